"""memloc truth: which localizers find what is known to be there."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memloc import store
from memloc.command import common, out
from memloc.errors import InputError
from memloc.terminal import Terminal

if TYPE_CHECKING:
    from memloc.truth.table import Table
    from memloc.truth.worlds import Ground, World

CHANGES = ("share", "sequences", "tokens", "source", "first_layer")
"""Settings of worlds that have flags; each goes to the worlds that have it."""

ALWAYS = ("value-norm", "activation", "random")
"""Without these beside it no figure says much: what needs no reading of the passages, little of it, and none at all."""


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.add_argument("--worlds", help="names with commas between; `all` for every world (default: planted,inj,del)",
                        default="planted,inj,del")  # fmt: skip
    parser.add_argument("--methods", help="localizers and baselines, with commas between (default: every one)")
    parser.add_argument("--model", nargs="+", help="checkpoint folders, labs with their files", metavar="FOLDER")
    sizes = ["tiny", "demo", "large"]
    parser.add_argument("--lab", choices=sizes, help="build labs under --out, one a seed, or find them")
    parser.add_argument("--seeds", type=int, default=3, help="draws on each --model, or labs (default: 3)")
    common(parser, "passages", "controls", "text", "prefix", "suffix")
    parser.add_argument("--share", type=float, help="share of places that injected memories are trained into")
    parser.add_argument("--sequences", type=int, help="known answers of a world on each model and seed")
    parser.add_argument("--tokens", type=int, help="tokens of an injected sequence")
    parser.add_argument("--source", choices=["unknown", "random"], help="what is injected: unknown or random text")
    parser.add_argument("--first-layer", action=argparse.BooleanOptionalAction, help="deletion may touch layer 0")
    parser.add_argument("--setting", action="append", default=[], help="METHOD.FIELD=VALUE, as often as needed")
    out(parser, "folder of results; the same command goes on where it was interrupted", required=True)


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Judge, print the tables, write them beside the results."""
    from memloc.truth import table, trials

    worlds = _worlds(arguments)
    methods = _methods(arguments)
    settings = _settings(arguments.setting, methods)
    if arguments.seeds < 1:
        raise InputError(f"--seeds {arguments.seeds}: expected at least 1")
    if arguments.model and arguments.lab:
        raise InputError("--model and --lab both say what is judged on; give one")
    store.check_target(arguments.out / "table.json")
    found = trials.run(worlds, _grounds(arguments, terminal), methods, arguments.out, settings=settings)
    made = table.Table.of(found, {name: world.headline for name, world in worlds.items()})
    made.write(arguments.out)
    _print(made, terminal)
    terminal.note(f"written to {arguments.out}: table.md, table.csv, table.json, and every trial under trials/")
    terminal.result(made.to_json())


def _print(made: Table, terminal: Terminal) -> None:
    """The overview, the worlds one by one, and who is not in them."""
    terminal.table("localizers on known answers; 95 % intervals over models, seeds and answers", *made.overview())
    for world in made.worlds:
        terminal.table(world, *made.detail(world))
        for line in made.remarks(world):
            terminal.note(f"{world}: {line}")
        terminal.note("")
    if made.failures():
        terminal.table("not judged", ["method", "worlds", "why"], made.failures())


def _worlds(arguments: argparse.Namespace) -> dict[str, World]:
    """The worlds asked for, with the settings given that they have."""
    from memloc.truth.worlds import WORLDS

    names = sorted(WORLDS) if arguments.worlds == "all" else _listed(arguments.worlds, "--worlds")
    changes = {name: getattr(arguments, name) for name in CHANGES if getattr(arguments, name) is not None}
    found: dict[str, World] = {}
    for name in names:
        world = WORLDS[name]
        known = {item.name for item in dataclasses.fields(world)}
        found[name] = dataclasses.replace(world, **{key: value for key, value in changes.items() if key in known})
    return found


def _methods(arguments: argparse.Namespace) -> tuple[str, ...]:
    from memloc.truth.entrants import every_name, source_digest

    if arguments.methods is None:
        return every_name()
    names = _listed(arguments.methods, "--methods")
    for name in names:
        source_digest(name)  # an unknown name is told before anything runs
    return tuple(dict.fromkeys((*names, *ALWAYS)))


def _listed(text: str, flag: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise InputError(f"{flag} {text!r}: expected names with commas between")
    return names


def _settings(given: Sequence[str], methods: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
    """METHOD.FIELD=VALUE as a table; values are JSON where they can be read so, else text."""
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        place, mark, value = text.partition("=")
        method, dot, name = place.partition(".")
        if not mark or not dot or method not in methods:
            raise InputError(f"--setting {text!r}: expected METHOD.FIELD=VALUE with a method that is judged")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        found.setdefault(method, {})[name.replace("-", "_")] = parsed
    return found


def _grounds(arguments: argparse.Namespace, terminal: Terminal) -> Iterator[Ground]:
    """One model after another, each with each of its seeds; without a model, only seeds."""
    from memloc.truth.worlds import Ground

    seeds = range(arguments.seeds)
    if arguments.lab:
        yield from (_ground(_lab(arguments, seed, terminal), seed, arguments) for seed in seeds)
    elif arguments.model:
        models = list(dict.fromkeys(Path(model) for model in arguments.model))
        alike = len({model.name for model in models}) < len(models)
        for model in models:
            for seed in seeds:
                found = _ground(model, seed, arguments)
                # Two folders of one name are two models.
                yield dataclasses.replace(found, name=str(model).replace("/", "+")) if alike else found
    else:
        yield from (Ground("no model", seed=seed) for seed in seeds)


def _lab(arguments: argparse.Namespace, seed: int, terminal: Terminal) -> Path:
    from memloc.lab.build import build
    from memloc.lab.recipe import preset

    folder: Path = arguments.out / "labs" / f"{arguments.lab}-{seed}"
    return build(preset(arguments.lab, seed=seed), folder, log=terminal.note)


def _ground(model: Path, seed: int, arguments: argparse.Namespace) -> Ground:
    from memloc.command import read_passages, read_text
    from memloc.truth.grounds import ground_of
    from memloc.view import ModelView

    if not (arguments.passages or arguments.controls or arguments.text):
        return ground_of(model, seed=seed)
    view = ModelView.open(model)
    return ground_of(
        model,
        seed=seed,
        memorized=read_passages(arguments.passages, view, arguments),
        unknown=read_passages(arguments.controls, view, arguments),
        text=read_text(arguments.text, view),
    )
