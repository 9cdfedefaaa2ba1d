import subprocess
import sys

import pytest

from editors.methods import EDITORS
from memloc.errors import UnknownName
from memloc.methods import LOCALIZERS, MEASURES
from memloc.registry import Registry


def test_an_unknown_name_suggests_a_near_one():
    with pytest.raises(UnknownName, match="no localizer called 'activatoin'; did you mean 'activation'"):
        LOCALIZERS["activatoin"]


def test_nothing_near_is_suggested_for_nonsense():
    with pytest.raises(UnknownName) as caught:
        EDITORS["xyzzy"]
    assert "did you mean" not in str(caught.value) and "rome" in str(caught.value)


@pytest.mark.parametrize("table", [LOCALIZERS, MEASURES, EDITORS], ids=lambda table: table.noun)
def test_every_entry_loads_and_says_what_it_does(table):
    for name, method in table.items():
        assert (method.__doc__ or "").split("\n")[0] == table.summary(name) != ""


def test_an_entry_that_points_nowhere_says_so():
    with pytest.raises(UnknownName, match="does not exist"):
        Registry("thing", {"a": "memloc.no_such_module:A"}).summary("a")


def test_the_tables_are_listed_without_importing_torch():
    code = (
        "import sys; from memloc.methods import LOCALIZERS, MEASURES; from editors.methods import EDITORS\n"
        "[t.summary(n) for t in (LOCALIZERS, MEASURES, EDITORS) for n in t]\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
