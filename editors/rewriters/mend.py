"""MEND: a trained network turns one gradient into an edit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from editors.base import Request
from editors.deltas import LowRank, add
from editors.edit import Edit
from editors.tuning.descent import working_copy
from editors.tuning.hypernet import Trained, signal
from memloc import progress
from memloc.errors import InputError
from memloc.provenance import Provenance, digest_tensor, settings_of
from memloc.sites import Site
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Mend:
    """The edit a trained network makes of a fact's gradient, in one forward and one backward.

    For each map, ΔW = -α Σ_t δ̃_t x̃_tᵀ over the tokens of prompt and answer: rank at most as many. (x̃, δ̃) is what the
    network makes of what the map reads and how the new answer's negative log-likelihood pulls on it. Several facts are
    edited at once: their changes are summed, none knowing of the others. Which maps is settled when the network is
    trained, so a selection is not asked for. The network belongs to one model, whose digest it carries.

    Attributes:
        trained: file that `memloc train-mend` wrote.

    Raises:
        InputError: no file is named, or no facts.
        ArtifactError: the file is missing or of another kind.
        MismatchError: it was trained on another model.

    Cost: one forward and one backward a fact.

    Source: Mitchell et al. 2022, arXiv:2110.11309.
    """

    trained: str | None = None

    @torch.no_grad()
    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched."""
        facts = request.need_facts()
        if self.trained is None:
            raise InputError("mend needs a trained network; make one with `memloc train-mend` and name it as trained")
        found = Trained.load(self.trained)
        found.check(view, self.trained)
        work, asked = working_copy(view), facts.as_passages("new")
        deltas: dict[Site, LowRank] = {}
        for index in progress.steps(range(len(asked)), "mend"):
            for site, entry in signal(work, asked[index : index + 1], list(found.net.sizes)).items():
                left, right = found.net(site, entry)
                delta = LowRank(left, right)
                deltas[site] = add(deltas[site], delta) if site in deltas else delta  # type: ignore[assignment]
        trained = {f"net {name}": digest_tensor(entry) for name, entry in found.net.tensors().items()}
        provenance = Provenance("mend", settings_of(self), None, {**request.inputs(view), **trained})
        return Edit.of(view, deltas, provenance, notes={"steps": found.step, "trained": found.provenance.to_json()})
