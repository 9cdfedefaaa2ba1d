"""Representation misdirection: what the model holds of the targets half-way is steered to nowhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from editors.base import Request
from editors.edit import Edit
from editors.masks import Masks
from editors.tuning.band import Band
from editors.tuning.descent import MaskedAdam, working_copy
from editors.tuning.keep import Keep
from editors.tuning.keeping import Keeping
from editors.tuning.training import Losses, cycle, descend
from editors.tuning.unlearning import Descending, check_open, chosen_masks, edit_of, reference_sums, whole_masks
from editors.tuning.unlearning_losses import misdirection
from memloc.batches import Batch, pad
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.sites import Kind, Site
from memloc.view import ModelView

DEPTH = 7 / 32
"""Where the original chose block 7 of 32."""

REACH = 3
"""Blocks whose MLPs are trained: the steered one and those below it."""

ASK = 10
"""Steps from one look at the targets' log p to the next, for it takes a whole forward and the loss half of one."""


@dataclass(frozen=True, kw_only=True)
class Rmu(Descending, Keeping):
    """Steer what block `layer` puts out on the targets to one random direction, and hold it still on kept rows.

    Loss = mean over target positions of ‖h - c·u‖² / d + keep_weight · mean over kept tokens of ‖h - h_original‖² / d,
    both over the mean ‖h_original‖² / d of the targets where `relative`. h is the residual stream after the block; u
    has entries drawn from [0, 1), and length 1. Nothing above the block is run in training.

    With `stop` "band" the targets' log p is looked at every ten steps, and the run ends once all are as unlikely as
    unseen text and the keep term is close.

    Without a selection the output maps of the MLPs of the block and of the two below it are trained, as published:
    few weights, where what the stream says of the targets is written. Of a selection, only what lies at or below the
    block can change.

    Attributes:
        layer: the block; by default 7/32 of the way up, as published.
        coefficient: c, in units of the mean norm of the targets' activations where `relative`.
        relative: measure activations against what they were, so that the settings have a meaning in every model.
        positions: "suffix": those that predict a suffix token; "all": every token of prefix and suffix.
        keep_weight: of the keep term.
        close: of the keep term, for the run to end.

    The other settings are those of `Descending` and `Keeping`.

    Raises:
        InputError: no targets, no such block, a selection above it, a passage both to forget and to retain, or
            targets that are forgotten already.

    Cost: a step is one forward and one backward of the blocks up to `layer`, over `target_rows` + `keep_rows` rows;
    memory d floats for each token that will be drawn to keep.

    Source: Li et al. 2024, arXiv:2403.03218. Relative units, self-replay and the band are ours.
    """

    layer: int | None = None
    coefficient: float = 1.0
    relative: bool = True
    positions: Literal["suffix", "all"] = "suffix"
    close: float = 0.05

    def __post_init__(self) -> None:
        self.check_descending()
        self.check_keeping()
        if self.coefficient <= 0:
            raise InputError(f"coefficient {self.coefficient}: expected above 0")

    @classmethod
    def published(cls, **settings: Any) -> Rmu:
        """Block 7, c 6.5, keep weight 1200, activations as they are, all tokens, lr 5e-5, 80 steps of 4 rows."""
        how: dict[str, Any] = {
            "layer": 7, "coefficient": 6.5, "relative": False, "positions": "all", "lr": 5e-5, "steps": 80,
            "target_rows": 4, "stop": "steps", "keep_weight": 1200.0, "keep_rows": 4, "replay": 0,
        }  # fmt: skip
        return cls(**{**how, **settings})

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched."""
        targets = request.need_forget()
        layer = self._layer(view)
        masks = self._masks(view, request, layer)
        work = working_copy(view)
        band = Band.of(work, targets, request.text, self.floor)
        check_open(targets, reference_sums(work, targets), band.upper)
        notes: dict[str, Any] = {"targets": len(targets), "layer": layer}
        keep = self.kept(work, request, targets, notes, steps=self.steps, teach=False)
        step = Misdirect(self, work, layer, targets, band, keep, request.seed)
        optimiser = MaskedAdam(work, masks, lr=self.lr)
        done = descend(optimiser, step, self.stopping(len(targets)), steps=self.steps, keep_weight=self.keep_weight,
                       label="rmu")  # fmt: skip
        notes |= {"weights": optimiser.count, "coefficient": float(step.towards.norm()), **done}
        return edit_of(self, "rmu", view, request, optimiser, masks, notes | band.report(work, targets))

    def _layer(self, view: ModelView) -> int:
        layer = round(DEPTH * view.layers) if self.layer is None else self.layer
        if not 0 <= layer < view.layers:
            raise InputError(f"layer {layer}: the model has {view.layers}, counted from 0")
        return layer

    def _masks(self, view: ModelView, request: Request, layer: int) -> Masks:
        if request.selection is None:
            return whole_masks(view, tuple(Site(at, Kind.MLP_OUT) for at in range(layer + 1)[-REACH:]))
        masks = {site: mask for site, mask in chosen_masks(view, request, self.reach).items() if site.layer <= layer}
        if not masks:
            raise InputError(f"the selection lies above block {layer}, which is steered; raise layer")
        return masks


class Misdirect:
    """One step's losses.

    Args:
        method: its settings.
        view: the working copy, not yet trained.
        layer: the block that is steered.
        targets: what is steered.
        band: where targets should end.
        keep: rows to hold still, or None; their activations are remembered here.
        seed: of the direction and of the targets' order.

    Attributes:
        towards: [d], c·u.
    """

    def __init__(
        self, method: Rmu, view: ModelView, layer: int, targets: Passages, band: Band, keep: Keep | None, seed: int
    ) -> None:
        self.method, self.view, self.layer, self.targets, self.band, self.keep = (
            method, view, layer, targets, band, keep,
        )  # fmt: skip
        self.batches: Iterator[Batch] = cycle(view, targets, method.target_rows, seed)
        self.met = False
        norm = self._norm()
        drawn = torch.rand(view.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        length = method.coefficient * (norm if method.relative else 1.0)
        self.towards = (drawn / drawn.norm() * length).to(view.device, view.dtype)
        self.unit = norm**2 / view.width if method.relative else 1.0
        self.known: dict[tuple[int, ...], Tensor] = {}
        if keep is not None:
            self._remember({row for step in range(method.steps) for row in keep.rows(step)})

    def __call__(self, step: int) -> Losses:
        """How far the targets are from where they are steered, and kept rows from where they were."""
        if step % ASK == 0:
            means = reference_sums(self.view, self.targets) / torch.tensor([len(i.suffix) for i in self.targets])
            self.met = bool((means <= self.band.upper).all())
        batch = next(self.batches)
        loss = misdirection(self.hidden(batch), self._counted(batch), self.towards).mean() / self.unit
        if self.keep is None:
            return Losses(loss, None, self.met)
        rows = self.keep.rows(step)
        kept = pad(rows, device=self.view.device)
        now, mask = self.hidden(kept), kept.mask
        was = torch.cat([self.known[row] for row in rows])
        return Losses(loss, (now[mask] - was).square().mean() / self.unit, self.met)

    def hidden(self, batch: Batch) -> Tensor:
        """The stream after the block, `[n, t, d]`, differentiable; nothing above it is run."""
        with self.view.record_blocks([self.layer], grad=torch.is_grad_enabled(), stop=True) as seen:
            self.view.hidden(batch)
        return seen[self.layer]

    def _counted(self, batch: Batch) -> Tensor:
        return batch.predicting if self.method.positions == "suffix" else batch.mask

    @torch.no_grad()
    def _norm(self) -> float:
        """Root mean square of the norm of the targets' activations."""
        total, count = 0.0, 0
        for batch in self.view.batches(self.targets, size=16):
            found = self.hidden(batch)[self._counted(batch)].double()
            total, count = total + float(found.square().sum()), count + len(found)
        return float((total / count) ** 0.5)

    @torch.no_grad()
    def _remember(self, rows: Iterable[tuple[int, ...]], size: int = 32) -> None:
        ordered = sorted(rows, key=lambda row: (-len(row), row))
        for at in range(0, len(ordered), size):
            part = ordered[at : at + size]
            found = self.hidden(pad(part, device=self.view.device))
            for row, hidden in zip(part, found, strict=True):
                self.known[row] = hidden[: len(row)].clone()
