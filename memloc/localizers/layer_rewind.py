"""Rewinding: put a window of layers back to an earlier checkpoint and see whether the passages are still recited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, digest_json, settings_of
from memloc.rewinding.snapshots import Snapshot, names_apart, series
from memloc.rewinding.windows import Passed, Survey, Window, rewound, rewound_passes, suffix_tokens, survey, windows
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site, kinds_named
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class LayerRewind:
    """Score of a layer = rise of the suffix's mean NLL (nats per token) when it is put back to an earlier checkpoint.

    θ' is the model with the parameters of a window of neighbouring layers replaced by the checkpoint's; the rise is
    NLL(θ') - NLL(θ). A layer's score is the mean over checkpoints, and over the windows that hold it, of the rise per
    layer of the window. A twin model that was trained otherwise is swapped in by naming its folder. One axis of
    passages. What lies outside the blocks (embeddings, final norm) stays the model's own. A layer is critical for
    memorization where the passages suffer and ordinary text does not: give some as `contrast`, read "criticality" in
    the notes, or score by it. Weights that moved further hurt more: "moved" in the
    notes is the relative distance of each window from the checkpoint.

    Notes, by window and checkpoint: "rise", "exact_match_drop" (share of passages no longer recited, teacher-forced),
    "contrast_rise", "criticality" (rise minus the contrast's), "moved"; and "nll", "exact_match", "contrast_nll".

    Attributes:
        earlier: folder of a checkpoint, a folder of checkpoint folders (a lab's snapshots), or several with commas
            between; safetensors, one file or sharded; tensors are read block by block, never a second model.
        window: up to so many neighbouring layers are put back together; 0 takes every contiguous window.
        grain: "layer" (whole blocks, norms and biases too, scored at `mlp.out`) or "component" (one kind of map at a
            time, with its bias, scored at that map).
        kinds: only these maps, such as "mlp.in,mlp.out"; "layer" puts them back together, "component" one by one.
        score: "rise", or "criticality": the rise less the mean rise of the contrast set.
        batch_size: passages per forward; no effect on scores.

    Cost: one forward and, for each checkpoint and window, the window's last block and the blocks above, over passages
    and contrast; one block of the checkpoint and one batch's residual streams in memory.

    Source: Maini et al. 2023, arXiv:2307.09542 (rewinding); Dankers & Titov 2024, arXiv:2408.04965 (windows, swapping).
    The share of a window's rise that a layer is given, and criticality as a difference, are ours.
    """

    in_parts: ClassVar[bool] = True

    earlier: str = ""
    window: int = 1
    grain: Literal["layer", "component"] = "layer"
    kinds: str | None = None
    score: Literal["rise", "criticality"] = "rise"
    batch_size: int = 16

    @torch.no_grad()
    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score places, passage by passage; `contrast` is ordinary text, never-trained controls or other passages.

        Raises:
            InputError: no passages, no checkpoint named, no contrast where criticality is scored.
            CheckpointError, MismatchError: a checkpoint is damaged, or of another architecture.
        """
        if not passages:
            raise InputError("layer-rewind: no passages given")
        if self.score == "criticality" and not contrast:
            raise InputError("layer-rewind: criticality is a difference; give a contrast set of ordinary text")
        snapshots, wanted = self._series(), self._windows(view)
        surveys = [survey(view, snapshot, wanted, self._kinds()) for snapshot in snapshots]
        mine = self._measured(view, passages, snapshots, wanted)
        theirs = self._measured(view, contrast, snapshots, wanted) if contrast else None
        inputs = {"model": view.digest, "passages": passages.digest}
        inputs["earlier"] = digest_json([entry.digest for entry in surveys])
        if contrast is not None:
            inputs["contrast"] = contrast.digest
        provenance = Provenance("layer-rewind", settings_of(self), inputs=inputs)
        notes = _notes(snapshots, wanted, mine, theirs, surveys)
        return Localization(Grain(self.grain), self._scores(wanted, mine, theirs), provenance, passages.ids, notes)

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """Forwards over passages and contrast, told without running them."""
        wanted, count = self._windows(view), len(self._series())
        blocks = view.layers + count * rewound_passes(view.layers, wanted)
        found = Cost(0)
        for given in (passages, contrast):
            if given:
                rows, tokens = widest(given, size=self.batch_size)
                one = block_tokens(view, given, size=self.batch_size) // view.layers
                spoken = min(suffix_tokens(given), rows * tokens)
                memory = pass_bytes(view, rows * tokens, context=tokens, unembedded=spoken)
                memory += 8 * view.layers * rows * tokens * view.width + 16 * len(given) * (count * len(wanted) + 1)
                found += Cost(one * blocks, bytes=memory)
        block = sum(parameter.numel() for parameter in view.block(0).parameters())
        return Cost(found.forward, bytes=found.bytes + 24 * block)

    def _series(self) -> tuple[Snapshot, ...]:
        if not self.earlier:
            raise InputError("layer-rewind: no earlier checkpoint; name its folder, or a folder of them, in `earlier`")
        return series(self.earlier)

    def _kinds(self) -> tuple[Kind, ...] | None:
        return kinds_named(self.kinds) if self.kinds else None

    def _windows(self, view: ModelView) -> list[Window]:
        if not 0 <= self.window <= view.layers:
            raise InputError(f"layer-rewind: window {self.window}; the model has {view.layers} layers (0 takes all)")
        kinds: Sequence[Kind | None] = (None,)
        if self.grain == "component":
            kinds = [kind for kind in view.kinds if kind in (self._kinds() or view.kinds)]
        return windows(view.layers, self.window or view.layers, kinds)

    def _measured(
        self, view: ModelView, passages: Passages, snapshots: Sequence[Snapshot], wanted: Sequence[Window]
    ) -> _Measured:
        nll, exact = torch.zeros(len(passages)), torch.zeros(len(passages))
        after = torch.zeros(2, len(wanted), len(snapshots), len(passages))
        place = {window: index for index, window in enumerate(wanted)}
        for batch in steps(list(view.batches(passages, size=self.batch_size)), "rewinding"):
            passed, rows = Passed.of(view, batch), list(batch.rows)
            nll[rows], exact[rows] = (entry.cpu().float() for entry in passed.verdict(passed.hidden))
            for column, snapshot in enumerate(snapshots):
                for window, hidden in rewound(passed, snapshot, wanted, self._kinds()):
                    loss, recited = passed.verdict(hidden)
                    after[0, place[window], column, rows] = loss.cpu().float()
                    after[1, place[window], column, rows] = recited.cpu().float()
        return _Measured(nll, exact, after[0] - nll, exact - after[1])

    def _scores(self, wanted: Sequence[Window], mine: _Measured, theirs: _Measured | None) -> dict[Site, Tensor]:
        rise = mine.rise.mean(1)
        if self.score == "criticality" and theirs is not None:
            rise = rise - theirs.rise.mean((1, 2))[:, None]
        held: dict[Site, list[Tensor]] = {}
        for window, scores in zip(wanted, rise, strict=True):
            for layer in range(window.start, window.stop + 1):
                held.setdefault(Site(layer, window.kind or Kind.MLP_OUT), []).append(scores / window.width)
        return {site: torch.stack(parts).mean(0) for site, parts in sorted(held.items())}


@dataclass(frozen=True)
class _Measured:
    """What was measured on one set: nll and exact [n]; rise and drop [windows, checkpoints, n]."""

    nll: Tensor
    exact: Tensor
    rise: Tensor
    drop: Tensor


def _notes(
    snapshots: Sequence[Snapshot],
    wanted: Sequence[Window],
    mine: _Measured,
    theirs: _Measured | None,
    surveys: Sequence[Survey],
) -> dict[str, Any]:
    names = names_apart(snapshots)

    def table(figures: Tensor) -> Mapping[str, Mapping[str, float]]:
        return {
            str(window): {name: float(value) for name, value in zip(names, row, strict=True)}
            for window, row in zip(wanted, figures, strict=True)
        }

    moved = torch.tensor([[entry.moved[window] for entry in surveys] for window in wanted])
    found: dict[str, Any] = {
        "nll": float(mine.nll.mean()),
        "exact_match": float(mine.exact.mean()),
        "rise": table(mine.rise.mean(2)),
        "exact_match_drop": table(mine.drop.mean(2)),
        "moved": table(moved),
    }
    if theirs is not None:
        found["contrast_nll"] = float(theirs.nll.mean())
        found["contrast_rise"] = table(theirs.rise.mean(2))
        found["criticality"] = table(mine.rise.mean(2) - theirs.rise.mean(2))
    return found
