"""ROME: rewrite one fact by one rank-one change of one MLP's output map."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from editors.base import Request
from editors.deltas import Delta, LowRank, add
from editors.edit import Edit
from editors.facts.contexts import Demand, Row, Token, check_context, demand, row_of, sample_prefixes
from editors.facts.keys_values import Descent, optimise_values, read_at, stream_norm
from editors.facts.least_squares import insert_pair
from editors.facts.own_words import namesakes, recalls
from editors.facts.protected import (
    NOTE,
    Amounts,
    note_of,
    own_sentences,
    rows_of_facts,
    rows_of_past,
    rows_predicting,
    second_moment_at,
)
from editors.facts.site_trial import TRIAL_LENGTHS, TRIALS, tried
from memloc import progress
from memloc.errors import InputError
from memloc.moments import Moments, second_moments
from memloc.passages import Fact, Facts, Prompt
from memloc.provenance import Provenance, digest_tensor, settings_of
from memloc.sites import Kind, Site
from memloc.view import ModelView, left_to_right


@dataclass(frozen=True, kw_only=True)
class Rome:
    """Make the model say a fact's target, by the gentlest rank-one change of one MLP's output map.

    A value δ is searched for that, added to what the map puts out at one token of the prompt, brings the target about
    (also behind prefixes the model wrote itself); the map is then changed so that it puts out that value there, moving
    least what ordinary text (and other subjects in the same prompt) sends through it. Several facts are done one after
    the other, each on the model with those before it, and come back as one edit.

    `Rome.published` holds the settings of the original.

    Attributes:
        layer: which block's MLP; None tries up to `tries` of them on the fact itself and keeps the best.
        token: where to edit: the subject's last token, the prompt's last token, or whichever measures best.
        variant: which keys the closed form uses. "consistent": one mean key in all places (r-ROME). "2022": the mean
            key gives the direction, the bare prompt's key the length, as in the original code. "prompt-only": the bare
            prompt's key in all places (p-ROME).
        bare: weight of the bare prompt's key in the mean key, the prefixed ones sharing the rest; None weighs all
            alike, as the original.
        steps: passes of the search for δ, the last of which only evaluates.
        pace: Adam's step size in shares of the stream's root mean square at the token: streams differ in scale.
        lr: as published instead, in the stream's units.
        clamp: ‖δ‖ is kept below this many times the norm of the map's clean output.
        weight_decay: weight of ‖δ‖ / ‖clean output‖² in the loss.
        kl_weight: weight of the change of the answer to "{subject} is a", in nats; used at subject-last only, for at
            prompt-last δ is the answer.
        stop_below: the search ends when the loss is below.
        damping: share of the moment's mean diagonal added to its diagonal.
        samples: how many prefixes of each length the model writes.
        lengths: of these prefixes in tokens, the start token included.
        top_k: each sampled token is one of the k likeliest.
        namesakes: how many prompts about other subjects the model makes up; two thirds are protected, the others judge
            sites. 0 makes none.
        protect: weight of the mean k kᵀ over protected tokens (namesakes; facts to keep; where `retain` predicts its
            suffixes) against that of ordinary text.
        sentences: how many texts the model writes itself, all tokens of which are protected but those at which it is
            about to give the present answer of the subject.
        sentence_length: of them, in tokens.
        replay: weight of the mean k kᵀ over them against that of ordinary text.
        past_weight: weight of each key of facts edited before, in this edit or an earlier one, in shares of an average
            token of text.
        recalls: at most how many prompts of the model's own, in which it comes to the present answer from the subject
            alone, are treated like prefixed prompts.
        tries: layers tried where `layer` is None, evenly spread.
        prefixes: texts instead of the model's own; () for none.
        moment: second moment instead of that of the request's text: a tensor [f, f] for `layer`, a `Moments` (for many
            edits of one model collect it once), or the path of a saved one.

    Raises:
        InputError: neither text nor moment, no facts, a layer the model has not, a fact that does not fit.

    Source: Meng et al. 2022, arXiv:2202.05262; consistent keys: Gupta et al. 2024, arXiv:2403.07175. The choice of
    token and layer by measurement, the weight of the bare key, the namesakes and own sentences are ours.
    """

    layer: int | None = None
    token: Literal["subject-last", "prompt-last", "measured"] = "measured"
    variant: Literal["consistent", "2022", "prompt-only"] = "consistent"
    bare: float | None = 0.5
    steps: int = 25
    pace: float = 0.2
    lr: float | None = None
    clamp: float = 8.0
    weight_decay: float = 1e-3
    kl_weight: float = 0.0625
    stop_below: float = 0.05
    damping: float = 1e-4
    samples: int = 2
    lengths: tuple[int, ...] = (5, 10)
    top_k: int = 5
    namesakes: int = 72
    protect: float = 1.0
    sentences: int = 300
    sentence_length: int = 16
    replay: float = 1.0
    past_weight: float = 1.0
    recalls: int = 8
    tries: int = 8
    prefixes: tuple[str, ...] | None = None
    moment: Any = None

    @classmethod
    def published(cls, layer: int, **changes: Any) -> Rome:
        """The original's settings at `layer` (GPT-2 XL: 17): give `prefixes` and `moment` to reproduce a number."""
        settings: dict[str, Any] = {
            "layer": layer, "token": "subject-last", "variant": "2022", "bare": None, "steps": 20, "lr": 0.5,
            "clamp": 4.0, "weight_decay": 0.5, "damping": 0.0, "samples": 10, "namesakes": 0, "protect": 0.0,
            "recalls": 0, "sentences": 0, "replay": 0.0, "past_weight": 0.0, **changes,
        }  # fmt: skip
        return cls(**settings)

    refuses = staticmethod(left_to_right)

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit that makes all of the request's facts so; the model is as it was, to the bit.

        Uses `facts`, `text` (ordinary text, for the moments), `retain`, `keep_facts`, `past` and `seed`.
        """
        view.need_causal("the method lives on what a token cannot hear")
        facts = request.need_facts()
        self._check()
        layers = self._layers(view)
        moments, source = self._moments(view, request, layers)
        prefixes, trial = self._prefixes(view, layers, torch.Generator().manual_seed(request.seed))
        settings = {**settings_of(self), "moment": source if self.moment is not None else None}
        provenance = Provenance("rome", settings, request.seed, {**request.inputs(view), "moment": source})
        deltas: dict[Site, Delta] = {}
        notes = []
        written: list[Row] = []
        with contextlib.ExitStack() as stack:
            for index, fact in enumerate(progress.steps(facts, "facts")):
                work = _Work.of(self, view, fact, request, moments=moments, prefixes=prefixes, trial=trial,
                                past=(*rows_of_past(request.past), *written))  # fmt: skip
                found = work.best(layers, self._tokens(fact))
                deltas[found.site] = add(deltas[found.site], found.delta) if found.site in deltas else found.delta
                notes.append(found.note)
                written.append(found.row)
                if index + 1 < len(facts):
                    stack.enter_context(Edit.of(view, {found.site: found.delta}, provenance).apply(view))
        keys = note_of(written, sorted({site.layer for site in deltas}))
        return Edit.of(view, deltas, provenance, notes={"facts": notes, "prefixes": list(prefixes), NOTE: keys})

    @property
    def descent(self) -> Descent:
        """The settings of the search for δ."""
        return Descent.of(self)

    @property
    def amounts(self) -> Amounts:
        """How much of what nobody named is protected."""
        return Amounts(self.namesakes, self.sentences if self.replay else 0, self.sentence_length)

    def _check(self) -> None:
        least = {"steps": 1, "pace": 0, "clamp": 0, "weight_decay": 0, "kl_weight": 0, "damping": 0, "samples": 0,
                 "namesakes": 0, "protect": 0, "recalls": 0, "sentences": 0, "sentence_length": 2, "replay": 0,
                 "past_weight": 0, "tries": 1, "top_k": 1}  # fmt: skip
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"rome: {name} is {getattr(self, name)}, expected {value} or more")
        if self.bare is not None and not 0 < self.bare <= 1:
            raise InputError(f"rome: bare is {self.bare}, expected above 0 and at most 1")

    def _layers(self, view: ModelView) -> tuple[int, ...]:
        if self.layer is not None:
            view.block(self.layer)
            return (self.layer,)
        count = min(self.tries, view.layers)
        return tuple(sorted({round(index * (view.layers - 1) / max(1, count - 1)) for index in range(count)}))

    def _tokens(self, fact: Fact) -> tuple[Token, ...]:
        if self.token != "measured":
            return (self.token,)
        return ("prompt-last",) if fact.prompt.subject is None else ("subject-last", "prompt-last")

    def _moments(self, view: ModelView, request: Request, layers: Sequence[int]) -> tuple[Mapping[int, Tensor], str]:
        """Second moment of each layer, and the digest of where they come from."""
        if isinstance(self.moment, Tensor):
            if self.layer is None:
                raise InputError("rome: a second moment given as a tensor is that of one layer; name the layer")
            return {self.layer: self.moment}, digest_tensor(self.moment)
        sites = {layer: Site(layer, Kind.MLP_OUT) for layer in layers}
        if self.moment is not None:
            found = self.moment if isinstance(self.moment, Moments) else Moments.load(self.moment)
        elif request.text:
            found = second_moments(view, request.text, tuple(sites.values()))
        else:
            raise InputError("rome needs ordinary text, to know what to leave alone, or a second moment; found neither")
        return {layer: found.mean(site) for layer, site in sites.items()}, found.digest

    def _prefixes(
        self, view: ModelView, layers: Sequence[int], generator: torch.Generator
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Prefixes to fit values with, and others to judge sites with; none of these where nothing is to be chosen."""
        given = self.prefixes
        if given is None:
            given = sample_prefixes(view, self.lengths, self.samples, generator, top_k=self.top_k)
        if (len(layers) == 1 and self.token != "measured") or view.tokenizer is None:
            return given, ()
        return given, sample_prefixes(view, TRIAL_LENGTHS, TRIALS, generator, top_k=self.top_k)


@dataclass(frozen=True)
class _Found:
    site: Site
    delta: LowRank
    note: Mapping[str, Any]
    row: Row
    merit: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class _Work:
    """One fact at work."""

    rome: Rome
    view: ModelView
    fact: Fact
    moments: Mapping[int, Tensor]
    prefixes: tuple[str, ...]
    trial: tuple[str, ...]
    request: Request
    past: tuple[Row, ...]
    others: tuple[Prompt, ...]
    ways: tuple[Prompt, ...]

    @classmethod
    def of(cls, rome: Rome, view: ModelView, fact: Fact, request: Request, **shared: Any) -> _Work:
        """With what the model says about others and about the fact itself, as it is now."""
        draw = torch.Generator().manual_seed(request.seed)
        others = namesakes(view, fact.prompt, rome.namesakes, draw, top_k=2 * rome.top_k)
        ways = recalls(view, [fact], rome.recalls, draw, top_k=2 * rome.top_k)[0]
        return cls(rome, view, fact, request=request, others=others, ways=ways, **shared)

    def named(self, token: Token) -> tuple[Row, ...]:
        """What the request names to keep."""
        return rows_of_facts(self.request.keep_facts, token) + rows_predicting(self.request.retain)

    def best(self, layers: Sequence[int], tokens: Sequence[Token]) -> _Found:
        """The change at the site that serves the fact best; at the only one without trying it."""
        found = [entry for token in tokens for entry in self._at(layers, token, len(layers) * len(tokens) > 1)]
        chosen = max(found, key=lambda entry: entry.merit)
        if len(found) == 1:
            return chosen
        every = [{key: entry.note[key] for key in ("layer", "token", "said", "kept", "drift")} for entry in found]
        return replace(chosen, note={**chosen.note, "tried": every})

    def _at(self, layers: Sequence[int], token: Token, judged: bool) -> list[_Found]:
        rome, view = self.rome, self.view
        asked = demand(self.fact, view.tokenizer, self.prefixes, token,
                       essence=token == "subject-last" and rome.kl_weight > 0)  # fmt: skip
        own = tuple(row_of(prompt, token) for prompt in self.ways)
        asked = replace(asked, prompts=asked.prompts + own)
        check_context([asked], view.context)
        others = tuple(row_of(prompt, token) for prompt in self.others)
        judges = others[2::3] if judged else ()
        named = tuple(row for row in others if row not in judges) + self.named(token)
        draw = torch.Generator().manual_seed(self.request.seed)
        said = own_sentences(view, Facts((self.fact,)), token, rome.amounts, draw)
        sites = [Site(layer, Kind.MLP_OUT) for layer in layers]
        keys = read_at(view, sites, asked.prompts)
        clean = read_at(view, sites, asked.prompts[:1], side="output")
        stays = self._weighed(sites, named, said)
        found = []
        for site in sites:
            entry = self._solve(site, asked, keys[site], float(clean[site].norm()), stays[site])
            more = {"token": token, "protected": len(named), "own": len(said), "recalls": len(own)}
            entry = replace(entry, note={**entry.note, **more})
            found.append(self._judged(entry, token, own, judges) if judged else entry)
        return found

    def _judged(self, found: _Found, token: Token, own: Sequence[Row], judges: Sequence[Row]) -> _Found:
        """With its merit: whether the bare prompt says the target, then what is said and what is kept, summed."""
        asked = demand(self.fact, self.view.tokenizer, self.trial, token, essence=False)
        seen = tried(self.view, {found.site: found.delta}, asked, own, judges)
        return replace(found, note={**found.note, "said": seen.said, "kept": seen.kept},
                       merit=(float(seen.right), seen.said + seen.kept))  # fmt: skip

    def _weighed(self, sites: Sequence[Site], named: Sequence[Row], said: Sequence[Row]) -> dict[Site, Tensor]:
        """What should stay at each site: text, what was named, what the model says itself, edits already made."""
        rome, view = self.rome, self.view
        total = {site: self.moments[site.layer].double() for site in sites}
        for site, moment in total.items():
            if moment.shape != 2 * view.weight(site).shape[1:]:
                raise InputError(f"second moment {list(moment.shape)} for keys of {view.weight(site).shape[1]} entries")
        for rows, weight in ((named, rome.protect), (said, rome.replay)):
            if rows and weight:
                more = second_moment_at(view, sites, rows)
                total = {site: moment + weight * more[site] for site, moment in total.items()}
        keys = read_at(view, sites, self.past) if self.past and rome.past_weight else {}
        # A key as unusual as that of an average token of text is half held at 1: kᵀC⁻¹k is f over text.
        return {site: moment + rome.past_weight / len(moment) * keys[site].T @ keys[site] if keys else moment
                for site, moment in total.items()}  # fmt: skip

    def _solve(self, site: Site, asked: Demand, keys: Tensor, scale: float, moment: Tensor) -> _Found:
        rome = self.rome
        stream = stream_norm(self.view, site.layer, asked.prompts[:1])
        values = optimise_values(self.view, site.layer, [asked], torch.tensor([scale]), rome.descent, stream=stream)
        weight = self.view.weight(site).detach().to("cpu", torch.float64)
        wanted = weight @ keys[0] + values.change[0].double()
        mean = _mean_key(keys, rome.bare)
        key = mean if rome.variant == "consistent" else keys[0]
        toward = mean if rome.variant == "2022" else None
        delta = insert_pair(weight, key, wanted, moment, damping=rome.damping, toward=toward)
        base = self.moments[site.layer].double()
        drift = _energy(delta.left.double() @ delta.right.double(), base) / max(_energy(weight, base), 1e-300)
        note = {
            "id": self.fact.id,
            "layer": site.layer,
            "loss": float(values.loss[0]),
            "updates": int(values.updates[0]),
            "before": float(values.before[0]),
            "after": float(values.after[0]),
            "value": float(values.change[0].norm()) / scale,
            "alignment": float(torch.cosine_similarity(keys[0], mean, dim=0)),
            "norm": delta.norm() / float(weight.norm()),
            "drift": drift,
        }
        return _Found(site, delta, note, asked.prompts[0])


def _mean_key(keys: Tensor, bare: float | None) -> Tensor:
    if bare is None or len(keys) == 1:
        return keys.mean(0)
    return bare * keys[0] + (1 - bare) * keys[1:].mean(0)


def _energy(matrix: Tensor, moment: Tensor) -> float:
    """Mean squared output of `matrix` over what the moment was taken of."""
    return float(((matrix @ moment.to(matrix)) * matrix).sum())
