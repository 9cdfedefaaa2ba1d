"""The names a script needs, without what it does not need."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import editors
import memloc
from memloc import plots
from memloc.grids import plots as grid_plots

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "numpy", "matplotlib", "safetensors"}


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", [memloc, editors], ids=lambda package: package.__name__)
def test_every_name_offered_is_there_and_its_own(package):
    assert len(package.__all__) <= 14
    for name in package.__all__:
        found = getattr(package, name)
        assert name in dir(package)
        assert getattr(found, "__name__", name) == name and inspect.getdoc(found)


@pytest.mark.parametrize("package", [memloc, editors], ids=lambda package: package.__name__)
def test_what_is_promised_to_type_checkers_is_what_is_offered(package):
    """The three lists in a package's file say the same; one of them alone would be a lie to somebody."""
    source = Path(str(package.__file__)).read_text(encoding="utf8")
    typed = source.split("if TYPE_CHECKING:")[1].split("_OFFERED")[0]
    names = {name.strip() for line in typed.splitlines() if " import " in line
             for name in line.split(" import ")[1].split(",")}  # fmt: skip
    assert names == set(package.__all__) == set(package._OFFERED)


def test_importing_costs_no_torch():
    loaded = fresh(f"import sys, memloc, editors\nprint(sorted({HEAVY!r} & set(sys.modules)))")
    assert loaded == "[]"


@pytest.mark.parametrize("name", ["Site", "Passages", "LOCALIZERS"])
def test_names_that_need_no_torch_do_not_bring_it(name):
    assert fresh(f"import sys, memloc\nmemloc.{name}\nprint('torch' in sys.modules)") == "False"


def test_the_measure_of_imports_can_fail():
    assert fresh("import sys, memloc\nmemloc.ModelView\nprint('torch' in sys.modules)") == "True"


def test_a_name_that_is_not_offered_is_answered_with_a_near_one():
    with pytest.raises(AttributeError, match=r"memloc offers no 'Localisation'; did you mean 'Localization'\? Known:"):
        memloc.Localisation  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match=r"editors offers no 'EDITOR'; did you mean 'EDITORS'\?"):
        editors.EDITOR  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Localisation'"):
        from memloc import Localisation  # type: ignore[attr-defined]  # noqa: F401
    assert not hasattr(memloc, "__wrapped__")


def test_submodules_still_come_by_their_own_names():
    assert fresh("from memloc import sites, errors\nimport memloc.store\nprint(memloc.sites is sites)") == "True"


@pytest.mark.parametrize("module", [plots, grid_plots], ids=lambda module: module.__name__)
def test_every_plot_draws_on_the_axis_it_is_given(module):
    drawing = {
        name: next(iter(inspect.signature(function).parameters))
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_") and name not in ("svg", "draw")
    }
    assert len(drawing) >= 4 and set(drawing.values()) == {"ax"}
