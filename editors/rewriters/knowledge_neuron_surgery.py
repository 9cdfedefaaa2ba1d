"""Knowledge-neuron surgery: erase, amplify or rewrite what chosen neurons add to the stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from editors.base import Request
from editors.deltas import Delta, LowRank, Sparse
from editors.edit import Edit
from editors.facts.contexts import Row
from editors.facts.keys_values import read_at
from editors.masks import digest, weight_masks
from memloc.errors import InputError
from memloc.passages import Fact, Facts
from memloc.provenance import Provenance, settings_of
from memloc.scores import Selection
from memloc.sites import OUTSIDE, Grain, Kind, Site
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class KnowledgeNeuronSurgery:
    """Change the value of each selected neuron, its column w_i of `mlp.out`.

    - "erase": w_i := 0.
    - "amplify": w_i := factor · w_i.
    - "replace": w_i := w_i + c_i (new · e(new answer) - old · e(old answer)), e(a) being the row of the unembedding for
      the answer's first token that the two answers do not share. One matrix of rank one a layer.

    c_i is 1, or with `scale` "column" the length of w_i, and e then has length one, so that `old` and `new` are shares
    of what the neuron says already, in every model. With `signed`, c_i has the sign of the neuron's activation at the
    last token of the facts' prompts: a neuron that is below zero there (gated and smooth activations) would otherwise
    push the wrong way. e is written as it is stored: neither the gain of the final norm nor that of a norm behind the
    block is taken out, so in families that have one the direction is bent by it. Several facts share the neurons: what
    is added is the mean over them, which suits facts of one answer only.

    Attributes:
        mode: "erase", "amplify" or "replace"; the last needs facts.
        factor: of "amplify"; 1 changes nothing and is refused.
        old: weight of the old answer's direction, subtracted (λ1).
        new: weight of the new answer's, added (λ2).
        scale: "column" or "raw".
        signed: whether c_i has the activation's sign.

    Raises:
        InputError: no selection of neurons, "replace" without facts or with equal answers, embeddings of another width
            than the stream.

    Cost: none for "erase" and "amplify"; "replace" one forward over the facts' prompts where `signed`.

    Source: Dai et al. 2022, arXiv:2104.08696 (erase; replace with λ1 = 1, λ2 = 8). Sign and scale are ours.
    """

    mode: Literal["erase", "amplify", "replace"] = "erase"
    factor: float = 2.0
    old: float = 1.0
    new: float = 1.0
    scale: Literal["column", "raw"] = "column"
    signed: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("erase", "amplify", "replace") or self.scale not in ("column", "raw"):
            raise InputError(f"mode {self.mode!r}, scale {self.scale!r}: expected 'erase', 'amplify' or 'replace', "
                             "and 'column' or 'raw'")  # fmt: skip
        if self.mode == "amplify" and self.factor == 1:
            raise InputError("factor 1 changes nothing; give another")
        if self.mode == "replace" and not (self.old or self.new):
            raise InputError("old 0 and new 0 change nothing; give one of them")

    @classmethod
    def published(cls) -> KnowledgeNeuronSurgery:
        """The paper's: λ1 = 1, λ2 = 8, embeddings as they are stored, whatever the sign."""
        return cls(mode="replace", old=1.0, new=8.0, scale="raw", signed=False)

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched."""
        selection = request.need_selection()
        if selection.grain is not Grain.NEURON:
            raise InputError(f"a selection of {selection.grain}s has no values of neurons; expected neurons")
        masks = weight_masks(view, selection)
        deltas: dict[Site, Delta]
        if self.mode == "replace":
            deltas = self._replaced(view, request.need_facts(), selection, tuple(masks))
        else:
            change = (0.0 if self.mode == "erase" else self.factor) - 1.0
            deltas = {site: Sparse.of(_value(view, site) * change, mask) for site, mask in masks.items()}
        given = {**request.inputs(view), "masks": digest(masks)}
        notes = {"neurons": {str(site): int(selection.masks[site].sum()) for site in masks}}
        provenance = Provenance("knowledge-neuron-surgery", settings_of(self), None, given)
        return Edit.of(view, deltas, provenance, notes=notes)

    def _replaced(
        self, view: ModelView, facts: Facts, selection: Selection, sites: tuple[Site, ...]
    ) -> dict[Site, Delta]:
        shift = torch.stack([self._shift(view, *_tokens(fact)) for fact in facts]).mean(0)
        rows = [_asked(view, fact) for fact in facts]
        read = read_at(view, sites, rows) if self.signed else {}
        deltas: dict[Site, Delta] = {}
        for site in sites:
            share = selection.masks[site].float()
            if self.scale == "column":
                share = share * _value(view, site).norm(dim=0)
            if self.signed:
                share = share * torch.where(read[site].mean(0) < 0, -1.0, 1.0).float()
            deltas[site] = LowRank(shift[:, None].clone(), share[None])
        return deltas

    def _shift(self, view: ModelView, new: int, old: int) -> Tensor:
        """[d], what a neuron says more of."""
        table = view.weight(Site(OUTSIDE, Kind.UNEMBED)).detach()
        if table.shape[1] != view.width:
            raise InputError(f"embeddings of {table.shape[1]} for a stream of {view.width}; use erase or amplify")
        added, taken = table[new].cpu().float(), table[old].cpu().float()
        if self.scale == "column":
            added, taken = added / added.norm(), taken / taken.norm()
        return self.new * added - self.old * taken


def _asked(view: ModelView, fact: Fact) -> Row:
    """Where the model says the answer: at the prompt's end, or at the mask token in the answer's place."""
    ids, mask = fact.prompt.ids, view.mask_token
    if mask is None:
        return Row(ids, len(ids) - 1)
    return Row((*ids, *[mask] * len(fact.target_true), *fact.prompt.after), len(ids))


def _tokens(fact: Fact) -> tuple[int, int]:
    """The first pair of tokens, new and old, in which the answers differ."""
    new, old = fact.target, fact.target_true
    for mine, its in zip(new, old, strict=False):
        if mine != its:
            return mine, its
    raise InputError(f"fact {fact.id!r}: old and new answer begin alike to the end of the shorter")


def _value(view: ModelView, site: Site) -> Tensor:
    return view.weight(site).detach().cpu().float()
