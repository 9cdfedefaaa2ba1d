"""memloc moments: what ordinary text sends into the maps, in one pass for all layers, and whether it is enough."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memloc import processes, store
from memloc.command import common, open_view, out, read_facts, read_text
from memloc.errors import InputError
from memloc.flags import shard
from memloc.sites import kinds_named
from memloc.terminal import Terminal, complain

if TYPE_CHECKING:
    from torch import Tensor

    from memloc.moments import Moments
    from memloc.passages import Facts, Passages
    from memloc.sites import Site
    from memloc.view import ModelView


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    common(parser, "model", "text", "facts", "seed")
    parser.add_argument("--layers", help="such as 4-8 or 0,3,5 (default: all)")
    parser.add_argument("--kinds", default="mlp.out", help="maps, with commas between (default: mlp.out)")
    parser.add_argument("--multiplier", type=float, default=10.0,
                        help="tokens to sum over, in widths of the widest map (default: 10)")  # fmt: skip
    parser.add_argument("--tokens", type=int, help="tokens to sum over, instead")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens of a forward pass (default: 4096)")
    parser.add_argument("--halves", action=argparse.BooleanOptionalAction, default=True,
                        help="keep two halves apart, to judge and shrink by: twice the memory and disk")  # fmt: skip
    shares = "share to move towards the identity: auto (from the halves), none, or a number (default: auto)"
    parser.add_argument("--shrink", default="auto", help=shares)
    parser.add_argument("--cache", type=Path, metavar="FOLDER",
                        help="keep sums here by digest and read them again; also what an interrupted run has done "
                        "(default: beside --out, until it is whole)")  # fmt: skip
    parser.add_argument("--shard", type=shard, metavar="NUMBER/COUNT",
                        help="sum over this share only, for `memloc merge`")  # fmt: skip
    out(
        parser,
        "moments.safetensors, for `edit NAME --moment` and `editability --moments`",
        required=True,
    )


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Sum, judge, shrink, save, print."""
    from memloc.moment_judgement import shrinkages
    from memloc.moment_pass import MomentPass

    if not processes.rank():
        store.check_target(arguments.out)
    share = _share(arguments)
    settings = MomentPass(multiplier=arguments.multiplier, tokens=arguments.tokens, seed=arguments.seed,
                          halves=arguments.halves, batch_tokens=arguments.batch_tokens)  # fmt: skip
    view = open_view(arguments)
    text, sites = need_text(arguments, view), _sites(arguments, view)
    folder = arguments.cache or arguments.out.with_name(f".{arguments.out.name}.parts")
    try:
        found = settings(view, text, sites, folder=folder, shard=arguments.shard)
    except KeyboardInterrupt:
        if any(folder.glob("*.part.safetensors")):
            complain(f"what is summed so far is kept in {folder}; the same command goes on from there")
        raise
    if share is None and arguments.shard is None and found.split is not None:
        found = found.shrunk(shrinkages(found))
    elif share:
        found = found.shrunk(dict.fromkeys(found.sums, share))
    if not processes.rank():
        found.save(arguments.out)
    processes.exchange(None)  # unfinished sums may go once the whole is safe
    if arguments.cache is None and not processes.rank():
        for path in folder.glob("*.safetensors"):
            path.unlink()
        folder.rmdir()
    facts = read_facts(arguments.facts, view)
    print_moments(found, arguments.out, terminal, None if facts is None else _subject_keys(view, facts, sites))


def print_moments(found: Moments, path: Path, terminal: Terminal, keys: Mapping[Site, Tensor] | None = None) -> None:
    """A row a site: what it is worth (for editing `keys`), and what to do where it is not enough."""
    from memloc.moment_judgement import judged

    split = found.split
    if split is None or not 0 < split.count < found.count:
        sizes = [[str(site), len(entry), found.count / len(entry)] for site, entry in found.sums.items()]
        terminal.table(f"{path}: second moments of {found.count:,} tokens", ["site", "width", "tokens a neuron"], sizes)
        terminal.note("no halves were kept apart, so nothing says whether this is enough")
        terminal.result({"file": str(path), "tokens": found.count, "sites": {}})
        return
    made = judged(found, keys)
    rows: list[list[Any]] = [
        [str(site), row.width, row.tokens / row.width, row.rank, row.silent, found.shrinkage.get(site, 0.0),
         row.agreement, row.excess, row.enough]
        for site, row in made.items()
    ]  # fmt: skip
    columns = ["site", "width", "tokens a neuron", "effective rank", "silent neurons", "shrunk by",
               "agreement of halves", "excess", "enough"]  # fmt: skip
    terminal.table(f"{path}: second moments of {found.count:,} tokens", columns, rows)
    whose = "an edit" if keys is None else "editing these facts"
    terminal.note(f"excess: how much more than need be {whose} with half this text would disturb fresh text; "
                  "with all of it, less")  # fmt: skip
    if not all(row.enough for row in made.values()):
        terminal.note("not enough everywhere: raise --multiplier, or give more text")
    sites = {str(site): row.to_json() | {"shrunk by": found.shrinkage.get(site, 0.0)} for site, row in made.items()}
    terminal.result({"file": str(path), "tokens": found.count, "sites": sites})


def _subject_keys(view: ModelView, facts: Facts, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """What flows into each site at the last token of each fact's subject (of its prompt where none is marked)."""
    import torch

    from memloc.batches import pad

    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for start in range(0, len(facts), 32):
        prompts = [fact.prompt for fact in facts[start : start + 32]]
        at = [(prompt.subject[1] if prompt.subject else len(prompt.ids)) - 1 for prompt in prompts]
        with torch.no_grad(), view.record(sites, stop=True) as seen:
            view.hidden(pad([prompt.ids for prompt in prompts], device=view.device))
        for site in sites:
            found[site].append(seen[site][torch.arange(len(at)), at].double().cpu())
    return {site: torch.cat(parts) for site, parts in found.items()}


def _sites(arguments: argparse.Namespace, view: ModelView) -> tuple[Site, ...]:
    layers = layers_named(arguments.layers, view.layers)
    kinds = kinds_named(arguments.kinds)
    for kind in kinds:
        if not kind.in_block or kind not in view.kinds:
            raise InputError(f"--kinds {arguments.kinds}: this model's blocks have no {kind}")
    return tuple(site for site in view.sites(*kinds) if site.layer in layers)


def need_text(arguments: argparse.Namespace, view: ModelView) -> Passages:
    """The text of --text, which must be there."""
    text = read_text(arguments.text, view)
    if text is None:
        raise InputError("--text FILE is needed here: ordinary text, such as the model was trained on")
    return text


def layers_named(text: str | None, count: int) -> tuple[int, ...]:
    """Layers from "4-8" or "0,3,5"; all of `count` where nothing is said.

    Raises:
        InputError: not of that form, or a layer that is not there.
    """
    if text is None:
        return tuple(range(count))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise InputError(f"--layers {text}: expected numbers such as 4-8 or 0,3,5")
        found |= set(range(int(first), int(last if dash else first) + 1))
    if not found or max(found) >= count:
        raise InputError(f"--layers {text}: the model has layers 0 to {count - 1}")
    return tuple(sorted(found))


def _share(arguments: argparse.Namespace) -> float | None:
    """The share asked for; None where the halves are to say."""
    if arguments.shrink == "auto":
        return None
    try:
        share = 0.0 if arguments.shrink == "none" else float(arguments.shrink)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InputError(f"--shrink {arguments.shrink}: expected auto, none, or a number from 0 to 1")
    return share
