"""Verbs that look: list, check, lab, measure, localize, show, report. Torch is imported by the verbs that need it.

`memloc` itself starts in `editors/cli.py`, which joins these verbs with its own.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memloc import store
from memloc.errors import ArtifactError, InputError
from memloc.flags import DataFile, Parser, add_fields, build
from memloc.methods import LOCALIZERS, MEASURES
from memloc.registry import Registry
from memloc.terminal import Terminal, cell, progress_shown

if TYPE_CHECKING:
    from memloc.measurement import Measurement
    from memloc.passages import Facts, Passages
    from memloc.scores import Localization
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
    """

    name: str
    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Terminal], None]
    methods: Registry | None = None


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
        "passages": {"help": "passages, JSONL" + filtered, "type": DataFile.parse, "metavar": "FILE"},
        "controls": {"help": "passages never trained on, JSONL" + filtered, "type": DataFile.parse, "metavar": "FILE"},
        "contrast": {"help": "passages to contrast with, JSONL" + filtered, "type": DataFile.parse, "metavar": "FILE"},
        "retain": {"help": "passages to keep, JSONL" + filtered, "type": DataFile.parse, "metavar": "FILE"},
        "text": {
            "help": "ordinary text, .txt or JSONL with 'text'" + filtered,
            "type": DataFile.parse,
            "metavar": "FILE",
        },
        "facts": {"help": "facts, JSONL" + filtered, "type": DataFile.parse, "metavar": "FILE"},
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
    for name in names:
        parser.add_argument(f"--{name}", **flags[name])


def out(parser: argparse.ArgumentParser, what: str, *, required: bool = False) -> None:
    """Add --out."""
    parser.add_argument("--out", type=Path, required=required, help=what, metavar="PATH")


def open_view(arguments: argparse.Namespace) -> ModelView:
    """The model the arguments name."""
    from memloc.view import ModelView

    return ModelView.open(arguments.model)


def read_passages(file: DataFile | None, view: ModelView, arguments: argparse.Namespace) -> Passages | None:
    """Passages of a data file, filtered, or None where none is named."""
    if file is None:
        return None
    from memloc.passages import Passages

    lengths = {"prefix": arguments.prefix, "suffix": arguments.suffix}
    passages = Passages.read(file.path, view.tokenizer, **lengths).where(file.keeps)
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
    from memloc.passages import Facts

    facts = Facts.read(file.path, view.tokenizer).where(file.keeps)
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


# -- verbs ------------------------------------------------------------------------------------------------------------


def list_methods(tables: Sequence[Registry], terminal: Terminal, only: str | None) -> None:
    """Print every method of `tables` with its first docstring line."""
    found = {}
    for table in tables:
        if only in (None, table.noun, table.noun + "s"):
            rows = [(name, table.summary(name)) for name in sorted(table)]
            terminal.table(f"{table.noun}s", ["name", "what it does"], rows)
            found[table.noun + "s"] = dict(rows)
    if not found:
        nouns = ", ".join(table.noun + "s" for table in tables)
        raise InputError(f"nothing called {only!r} to list; known: {nouns}")
    terminal.result(found)


def _check_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder (or hub name)")


def _check(arguments: argparse.Namespace, terminal: Terminal) -> None:
    from memloc.sites import Kind, Site

    view = open_view(arguments)
    about = {
        "model": view.name, "family": view.row.family, "type": view.config.model_type, "layers": view.layers,
        "width": view.width, "heads": view.heads, "key-value heads": view.kv_heads, "head width": view.head_width,
        "neurons": view.neurons, "vocabulary": view.vocab, "context": view.context, "dtype": str(view.dtype),
        "tokenizer": type(view.tokenizer).__name__ if view.tokenizer else None, "digest": view.digest,
    }  # fmt: skip
    unembed = view.place(view.sites(Kind.UNEMBED)[0]).parameter
    about["tied"] = ", ".join((unembed, *view.tied(unembed))) if view.tied(unembed) else None
    maps = []
    for kind in view.kinds:
        place = view.place(Site(0, kind))
        biased = view.has(Site(0, kind, bias=True))
        stored = "[in, out]" if place.transposed else "[out, in]"
        rows = None if place.rows is None else "part of a fused map"
        maps.append([str(kind), place.parameter, list(view.weight(Site(0, kind)).shape), stored, biased, rows])
    terminal.table("proved by arithmetic on this model", ["", ""], list(about.items()))
    columns = ["kind", "parameter at layer 0", "weight [out, in]", "stored", "bias", "note"]
    terminal.table("maps of a block", columns, maps)
    terminal.note("neurons are read at the input of mlp.out, heads at the input of attn.out")
    terminal.result({**about, "maps": [dict(zip(columns, row, strict=True)) for row in maps]})


def _lab_flags(parser: argparse.ArgumentParser) -> None:
    out(parser, "folder to make (absent, empty, or built before from the same recipe)", required=True)
    parser.add_argument("--size", choices=["demo", "tiny"], default="demo", help="demo: about a minute; tiny: seconds")
    common(parser, "seed")


def _lab(arguments: argparse.Namespace, terminal: Terminal) -> None:
    from memloc.lab.build import build as train
    from memloc.lab.recipe import preset

    folder = train(preset(arguments.size, seed=arguments.seed), arguments.out, log=terminal.note)
    figures = json.loads((folder / "lab.json").read_text(encoding="utf8"))
    last = figures["history"][-1]
    rows = [[key.replace("_", " "), value] for key, value in last.items() if key != "strict"]
    rows += [[f"recited, of those shown {dose} times", rate] for dose, rate in last["strict"].items()]
    terminal.table(f"lab model in {folder}", ["figure", "value"], rows)
    terminal.result({"folder": str(folder), "digest": figures["digest"], "figures": last})


def _measure_flags(parser: argparse.ArgumentParser) -> None:
    common(parser, "model", "passages", "controls", "text", "facts", "prefix", "suffix", "seed")
    out(parser, "measurement, JSON")


def _measure(arguments: argparse.Namespace, terminal: Terminal) -> None:
    from memloc.measures.control import with_controls

    view = open_view(arguments)
    items, controls = _measured_data(arguments, view)
    measured: Measurement = (
        arguments.method(view, items) if controls is None else with_controls(arguments.method, view, items, controls)
    )
    if arguments.out is not None:
        measured.save(arguments.out)
    print_measurement(measured, terminal)
    terminal.result(measured.to_json())


def _measured_data(arguments: argparse.Namespace, view: ModelView) -> tuple[Any, Passages | None]:
    """What the measure asks about, and its controls; a measure says by its second parameter whether it takes facts."""
    wants_facts = "facts" in inspect.signature(arguments.method.__call__).parameters
    name = type(arguments.method).__name__
    if wants_facts:
        if arguments.facts is None or arguments.passages or arguments.text or arguments.controls:
            raise InputError(f"{name} is measured on --facts FILE, and on no passages, text or controls")
        return read_facts(arguments.facts, view), None
    if arguments.facts is not None:
        raise InputError(f"{name} is measured on --passages or --text, not on --facts")
    items = read_text(arguments.text, view) or need_passages(arguments.passages, view, arguments)
    return items, read_passages(arguments.controls, view, arguments)


def print_measurement(measured: Measurement, terminal: Terminal) -> None:
    """Figures with n and interval, the controls beside them."""
    control = measured.control
    rows = []
    for name, figure in measured.figures.items():
        beside = control.figures.get(name) if control else None
        ends = None if figure.low is None else f"{cell(figure.low)} to {cell(figure.high)}"
        rows.append([name, figure.value, ends, figure.n, figure.unit, beside.value if beside else None])
    columns = ["figure", "value", "95 % interval", "n", "unit"]
    if control is None:
        rows = [row[:-1] for row in rows]
    else:
        columns.append("controls")
    beside_n = f" (controls: n = {len(control.rows)})" if control else ""
    terminal.table(measured.measure + beside_n, columns, rows)
    if control is None and measured.measure == "extraction":
        terminal.note("no --controls were given: a rate says little without the same figure on text never trained on")


def _localize_flags(parser: argparse.ArgumentParser) -> None:
    common(parser, "model", "passages", "controls", "contrast", "facts", "prefix", "suffix", "seed")
    out(parser, "localization.safetensors (with --controls, theirs beside it: NAME.controls.safetensors)")
    parser.add_argument("--top", type=int, default=20, help="rows to print (default: 20)")


def _localize(arguments: argparse.Namespace, terminal: Terminal) -> None:
    view = open_view(arguments)
    facts = read_facts(arguments.facts, view)
    passages = facts.as_passages("true") if facts else need_passages(arguments.passages, view, arguments)
    contrast = read_passages(arguments.contrast, view, arguments)
    controls = read_passages(arguments.controls, view, arguments)
    found: Localization = arguments.method(view, passages, contrast=contrast)
    beside = None if controls is None else arguments.method(view, controls, contrast=contrast)
    if arguments.out is not None:
        found.save(arguments.out)
        if beside is not None:
            beside.save(arguments.out.with_suffix(f".controls{arguments.out.suffix}"))
    print_localization(found, terminal, arguments.top, beside)
    terminal.result(_localization_json(found, arguments.top, beside))


def best_places(found: Localization, top: int, beside: Localization | None = None) -> list[list[Any]]:
    """The best `top` places as rows: place, index, score, the controls' score, share of all positive scores."""
    mean = found.mean()
    other = beside.mean() if beside is not None else None
    total = sum(float(scores.clamp(min=0).sum()) for scores in mean.scores.values()) or 1.0
    chosen = mean.top(min(top, mean.count)).indices()
    rows = []
    for site, entries in chosen.items():
        scores = mean.scores[site]
        for entry in entries:
            score = float(scores.reshape(-1)[entry])
            control = None if other is None else float(other.scores[site].reshape(-1)[entry])
            shape = scores.shape
            index = None if not shape else entry if len(shape) == 1 else list(divmod(entry, shape[1]))
            place = f"L{site.layer}" if mean.grain == "layer" else str(site)
            rows.append([place, index, score, control, max(score, 0.0) / total])
    return sorted(rows, key=lambda row: -row[2])


def print_localization(found: Localization, terminal: Terminal, top: int, beside: Localization | None = None) -> None:
    """The best places and what the method noted."""
    rows = best_places(found, top, beside)
    columns = ["place", "index", "score", "controls", "share"]
    if beside is None:
        rows, columns = [row[:3] + row[4:] for row in rows], ["place", "index", "score", "share"]
    title = f"{found.provenance.method}: best {len(rows)} of {found.count} {found.grain} scores"
    terminal.table(title, columns, rows)
    for key, value in found.notes.items():
        terminal.note(f"{key}: {value}")


def _localization_json(found: Localization, top: int, beside: Localization | None) -> dict[str, Any]:
    keys = ["site", "index", "score", "controls", "share"]
    return {
        "kind": "localization", "grain": str(found.grain), "count": found.count, "notes": dict(found.notes),
        "provenance": found.provenance.to_json(),
        "top": [dict(zip(keys, row, strict=True)) for row in best_places(found, top, beside)],
    }  # fmt: skip


def _show_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a localization, an edit or a measurement")
    parser.add_argument("--top", type=int, default=20, help="rows to print (default: 20)")


def show(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Print what is in one of our files."""
    if not arguments.file.is_file():
        raise ArtifactError(f"{arguments.file}: no such file")
    if arguments.file.suffix == ".json":
        from memloc.measurement import Measurement

        measured = Measurement.load(arguments.file)
        print_measurement(measured, terminal)
        terminal.result(measured.to_json())
        return
    header = store.header_of(arguments.file)
    if header["kind"] == "localization":
        from memloc.scores import Localization

        found = Localization.load(arguments.file)
        print_localization(found, terminal, arguments.top)
        terminal.result(_localization_json(found, arguments.top, None))
        return
    rows = [[key, json.dumps(value, ensure_ascii=False)] for key, value in sorted(header.items())]
    terminal.table(f"{arguments.file}: {header['kind']}", ["", ""], rows)
    terminal.result(header)


def _report_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compare",
        action="append",
        nargs="+",
        metavar=("NAME:GOAL BEFORE [AFTER", "RANDOM]"),
        required=True,
        help="measurements of one group, before, after and under the random edit; GOAL is forget, keep or learn",
    )
    parser.add_argument("--localization", action="append", type=Path, default=[], help="a localization to draw")
    parser.add_argument("--edit", action="append", type=Path, default=[], help="an edit to describe")
    parser.add_argument("--title", default="memloc report", help="title of the page")
    parser.add_argument("--model", help="with --edited and --passages: show what both models say after each prefix")
    parser.add_argument("--edited", help="the edited checkpoint")
    parser.add_argument("--show-text", action="store_true", help="print the passages themselves (by default redacted)")
    common(parser, "passages", "prefix", "suffix")
    out(parser, "folder for report.html, report.json and report.md", required=True)


def _report(arguments: argparse.Namespace, terminal: Terminal) -> None:
    from memloc.report import Comparison, EditSummary, Located, Report
    from memloc.scores import Localization

    comparisons = [_comparison(words, Comparison) for words in arguments.compare]
    located = []
    for path in arguments.localization:
        beside = path.with_suffix(f".controls{path.suffix}")
        control = Localization.load(beside) if beside.is_file() else None
        located.append(Located(localization=Localization.load(path), control=control, title=path.stem))
    first = comparisons[0].before.provenance
    report = Report(
        title=arguments.title,
        model=arguments.model or "",
        model_digest=first.inputs.get("model", ""),
        comparisons=tuple(comparisons),
        localizations=tuple(located),
        edits=tuple(
            EditSummary(name=path.stem, header=store.header_of(path), bytes=path.stat().st_size)
            for path in arguments.edit
        ),
        texts=_texts(arguments),
        provenance=first.to_json(),
        show_text=arguments.show_text,
    )
    written = report.save(arguments.out)
    terminal.note("\n".join(f"written: {path}" for path in written))
    terminal.result({"written": [str(path) for path in written], "passed": report.passed})


def _comparison(words: list[str], make: Any) -> Any:
    from memloc.measurement import Measurement

    if not 2 <= len(words) <= 4:
        raise InputError(f"--compare {' '.join(words)}: expected NAME:GOAL and one to three measurement files")
    name, _, goal = words[0].partition(":")
    if goal not in ("", "forget", "keep", "learn"):
        raise InputError(f"--compare {words[0]}: the goal is forget, keep or learn, found {goal!r}")
    before, *others = (Measurement.load(path) for path in words[1:])
    after, random = [*others, None, None][:2]
    return make(name=name, before=before, after=after, random=random, goal=goal)


def _texts(arguments: argparse.Namespace) -> tuple[Any, ...]:
    if arguments.passages is None:
        return ()
    if arguments.model is None or arguments.edited is None:
        raise InputError("--passages in a report needs --model and --edited, the two models that continue them")
    from memloc.view import ModelView

    view, edited = ModelView.open(arguments.model), ModelView.open(arguments.edited)
    return text_rows(need_passages(arguments.passages, view, arguments), before=view, after=edited)


def text_rows(
    passages: Passages, *, before: ModelView, after: ModelView, control: ModelView | None = None
) -> tuple[Any, ...]:
    """What two or three models say after each prefix, token by token, for a report."""
    from memloc.measures.continuation import continue_greedy
    from memloc.report import TextRow

    arms = [view for view in (before, after, control) if view is not None]
    said = zip(*(continue_greedy(view, passages) for view in arms), strict=True)
    return tuple(
        TextRow(item.id, before.spell(item.prefix), before.spell(item.suffix), *map(before.spell, rows))
        for item, rows in zip(passages, said, strict=True)
    )


def verbs() -> tuple[Verb, ...]:
    """The verbs of this package, in the order of the loop."""
    return (
        Verb("check", "prove that memloc understands a model; print its map", _check_flags, _check),
        Verb("lab", "train a small model here whose memories are known", _lab_flags, _lab),
        Verb("measure", "what is memorized, beside its controls", _measure_flags, _measure, MEASURES),
        Verb("localize", "where it is kept", _localize_flags, _localize, LOCALIZERS),
        Verb("show", "print what is in a localization, an edit or a measurement", _show_flags, show),
        Verb("report", "one page of evidence from measurements, localizations and edits", _report_flags, _report),
    )
