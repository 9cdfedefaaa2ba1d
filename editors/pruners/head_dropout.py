"""Head dropout: silence attention heads by editing the columns of the output projection they speak through."""

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


@dataclass(frozen=True, kw_only=True)
class HeadDropout:
    """Silence the selected attention heads: their columns of `attn.out` become zero, or smaller.

    What head h hands to the output projection is replaced by 0, by factor times itself, by its mean over ordinary
    text, or by its values on one token drawn from that text. Only what the head *says* is touched: query, key and
    value stay, so that a key or value shared by several query heads (grouped queries) still serves the others. The
    same as hooks, which need no bias: `hooked`.

    Attributes:
        mode: "zero"; "scale"; "mean", over all tokens of `text`, or, without it, of `retain`; or "resample": the
            values on one token of that text, the same for all heads and all layers, drawn from the seed.
        factor: what "scale" multiplies by; 1 changes nothing and is refused.
        batch_size: rows of a forward pass in "mean"; no effect beyond rounding.

    Cost: none beyond the edit; "mean" one forward over the text, "resample" one over the row of the token.

    Source: Michel et al. 2019, arXiv:1905.10650 (zero). The constants as a bias are exact algebra.
    """

    mode: Mode = "zero"
    factor: float = 0.5
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_mode(self.mode, self.factor)

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: no selection, one that is not of heads, or a constant without text or a bias.
        """
        need_biases(view, request, self.mode)
        made = silencing(view, request, self.mode, self.factor, (Grain.HEAD,), batch_size=self.batch_size)
        selection = request.need_selection()
        heads = {str(site): [int(head) for head in mask.nonzero()[:, 0]] for site, mask in selection.masks.items()}
        given = {**request.inputs(view), "masks": digest(weight_masks(view, selection))}
        seed = request.seed if self.mode == "resample" else None
        by = Provenance("head-dropout", settings_of(self), seed, given)
        shown = {site: found for site, found in sorted(heads.items()) if found}
        return Edit.of(view, made.deltas(view), by, notes={"heads": shown})

    def hooked(self, view: ModelView, request: Request) -> AbstractContextManager[None]:
        """The same change at inference time: inside the block the model computes what the edited one does."""
        made = silencing(view, request, self.mode, self.factor, (Grain.HEAD,), batch_size=self.batch_size)
        return made.hooked(view)
