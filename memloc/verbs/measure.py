"""memloc measure: what is memorized, beside its controls."""

from __future__ import annotations

import argparse
import inspect
from typing import TYPE_CHECKING, Any

from memloc import store
from memloc.command import common, need_passages, open_view, out, read_facts, read_passages, read_text
from memloc.errors import InputError
from memloc.terminal import Terminal
from memloc.verbs.printing import print_measurement

if TYPE_CHECKING:
    from memloc.measurement import Measurement
    from memloc.passages import Passages
    from memloc.view import ModelView


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    common(parser, "model", "passages", "controls", "text", "facts", "prefix", "suffix", "seed")
    out(parser, "measurement, JSON")


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Measure, print figures beside their controls, save."""
    from memloc.measures.control import with_controls

    if arguments.out is not None:
        store.check_target(arguments.out)
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
