"""Values searched for beside a decoy: the MLP's output and the attention's move together, and the MLP's part is kept.

What a block adds comes from both. A value that has to bring the target about alone must also do what attention would
have done; searched for together, each does its own part, and what attention does is then left out (PMET).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.facts.contexts import Demand, check_context
from editors.facts.keys_values import Descent, Values, adam
from editors.facts.stages import Stage
from memloc.batches import Batch, pad
from memloc.sites import Kind, Site
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class PairedDescent:
    """How both are searched for.

    Attributes:
        search: as of one value. Its `weight_decay` weighs the norms of both; its `stop_below` is of the target's loss,
            and only used where no essence is asked for.
        relief: factor of the target's loss once it is the likeliest answer everywhere it is asked for.
        calm: a fact whose essence is asked for is done when that is so and the essence's KL is at most this, in nats.
    """

    search: Descent
    relief: float = 0.1
    calm: float = 0.01


def optimise_pairs(
    view: ModelView, layer: int, demands: Sequence[Demand], scale: Tensor, how: PairedDescent, *, size: int = 32
) -> Values:
    """For every fact the change of what `mlp.out` puts out, found together with one of what `attn.out` puts out.

    Both are added at the edited token of all of a fact's prompts, and of its essence. Minimised is the mean over
    prompts and target tokens of -log p (times `relief` where the target is the likeliest already), KL and decay as in
    `how`. Each change is kept within `clamp` times `scale`. Every fact's result is as if it were alone.

    Cost: a step is a forward and a backward through block `layer` and those above.

    Args:
        view: the model; no gradient of it is taken.
        layer: whose MLP and attention are changed.
        demands: the facts.
        scale: [n] norm of the clean output.
        how: the settings.
        size: facts at once.

    Returns:
        Values; `change` is the MLP's. `after` is with both, so what the MLP alone brings about is less.

    Raises:
        InputError: a row longer than the model's context.

    Source: Li et al. 2024, arXiv:2308.08742. Batching is ours.
    """
    check_context(demands, view.context)
    parts = []
    for start in range(0, len(demands), size):
        part = list(demands[start : start + size])
        with view.frozen():
            parts.append(_search(_Pair(view, layer, part), scale[start : start + size], how))
    names = ("change", "loss", "updates", "before", "after")
    return Values(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


class _Pair:
    """Rows of the facts, run up to the block below the edited one once."""

    def __init__(self, view: ModelView, layer: int, demands: Sequence[Demand]) -> None:
        self.view, self.layer = view, layer
        # Which positions are scored, and how, does not depend on where the model is changed.
        self.plan = Stage(view, layer, demands)
        rows = [(ids, at) for demand in demands for ids, at in _rows(demand)]
        self.batch: Batch = pad([ids for ids, _ in rows], device=view.device)
        self.tail = view.tail(layer - 1, self.batch) if layer else None
        self.sites = Site(layer, Kind.MLP_OUT), Site(layer, Kind.ATTN_OUT)

    def terms(self, change: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of every fact with `change` [n, 2, d]: nats, KL, log p of the bare target, whether it is the likeliest."""
        plan, line = self.plan, torch.arange(len(self.plan.fact), device=self.view.device)

        def moved(site: Site, output: Tensor) -> Tensor:
            more = change[plan.fact, self.sites.index(site)]
            added = output[line, plan.at] + more.to(output.dtype)
            return output.index_put((line, plan.at), added)

        with self.view.replace(self.sites, moved, side="output"):
            hidden = self.tail.hidden(self.tail.residual) if self.tail else self.view.hidden(self.batch)
        logs = self.view.unembed(hidden[plan.row, plan.column]).log_softmax(-1)
        asked, now = logs[: plan.asked], logs[plan.asked :]
        said = asked.gather(1, plan.token[:, None])[:, 0]
        zero = said.new_zeros(len(plan.demands))
        nll = -zero.index_add(0, plan.owner, said * plan.share.to(said))
        bare = zero.index_add(0, plan.owner[plan.bare], said.detach()[plan.bare])
        kl = zero.index_add(0, plan.kept, (now.exp() * (now - plan.clean)).sum(1))
        wrong = zero.index_add(0, plan.owner, (asked.argmax(1) != plan.token).to(said))
        return nll.float(), kl.float(), bare.float(), wrong == 0


def _search(pair: _Pair, scale: Tensor, how: PairedDescent) -> Values:
    count, device, search = len(scale), pair.view.device, how.search
    norms = scale.to(device, torch.float32)
    stride = search.stride(norms, pair.view.width)[:, :, None]
    change, moments = (torch.zeros(*size, count, 2, pair.view.width, device=device) for size in ((), (2,)))
    updates = torch.zeros(count, dtype=torch.long, device=device)
    going = torch.arange(count, device=device)
    before = torch.zeros(count, device=device)
    quiet = torch.tensor([demand.essence is None for demand in pair.plan.demands], device=device)
    for step in range(search.steps):
        mine = change.clone().requires_grad_(True)
        nll, kl, bare, likeliest = pair.terms(mine)
        decay = search.weight_decay * mine.norm(dim=2).sum(1) / norms**2
        total = torch.where(likeliest, how.relief, 1.0) * nll + search.kl_weight * kl + decay
        before = bare.exp() if step == 0 else before
        # A fact that was done once stays done.
        done = torch.where(quiet, nll.detach() < search.stop_below, likeliest & (kl.detach() <= how.calm))
        going = going[~done[going]]
        if step == search.steps - 1 or not len(going):
            break
        (gradient,) = torch.autograd.grad(total[going].sum(), mine)
        updates[going] += 1
        after = change[going] - stride[going] * adam(moments, going, gradient[going], step + 1)
        longest = search.clamp * norms[going]
        change[going] = after * (longest[:, None] / after.norm(dim=2).clamp_min(1e-30)).clamp_max(1)[:, :, None]
    return Values(
        change[:, 0].cpu(), total.detach().cpu(), updates.cpu(), before.detach().cpu(), bare.exp().detach().cpu()
    )


def _rows(demand: Demand) -> list[tuple[tuple[int, ...], int]]:
    """In the order in which `Stage` scores them."""
    rows = [(row.ids + demand.target[:-1], row.at) for row in demand.prompts]
    return rows + ([(demand.essence.ids, demand.essence.at)] if demand.essence is not None else [])
