"""memloc convert: a data file as memloc's JSON lines, or a measurement as the results of other tools."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from memloc import store
from memloc.command import out
from memloc.errors import InputError
from memloc.formats.format import QUESTION, SPLIT, Settings
from memloc.formats.results import WRITERS
from memloc.terminal import Terminal


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.add_argument("file", type=Path, help="the file to convert")
    out(parser, "where to write: JSON lines, or JSON with --as lm-eval and the like", required=True)
    reading_flags(parser)


def reading_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how a file is read."""
    parser.add_argument("--as", dest="name", metavar="NAME",
                        help=f"what the file is, where it is not recognised; or, for a measurement, how to write it: "
                             f"{', '.join(WRITERS)}")  # fmt: skip
    parser.add_argument("--model", help="tokenise with this checkpoint's tokenizer (no weight is read)")
    parser.add_argument("--tokenizer", help="tokenise with this tokenizer's folder")
    parser.add_argument("--prefix", type=int, default=SPLIT[0], help="tokens that make a prefix (default: 50)")
    parser.add_argument(
        "--suffix", type=int, default=SPLIT[1], help="tokens after it that make its suffix (default: 50)"
    )
    parser.add_argument("--stride", type=int, help="plain text: tokens between windows (default: a whole window)")
    parser.add_argument("--template", default=QUESTION, help="how a question is asked; {question} stands for it")
    parser.add_argument(
        "--patterns", type=Path, metavar="FILE", help="ParaRel: the relation's patterns with [X] and [Y]"
    )
    parser.add_argument("--suffixes", type=Path, metavar="FILE", help="the suffixes that belong to a file of prefixes")


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Read, check every record, and write all of them or nothing."""
    store.check_target(arguments.out)
    if arguments.name in WRITERS:
        _results(arguments, terminal)
        return
    from memloc.formats import table

    settings = settings_of(arguments)
    reading = table.read(arguments.file, settings, name=arguments.name).sound()
    problems = table.problems_of(reading, settings)
    if problems:
        raise InputError(f"{arguments.file}, {problems[0]}; {len(problems)} in all, nothing was written")
    reading = table.tokenised(reading, settings)
    store.write_text(arguments.out, reading.jsonl())
    told = {"format": reading.format.name, "makes": reading.format.makes, "source": reading.source,
            "records": len(reading.rows), "left_out": reading.left_out, "out": str(arguments.out)}  # fmt: skip
    terminal.note(f"{arguments.file}: {reading.format.name}, {reading.source} records; "
                  f"{len(reading.rows)} {reading.format.makes} written to {arguments.out}")  # fmt: skip
    if reading.left_out:
        terminal.note(f"{reading.left_out} left out: {reading.format.left_out}")
    if reading.format.noted:
        terminal.note(f"note: {reading.format.noted}")
    terminal.result(told)


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings the flags name."""
    return Settings(
        prefix=arguments.prefix,
        suffix=arguments.suffix,
        stride=arguments.stride,
        tokenizer=_tokenizer(arguments.tokenizer or arguments.model),
        template=arguments.template.replace("\\n", "\n"),
        patterns=arguments.patterns,
        suffixes=arguments.suffixes,
    )


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: no tokenizer there ({' '.join(str(error).split())[:120]})") from error


def _results(arguments: argparse.Namespace, terminal: Terminal) -> None:
    from memloc.measurement import Measurement

    found = WRITERS[arguments.name](Measurement.load(arguments.file))
    store.write_text(arguments.out, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    terminal.note(f"{arguments.file}: a measurement, written to {arguments.out} as {arguments.name}")
    terminal.result({"format": "measurement", "as": arguments.name, "out": str(arguments.out)})
