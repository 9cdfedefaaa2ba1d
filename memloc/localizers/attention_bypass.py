"""Attention bypassed: what the suffix loses when a layer's, or a head's, tokens see themselves alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from memloc import hooks
from memloc.batches import Batch
from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.running.outcomes import Outcome, outcome_bytes
from memloc.running.patterns import short_circuit
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView, Tail


@dataclass(frozen=True, kw_only=True)
class AttentionBypass:
    """Score of a layer or head = rise of the suffix's NLL when its attention matrix is the identity, nats per token.

    Every position then attends to itself alone: value and output projections stay, what is taken away is the moving of
    information between tokens. Heads are bypassed one at a time, layers one at a time or with their neighbours. One
    axis of passages.

    Attributes:
        grain: "layer" or "head".
        span: layers only. "layer": one at a time; "window": `width` consecutive layers with the scored one in their
            middle, fewer at the ends; "quartile": the quarter of the model the layer belongs to, one score for all.
        width: of a window, odd.
        batch_size: passages per forward; no effect on scores.

    Notes:
        With nothing changed ("clean") and for every change, means over passages of nll, accuracy (share of suffix
        tokens that are the first choice), exact (share of passages recited, teacher-forced) and entropy (nats, of what
        is expected at the suffix's positions); and the same on `contrast` where there is one, to see what a change
        costs text that was not memorized.

    Cost: one forward a passage, kept, and one for each change from its lowest layer on: half a forward on average, so
    about l/2 forwards for layers and l·h/2 for heads. The same again for `contrast`.

    Source: Menta et al. 2025 (AikyamLab/llm-memorization), per layer and quartile; heads, windows, the loss instead of
    exact match and the reuse of what lies below are ours.
    """

    grain: Literal["layer", "head"] = "layer"
    span: Literal["layer", "window", "quartile"] = "layer"
    width: int = 3
    batch_size: int = 16
    in_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.width < 1 or self.width % 2 == 0 or self.batch_size < 1:
            raise InputError(f"width {self.width}, batch_size {self.batch_size}: expected odd, and at least 1")
        if self.grain == "head" and self.span != "layer":
            raise InputError(f"attention-bypass: a span of {self.span} is of layers; leave span off, or take layers")

    @torch.no_grad()
    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score layers or heads, passage by passage; `contrast` is other text, of which the notes then tell.

        Raises:
            InputError: no passages.
        """
        if not passages:
            raise InputError("attention-bypass: no passages given")
        clean, changed = self._outcomes(view, passages)
        notes: dict[str, Any] = {"passages": _told(clean, changed)}
        inputs = {"model": view.digest, "passages": passages.digest}
        if contrast:
            notes["contrast"] = _told(*self._outcomes(view, contrast))
            inputs["contrast"] = contrast.digest
        scores: dict[Site, Tensor] = {}
        for change, outcome in changed.items():
            rise = outcome.nll - clean.nll
            for layer in change.scored:
                if change.head is None:
                    scores[Site(layer, Kind.MLP_OUT)] = rise
                else:
                    heads = scores.setdefault(Site(layer, Kind.ATTN_OUT), rise.new_zeros(len(rise), view.heads))
                    heads[:, change.head] = rise
        provenance = Provenance("attention-bypass", settings_of(self), inputs=inputs)
        return Localization(Grain(self.grain), scores, provenance, passages.ids, notes)

    def changes(self, view: ModelView) -> tuple[Change, ...]:
        """What is changed, one after another."""
        layers = range(view.layers)
        if self.grain == "head":
            return tuple(Change((layer,), (layer,), head) for layer in layers for head in range(view.heads))
        if self.span == "quartile":
            quarters = [tuple(layer for layer in layers if layer * 4 // view.layers == part) for part in range(4)]
            return tuple(Change(quarter, quarter) for quarter in quarters if quarter)
        reach = self.width // 2 if self.span == "window" else 0
        windows = [tuple(range(max(0, at - reach), min(view.layers, at + reach + 1))) for at in layers]
        return tuple(Change(window, (layer,)) for layer, window in zip(layers, windows, strict=True))

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """One whole forward, and the blocks from its lowest layer on for each change."""
        total = Cost(0)
        above = sum(view.layers - min(change.layers) for change in self.changes(view))
        for given in (passages, contrast or Passages(())):
            if given:
                rows, tokens = widest(given, size=self.batch_size)
                once = block_tokens(view, given, size=self.batch_size)
                memory = pass_bytes(view, rows * tokens, context=tokens) + outcome_bytes(view, rows * tokens)
                memory += 8 * rows * tokens * (view.layers + 8) * max(view.width, view.heads * view.head_width)
                memory += 256 * len(given) * (1 + len(self.changes(view)))
                total += Cost(once + once * above // view.layers, bytes=memory)
        return total

    def _outcomes(self, view: ModelView, passages: Passages) -> tuple[Outcome, dict[Change, Outcome]]:
        """What becomes of passages with nothing changed, and with each change."""
        clean: list[tuple[Batch, Outcome]] = []
        changed: dict[Change, list[tuple[Batch, Outcome]]] = {change: [] for change in self.changes(view)}
        for batch in steps(list(view.batches(passages, size=self.batch_size)), "attention bypassed"):
            ladder, hidden = Ladder.of(view, batch)
            clean.append((batch, Outcome.of(view, batch, hidden)))
            for change, found in changed.items():
                heads = None if change.head is None else [change.head]
                with short_circuit(view, change.layers, heads):
                    hidden = ladder.hidden(min(change.layers))
                found.append((batch, Outcome.of(view, batch, hidden)))
        gathered = {change: Outcome.gathered(found, len(passages)) for change, found in changed.items()}
        return Outcome.gathered(clean, len(passages)), gathered


@dataclass(frozen=True)
class Change:
    """Attention to be bypassed.

    Attributes:
        layers: where.
        scored: which layers' score it is.
        head: which head of theirs, or None for all.
    """

    layers: tuple[int, ...]
    scored: tuple[int, ...]
    head: int | None = None

    def __str__(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        where = f"L{first}" if first == last else f"L{first}-L{last}"
        return where if self.head is None else f"{where}.{self.head}"


@dataclass(frozen=True)
class Ladder:
    """What enters each block of a batch, and what it is called with: a place to start from below any layer."""

    view: ModelView
    entering: Mapping[int, Tensor]
    calls: Mapping[int, hooks.Call]

    @classmethod
    def of(cls, view: ModelView, batch: Batch) -> tuple[Ladder, Tensor]:
        """Run `batch` once; with it, the residual stream after the final norm."""
        blocks = {layer: view.block(layer) for layer in range(view.layers)}
        with hooks.record_calls(blocks) as calls, view.record_blocks(blocks, side="input") as entering:
            hidden = view.hidden(batch)
        return cls(view, entering, calls), hidden

    def hidden(self, layer: int) -> Tensor:
        """After the final norm, with blocks `layer` and above run again, changed as they may be."""
        return Tail(self.view, layer - 1, self.entering[layer], self.calls).hidden(self.entering[layer])


def _told(clean: Outcome, changed: Mapping[Change, Outcome]) -> dict[str, Any]:
    return {"clean": clean.means(), "changed": {str(change): outcome.means() for change, outcome in changed.items()}}
