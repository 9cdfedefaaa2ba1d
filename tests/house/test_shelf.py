"""The files a repository is expected to have say what is true of this one."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]


def read(name):
    return (ROOT / name).read_text(encoding="utf8")


def test_the_citation_names_this_version_and_licence():
    found = dict(re.findall(r"^([a-z-]+): (.+)$", read("CITATION.cff"), flags=re.MULTILINE))
    assert found["title"] == PROJECT["name"] and found["version"] == PROJECT["version"]
    assert found["license"] == PROJECT["license"] and read("LICENSE").startswith(f"{PROJECT['license']} License")


def test_the_changelog_knows_the_version():
    assert PROJECT["version"] in read("CHANGELOG.md")


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_what_is_linked_or_named_is_there(name):
    text = read(name)
    named = set(re.findall(r"\]\(((?!http)[^)#]+)\)", text))
    named |= set(re.findall(r"`((?:memloc|editors|tests|scripts|docs|examples)/[\w/.-]*)`", text))
    assert len(named) > 1
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_make_target_that_is_told_exists():
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)", read("CONTRIBUTING.md"), flags=re.MULTILINE)) <= targets
