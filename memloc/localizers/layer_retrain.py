"""Retraining: reset a window of layers, train it alone on clean text, and see whether the passages come back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError
from memloc.objectives import suffix_nll
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, digest_json, settings_of
from memloc.rewinding.groups import descend, substituted
from memloc.rewinding.snapshots import Snapshot, names_apart, series
from memloc.rewinding.windows import Part, Passed, Window, earlier_parts, part, suffix_tokens, survey, windows
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site, kinds_named
from memloc.view import ModelView

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerRetrain:
    """Score of a layer = rise of the suffix's mean NLL (nats per token) that training it on clean text leaves behind.

    A window of neighbouring layers is reset to an earlier checkpoint (or to the initialisation), then trained alone,
    by Adam on the suffixes of `contrast`, which is clean text, with everything else frozen. If the passages come back
    although they are not trained on, the rest of the model held them and the window was redundant for them: its score,
    NLL(retrained) - NLL(model), is low. Where the contrast set's loss is not back either, training was too short to
    say: see the notes. A layer's score is the mean over checkpoints and over the windows that hold it. One axis of
    passages; training does not depend on them.

    Notes, by window and checkpoint: "reset" and "retrained" NLL of the passages, "returned" (share of the reset's rise
    that retraining took back), "exact_match_retrained", "contrast_reset", "contrast_retrained"; and "nll",
    "exact_match", "contrast_nll".

    Attributes:
        earlier: folder of a checkpoint, a folder of checkpoint folders, or several with commas between; safetensors.
        window: so many neighbouring layers are reset together, in every contiguous window.
        kinds: only these maps of the layers, such as "mlp.in,mlp.out"; by default whole blocks.
        steps: of Adam.
        lr: Adam's learning rate.
        rows: contrast rows in each step.
        seed: of the order in which they are shown.
        batch_size: passages per forward when judging; no effect on scores.

    Cost: for each window and checkpoint, `steps` forwards of `rows` rows and backwards from the top to the window, and
    two forwards over passages and contrast; the window's parameters five times in float32.

    Source: Maini et al. 2023, arXiv:2307.09542; Dankers & Titov 2024, arXiv:2408.04965. The score is ours.
    """

    earlier: str = ""
    window: int = 1
    kinds: str | None = None
    steps: int = 30
    lr: float = 1e-3
    rows: int = 8
    seed: int = 0
    batch_size: int = 16

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score layers, passage by passage; `contrast` is the clean text that is trained on.

        Raises:
            InputError: no passages, no contrast, no checkpoint named.
            CheckpointError, MismatchError: a checkpoint is damaged, or of another architecture.
        """
        if not passages:
            raise InputError("layer-retrain: no passages given")
        if not contrast:
            raise InputError("layer-retrain: needs clean text to train on, as contrast")
        snapshots, wanted = self._series(), self._windows(view)
        surveys = [survey(view, snapshot, self._all(view), self._kinds()) for snapshot in snapshots]
        clean, other = self._judged(view, passages, {}), self._judged(view, contrast, {})
        notes: dict[str, Any] = {"nll": float(clean[0].mean()), "exact_match": float(clean[1].mean()),
                                 "contrast_nll": float(other[0].mean())}  # fmt: skip
        rises: dict[Window, list[Tensor]] = {window: [] for window in wanted}
        runs = [(window, place) for window in wanted for place in enumerate(names_apart(snapshots))]
        for window, (index, name) in steps(runs, "retraining"):
            after, said = self._one(view, passages, contrast, window, snapshots[index])
            rises[window].append(after - clean[0])
            gap = said["reset"] - notes["nll"]
            said["returned"] = (said["reset"] - said["retrained"]) / gap if abs(gap) > 1e-6 else 0.0
            for key, value in said.items():
                notes.setdefault(key, {}).setdefault(str(window), {})[name] = value
        inputs = {"model": view.digest, "passages": passages.digest, "contrast": contrast.digest}
        inputs["earlier"] = digest_json([entry.digest for entry in surveys])
        provenance = Provenance("layer-retrain", settings_of(self), seed=self.seed, inputs=inputs)
        return Localization(Grain.LAYER, _scores(rises), provenance, passages.ids, notes)

    def _one(
        self, view: ModelView, passages: Passages, contrast: Passages, window: Window, snapshot: Snapshot
    ) -> tuple[Tensor, dict[str, float]]:
        """Reset one window, train it: NLL of each passage afterwards, and figures for the notes."""
        parts = {layer: part(view, layer, self._kinds()) for layer in range(window.start, window.stop + 1)}
        old = {layer: earlier_parts(view, snapshot, entry) for layer, entry in parts.items()}
        reset, trained = _composed(view, parts, _flat(old)), self._trained(view, contrast, parts, old)
        found = self._judged(view, passages, trained)
        return found[0], {
            "reset": float(self._judged(view, passages, reset)[0].mean()),
            "retrained": float(found[0].mean()),
            "exact_match_retrained": float(found[1].mean()),
            "contrast_reset": float(self._judged(view, contrast, reset)[0].mean()),
            "contrast_retrained": float(self._judged(view, contrast, trained)[0].mean()),
        }

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """Training and judging, told without running it."""
        if not contrast:
            raise InputError("layer-retrain: needs clean text to train on as contrast")
        wanted, count = self._windows(view), len(self._series())
        judging = sum(block_tokens(view, given, size=self.batch_size) for given in (passages, contrast))
        forward, backward = judging, 0
        tokens = sum(batch.ids.numel() for batch in self._batches(view, contrast))
        for window in wanted:
            forward += count * (2 * judging + view.layers * tokens)
            backward += count * (view.layers - window.start) * tokens
        return Cost(forward, backward, self._bytes(view, passages, contrast))

    def _bytes(self, view: ModelView, passages: Passages, contrast: Passages) -> int:
        block = sum(parameter.numel() for parameter in view.block(0).parameters())
        longest = max(len(item.ids) for item in contrast)
        training = pass_bytes(view, self.rows * longest, context=longest, grad=True, unembedded=self.rows * longest)
        judging = 0
        for given in (passages, contrast):
            rows, tokens = widest(given, size=self.batch_size)
            spoken = min(suffix_tokens(given), rows * tokens)
            judging = max(judging, pass_bytes(view, rows * tokens, context=tokens, unembedded=spoken))
        results = 64 * len(passages) * len(self._windows(view)) + 16 * self.steps * self.rows * longest
        return max(training, judging) + 64 * self.window * block + results

    def _series(self) -> tuple[Snapshot, ...]:
        if not self.earlier:
            raise InputError("layer-retrain: no earlier checkpoint; name its folder, or a folder of them, in `earlier`")
        return series(self.earlier)

    def _kinds(self) -> tuple[Kind, ...] | None:
        return kinds_named(self.kinds) if self.kinds else None

    def _windows(self, view: ModelView) -> list[Window]:
        if not 1 <= self.window <= view.layers:
            raise InputError(f"layer-retrain: window {self.window}; the model has {view.layers} layers")
        return [window for window in windows(view.layers, self.window) if window.width == self.window]

    def _all(self, view: ModelView) -> list[Window]:
        return windows(view.layers, 1)

    def _batches(self, view: ModelView, contrast: Passages) -> Iterator[Batch]:
        """The rows of each step: the contrast set again and again, shuffled each time."""
        generator = torch.Generator().manual_seed(self.seed)
        waiting: list[int] = []
        for _ in range(self.steps):
            while len(waiting) < min(self.rows, len(contrast)):
                waiting += torch.randperm(len(contrast), generator=generator).tolist()
            chosen = sorted(set(waiting[: self.rows]))
            del waiting[: self.rows]
            yield next(view.batches(Passages(tuple(contrast[row] for row in chosen)), size=self.rows))

    def _trained(
        self, view: ModelView, contrast: Passages, parts: Mapping[int, Part], reset: Mapping[int, Tensors]
    ) -> dict[str, Tensor]:
        """The model's parameters of the window after training, by their full names."""
        shown = list(self._batches(view, contrast))

        def loss(step: int) -> Tensor:
            return suffix_nll(view, shown[step]).mean()

        compose = partial(_composed, view, parts)
        return descend(view.model, _flat(reset), loss, count=self.steps, lr=self.lr, compose=compose)

    @torch.no_grad()
    def _judged(self, view: ModelView, passages: Passages, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """Of each passage, [n]: mean nats per suffix token with `tensors` in place, and whether it is recited."""
        nll, exact = torch.zeros(len(passages)), torch.zeros(len(passages))
        for batch in view.batches(passages, size=self.batch_size):

            def run(batch: Batch = batch) -> tuple[Tensor, Tensor]:
                passed = Passed.of(view, batch)
                return passed.verdict(passed.hidden)

            loss, recited = substituted(view.model, tensors, run)
            nll[list(batch.rows)], exact[list(batch.rows)] = loss.cpu().float(), recited.cpu().float()
        return nll, exact


def _flat(tensors: Mapping[int, Tensors]) -> dict[str, Tensor]:
    return {f"{layer}.{name}": entry for layer, entries in tensors.items() for name, entry in entries.items()}


def _composed(view: ModelView, parts: Mapping[int, Part], tensors: Tensors) -> dict[str, Tensor]:
    """Full parameter names to what stands in the model, from tensors named by layer and place in the block."""
    found: dict[str, Tensor] = {}
    for layer, entry in parts.items():
        mine = {name: tensors[f"{layer}.{name}"] for name in entry.rows}
        composed = entry.composed(view, mine)
        found |= {f"{view.row.blocks}.{layer}.{name}": tensor for name, tensor in composed.items()}
    return found


def _scores(rises: Mapping[Window, list[Tensor]]) -> dict[Site, Tensor]:
    held: dict[Site, list[Tensor]] = {}
    for window, parts in rises.items():
        for layer in range(window.start, window.stop + 1):
            held.setdefault(Site(layer, Kind.MLP_OUT), []).append(torch.stack(parts).mean(0))
    return {site: torch.stack(parts).mean(0) for site, parts in sorted(held.items())}
