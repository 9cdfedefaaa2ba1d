"""Equal budgets: so many places of a localization that they let the same share of the weights change."""

from __future__ import annotations

from editors.masks import share, weight_masks
from memloc.errors import InputError
from memloc.scores import Localization, Selection
from memloc.view import ModelView


def within(view: ModelView, found: Localization, budget: float) -> Selection:
    """The best places of `found` that together hold at most `budget` of the model's weights, at least one of them.

    Weights are counted as an editor is handed them (`weight_masks`): a neuron is its column, a layer all its maps. So
    a budget means the same for every grain, but for a grain whose smallest part is larger than it.

    Args:
        view: the model.
        found: scores of a grain that names weights.
        budget: share of all parameters, in (0, 1].

    Raises:
        InputError: a budget outside its range, or a grain that names no weights.

    Cost: about log2 of the number of places times that of making masks.
    """
    if not 0 < budget <= 1:
        raise InputError(f"budget {budget}: expected a share of the weights above 0 and at most 1")
    few, many = 1, found.count
    while few < many:
        middle = (few + many + 1) // 2
        if share(view, weight_masks(view, found.top(middle))) <= budget:
            few = middle
        else:
            many = middle - 1
    return found.top(few)
