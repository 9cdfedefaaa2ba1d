"""memloc show: print what is in one of our files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from memloc import store
from memloc.command import common, out
from memloc.errors import ArtifactError, CheckpointError, InputError
from memloc.terminal import Terminal
from memloc.verbs.printing import localization_json, print_localization, print_measurement
from memloc.verbs.report import spelled

if TYPE_CHECKING:
    from memloc.engines.names import Names
    from memloc.scores import Localization


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.add_argument("file", type=Path, help="a localization, a selection, an edit or a measurement")
    parser.add_argument(
        "--model", help="with --passages or --facts: spell the tokens of maps; with --names nnsight: whose paths"
    )
    parser.add_argument(
        "--names",
        choices=("transformer-lens", "nnsight"),
        help="print the best or chosen places in that library's words",
    )
    common(parser, "passages", "facts", "prefix", "suffix")
    parser.add_argument("--show-text", action="store_true", help="print the passages themselves (by default redacted)")
    out(parser, "folder for a page that draws a localization")
    parser.add_argument("--top", type=int, default=20, help="rows to print (default: 20)")


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
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
    if arguments.names is not None:
        _names(arguments, header["kind"], terminal)
        return
    if header["kind"] == "localization":
        from memloc.scores import Localization

        found = Localization.load(arguments.file)
        beside = arguments.file.with_suffix(f".controls{arguments.file.suffix}")
        control = Localization.load(beside) if beside.is_file() else None
        print_localization(found, terminal, arguments.top, control)
        if arguments.out is not None:
            _draw(arguments, found, control, terminal)
        terminal.result(localization_json(found, arguments.top, control))
        return
    if arguments.out is not None:
        raise InputError(
            f"{arguments.file} holds {header['kind']}; a page is drawn of localizations (see memloc report)"
        )
    if header["kind"] == "selection":
        _selection(arguments, terminal)
        return
    rows = [[key, json.dumps(value, ensure_ascii=False)] for key, value in sorted(header.items())]
    terminal.table(f"{arguments.file}: {header['kind']}", ["", ""], rows)
    terminal.result(header)


def _names(arguments: argparse.Namespace, kind: str, terminal: Terminal) -> None:
    """The best places of a localization, or all of a selection, as hook names or paths with the index into them."""
    from memloc.engines.names import LensNames, exported
    from memloc.scores import Localization, Selection

    if kind not in ("localization", "selection"):
        raise InputError(f"--names: {arguments.file} holds {kind}; places are in localizations and selections")
    if kind == "localization":
        found = Localization.load(arguments.file)
        chosen = found.top(min(arguments.top, found.count))
    else:
        chosen = Selection.load(arguments.file)
    names: Names = LensNames()
    if arguments.names == "nnsight":
        names = _paths(arguments.model)
    places = [[str(place.site), place.entry, place.name, place.index] for place in exported(chosen, names)]
    columns = ["place", "entry", arguments.names, "index"]
    terminal.table(f"{len(places)} {chosen.grain}s in the words of {arguments.names}", columns, places)
    listed = [dict(zip(("place", "entry", "name", "index"), row, strict=True)) for row in places]
    terminal.result({"kind": kind, "names": arguments.names, "grain": str(chosen.grain), "places": listed})


def _paths(model: str | None) -> Names:
    from transformers import AutoConfig

    from memloc.architectures import row_for
    from memloc.engines.names import NnsightNames

    if model is None:
        raise InputError("--names nnsight: paths are the family's own; add --model FOLDER (its config alone is read)")
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model}: no config can be read: {' '.join(str(error).split())[:200]}") from error
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return NnsightNames(row_for(config), int(width))


def _draw(arguments: argparse.Namespace, found: Localization, control: Localization | None, terminal: Terminal) -> None:
    """A page of the one localization, its tokens spelled where model and passages are named."""
    from memloc.report import Located, Report

    tokens, prefixes = spelled(arguments)
    shown = Located(localization=found, control=control, title=arguments.file.stem, tokens=tokens, prefixes=prefixes)
    made = found.provenance
    report = Report(
        title=f"Where it is kept: {made.method}",
        model=arguments.model or "",
        model_digest=made.inputs.get("model", ""),
        localizations=(shown,),
        show_text=arguments.show_text,
    )
    for path in report.save(arguments.out):
        terminal.note(f"written: {path}")


def _selection(arguments: argparse.Namespace, terminal: Terminal) -> None:
    from memloc.results.profiles import chosen_by_layer
    from memloc.scores import Selection

    chosen = Selection.load(arguments.file)
    places = [(str(site), index) for site, entries in chosen.indices().items() for index in entries]
    share = f"{chosen.count} {chosen.grain}s, {100 * chosen.fraction:.3g} % of those scored"
    terminal.table(f"selection by {chosen.provenance.method}: {share}", ["layer", "chosen"],
                   [list(row) for row in chosen_by_layer(chosen).items()])  # fmt: skip
    terminal.table(f"first {min(arguments.top, len(places))}", ["place", "index"], places[: arguments.top])
    terminal.result({
        "kind": "selection", "grain": str(chosen.grain), "count": chosen.count, "fraction": chosen.fraction,
        "provenance": chosen.provenance.to_json(), "places": places,
    })  # fmt: skip
