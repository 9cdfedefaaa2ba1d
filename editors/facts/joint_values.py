"""Values of many keys searched for together, at the price that a closed form will charge for them.

Searched for one by one, values are as large as they happen to become, and what it costs to bring them about is seen
only afterwards. But that cost is known beforehand: the gentlest change that adds R to the answers to keys K moves what
should stay by trace(R A Rᵀ), A = (KᵀC⁻¹K)⁻¹, on average over it. So R is searched for under that price, all facts
together: keys that are alike then agree on what they can share. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from editors.facts.contexts import Demand, check_context
from editors.facts.keys_values import Descent, Values, adam
from editors.facts.stages import Stage
from memloc import progress
from memloc.view import ModelView


def optimise_jointly(
    view: ModelView,
    layer: int,
    demands: Sequence[Demand],
    keys: Sequence[Sequence[int]],
    price: Tensor,
    scale: Tensor,
    how: Descent,
    *,
    size: int = 32,
) -> Values:
    """For every key the change of what `layer` puts out, such that all targets are said and the price is least.

    Minimised is the sum over facts of the mean over prompts and target tokens of max(0, -log p - stop_below), plus
    trace(R price Rᵀ), by Adam with a step size that falls to nothing over the second half.

    Cost: a step is a forward and a backward through the blocks above `layer`, for all rows.

    Args:
        view: the model; no gradient of it is taken.
        layer: whose output is changed.
        demands: the facts.
        keys: for every fact the key of each of its prompts, and of its essence.
        price: [k, k], symmetric.
        scale: [n] norm of the clean output of each fact's bare prompt; `clamp` is relative to it.
        how: the settings; `lr` and `weight_decay` are not used.
        size: facts at once.

    Returns:
        Values, `change` of which has an entry a key, the rest an entry a fact.
    """
    check_context(demands, view.context)
    count, device = price.shape[0], view.device
    owner = torch.zeros(count, dtype=torch.long)
    for fact, own in enumerate(keys):
        owner[list(own)] = fact
    stride = replace(how, lr=None).stride(scale.to(device, torch.float32), view.width)[owner]
    longest = how.clamp * scale.to(device, torch.float32)[owner]
    charge = price.to(device, torch.float32)
    change, moments = torch.zeros(count, view.width, device=device), torch.zeros(2, count, view.width, device=device)
    every = torch.arange(count, device=device)
    with view.frozen():
        stages = _stages(view, layer, demands, keys, size)
        before = _spoken(stages, change)[1]
        for step in progress.steps(range(how.steps), "values"):
            gradient = 2 * charge @ change
            for stage, mine in stages:
                part = change[mine].requires_grad_(True)
                said, kl = stage.spoken(part)
                short = ((-said - how.stop_below).clamp_min(0) * stage.share.to(said)).sum() + how.kl_weight * kl.sum()
                gradient[mine] += torch.autograd.grad(short, part)[0]
            left = min(1.0, 2 * (1 - step / how.steps))
            change = change - left * stride * adam(moments, every, gradient, step + 1)
            change *= (longest / change.norm(dim=1).clamp_min(1e-30)).clamp_max(1)[:, None]
        loss, after = _spoken(stages, change)
    updates = torch.full((len(demands),), how.steps)
    return Values(change.cpu(), loss.cpu(), updates, before.cpu(), after.cpu())


def _stages(
    view: ModelView, layer: int, demands: Sequence[Demand], keys: Sequence[Sequence[int]], size: int
) -> list[tuple[Stage, Tensor]]:
    """Some facts each, and which keys they have."""
    found = []
    for start in range(0, len(demands), size):
        mine = sorted({key for fact in keys[start : start + size] for key in fact})
        place = {key: index for index, key in enumerate(mine)}
        rows = [place[key] for fact in keys[start : start + size] for key in fact]
        stage = Stage(view, layer, demands[start : start + size], rows)
        found.append((stage, torch.tensor(mine, device=view.device)))
    return found


@torch.no_grad()
def _spoken(stages: Sequence[tuple[Stage, Tensor]], change: Tensor) -> tuple[Tensor, Tensor]:
    """Each fact's mean nats per token, and the probability of its target after the bare prompt."""
    terms = [stage.terms(change[mine]) for stage, mine in stages]
    return torch.cat([term.nll for term in terms]), torch.cat([term.spoken for term in terms])
