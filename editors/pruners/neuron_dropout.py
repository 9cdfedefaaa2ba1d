"""Neuron dropout: silence neurons or heads by editing the columns they speak through."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from editors.base import Request
from editors.edit import Edit
from editors.masks import digest, weight_masks
from editors.pruning.silencing import Mode, check_mode, need_biases, silencing
from memloc.provenance import Provenance, settings_of
from memloc.sites import Grain
from memloc.view import ModelView

GRAINS = (Grain.NEURON, Grain.HEAD)


@dataclass(frozen=True, kw_only=True)
class NeuronDropout:
    """Silence the selected neurons (or heads): their columns of the output projection become zero, or smaller.

    The edited model is the model whose activations were replaced: h_i by 0, by factor · h_i, by its mean μ_i over
    ordinary text, or by its value v_i on one token drawn from that text. With W the output projection and b its bias,
    W[:, i] becomes factor · W[:, i], and for a constant c (mean or resample) also b becomes b + Σ_i c_i W[:, i]. The
    same as hooks, which need no bias: `hooked`.

    Attributes:
        mode: "zero"; "scale"; "mean", over all tokens of `text`, or, without it, of `retain`; or "resample": the
            values on one token of that text, the same for all neurons and all layers, drawn from the seed. In a file
            of weights that is a constant, not a new draw each time.
        factor: what "scale" multiplies by; 1 changes nothing and is refused.
        batch_size: rows of a forward pass in "mean"; no effect beyond rounding.

    Cost: none beyond the edit; "mean" one forward over the text, up to the last layer selected, "resample" one over
    the row of the token.

    Source: Chang et al. 2024, arXiv:2311.09060 (zero). The constants as a bias are exact algebra.
    """

    mode: Mode = "zero"
    factor: float = 0.5
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_mode(self.mode, self.factor)

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: no selection, one that is not of neurons or heads, or a constant without text or a bias.
        """
        need_biases(view, request, self.mode)
        made = silencing(view, request, self.mode, self.factor, GRAINS, batch_size=self.batch_size)
        given = {**request.inputs(view), "masks": digest(weight_masks(view, request.need_selection()))}
        seed = request.seed if self.mode == "resample" else None
        return Edit.of(view, made.deltas(view), Provenance("neuron-dropout", settings_of(self), seed, given))

    def hooked(self, view: ModelView, request: Request) -> AbstractContextManager[None]:
        """The same change at inference time: inside the block the model computes what the edited one does."""
        return silencing(view, request, self.mode, self.factor, GRAINS, batch_size=self.batch_size).hooked(view)
