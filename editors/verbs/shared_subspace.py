"""memloc shared-subspace: do memories share weights? Masks of disjoint halves, overlap against chance, transfer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memloc import store
from memloc.command import common, need_passages, open_view, out, read_passages, read_text
from memloc.errors import InputError
from memloc.flags import DataFile
from memloc.terminal import Terminal

if TYPE_CHECKING:
    from editors.pruning.shared_splits import Mean, Splits
    from editors.pruning.shared_subspace import Shared
    from memloc.report import Report
    from memloc.view import ModelView

WINDOWS = 200
"""Windows of held-out text that are read, five times a split: enough to tell a broken model from a whole one."""

FIGURES = ("strict rate", "exact memorization", "extraction strength")
OVERLAPS = {
    "of the two halves": "halves",
    "by chance": "chance",
    "of a half and passages never trained on": "controls",
    "of two sets never trained on": "between_controls",
}
UNDER = {
    "before": "before",
    "of the half whose mask is pruned": "own",
    "of the other half": "other",
    "of both, under masks of passages never trained on": "under_controls",
}


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    common(parser, "model", "passages", "controls", "retain", "text")
    parser.add_argument("--held-out", type=DataFile.parse, metavar="FILE",
                        help="ordinary text the pruner does not see: what pruning breaks besides")  # fmt: skip
    common(parser, "prefix", "suffix")
    parser.add_argument("--half", type=int, help="passages of a half (default: all, halved; as many controls)")
    parser.add_argument("--splits", type=int, default=3, help="how often the passages are split anew (default: 3)")
    parser.add_argument("--figure", choices=FIGURES, default=FIGURES[0],
                        help="what counts as memory (default: strict rate, the share recited whole)")  # fmt: skip
    told = "prune only where this localizer finds each half (with --fraction or --count)"
    parser.add_argument("--localizer", metavar="NAME", help=told)
    common(parser, "fraction", "count", "per", "seed")
    out(parser, "folder of shared-subspace.json, the report, and finished splits", required=True)


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Prune for either half and for controls, on every split; print, write."""
    from editors.base import Request
    from editors.pruning.shared_splits import over_splits

    if arguments.passages is None or arguments.controls is None:
        raise InputError("shared-subspace needs --passages FILE (known by heart) and --controls FILE (never trained "
                         "on): an overlap says nothing without theirs")  # fmt: skip
    if arguments.out.exists() and not arguments.out.is_dir():
        raise InputError(f"{arguments.out} is a file; name a folder for the report; nothing was written")
    _check_places(arguments)
    view = open_view(arguments)
    splits = _splits(arguments, view)
    text = read_text(arguments.text, view)
    pruner = _where_localized(arguments, text)
    request = Request(retain=read_passages(arguments.retain, view, arguments), text=text, seed=arguments.seed)
    held_out = read_text(arguments.held_out, view)
    if held_out is not None and len(held_out) > WINDOWS:
        terminal.note(f"of {len(held_out)} windows of held-out text the first {WINDOWS} are read")
        held_out = held_out[:WINDOWS]
    store.check_target(arguments.out / "shared-subspace.json")
    terminal.note(f"{splits.count} splits into halves of {splits.size}: {4 * splits.count} prunings")
    folder = arguments.out / "splits"
    found = over_splits(view, pruner, request, splits, figure=arguments.figure, held_out=held_out, folder=folder)
    tell(found, splits, arguments, view, terminal)


def tell(
    found: Sequence[Shared], splits: Splits, arguments: argparse.Namespace, view: ModelView, terminal: Terminal
) -> None:
    """Print tables and sentences, write the report, and give the result as JSON."""
    from editors.pruning.shared_splits import means

    over, name = means(found), _name(arguments)
    for title, rows in _tables(over, arguments.figure).items():
        terminal.table(title, ["", f"mean of {len(found)}", "least", "most"], rows)
    said = sentences(found, over)
    for text, _ in said:
        terminal.note(text)
    for path in _report(found, over, said, splits, arguments, view).save(arguments.out, stem="shared-subspace"):
        terminal.note(f"written: {path}")
    terminal.result({
        "pruner": name, "figure": arguments.figure, "half": splits.size, "seed": splits.seed,
        "mean": {key: entry and entry.mean for key, entry in over.items()},
        "splits": [made.to_json() for made in found], "overlaps": said[0][1], "transfers": said[1][1],
    })  # fmt: skip


def sentences(found: Sequence[Shared], over: Mapping[str, Mean | None]) -> tuple[tuple[str, bool | None], ...]:
    """Whether the halves share weights, and whether removal passes over; each in so many splits, with its figures."""
    count = len(found)
    mean = {key: entry.mean for key, entry in over.items() if entry is not None}
    share = sum(made.overlaps for made in found)
    overlap = (
        f"the halves' masks overlap more than by chance, and than those of passages never trained on do with them or "
        f"each other, in {share} of {count} splits: {mean['halves']:.3g}, by chance {mean['chance']:.3g}, with those "
        f"{mean['controls']:.3g}, those with each other {mean['between_controls']:.3g}"
    )
    fell = [made.transfers for made in found if made.transfers is not None]
    if not fell:
        return (overlap, share == count), ("no half falls when its own mask is pruned; prune a larger share", None)
    moved = (
        f"pruning one half's mask takes more from the other half than a mask of passages never trained on does in "
        f"{sum(fell)} of {len(fell)} splits: {mean['transfer']:.0%} of what the own half loses, against "
        f"{mean['transfer_controls']:.0%}"
    )
    return (overlap, share == count), (moved, all(fell))


def _check_places(arguments: argparse.Namespace) -> None:
    """A localizer needs a number of places, and a number of places a localizer."""
    from memloc.methods import LOCALIZERS

    given = [name for name in ("fraction", "count") if getattr(arguments, name) is not None]
    if arguments.localizer is None and given:
        raise InputError(f"--{given[0]} chooses from what a --localizer finds; none was named")
    if arguments.localizer is not None:
        LOCALIZERS.target(arguments.localizer)
        if len(given) != 1:
            raise InputError("--localizer needs --fraction or --count: how many places of those it finds")


def _where_localized(arguments: argparse.Namespace, text: Any) -> Any:
    from editors.pruning.shared_splits import WhereLocalized
    from memloc.methods import LOCALIZERS

    if arguments.localizer is None:
        return arguments.method
    how = {"count": arguments.count, "fraction": arguments.fraction, "per": arguments.per}
    return WhereLocalized(localizer=LOCALIZERS[arguments.localizer](), pruner=arguments.method, contrast=text, **how)


def _splits(arguments: argparse.Namespace, view: ModelView) -> Splits:
    from editors.pruning.shared_splits import Splits

    return Splits(
        passages=need_passages(arguments.passages, view, arguments),
        controls=need_passages(arguments.controls, view, arguments),
        half=arguments.half,
        count=arguments.splits,
        seed=arguments.seed,
    )


def _name(arguments: argparse.Namespace) -> str:
    pruner = type(arguments.method).__name__.lower()
    return pruner if arguments.localizer is None else f"{pruner} where {arguments.localizer} points"


def _tables(over: Mapping[str, Mean | None], figure: str) -> dict[str, list[list[Any]]]:
    """Title to rows: what, mean, least, most."""
    tables = {"overlap of masks (intersection over union)": OVERLAPS, f"{figure} of passages": UNDER}
    tables["transfer: fall over the fall of the own half"] = {
        "the other half": "transfer", "both, under masks of passages never trained on": "transfer_controls",
    }  # fmt: skip
    if over["harm_before"] is not None:
        tables["held-out text, nats per token"] = {
            "before": "harm_before", "under a half's mask": "harm_halves",
            "under a mask of passages never trained on": "harm_controls",
        }  # fmt: skip
    tables["weights pruned"] = {"for a half": "pruned", "for passages never trained on": "pruned_controls"}
    found = {}
    for title, wanted in tables.items():
        rows = [(label, over[name]) for label, name in wanted.items()]
        found[title] = [[label, *([row.mean, row.least, row.most] if row else [None] * 3)] for label, row in rows]
    return found


def _report(
    found: Sequence[Shared],
    over: Mapping[str, Mean | None],
    said: Sequence[tuple[str, bool | None]],
    splits: Splits,
    arguments: argparse.Namespace,
    view: ModelView,
) -> Report:
    from memloc.provenance import settings_of, versions
    from memloc.report import Entry, Note, Report, Sheet, Verdict
    from memloc.terminal import cell

    sheets = [
        Sheet(title="Over the splits", caption=title, columns=("", f"mean of {len(found)}", "least", "most"), rows=[
            [Entry(text=row[0], kind="text"), *(Entry(text=cell(value)) for value in row[1:])] for row in rows
        ])
        for title, rows in _tables(over, arguments.figure).items()
    ]  # fmt: skip
    about = (
        "Chavhan et al. 2024 report of image models that what two disjoint sets of memorized images light up overlaps, "
        "and that pruning for one set forgets the other. Masks overlap for other reasons as well (large weights, busy "
        "inputs), and a broken model recites nothing: so the same is asked of passages never trained on. Means are "
        "over splits of the same passages, which are no independent samples."
    )
    name = _name(arguments)
    given = {key: getattr(arguments, key) for key in ("localizer", "fraction", "count", "figure", "seed")}
    return Report(
        title="Do memories share weights?", model=view.name, model_digest=view.digest,
        summary=f"{name}: {len(found)} splits of {len(splits.passages)} passages into halves of {splits.size}.",
        verdicts=tuple(Verdict(text[0].upper() + text[1:], holds) for text, holds in said), sheets=tuple(sheets),
        notes=(Note("What is compared", about),),
        provenance={"pruner": {"name": name, **settings_of(arguments.method)}, "asked": given,
                    "passages": splits.passages.digest, "controls": splits.controls.digest,
                    **{f"split {number}": made.to_json() for number, made in enumerate(found, 1)},
                    "versions": versions()},
    )  # fmt: skip
