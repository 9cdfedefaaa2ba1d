"""memloc localize: where it is kept."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from memloc import processes, store
from memloc.command import common, need_passages, open_view, out, read_facts, read_passages, read_text
from memloc.errors import InputError
from memloc.flags import shard
from memloc.terminal import Terminal, complain
from memloc.verbs.printing import localization_json, print_localization

if TYPE_CHECKING:
    from memloc.passages import Passages
    from memloc.scores import Localization
    from memloc.view import ModelView


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    common(parser, "model", "passages", "controls", "contrast", "text", "facts", "prefix", "suffix", "seed")
    parser.add_argument("--paraphrases", action="store_true", help="with --facts: their other phrasings too")
    out(parser, "localization.safetensors (with --controls, theirs beside it: NAME.controls.safetensors)")
    parser.add_argument("--top", type=int, default=20, help="rows to print (default: 20)")
    parser.add_argument(
        "--joint", type=int, metavar="COUNT", help="select so many jointly: silence, score again, go on"
    )
    parser.add_argument(
        "--step", type=int, default=5, help="with --joint: units silenced between scorings (default: 5)"
    )
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="NUMBER/COUNT",
        help="score this share of the passages only, for `memloc merge`",
    )
    parser.add_argument("--plan", action="store_true", help="tell what the run would take, and stop")


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Tell the plan, localize, print the best places, save."""
    if arguments.out is not None and not processes.rank():
        store.check_target(arguments.out)
    _check_divided(arguments)
    view = open_view(arguments)
    facts = read_facts(arguments.facts, view)
    if facts is None and arguments.paraphrases:
        raise InputError("--paraphrases are those of --facts FILE; none is given")
    passages = (
        facts.as_passages("true", paraphrases=arguments.paraphrases)
        if facts
        else need_passages(arguments.passages, view, arguments)
    )
    contrast = _contrast(arguments, view)
    controls = read_passages(arguments.controls, view, arguments)
    ours, others = _share(arguments, passages), None if controls is None else _share(arguments, controls)
    plan = _plan(arguments, view, ours, others, contrast, terminal)
    if arguments.plan:
        terminal.result({"plan": plan})
        return
    if arguments.joint is not None:
        _joint(arguments, view, passages, contrast, terminal)
        return
    found = _localize(arguments, view, passages, contrast, terminal, "")
    beside = None if controls is None else _localize(arguments, view, controls, contrast, terminal, ".controls")
    print_localization(found, terminal, arguments.top, beside)
    terminal.result({**localization_json(found, arguments.top, beside), "plan": plan})


def _check_divided(arguments: argparse.Namespace) -> None:
    """See that the work can be divided where it is to be."""
    if arguments.shard is None and processes.count() == 1:
        return
    from memloc.shared_work import check_divisible

    check_divisible(arguments.method)
    if arguments.joint is not None:
        raise InputError("--joint scores all passages together, again and again; it runs whole and in one process")


def _share(arguments: argparse.Namespace, passages: Passages) -> Passages:
    """The passages of --shard, or all."""
    if arguments.shard is None:
        return passages
    from memloc.shared_work import sharded

    return sharded(passages, arguments.shard)


def _contrast(arguments: argparse.Namespace, view: ModelView) -> Passages | None:
    """The second data set, as passages or as ordinary text."""
    if arguments.contrast is not None and arguments.text is not None:
        raise InputError("--contrast and --text both name the second data set; give one")
    return read_text(arguments.text, view) or read_passages(arguments.contrast, view, arguments)


def _plan(
    arguments: argparse.Namespace,
    view: ModelView,
    passages: Passages,
    controls: Passages | None,
    contrast: Passages | None,
    terminal: Terminal,
) -> str | None:
    """What the run will take, said before it starts; None where the method cannot tell."""
    if not hasattr(arguments.method, "cost"):
        return None
    cost = arguments.method.cost(view, passages, contrast=contrast)
    if controls is not None:
        cost += arguments.method.cost(view, controls, contrast=contrast)
    told: str = cost.told(view, passages)
    terminal.note(f"plan: {told}")
    return told


def _joint(
    arguments: argparse.Namespace, view: ModelView, passages: Passages, contrast: Passages | None, terminal: Terminal
) -> None:
    """Select jointly, print what silencing does beside single scores and random order, save."""
    from memloc.ablations.joint import joint_selection, removal_curves

    settings = {"count": arguments.joint, "step": arguments.step, "contrast": contrast}
    joint = joint_selection(arguments.method, view, passages, **settings)
    if arguments.out is not None:
        joint.localization.save(arguments.out)
    points = sorted({0, arguments.joint, *range(0, arguments.joint, arguments.step)})
    curves = removal_curves(joint, view, passages, points=points, seed=arguments.seed)
    rows = [[removed, *values] for removed, *values in zip(curves[0].removed, *(c.nll for c in curves), strict=True)]
    columns = ["silenced", *(curve.name for curve in curves)]
    terminal.table("mean NLL of the suffixes, nats per token, by order of silencing", columns, rows)
    print_localization(joint.localization, terminal, arguments.top)
    terminal.result({
        **localization_json(joint.localization, arguments.top, None),
        "curves": [dict(zip(columns, row, strict=True)) for row in rows],
    })  # fmt: skip


def _localize(
    arguments: argparse.Namespace,
    view: ModelView,
    passages: Passages,
    contrast: Passages | None,
    terminal: Terminal,
    suffix: str,
) -> Localization:
    """Run the method, in parts that survive an interrupt where it can; save where a file is named."""
    from memloc import parts
    from memloc.shared_work import localize, marked

    ours, folder, path = _share(arguments, passages), None, None
    if arguments.out is not None:
        path = arguments.out.with_suffix(f"{suffix}{arguments.out.suffix}") if suffix else arguments.out
        folder = path.with_name(f".{path.name}.parts")
        ready = parts.finished(folder)
        if ready and getattr(arguments.method, "in_parts", False):
            terminal.note(f"{ready} parts of an interrupted run lie in {folder}; those of this very run are used")
    try:
        found: Localization = localize(arguments.method, view, ours, contrast=contrast, folder=folder)
    except KeyboardInterrupt:
        if folder is not None and parts.finished(folder):
            complain(
                f"{parts.finished(folder)} finished parts are kept in {folder}; the same command goes on from there"
            )
        raise
    if arguments.shard is not None:
        found = marked(found, arguments.shard, passages)
    if path is not None and folder is not None:
        if not processes.rank():
            found.save(path)
        processes.exchange(None)  # parts may go once the whole is safe
        parts.discard(folder)
    return found
