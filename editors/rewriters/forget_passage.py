"""Forget passages: the least change after which the model says them no more readily than after disturbed prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from editors.base import Request
from editors.edit import Edit
from editors.tuning.descent import working_copy
from editors.tuning.least_change import Metric
from editors.tuning.odds import Row
from editors.tuning.replay import Replay, own_samples
from editors.tuning.unfamiliar import Asked, Kept, Search, Solver, disturbed, own_odds
from memloc import progress
from memloc.errors import InputError
from memloc.gradients.curvature import Factors, curvature_factors
from memloc.passages import Passage, Passages
from memloc.provenance import Provenance, settings_of
from memloc.scores import Selection
from memloc.sites import Grain, Site, kinds_named
from memloc.view import ModelView, left_to_right


@dataclass(frozen=True, kw_only=True)
class ForgetPassage:
    """Rewrite what the prefixes of passages recall, towards what the model says where it does not recognise them.

    For every token of a target's suffix, z = log(p / (1 - p)) after its true prefix should fall to z°, its mean over
    copies whose tokens were substituted with probability `disturb`: the model's own answer where the memory is not
    called up. Of all changes D of the chosen maps that do so to first order, the one with least

        Σ_maps tr(G D A Dᵀ),   A = E[k kᵀ],   G = E[g gᵀ]

    over ordinary text, `retain` and the model's own samples, is Σ_i x_i (G⁻¹ g_i)(A⁻¹ k_i)ᵀ: k_i is what a map reads at
    the position that predicts token i, g_i the derivative of z_i by what it puts out there, and x ≥ 0 solves a problem
    with one unknown a token. That objective is twice the divergence on what is to be kept, by K-FAC. No gradient
    descent, no values to optimise: measure, solve, and again, since each solve is linear (the same D is solved for as a
    whole, not added to). Sure tokens of `retain`, `keep_facts` and of the samples that the change would lose join the
    next solve as demands not to fall below `margin`.

    A selection of components or layers chooses the maps; of other grains it makes no sense here.

    Attributes:
        kinds: maps to change where no selection does, of every layer in `layers`.
        layers: or None for all.
        rank: at most that of each change; cut where the metric loses least. None leaves it to the number of tokens.
        positions: only that many tokens of each suffix, from its start; None for all.
        disturb: share of tokens substituted in a copy.
        tries: copies of each target.
        rounds: solves at most.
        step: share of the way to a new solution that later rounds go.
        close: nats per token that a target's mean z may stay above its z°; all below, and nothing sure lost, ends it.
        replay: how many samples of the model to draw, before filtering; 0 for none.
        replay_length: tokens of each; by default as long as the longest target, within the context.
        replay_temperature: of the samples.
        replay_ngram: a sample that shares that many tokens in a row with a target is left out.
        replay_weight: of the samples in A and G, against ordinary text.
        retain_weight: of `retain`.
        margin: nats of log-odds that a token to be kept should not fall below (or its own, where that is lower).
        protect: at most that many tokens join the solve a round, those worst hit.
        damping: share of A's mean diagonal added to its diagonal.
        pull_damping: the same for G.
        ridge: share of the demands' mean diagonal; makes room where they contradict each other.
        batch_size: rows of a forward pass.

    Raises:
        InputError: no passages to forget, nothing to keep by, a passage both to forget and to retain, or targets that
            are said no more readily than they should be already.

    Cost: factors of A and G, in³/3 + out³/3 a map and as many entries in float64; a round is one forward and backward
    over a row for each target token and each protected one, one forward over the samples, and n² a sweep.

    Source: ours. The metric is K-FAC's, Martens and Grosse 2015, arXiv:1503.05671; protection by the model's own
    samples as in `sparse-fine-tune`.
    """

    kinds: str = "attn.out,mlp.out"
    layers: tuple[int, ...] | None = None
    rank: int | None = None
    positions: int | None = None
    disturb: float = 0.45
    tries: int = 16
    rounds: int = 6
    step: float = 0.5
    close: float = 0.1
    replay: int = 4800
    replay_length: int | None = None
    replay_temperature: float = 0.7
    replay_ngram: int = 8
    replay_weight: float = 1.0
    retain_weight: float = 1.0
    margin: float = 2.0
    protect: int = 400
    damping: float = 1e-2
    pull_damping: float = 0.02
    ridge: float = 1e-3
    batch_size: int = 64
    refuses = staticmethod(left_to_right)

    def __post_init__(self) -> None:
        for name in ("rank", "positions", "tries", "rounds", "replay_ngram", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} {value}: expected at least 1")
        for name in ("disturb", "step", "replay_temperature"):
            value = getattr(self, name)
            if value <= 0 or (name != "replay_temperature" and value > 1):
                raise InputError(
                    f"{name} {value}: expected above 0{'' if name.startswith('replay') else ', at most 1'}"
                )
        for name in (
            "close",
            "replay",
            "replay_weight",
            "retain_weight",
            "protect",
            "damping",
            "pull_damping",
            "ridge",
        ):
            if getattr(self, name) < 0:
                raise InputError(f"{name} {getattr(self, name)}: expected 0 or more")

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched. Uses all of the request but `facts` and `past`."""
        view.need_causal("the method lives on what a token cannot hear")
        targets = request.need_forget()
        sites = self._sites(view, request.selection)
        _check_apart(targets, request.retain)
        work = working_copy(view)
        asked = self._asked(work, targets, request.seed)
        replay = (
            own_samples(self, work, targets, request.text, request.retain, seed=request.seed) if self.replay else None
        )
        metrics = self._metrics(work, sites, request, replay)
        kept = Kept.of(work, self._pool(request, replay), self.margin, self.batch_size)
        found, notes = Solver(Search.of(self), work, metrics, asked, kept).run()
        provenance = Provenance("forget-passage", settings_of(self), request.seed, request.inputs(view))
        if replay is not None:
            notes["replay"] = {"kept": len(replay.ids), "filtered": replay.filtered, "length": replay.ids.shape[1]}
        return Edit.of(view, found, provenance, notes=notes)

    def _sites(self, view: ModelView, selection: Selection | None) -> tuple[Site, ...]:
        if selection is None:
            kinds = kinds_named(self.kinds)
            for layer in self.layers or ():
                view.block(layer)
            wanted = range(view.layers) if self.layers is None else self.layers
            chosen = {site for site in view.sites(*kinds) if site.layer in wanted}
        elif selection.grain is Grain.COMPONENT:
            chosen = {site for site, mask in selection.masks.items() if bool(mask) and not site.bias}
        elif selection.grain is Grain.LAYER:
            layers = {site.layer for site, mask in selection.masks.items() if bool(mask)}
            chosen = {site for site in view.sites(*kinds_named(self.kinds)) if site.layer in layers}
        else:
            raise InputError(f"a selection of {selection.grain}s chooses no maps; expected components or layers")
        found = tuple(sorted(site for site in chosen if site.kind.in_block))
        if not found:
            raise InputError("no map is left to change; choose components or layers that hold some of the kinds")
        return found

    # -- what is asked ------------------------------------------------------------------------------------------

    def _asked(self, view: ModelView, targets: Passages, seed: int) -> Asked:
        """A row a token, and the log-odds it should fall to."""
        targets.check(view.vocab, view.context)
        generator = torch.Generator().manual_seed(seed)
        levels = []
        for item in progress.steps(targets, "own answers"):
            copies = disturbed(item, view.vocab, self.disturb, self.tries, generator)
            levels.append(own_odds(view, copies, item, self.positions))
        rows = [item.ids[: len(item.prefix) + step + 1] for item in targets
                for step in range(len(item.suffix[: self.positions]))]  # fmt: skip
        return Asked(targets, rows, levels)

    # -- what is kept -------------------------------------------------------------------------------------------

    def _metrics(
        self, view: ModelView, sites: Sequence[Site], request: Request, replay: Replay | None
    ) -> dict[Site, Metric]:
        parts: list[tuple[Factors, float]] = []
        samples = None if replay is None else Passages(tuple(_samples(replay)), "self-replay")
        weighed = ((request.text, 1.0), (samples, self.replay_weight), (request.retain, self.retain_weight))
        for passages, weight in weighed:
            if passages and weight:
                how: dict[str, Any] = {"seed": request.seed, "size": self.batch_size}
                parts.append((curvature_factors(view, passages, sites, **how), weight))
        if not parts:
            raise InputError("forget-passage needs something to keep: text, passages to retain, or replay above 0")
        damping = {"damping": self.damping, "pull_damping": self.pull_damping}
        return {
            site: Metric.of(
                torch.stack([weight * part.read.mean(site) for part, weight in parts]).sum(0),
                torch.stack([weight * part.pull.mean(site) for part, weight in parts]).sum(0),
                **damping,
            )
            for site in sites
        }

    def _pool(self, request: Request, replay: Replay | None) -> list[tuple[int, Row]]:
        """Rows to keep, each with the first token of it that counts."""
        named = [(len(item.prefix), item.ids) for item in request.retain or ()]
        named += [
            (len(item.prefix), item.ids) for item in (request.keep_facts.as_passages() if request.keep_facts else ())
        ]
        return named + [(1, tuple(row)) for row in ([] if replay is None else replay.ids.tolist())]


def _samples(replay: Replay) -> list[Passage]:
    return [Passage(f"sample-{index}", tuple(row[:1]), tuple(row[1:])) for index, row in enumerate(replay.ids.tolist())]


def _check_apart(targets: Passages, retain: Passages | None) -> None:
    kept = {item.ids for item in retain or ()}
    for item in targets:
        if item.ids in kept:
            raise InputError(f"passage {item.id!r} is both to forget and to retain; take it out of one set")
