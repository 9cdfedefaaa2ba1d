"""The command line's own tools: what a verb is, the flags many verbs share, and how data files are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memloc import processes
from memloc.errors import InputError
from memloc.flags import DataFile, Parser, add_fields, build
from memloc.registry import Registry
from memloc.terminal import Terminal, progress_shown

if TYPE_CHECKING:
    from memloc.passages import Facts, Passages
    from memloc.view import ModelView


@dataclass(frozen=True)
class Verb:
    """One word of the command line.

    Attributes:
        name: the word.
        summary: one line for `memloc --help`.
        configure: adds its flags to a parser.
        run: does the work.
        methods: the table its NAME comes from, for verbs that take one.
        shared: several processes can share its work.
    """

    name: str
    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Terminal], None]
    methods: Registry | None = None
    shared: bool = False


def run(prog: str, about: str, verbs: Sequence[Verb], argv: Sequence[str]) -> None:
    """Parse `argv` and do what it says.

    Raises:
        MemlocError: on purpose; the caller prints it and exits with 2.
    """
    table = {verb.name: verb for verb in verbs}
    parser = Parser(prog=prog, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=_version())
    words = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for verb in verbs:
        words.add_parser(verb.name, help=verb.summary, add_help=False)
    if not argv or argv[0] not in table:
        given = parser.parse_args(list(argv))
        if given.verb is None:
            parser.print_help()
        return
    _run_verb(prog, table[argv[0]], list(argv[1:]))


def _run_verb(prog: str, verb: Verb, argv: list[str]) -> None:
    name = f"{prog} {verb.name}"
    if processes.count() > 1 and not verb.shared:
        raise InputError(f"{name} runs in one process; start it without torchrun")
    method, fields = None, []
    if verb.methods is not None and argv and not argv[0].startswith("-"):
        method = verb.methods[argv[0]]
        name, argv = f"{name} {argv[0]}", argv[1:]
    about = verb.summary if method is None else (method.__doc__ or "").split("\n\n")[0]
    parser = Parser(prog=name, description=about)
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout, and nothing else")
    verb.configure(parser)
    if method is not None:
        fields = add_fields(parser, method)
    elif verb.methods is not None:
        parser.epilog = "NAME is one of: " + ", ".join(sorted(verb.methods))
        parser.usage = f"{name} NAME [options]; {name} NAME --help for the settings of one"
        if argv not in (["-h"], ["--help"]):
            raise InputError(f"{name} needs the NAME of a {verb.methods.noun}: {', '.join(sorted(verb.methods))}")
    arguments = parser.parse_args(argv)
    if method is not None:
        arguments.method = build(method, fields, arguments)
    with progress_shown():
        verb.run(arguments, Terminal(as_json=arguments.json))


def _version() -> str:
    from memloc.provenance import versions

    return f"memloc {versions()['memloc']}"


# -- arguments many verbs share ---------------------------------------------------------------------------------------


def common(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the flags called `names`; each means the same in every verb."""
    filtered = "; FILE#key=value takes only those records"
    flags: dict[str, dict[str, Any]] = {
        "model": {"help": "checkpoint folder (or hub name)", "required": True},
        "device-map": {
            "help": "spread the model over devices, CPU and disk: auto, balanced or sequential (needs accelerate)",
            "choices": ["auto", "balanced", "balanced_low_0", "sequential"],
        },
        "passages": {
            "help": "passages, JSONL or any file `memloc validate` knows" + filtered,
            "type": DataFile.parse,
            "metavar": "FILE",
        },
        "controls": {"help": "passages never trained on, JSONL" + filtered, "type": DataFile.parse, "metavar": "FILE"},
        "contrast": {"help": "passages to contrast with, JSONL" + filtered, "type": DataFile.parse, "metavar": "FILE"},
        "retain": {"help": "passages to keep, JSONL" + filtered, "type": DataFile.parse, "metavar": "FILE"},
        "text": {
            "help": "ordinary text, .txt or JSONL with 'text'" + filtered,
            "type": DataFile.parse,
            "metavar": "FILE",
        },
        "facts": {
            "help": "facts, JSONL or any file `memloc validate` knows" + filtered,
            "type": DataFile.parse,
            "metavar": "FILE",
        },
        "prefix": {"help": "tokens of a text record that make its prefix (default: 50)", "type": int, "default": 50},
        "suffix": {"help": "tokens after it that make its suffix (default: 50)", "type": int, "default": 50},
        "localization": {"help": "localization.safetensors to select from", "type": Path, "metavar": "FILE"},
        "fraction": {"help": "share of the scored places to select", "type": float},
        "count": {"help": "number of places to select", "type": int},
        "per": {
            "help": "select over the whole model or at every site",
            "choices": ["model", "site"],
            "default": "model",
        },
        "seed": {"help": "seed of everything random (default: 0)", "type": int, "default": 0},
    }
    for name in [*names, *(["device-map"] if "model" in names else [])]:
        parser.add_argument(f"--{name}", **flags[name])


def out(parser: argparse.ArgumentParser, what: str, *, required: bool = False) -> None:
    """Add --out."""
    parser.add_argument("--out", type=Path, required=required, help=what, metavar="PATH")


def open_view(arguments: argparse.Namespace) -> ModelView:
    """The model the arguments name."""
    from memloc.view import ModelView

    return ModelView.open(arguments.model, device=processes.device(), device_map=arguments.device_map)


def read_passages(file: DataFile | None, view: ModelView, arguments: argparse.Namespace) -> Passages | None:
    """Passages of a data file, filtered, or None where none is named."""
    return None if file is None else passages_of(file, view, prefix=arguments.prefix, suffix=arguments.suffix)


def passages_of(file: DataFile, view: ModelView, *, prefix: int, suffix: int) -> Passages:
    """Passages of a data file, filtered.

    Raises:
        InputError: none is left.
    """
    from memloc.formats import data

    passages = data.passages(file.path, view.tokenizer, prefix=prefix, suffix=suffix).where(file.keeps)
    if not passages:
        raise InputError(f"{file}: no record matches")
    return passages


def need_passages(file: DataFile | None, view: ModelView, arguments: argparse.Namespace) -> Passages:
    """As `read_passages`, but --passages must be there."""
    found = read_passages(file, view, arguments)
    if found is None:
        raise InputError("--passages FILE is needed here")
    return found


def read_facts(file: DataFile | None, view: ModelView) -> Facts | None:
    """Facts of a data file, filtered, or None where none is named."""
    if file is None:
        return None
    from memloc.formats import data

    facts = data.facts(file.path, view.tokenizer).where(file.keeps)
    if not facts:
        raise InputError(f"{file}: no record matches")
    return facts


def read_text(file: DataFile | None, view: ModelView) -> Passages | None:
    """Ordinary text as windows of the model's context (at most 512 tokens), or None where none is named."""
    if file is None:
        return None
    from memloc.passages import Passages, read_jsonl

    if file.path.suffix == ".jsonl":
        records = [record for _, record in read_jsonl(file.path) if file.keeps(record)]
        texts = [record["text"] for record in records if isinstance(record.get("text"), str)]
    elif file.path.is_file():
        texts = [file.path.read_text(encoding="utf8")]
    else:
        raise InputError(f"{file.path}: no such file")
    if not texts:
        raise InputError(f"{file}: no record with a 'text' matches")
    return Passages.from_texts(texts, view.tokenizer, window=min(view.context or 512, 512), origin=file.path.stem)


def filled_values(given: Sequence[str]) -> dict[str, str]:
    """What {NAME} stands for in a file, from NAME=VALUE.

    Raises:
        InputError: of another form.
    """
    found = {}
    for entry in given:
        name, mark, value = entry.partition("=")
        if not mark or not name.isidentifier():
            raise InputError(f"--with {entry}: expected NAME=VALUE")
        # A place named on the command line is meant from where the command is given, not from where the grid lies.
        found[name] = str(Path(value).absolute()) if Path(value).exists() else value
    return found
