"""Zero-out: what the suffix loses when one neuron or head is silenced. Exact for all of them, or for a shortlist."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from memloc.ablations.gates import gate_count, gate_gradients, gate_sites
from memloc.ablations.variants import Variants, variant_bytes
from memloc.batches import length_read
from memloc.costs import Cost, pass_bytes
from memloc.errors import InputError
from memloc.passages import Passage, Passages
from memloc.progress import steps
from memloc.provenance import Provenance, digest_json, settings_of
from memloc.scores import Localization
from memloc.sites import Grain
from memloc.statistics import bootstrap_interval, rate_interval
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class ZeroOut:
    """Score of a neuron or head = rise of the suffix's mean NLL, in nats per token, when it is silenced everywhere.

    With ℓ the mean NLL of the suffix and g the gate by which what the unit says is multiplied at every position:

        score_i = ℓ(g_i = 0) - ℓ(g_i = 1)

    signed: a unit whose silence helps the suffix scores below 0. One axis of passages.

    Exact, and cheaper than a forward a unit: a variant starts at the block above its layer, of the top block only the
    positions that predict the suffix are run, and what a neuron of the last layer does to the logits is arithmetic.

    Attributes:
        mode: "exact": every unit is silenced. "shortlist": those with the largest first-order estimate (gate gradient,
            one backward pass) are, the others keep that estimate; a random audit of the others, exact too, bounds what
            was missed, in the notes: `missed_share` of the unverified units that reach the best tenth of the
            shortlist, `missed_mass`, their share of all positive scores, each with a 95 % interval, all passages
            together.
        grain: "neuron" or "head".
        verify: units of a passage on the shortlist.
        audit: units of a passage drawn from the rest.
        seed: of the audit, with the passage's tokens.
        memory_mb: working memory variants may take, roughly; no effect on scores. More is slower: large buffers are
            given back to the system after each use.

    Cost: for a passage of t tokens, s of them its suffix: two forwards, and for each unit of layer j of
    l about t·(l - 2 - j) + s block-tokens, none for neurons of the last layer (keys and values of the top block before
    the suffix are not counted). The definition takes t·l for each. A head takes t more.

    Source: Chang et al. 2024, arXiv:2311.09060, section "Zero-out". The shortlist, its audit, heads and the closed form
    of the last layer are ours.
    """

    mode: Literal["exact", "shortlist"] = "exact"
    grain: Literal["neuron", "head"] = "neuron"
    verify: int = 200
    audit: int = 100
    seed: int = 0
    memory_mb: int = 64
    in_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.verify, self.memory_mb) < 1 or self.audit < 2:
            found = f"verify {self.verify}, memory_mb {self.memory_mb}, audit {self.audit}"
            raise InputError(f"zero-out: {found}; expected at least 1, 1 and 2")

    @torch.no_grad()
    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score all neurons or heads, passage by passage; `contrast` is not used.

        Raises:
            InputError: no passages, or one the model cannot take (named).
        """
        if not passages:
            raise InputError("zero-out: no passages given")
        passages.check(view.vocab, view.context, behind=not view.row.causal)
        sites, count = gate_sites(view, self.grain), gate_count(view, self.grain)
        found = torch.zeros(len(passages), len(sites), count)
        audit = _Audit()
        for row, item in steps(list(enumerate(passages)), "zero-out"):
            work = _Silencing(view, item, Grain(self.grain), self.memory_mb)
            if self.mode == "exact":
                found[row] = torch.stack([work.effects(layer, torch.arange(count)) for layer in range(len(sites))])
            else:
                found[row] = self._shortlisted(work, audit)
        inputs = {"model": view.digest, "passages": passages.digest}
        provenance = Provenance("zero-out", settings_of(self), seed=self._seed(), inputs=inputs)
        scores = {site: found[:, index] for index, site in enumerate(sites)}
        return Localization(Grain(self.grain), scores, provenance, passages.ids, audit.notes())

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """Exact in exact mode; a shortlist takes at most what it would if all of it lay in the first layer."""
        total = Cost(0)
        for item in passages:
            total = total + self._cost(view, item)
        results = 12 * len(passages) * view.layers * gate_count(view, self.grain)
        return Cost(total.forward, total.backward, total.bytes + results, total.bound)

    def _cost(self, view: ModelView, item: Passage) -> Cost:
        tokens, suffix, count = length_read(item, view.mask_token), len(item.suffix), gate_count(view, self.grain)
        heads, top = self.grain == "head", suffix if view.row.causal else tokens

        def each(layer: int) -> int:
            above = 0 if layer == view.layers - 1 else (view.layers - 2 - layer) * tokens + top
            return above + (tokens if heads else 0)

        start = view.layers * (2 * tokens - 1 if view.row.causal else tokens)
        if self.mode == "exact":
            last = int(not heads)
            variants = (count + 1) * sum(each(layer) for layer in range(view.layers - last))
            return Cost(start + variants, bytes=self._bytes(view, tokens, suffix))
        chosen = min(view.layers * count, self.verify + self.audit) + view.layers
        whole = view.layers * tokens
        forward = start + whole + chosen * max(each(layer) for layer in range(view.layers))
        memory = self._bytes(view, tokens, suffix) + pass_bytes(
            view, tokens, context=tokens, grad=True, unembedded=suffix
        )
        return Cost(forward, whole, memory, "at most")

    def _bytes(self, view: ModelView, tokens: int, suffix: int) -> int:
        wide = 8 if view.dtype == torch.float64 else 4
        kept = view.layers * tokens * (2 * view.width + view.neurons + view.heads * view.head_width)
        form = 2 * view.vocab * view.width + view.neurons * (view.vocab + 6 * view.width) + 6 * suffix * view.vocab
        variant = variant_bytes(view, tokens, suffix)
        return wide * (kept + form) + 2 * max(variant, min(self.memory_mb * 2**20, variant * view.neurons)) + 2**20

    def _seed(self) -> int | None:
        return self.seed if self.mode == "shortlist" else None

    def _shortlisted(self, work: _Silencing, audit: _Audit) -> Tensor:
        """First-order estimates [l, u], exact where verified or audited."""
        batch = next(work.view.batches(Passages((work.item,))))
        scores = -gate_gradients(work.view, batch, self.grain)[0].cpu().float()
        flat = scores.view(-1)
        order = flat.argsort(descending=True, stable=True)
        best, rest = order[: self.verify], order[self.verify :]
        drawn = rest[torch.randperm(len(rest), generator=_generator(self.seed, work.item))[: self.audit]]
        estimated = flat[drawn].clone()
        for layer in range(len(scores)):
            here = torch.cat([best, drawn])
            here = here[here // scores.shape[1] == layer]
            if len(here):
                flat[here] = work.effects(layer, here % scores.shape[1])
        audit.add(flat[best], flat[drawn], estimated, len(rest))
        return scores


@dataclass(frozen=True)
class _Silencing:
    """One passage under the silence of one unit at a time."""

    view: ModelView
    item: Passage
    grain: Grain
    memory_mb: int
    variants: Variants = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "variants", Variants.of(self.view, self.item))

    def effects(self, layer: int, units: Tensor) -> Tensor:
        """Rise of the NLL when each of `units` [n] of a layer is silenced alone: [n], float32 on the CPU.

        Against the passage itself, run the same way, so that rounding shared by both is no effect.
        """
        found = [self._run(layer, part) for part in self._parts(units)]
        return (torch.cat(found) - self._run(layer, units[:0])).cpu().float()

    def _parts(self, units: Tensor) -> Iterator[Tensor]:
        tokens = length_read(self.item, self.view.mask_token)
        room = self.memory_mb * 2**20 // variant_bytes(self.view, tokens, len(self.item.suffix))
        yield from torch.split(units, max(1, room))

    def _run(self, layer: int, units: Tensor) -> Tensor:
        """NLL [n] without each of `units`; [1], of the passage as it is, where there are none."""
        units, variants = units.to(self.view.device), self.variants
        site, none, plain = gate_sites(self.view, self.grain)[layer], not len(units), self.grain is Grain.NEURON
        if plain and layer == self.view.layers - 1:
            values = self.view.weight(site).detach()
            if none:
                return variants.nll_at_the_end(
                    values.new_zeros(1, len(variants.target)), values.new_zeros(1, len(values))
                )
            return variants.nll_at_the_end(variants.entering[site][variants.scored, units].T, values[:, units].T)
        if plain:
            clean = variants.above[layer][None]
            return variants.nll(layer, clean if none else variants.without_each(layer, units))
        gates = torch.ones(max(1, len(units)), gate_count(self.view, self.grain), device=self.view.device)
        gates[torch.arange(len(units), device=units.device), units] = 0
        return variants.nll(layer, variants.gated(site, gates))


@dataclass
class _Audit:
    """What random units outside the shortlists turned out to be, all passages together."""

    reached: int = 0
    gaps: list[float] = field(default_factory=list)
    missed: list[float] = field(default_factory=list)
    verified: float = 0.0

    def add(self, best: Tensor, drawn: Tensor, estimated: Tensor, rest: int) -> None:
        """Take one passage in: exact scores of its shortlist, exact and estimated ones of its audit of `rest` units."""
        bar = best.sort(descending=True).values[math.ceil(len(best) / 10) - 1]
        self.reached += int((drawn >= bar).sum())
        self.gaps += (drawn - estimated).abs().tolist()
        self.missed += (drawn.clamp_min(0) * rest).tolist()
        self.verified += float(best.clamp_min(0).sum()) * len(drawn)

    def notes(self) -> dict[str, Any]:
        """Shares with their 95 % intervals; nothing where nothing was audited."""
        n = len(self.missed)
        if n < 2:
            return {}
        mean, verified = sum(self.missed) / n, self.verified / n
        low, high = bootstrap_interval(self.missed)
        return {
            "audited": n,
            "missed_share": self.reached / n,
            "missed_share_interval": list(rate_interval(self.reached, n)),
            "missed_mass": _part(mean, verified),
            "missed_mass_interval": [_part(low, verified), _part(high, verified)],
            "estimate_error": sum(self.gaps) / n,
        }


def _part(missed: float, verified: float) -> float:
    return missed / (missed + verified) if missed + verified > 0 else 0.0


def _generator(seed: int, item: Passage) -> torch.Generator:
    """A passage's own, whatever its company."""
    return torch.Generator().manual_seed(int(digest_json([seed, item.prefix, item.suffix])[:12], 16))
