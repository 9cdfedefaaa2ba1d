"""Keys at a token, and the values that would make the model say something else: all facts in one batch.

The search for values resumes at the edited layer, unembeds only the positions that are scored, and leaves a fact
alone once it is done; each fact has its own change, its own Adam state and its own stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from editors.facts.contexts import Demand, Row, check_context
from editors.facts.stages import Stage
from memloc.batches import Batch, pad
from memloc.hooks import Side
from memloc.sites import Kind, Site
from memloc.view import ModelView


@torch.no_grad()
def read_at(
    view: ModelView, sites: Sequence[Site], rows: Sequence[Row], *, side: Side = "input", size: int = 64
) -> dict[Site, Tensor]:
    """What flows into (or out of) `sites` at each row's token: site to `[n, width]`, float64 on the CPU.

    Cost: a forward a batch of `size` rows, up to their tokens, left after the highest site.
    """
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    groups = _alike(view, rows, size)
    for chosen, batch, at in _read(view, rows, groups):
        with view.record(sites, side=side, stop=True) as seen:
            view.hidden(batch)
        for site in sites:
            found[site].append(seen[site][chosen, at].to("cpu", torch.float64))
    return {site: _in_order(parts, groups) for site, parts in found.items()}


@torch.no_grad()
def read_blocks_at(view: ModelView, layer: int, rows: Sequence[Row], *, size: int = 64) -> Tensor:
    """What block `layer` puts out at each row's token: `[n, d]`, float64 on the CPU."""
    found = []
    groups = _alike(view, rows, size)
    for chosen, batch, at in _read(view, rows, groups):
        with view.record_blocks([layer], stop=True) as seen:
            view.hidden(batch)
        found.append(seen[layer][chosen, at].to("cpu", torch.float64))
    return _in_order(found, groups)


def _alike(view: ModelView, rows: Sequence[Row], size: int) -> list[list[int]]:
    """Rows by the number of tokens that are read, `size` a group: padding costs as much as what is read."""
    order = sorted(range(len(rows)), key=lambda index: len(_heard(view, rows[index])))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _heard(view: ModelView, row: Row) -> tuple[int, ...]:
    """Of a row's tokens those its own can hear."""
    return row.ids[: row.at + 1] if view.row.causal else row.ids


def _read(
    view: ModelView, rows: Sequence[Row], groups: Sequence[Sequence[int]]
) -> Iterator[tuple[Tensor, Batch, Tensor]]:
    """A batch of each group, with the number and the token of its rows."""
    for group in groups:
        at = torch.tensor([rows[index].at for index in group], device=view.device)
        batch = pad([_heard(view, rows[index]) for index in group], device=view.device)
        yield torch.arange(len(group), device=at.device), batch, at


def _in_order(parts: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> Tensor:
    """What was read of each group, in the order of the rows."""
    whole = torch.cat(list(parts))
    found = torch.empty_like(whole)
    found[[index for group in groups for index in group]] = whole
    return found


@torch.no_grad()
def chances(view: ModelView, demands: Sequence[Demand], *, size: int = 64) -> list[float]:
    """Probability of each fact's whole target after its bare prompt."""
    found: list[float] = []
    for start in range(0, len(demands), size):
        part = demands[start : start + size]
        rows = [entry.prompts[0].ids + entry.target[:-1] for entry in part]
        batch = pad(rows, device=view.device)
        line = torch.tensor([index for index, entry in enumerate(part) for _ in entry.target], device=view.device)
        column = [len(entry.prompts[0].ids) - 1 + step for entry in part for step in range(len(entry.target))]
        token = torch.tensor([token for entry in part for token in entry.target], device=view.device)
        logs = view.logits_at(batch, line, torch.tensor(column, device=view.device)).log_softmax(-1)
        spoken = logs.gather(1, token[:, None])[:, 0]
        found += torch.zeros(len(part), device=view.device).to(spoken).index_add(0, line, spoken).exp().tolist()
    return found


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How values are searched for.

    Attributes:
        steps: passes; the last one only evaluates, so there are `steps - 1` updates.
        pace: Adam's step size in shares of the clean stream's root mean square: streams differ in scale.
        lr: as published instead, in the stream's units.
        clamp: the change is kept no longer than `clamp` times the clean output.
        weight_decay: weight of ‖δ‖ / ‖clean output‖² (the numerator is not squared).
        kl_weight: weight of KL(edited ‖ clean), in nats, where the fact's essence is asked.
        stop_below: a fact is done when its whole loss is below.
    """

    steps: int = 25
    pace: float = 0.05
    lr: float | None = None
    clamp: float = 4.0
    weight_decay: float = 0.5
    kl_weight: float = 0.0625
    stop_below: float = 0.05

    @classmethod
    def of(cls, settings: object) -> Descent:
        """From those of an editor, which has fields of the same names."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def stride(self, norms: Tensor, width: int) -> Tensor:
        """Adam's step size `[n, 1]` for clean streams of `norms` `[n]`, in the stream's units."""
        lengths = self.pace * norms / width**0.5 if self.lr is None else torch.full_like(norms, self.lr)
        return lengths[:, None]


@dataclass(frozen=True)
class Values:
    """What the search found, one entry a fact.

    Attributes:
        change: [n, d] float32, to be added to the clean output.
        loss: [n] the whole loss with it, nats per token.
        updates: [n] Adam updates made.
        before: [n] probability of the whole target after the bare prompt, clean.
        after: [n] and with the change.
    """

    change: Tensor
    loss: Tensor
    updates: Tensor
    before: Tensor
    after: Tensor


def stream_norm(view: ModelView, layer: int, rows: Sequence[Row]) -> Tensor:
    """Norm of what a change of `layer`'s `mlp.out` is added to, `[n]` float32: the stream after the block.

    Where a norm stands behind the map, what the map puts out and the stream are not to one scale; there the former.
    """
    site = Site(layer, Kind.MLP_OUT)
    behind = view.row.added.get(site.kind)
    clean = read_at(view, [site], rows, side="output")[site] if behind else read_blocks_at(view, layer, rows)
    found: Tensor = clean.norm(dim=1).float()
    return found


def optimise_values(
    view: ModelView,
    layer: int,
    demands: Sequence[Demand],
    scale: Tensor,
    how: Descent,
    *,
    stream: Tensor | None = None,
    size: int = 32,
) -> Values:
    """For every fact the change of what `layer` puts out at its token that makes the model say the target.

    The change is added at the edited token of all of a fact's prompts, and of its essence. Minimised is the mean over
    prompts and target tokens of -log p, and the two terms of `how`. Every fact's result is as if it were alone.

    Cost: a step is a forward and a backward through the blocks above `layer`, for the rows of facts not yet done.

    Args:
        view: the model; no gradient of it is taken.
        layer: whose block output (for an MLP: output of its last map) is changed.
        demands: the facts.
        scale: [n] norm of the clean output that `clamp` and `weight_decay` are relative to.
        how: the settings.
        stream: [n] norm of the stream that `pace` is relative to; None for `scale`.
        size: facts at once.

    Raises:
        InputError: a row longer than the model's context.

    Source: Meng et al. 2022, arXiv:2202.05262, in the form of its published code; batching is ours.
    """
    check_context(demands, view.context)
    strides = how.stride(scale if stream is None else stream, view.width)
    parts = [
        _search(view, layer, demands[at : at + size], scale[at : at + size], strides[at : at + size], how)
        for at in range(0, len(demands), size)
    ]
    names = ("change", "loss", "updates", "before", "after")
    return Values(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _search(
    view: ModelView, layer: int, demands: Sequence[Demand], scale: Tensor, strides: Tensor, how: Descent
) -> Values:
    count, device = len(demands), view.device
    norms, stride = scale.to(device, torch.float32), strides.to(device, torch.float32)
    change = torch.zeros(count, view.width, device=device)
    moments = torch.zeros(2, count, view.width, device=device)
    loss, before, after = (torch.zeros(count, device=device) for _ in range(3))
    updates = torch.zeros(count, dtype=torch.long, device=device)
    active = torch.arange(count, device=device)
    with view.frozen():
        stage = Stage(view, layer, [demands[index] for index in active.tolist()])
        for step in range(how.steps):
            mine = change[active].requires_grad_(True)
            terms = stage.terms(mine)
            total = terms.nll + how.kl_weight * terms.kl + how.weight_decay * mine.norm(dim=1) / norms[active] ** 2
            loss[active], after[active] = total.detach(), terms.spoken
            if step == 0:
                before[active] = terms.spoken
            going = (total.detach() >= how.stop_below).nonzero()[:, 0]
            if step == how.steps - 1 or not len(going):
                break
            (gradient,) = torch.autograd.grad(total[going].sum(), mine)
            chosen = active[going]
            updates[chosen] += 1
            moved = change[chosen] - stride[chosen] * adam(moments, chosen, gradient[going], step + 1)
            longest = how.clamp * norms[chosen]
            change[chosen] = moved * (longest / moved.norm(dim=1).clamp_min(1e-30)).clamp_max(1)[:, None]
            if len(going) < len(active):
                # Facts leave at once: a finished fact costs nothing, and what is left keeps its rows' arithmetic.
                active = chosen
                stage = stage.only(going.tolist())
    return Values(change.cpu(), loss.cpu(), updates.cpu(), before.cpu(), after.cpu())


def adam(moments: Tensor, rows: Tensor, gradient: Tensor, step: int) -> Tensor:
    """Adam's direction for `rows`; both moments are updated in place. Its usual constants."""
    first, second, tiny = 0.9, 0.999, 1e-8
    moments[0, rows] = first * moments[0, rows] + (1 - first) * gradient
    moments[1, rows] = second * moments[1, rows] + (1 - second) * gradient**2
    mean = moments[0, rows] / (1 - first**step)
    return mean / ((moments[1, rows] / (1 - second**step)).sqrt() + tiny)
