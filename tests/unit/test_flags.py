import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from editors.cli import verbs
from memloc.errors import InputError
from memloc.flags import DataFile, Parser, add_fields, build
from memloc.passages import Passages
from memloc.sites import Kind
from memloc.terminal import cell


@dataclass(frozen=True, kw_only=True)
class Method:
    """Does a thing.

    Attributes:
        steps: how many,
            at most.
        mode: which way.
    """

    steps: int = 3
    rate: float | None = None
    mode: Literal["a", "b"] = "a"
    fast: bool = True
    kind: Kind = Kind.MLP_OUT
    layers: tuple[int, ...] = ()
    tensor: Any = None
    text: Passages | Path | str | None = None
    either: int | str = 0
    seed: int = 0


def parsed(*words):
    parser = Parser(prog="x")
    parser.add_argument("--seed", type=int, default=5)
    names = add_fields(parser, Method)
    return build(Method, names, parser.parse_args(words)), parser


def test_fields_are_flags():
    found, _ = parsed(
        "--steps", "9", "--rate", "0.5", "--mode", "b", "--no-fast", "--kind", "attn.out", "--layers", "1", "2"
    )
    assert found == Method(steps=9, rate=0.5, mode="b", fast=False, kind=Kind.ATTN_OUT, layers=(1, 2), seed=5)


def test_what_is_not_said_keeps_its_default_and_shared_flags_are_shared():
    assert parsed()[0] == Method(seed=5)


def test_help_comes_from_the_docstring_and_tensors_have_no_flag():
    text = " ".join(parsed()[1].format_help().split())
    assert "how many, at most. (default: 3)" in text and "--tensor" not in text and "--either" not in text


def test_what_may_be_an_object_in_python_is_a_file_in_a_shell():
    assert parsed("--text", "a.jsonl")[0] == Method(text=Path("a.jsonl"), seed=5)
    assert "--text FILE" in parsed()[1].format_help()


@pytest.mark.parametrize("words", [["--mode", "c"], ["--steps", "many"], ["--nonsense"], ["--kind", "x"]])
def test_a_wrong_flag_is_one_line(words):
    with pytest.raises(InputError, match="see `x --help`") as caught:
        parsed(*words)
    assert "\n" not in str(caught.value)


def test_a_data_file_may_name_which_records():
    file = DataFile.parse("a/b.jsonl#dose=64,32")
    assert str(file.path) == "a/b.jsonl" and file.keeps({"dose": 64}) and not file.keeps({"dose": 8})
    assert DataFile.parse("c.jsonl").keeps({})
    assert file.keeps(argparse.Namespace(id="x", tags={"dose": 32}))
    assert DataFile.parse("c#id=x").keeps(argparse.Namespace(id="x", tags={}))


@pytest.mark.parametrize(
    "value, text", [(None, ""), (True, "yes"), (0.123456, "0.1235"), (float("inf"), "∞"), (1e-9, "1e-09"), (3, "3")]
)
def test_cells_read_like_a_person_writes(value, text):
    assert cell(value) == text


@pytest.mark.parametrize("verb", ["edit", "localize", "measure"])
def test_no_setting_of_a_method_is_called_like_a_flag_of_its_verb(verb):
    """Both would be one flag: what is meant for the one would reach the other. A seed is meant for both."""
    found = next(entry for entry in verbs() if entry.name == verb)
    parser = argparse.ArgumentParser()
    found.configure(parser)
    flags = {action.dest for action in parser._actions} - {"help"}
    assert found.methods is not None and len(flags) > 5
    shared = {
        name: {field.name for field in dataclasses.fields(found.methods[name]) if field.init} & flags - {"seed"}
        for name in found.methods
    }
    assert {name: fields for name, fields in shared.items() if fields} == {}
