"""The test of a shared subspace over several splits of the passages, each filed when it is done."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from editors.base import Editor, Request
from editors.edit import Edit
from editors.pruning.shared_subspace import Shared, shared_subspace
from memloc import progress, store
from memloc.errors import ArtifactError, InputError
from memloc.measures.extraction import Extraction
from memloc.measures.perplexity import Perplexity
from memloc.passages import Passages
from memloc.provenance import digest_json, settings_of
from memloc.view import ModelView

SCHEMA = "memloc.shared-subspace-split/1"
Pair = tuple[Passages, Passages]


@dataclass(frozen=True, kw_only=True)
class WhereLocalized:
    """A pruner that prunes only where a localizer, asked about the same passages, found them.

    Attributes:
        localizer: any whose places are weights.
        pruner: handed the places.
        contrast: what the localizer contrasts the passages with, or None.
        count, fraction, per: how many places, as `Localization.top` takes them.
    """

    localizer: Any
    pruner: Any
    contrast: Passages | None = None
    count: int | None = None
    fraction: float | None = None
    per: str = "model"

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched."""
        found = self.localizer(view, request.need_forget(), contrast=self.contrast)
        chosen = found.top(self.count, fraction=self.fraction, per=self.per)
        made: Edit = self.pruner(view, replace(request, selection=chosen))
        return made


@dataclass(frozen=True, kw_only=True)
class Splits:
    """How the passages are split.

    Attributes:
        passages: the model knows them by heart.
        controls: never trained on.
        half: passages of a half, and of a set of controls; None for as many as there are.
        count: splits.
        seed: of the draws.

    Raises:
        InputError: too few passages for two halves, or a text that is there twice.
    """

    passages: Passages
    controls: Passages
    half: int | None = None
    count: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or (self.half is not None and self.half < 1):
            raise InputError(f"{self.count} splits of halves of {self.half}: expected at least 1 of each")
        for name, rows in (("passages", self.passages), ("controls", self.controls)):
            wanted = 2 * (self.half or 1)
            if len(rows) < wanted:
                raise InputError(f"{len(rows)} {name}; two halves of {wanted // 2} need {wanted}")
        seen: dict[tuple[int, ...], str] = {}
        for name, rows in (("passage", self.passages), ("control", self.controls)):
            for item in rows:
                called = f"{name} {item.id!r}"
                if item.ids in seen:
                    twin = seen[item.ids]
                    raise InputError(f"{twin} and {called} are the same text; masks would overlap for that alone")
                seen[item.ids] = called

    @property
    def size(self) -> int:
        """Passages of a half."""
        return self.half or min(len(self.passages), len(self.controls)) // 2

    def draw(self, number: int) -> tuple[Pair, Pair]:
        """Halves, and sets of controls, of one split."""
        return _cut(self.passages, self.size, f"{self.seed} {number}"), _cut(
            self.controls, self.size, f"{self.seed} {number} controls"
        )


def over_splits(
    view: ModelView,
    pruner: Editor,
    request: Request,
    splits: Splits,
    *,
    figure: str = "strict rate",
    held_out: Passages | None = None,
    folder: str | Path | None = None,
) -> tuple[Shared, ...]:
    """Make the test on every split; the model is as it was.

    Args:
        view: the model.
        pruner: an editor that makes single weights zero.
        request: what it is asked beside passages to forget.
        splits: of the passages.
        figure: of `Extraction`: what counts as memory, larger for more.
        held_out: ordinary text whose mean NLL (nats per token) tells what pruning breaks, or None.
        folder: where finished splits are kept and read again, by a digest of everything; None keeps none.

    Raises:
        InputError: an edit that is no mask, or nothing of what counts is there before any pruning.
        ArtifactError: a file in `folder` that is none of ours.

    Cost: a split takes four prunings, ten measurements of half the passages and five of `held_out`.
    """
    measure, kept = _figure(figure), {item.ids for part in (request.retain, request.text) for item in part or ()}
    both = next((item.id for item in splits.passages if item.ids in kept), None)
    if both is not None:
        raise InputError(f"passage {both!r} is to be pruned for and to be kept; take it out of one set")
    if not measure(view, splits.passages):
        raise InputError(f"the {figure} of the passages is 0 before anything is pruned; name some the model recites")
    harm = None if held_out is None else _nll(held_out)
    about = [_settings(pruner), request.inputs(view), request.seed, str(view.dtype), figure]
    about.append(None if held_out is None else held_out.digest)
    found = []
    for number in progress.steps(range(splits.count), "splits"):
        halves, controls = splits.draw(number)
        key = digest_json([*about, *(rows.digest for rows in halves + controls)])[:24]
        path = None if folder is None else Path(folder) / f"{key}.json"
        done = None if path is None else _read(path)
        if done is None:
            done = shared_subspace(view, pruner, request, halves, controls, measure, harm=harm)
            if path is not None:
                store.write_text(path, json.dumps({"schema": SCHEMA, **done.to_json()}, allow_nan=False) + "\n")
        found.append(done)
    return tuple(found)


@dataclass(frozen=True)
class Mean:
    """A figure over splits: its mean, least and most; of those splits where it is defined."""

    mean: float
    least: float
    most: float


def means(found: Sequence[Shared]) -> dict[str, Mean | None]:
    """Of every figure, and of both transfers; None where no split has it."""
    rows = [made.to_json() for made in found]
    result: dict[str, Mean | None] = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]
        result[name] = Mean(sum(values) / len(values), min(values), max(values)) if values else None
    return result


def _cut(rows: Passages, size: int, seed: str) -> Pair:
    order = list(rows)
    random.Random(seed).shuffle(order)
    return Passages(tuple(order[:size]), "first half"), Passages(tuple(order[size : 2 * size]), "second half")


def _figure(name: str) -> Callable[[ModelView, Passages], float]:
    return lambda view, rows: float(Extraction()(view, rows)[name])


def _nll(rows: Passages) -> Callable[[ModelView], float]:
    """Of the logarithm, which stays finite where a broken model's perplexity does not."""
    return lambda view: float(Perplexity()(view, rows)["nll"])


def _settings(pruner: Any) -> Any:
    if not isinstance(pruner, WhereLocalized):
        return [type(pruner).__qualname__, settings_of(pruner)]
    inner = [_settings(part) for part in (pruner.localizer, pruner.pruner)]
    return [*inner, pruner.contrast and pruner.contrast.digest, pruner.count, pruner.fraction, pruner.per]


def _read(path: Path) -> Shared | None:
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, Mapping) or found.get("schema") != SCHEMA:
        raise ArtifactError(f"{path} holds no finished split; remove it or name another folder")
    return Shared(**{item.name: found[item.name] for item in fields(Shared)})
