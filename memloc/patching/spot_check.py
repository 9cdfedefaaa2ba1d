"""How far estimates of single places can be trusted: the best ones run exactly, some of the others at random."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from memloc.costs import Cost
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.patching.pairs import Pair
from memloc.patching.perturbation import own_generator
from memloc.patching.places import Places
from memloc.patching.sweep import Sweep
from memloc.progress import steps
from memloc.sites import Site
from memloc.statistics import bootstrap_interval, rate_interval
from memloc.view import ModelView


@dataclass(frozen=True)
class Checked:
    """One passage's places that were patched exactly.

    Attributes:
        verified: (site, unit) of the best by estimate; `estimate` and `exact` [k] are theirs.
        audited: estimates and exact effects of some of the others, [a] each.
        others: how many others there are.
        joint: exact effects of patching together the verified places, all others, and all.
    """

    verified: list[tuple[Site, int]]
    estimate: Tensor
    exact: Tensor
    audited: tuple[Tensor, Tensor]
    others: int
    joint: tuple[float, float, float]

    def put_into(self, scores: Mapping[Site, Tensor], row: int) -> None:
        """Exact effects in the estimates' place."""
        for (site, unit), value in zip(self.verified, self.exact.tolist(), strict=True):
            scores[site][row].view(-1)[unit] = value

    @property
    def correlation(self) -> float | None:
        """Of estimates with exact effects; None where there is nothing to correlate."""
        pair = torch.stack([self.estimate, self.exact])
        if len(self.verified) < 2 or bool((pair.std(1) == 0).any()):
            return None
        return float(torch.corrcoef(pair)[0, 1])


@dataclass(frozen=True)
class SpotCheck:
    """Patch some places exactly.

    Attributes:
        sweep: corruption, direction and metric.
        verify: so many of the best-scored places of each passage.
        audit: so many of the others, drawn at random without replacement.
        seed: of that draw.
    """

    sweep: Sweep
    verify: int
    audit: int
    seed: int

    def passages(
        self,
        view: ModelView,
        places: Places,
        passages: Passages,
        contrast: Passages | None,
        scores: Mapping[Site, Tensor],
    ) -> Iterator[Checked]:
        """Passage by passage, in order; `scores` are the estimates, [n, units] or [n] a site."""
        pairs = self.sweep.pairs(view, places, passages, contrast)
        for row, (item, first, pair) in enumerate(steps(pairs, "verifying", len(passages))):
            units = self.sweep.units(places, item, first).tolist()
            found = [(site, unit) for site in places.scored for unit in units]
            flat = torch.cat([scores[site][row].view(-1)[units] for site in places.scored])
            order = torch.argsort(flat, descending=True, stable=True).tolist()
            best, rest = order[: self.verify], order[self.verify :]
            picks = torch.randperm(len(rest), generator=own_generator(self.seed, item))[: self.audit].tolist()
            drawn = [rest[pick] for pick in picks]
            exact = self._exact(pair, [found[index] for index in best + drawn])
            yield Checked(
                [found[index] for index in best],
                flat[best],
                exact[: len(best)],
                (flat[drawn], exact[len(best) :]),
                len(rest),
                self._joint(pair, [found[index] for index in best], [found[index] for index in rest]),
            )

    def cost(self, view: ModelView, places: Places, passages: Passages) -> Cost:
        """At most; the two runs of each passage are run anew."""
        forward = 0
        for item in passages:
            units = len(places.scored) * places.count(len(item.ids) - 1)
            variants = min(units, self.verify + self.audit) + 3
            rows = max(1, self.sweep.corruption.rows) * variants
            forward += self.sweep.pair_tokens(view, places, item) + rows * view.layers * (len(item.ids) - 1)
        return Cost(forward, bytes=self.sweep.bytes(view, places, passages), bound="at most")

    def _exact(self, pair: Pair, chosen: list[tuple[Site, int]]) -> Tensor:
        found = torch.zeros(len(chosen), dtype=torch.float64)
        for site in sorted({site for site, _ in chosen}):
            index = [at for at, (other, _) in enumerate(chosen) if other == site]
            units = torch.tensor([chosen[at][1] for at in index], device=pair.view.device)
            found[index] = pair.effects(site, units, rows=self.sweep.rows).cpu()
        return found

    def _joint(
        self, pair: Pair, best: list[tuple[Site, int]], rest: list[tuple[Site, int]]
    ) -> tuple[float, float, float]:
        one, two, three = (float(pair.patched(pair.union(group))[0]) for group in (best, rest, best + rest))
        return one, two, three


def notes_of(found: list[Checked]) -> dict[str, Any]:
    """The notes of a localization, one value a passage, so that runs in parts join into the notes of one run."""
    notes: dict[str, Any] = {
        "verified_correlation": [entry.correlation for entry in found],
        "verified_estimate": [float(entry.estimate.sum()) for entry in found],
        "verified_exact": [float(entry.exact.sum()) for entry in found],
        "joint_verified": [entry.joint[0] for entry in found],
        "joint_rest": [entry.joint[1] for entry in found],
        "joint_all": [entry.joint[2] for entry in found],
    }
    if any(len(entry.audited[0]) for entry in found):
        notes |= {
            "verified_least": [float(entry.exact.min()) for entry in found],
            "verified_found": [float(entry.exact.clamp_min(0).sum()) for entry in found],
            "audit_others": [entry.others for entry in found],
            "audit_estimate": [entry.audited[0].tolist() for entry in found],
            "audit_exact": [entry.audited[1].tolist() for entry in found],
        }
    return notes


@dataclass(frozen=True)
class Audit:
    """What the places drawn at random say of all that were not verified; over all passages of a localization.

    Attributes:
        places: how many were looked at.
        hits: how many have a larger exact effect than the least of their passage's verified ones.
        share: 95 % interval of the share of such places; its upper end holds also where none was seen.
        missed: sum of the positive exact effects of the places not verified, estimated, per passage.
        interval: its 95 % bootstrap interval over the places looked at; it cannot see a tail that was never drawn.
        found: sum of the positive exact effects of the verified ones, per passage.
        error: mean |estimate - exact| of a place looked at.
    """

    places: int
    hits: int
    share: tuple[float, float]
    missed: float
    interval: tuple[float, float]
    found: float
    error: float

    @classmethod
    def of(cls, notes: Mapping[str, Any]) -> Audit:
        """From the notes of a localization made with `audit`, whole or joined from parts.

        Raises:
            InputError: there was no audit.
        """
        if not any(notes.get("audit_exact", ())):
            raise InputError("these notes hold no audit; localize with audit=N and verify=K")
        keys = ("verified_least", "audit_others", "audit_estimate", "audit_exact")
        rows = list(zip(*(notes[key] for key in keys), strict=True))
        each = [
            (least, others, one, two)
            for least, others, line, exact in rows
            for one, two in zip(line, exact, strict=True)
        ]
        hits = sum(two > least for least, _, _, two in each)
        # Each place looked at stands for all others of its passage.
        mass = [others * max(two, 0.0) for _, others, _, two in each]
        return cls(
            len(each),
            hits,
            rate_interval(hits, len(each)),
            fmean(mass),
            bootstrap_interval(mass),
            fmean(notes["verified_found"]),
            fmean(abs(one - two) for _, _, one, two in each),
        )
