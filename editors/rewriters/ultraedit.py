"""UltraEdit: one backward pass, normalised over everything seen so far, and one ridge solve."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from editors.base import Request
from editors.deltas import LowRank, add
from editors.edit import Edit
from editors.tuning.alternative import own_alternative
from editors.tuning.descent import working_copy
from memloc import progress
from memloc.batches import Batch
from memloc.errors import InputError, MismatchError
from memloc.gradients.map_gradients import pulls
from memloc.objectives import suffix_nll
from memloc.passages import Passages
from memloc.provenance import Provenance, settings_of
from memloc.scores import Selection
from memloc.sites import Grain, Site, kinds_named
from memloc.view import ModelView

METHOD = "ultraedit"


@dataclass(frozen=True)
class Running:
    """Mean and spread of everything seen so far, entry by entry; float64.

    Attributes:
        count: rows seen.
        mean: [w].
        squares: [w], sums of squared distances from the mean.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, width: int) -> Running:
        """Nothing seen."""
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))

    def seen(self, rows: Tensor) -> Running:
        """With `rows` [n, w] too, by Chan et al.'s pairwise update: one row counts as well as many."""
        count = self.count + len(rows)
        if not len(rows):
            return self
        mean = rows.mean(0)
        apart = mean - self.mean
        squares = self.squares + (rows - mean).square().sum(0) + apart.square() * (self.count * len(rows) / count)
        return Running(count, self.mean + apart * (len(rows) / count), squares)

    def normed(self, rows: Tensor) -> Tensor:
        """Rows less the mean over the spread; an entry that never varied stays 0."""
        spread = (self.squares / max(1, self.count - 1)).sqrt()
        return (rows - self.mean) / torch.where(spread > 0, spread, torch.ones_like(spread))

    def to_json(self) -> dict[str, Any]:
        """Count, and both vectors as base64 of little-endian float64."""
        return {"count": self.count, "mean": _packed(self.mean), "squares": _packed(self.squares)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Running:
        """Back from `to_json`."""
        return cls(int(found["count"]), _unpacked(found["mean"]), _unpacked(found["squares"]))


@dataclass(frozen=True, kw_only=True)
class UltraEdit:
    """A ridge solve towards normalised gradients; no subject, no second moment, no search for values.

    One forward and backward of the answers' negative log-likelihood gives, for every map and every position that
    predicts an answer token, what the map reads h_i and the gradient g_i by what it puts out. With ĥ and ĝ normalised
    entry by entry over everything seen so far,

        v_i = -lr · ‖ĥ_i‖² · ĝ_i,    ΔWᵀ = (HᵀH + ridge · 1)⁻¹ Hᵀ V = Hᵀ (H Hᵀ + ridge · 1)⁻¹ V,

    solved in the number of tokens. The running statistics stand in the edit's notes, and edits of this method in
    `past` are continued: what they have seen counts, in their order. A selection of components or layers chooses the
    maps; of other grains it makes no sense here.

    What is taught: the new answers of `facts`, or, without facts, the model's own alternatives to `forget`.

    Attributes:
        kinds: maps to change where no component is selected.
        layers: or None for the last half.
        lr: of the targets; the published one is for models whose maps are ten times as wide as the lab's.
        ridge: added to HᵀH.
        rounds: the whole once more on the edited model; the published method has one.
        batch_size: rows of a forward pass; statistics take all rows of a round at once, so it has no effect but
            rounding.

    Raises:
        InputError: neither facts nor passages, a single answer token and no past (nothing to normalise by).
        MismatchError: statistics of a past edit that belong to maps of another size.

    Cost: one forward and backward a round; n² (in + out) a map.

    Source: Gu et al. 2025, arXiv:2505.14679, from the equations. There keys and gradients of the label positions are
    taken; rounds are ours.
    """

    kinds: str = "mlp.out"
    layers: tuple[int, ...] | None = None
    lr: float = 3e-3
    ridge: float = 1.0
    rounds: int = 1
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.ridge <= 0 or self.rounds < 1 or self.batch_size < 1:
            raise InputError("expected lr and ridge above 0, rounds and batch_size of at least 1")

    @classmethod
    def published(cls, layers: tuple[int, ...], **changes: Any) -> UltraEdit:
        """The published settings; layers and kinds are the model's (Mistral-7B: 29 and 30, mlp.out)."""
        return cls(**{"layers": layers, "lr": 1e-6, "ridge": 1.0, "rounds": 1, **changes})

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched."""
        work = working_copy(view)
        taught = _taught(work, request)
        sites = self._sites(view, request.selection)
        running, before = _past(view, sites, request.past), None
        deltas: dict[Site, Any] = {}
        provenance = Provenance(METHOD, settings_of(self), request.seed, request.inputs(view))
        losses = []
        with contextlib.ExitStack() as stack:
            for turn in progress.steps(range(self.rounds), "ultraedit"):
                loss, read, pull = _answers(work, taught, sites, self.batch_size)
                before = loss if before is None else before
                losses.append(loss)
                found, running = self._solve(read, pull, running)
                deltas = {site: add(deltas[site], found[site]) if site in deltas else found[site] for site in sites}
                if turn + 1 < self.rounds:
                    stack.enter_context(Edit.of(work, found, provenance).apply(work))
        notes = {"losses": losses, "statistics": {str(site): entry.to_json() for site, entry in running.items()}}
        return Edit.of(view, deltas, provenance, notes=notes)

    def _sites(self, view: ModelView, selection: Selection | None) -> tuple[Site, ...]:
        kinds = kinds_named(self.kinds)
        if selection is None:
            layers = tuple(range(view.layers // 2, view.layers)) if self.layers is None else self.layers
            for layer in layers:
                view.block(layer)
            found = [site for site in view.sites(*kinds) if site.layer in layers]
        elif selection.grain is Grain.COMPONENT:
            found = [site for site, mask in selection.masks.items() if bool(mask) and not site.bias]
        elif selection.grain is Grain.LAYER:
            layers = tuple(site.layer for site, mask in selection.masks.items() if bool(mask))
            found = [site for site in view.sites(*kinds) if site.layer in layers]
        else:
            raise InputError(f"a selection of {selection.grain}s chooses no maps; expected components or layers")
        chosen = tuple(sorted(site for site in found if site.kind.in_block))
        if not chosen:
            raise InputError("no map is left to change; choose components or layers that hold some of the kinds")
        return chosen

    def _solve(
        self, read: Mapping[Site, Tensor], pull: Mapping[Site, Tensor], running: Mapping[Site, Running]
    ) -> tuple[dict[Site, LowRank], dict[Site, Running]]:
        found, later = {}, {}
        for site, keys in read.items():
            rows = torch.cat([keys, pull[site]], 1)
            later[site] = running[site].seen(rows)
            if later[site].count < 2:
                raise InputError("ultraedit normalises by what it has seen, and one token has no spread; give more")
            normed, gradient = torch.split(later[site].normed(rows), [keys.shape[1], pull[site].shape[1]], 1)
            values = -self.lr * normed.square().sum(1, keepdim=True) * gradient
            found[site] = ridge_update(keys, values, self.ridge)
        return found, later


def ridge_update(keys: Tensor, values: Tensor, ridge: float) -> LowRank:
    """The D with least ‖D kᵢ - vᵢ‖² summed over rows, plus ridge · ‖D‖²: solved in the number of rows.

    Args:
        keys: [n, in].
        values: [n, out].
        ridge: above 0.
    """
    table = keys @ keys.T + ridge * torch.eye(len(keys), dtype=keys.dtype)
    return LowRank(torch.linalg.solve(table, values).T.float(), keys.float())


def _taught(view: ModelView, request: Request) -> Passages:
    if request.facts:
        return request.facts.as_passages("new")
    if not request.forget:
        raise InputError("ultraedit needs facts to change, or passages to forget; none were given")
    return own_alternative(view, request.forget, seed=request.seed)


def _past(view: ModelView, sites: Sequence[Site], past: Sequence[Edit]) -> dict[Site, Running]:
    """What earlier edits of this method have seen: the last of them that names a site says all."""
    found: dict[Site, Running] = {}
    for site in sites:
        width = sum(view.weight(site).shape)
        found[site] = Running.empty(width)
        for edit in past:
            known = edit.notes.get("statistics", {}) if edit.provenance.method == METHOD else {}
            if str(site) in known:
                found[site] = Running.from_json(known[str(site)])
                if len(found[site].mean) != width:
                    raise MismatchError(f"{site}: a past edit's statistics of {len(found[site].mean)} entries, "
                                        f"expected {width} in this model")  # fmt: skip
    return found


def _answers(
    view: ModelView, taught: Passages, sites: Sequence[Site], size: int
) -> tuple[float, dict[Site, Tensor], dict[Site, Tensor]]:
    """Mean loss, and what each map reads and is pulled on where it predicts a token of an answer; float64, CPU."""
    read: dict[Site, list[Tensor]] = {site: [] for site in sites}
    pull: dict[Site, list[Tensor]] = {site: [] for site in sites}
    total = 0.0
    for batch in view.batches(taught, size=size):
        loss, found = pulls(view, batch, sites, loss=_summed)
        total += float(loss.sum())
        for site in sites:
            read[site].append(found[site].read[batch.predicting].detach().cpu().double())
            pull[site].append(found[site].pull[batch.predicting].cpu().double())
    tokens = sum(len(item.suffix) for item in taught)
    joined = [{site: torch.cat(parts) for site, parts in side.items()} for side in (read, pull)]
    return total / tokens, joined[0], joined[1]


def _summed(view: ModelView, batch: Batch) -> Tensor:
    """Negative log-likelihood of each row's answer, [n], nats."""
    return suffix_nll(view, batch) * (batch.length - batch.prefix)


def _packed(vector: Tensor) -> str:
    return base64.b64encode(vector.numpy().astype("<f8").tobytes()).decode()


def _unpacked(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float64).clone()
