"""MEMIT: rewrite many facts at once, by least squares over several MLPs' output maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from editors.batch_edit import BatchEditor
from editors.closed_forms import Factor
from memloc.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Memit(BatchEditor):
    """Make the model say many facts' targets at once, each layer bringing a share, by least squares.

    Attributes:
        weight: λ over the number of the map's inputs f: a fact's key against what should stay. At 1, a fact
            whose key is as unusual as an average token's is half met; at 0, all are met (that is EMMET).

    Source: Meng et al. 2023, arXiv:2210.07229.
    """

    weight: float = 0.05
    name: ClassVar[str] = "memit"

    def metric(self, moment: Tensor) -> Factor:
        return Factor.of(moment, damping=self.damping)

    def slack_of(self, width: int) -> float:
        return self.weight * width
