"""The notebooks run from top to bottom in a fresh process, and what they store is what they show now."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "notebooks.py"
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))

spec = importlib.util.spec_from_file_location("notebooks", SCRIPT)
notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebooks)


def holds(stored, found):
    """Whether figures agree: shares within 0.35 (a lab trained elsewhere is another lab), others within a third."""
    assert stored.keys() == found.keys()
    return all(
        abs(was - found[name]) <= (0.35 if 0 <= was <= 1 and "nll" not in name else max(0.15, 0.34 * abs(was)))
        for name, was in stored.items()
    )


def test_there_are_three():
    assert len(NAMES) == 3 and {path.stem for path in (ROOT / "examples").glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_holds_the_cells_of_its_source(name):
    cells = notebooks.cells_of((ROOT / "examples" / f"{name}.py").read_text(encoding="utf8"))
    stored = notebooks.written(name)
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in stored["cells"]] == cells
    assert stored["nbformat"] == 4 and len({cell["id"] for cell in stored["cells"]}) == len(cells)
    for cell in stored["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | (
            {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_small_and_names_no_place_of_the_machine_it_was_run_on(name):
    text = (ROOT / "examples" / f"{name}.ipynb").read_text(encoding="utf8")
    assert len(text) < 200_000
    assert not re.findall(r"/(?:home|root|tmp|work|Users)/", text)


@pytest.mark.slow
@pytest.mark.lab
def test_the_notebooks_run_in_a_fresh_process_and_their_figures_still_hold(tiny_lab, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lab-tiny").symlink_to(tiny_lab)  # the lab the notebooks would train: they find it built
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(SCRIPT), "--check", *NAMES]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for name in NAMES:
        stored = notebooks.stored_figures(notebooks.written(name))
        assert holds(stored, found[name]), (name, stored, found[name])
    unlearned, edited = found["unlearn_a_passage"], found["edit_a_fact"]
    assert unlearned["targets recited before"] == 1 and unlearned["targets recited after"] == 0
    assert edited["efficacy accuracy, before"] == 0 and edited["efficacy accuracy, after"] == 1


def test_the_comparison_of_figures_can_fail():
    assert holds({"share": 1.0, "nll": 5.0}, {"share": 0.8, "nll": 5.5})
    assert not holds({"share": 1.0}, {"share": 0.5}) and not holds({"nll": 5.0}, {"nll": 9.0})


def test_the_last_expression_of_a_cell_is_its_output():
    cells = notebooks.cells_of("# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 2\nprint(x)\nx + 1\n\n# %%\ny = x\n")
    assert cells == [("markdown", "# Title\n\ntext"), ("code", "x = 2\nprint(x)\nx + 1"), ("code", "y = x")]
    outputs, space = notebooks.execute(cells)
    assert [len(entries) for entries in outputs] == [0, 2, 0] and space["y"] == 2
    assert outputs[1][0]["text"] == ["2\n"] and outputs[1][1]["data"] == {"text/plain": ["3"]}
