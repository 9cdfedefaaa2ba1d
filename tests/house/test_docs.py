"""The README and the picture of the house say what is true."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from editors.cli import verbs
from editors.methods import EDITORS
from memloc.methods import LOCALIZERS, MEASURES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf8")
HOUSE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf8")


def test_the_readme_lists_every_method_in_its_own_words():
    made = subprocess.run(
        [sys.executable, "scripts/method_table.py"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0 and made.stdout.strip() in README, made.stderr


def test_every_command_in_the_readme_is_a_verb_and_every_method_in_it_exists():
    known = {verb.name: verb for verb in verbs()}
    block = README.split("## On your own model")[1]
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("memloc ")]
    assert len(lines) > 6
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[1] in known, line
        if known[words[1]].methods is not None:
            assert words[2] in {**MEASURES, **LOCALIZERS, **EDITORS}, line


@pytest.mark.parametrize("package", ["memloc", "editors"])
def test_every_room_is_in_the_picture(package):
    told = set(re.findall(r"`([a-z_]+(?:\.py|/))`", HOUSE))
    rooms = {path.name for path in (ROOT / package).glob("*.py") if path.name != "__init__.py"}
    rooms |= {f"{path.parent.name}/" for path in (ROOT / package).glob("*/__init__.py")}
    assert rooms <= told, rooms - told
