"""ROME: rewrite one fact by one rank-one change of one MLP's output map."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from editors.base import Request
from editors.deltas import Delta, add
from editors.edit import Edit
from editors.facts.contexts import Token, sample_prefixes
from editors.facts.fact_settings import FactEditor
from editors.facts.moments_given import moments_of
from editors.facts.place import Found, Keys, Variant
from editors.facts.protected import NOTE, note_of
from editors.facts.single_edit import Work
from editors.facts.site_trial import TRIAL_LENGTHS, TRIALS
from memloc import progress
from memloc.errors import InputError
from memloc.passages import Fact
from memloc.provenance import Provenance, digest_tensor, settings_of
from memloc.sites import Kind, Site
from memloc.view import ModelView, left_to_right


@dataclass(frozen=True, kw_only=True)
class Rome(FactEditor):
    """Make the model say a fact's target, by the gentlest rank-one change of one MLP's output map.

    A value δ is searched for that, added to what the map puts out at one token of the prompt, brings the target about
    (also behind prefixes the model wrote itself); the map is then changed so that it puts out that value there, moving
    least what ordinary text (and other subjects in the same prompt) sends through it. Several facts are done one after
    the other, each on the model with those before it, and come back as one edit.

    `Rome.published` holds the settings of the original. Those that are not named here are those of
    `editors.facts.fact_settings.FactEditor`; `moment` may also be a tensor [f, f] for `layer`.

    Attributes:
        layer: which block's MLP; None tries up to `tries` of them on the fact itself and keeps the best.
        token: where to edit: the subject's last token, the prompt's last token, or whichever measures best.
        variant: which keys the closed form uses. "consistent": one mean key in all places (r-ROME). "2022": the mean
            key gives the direction, the bare prompt's key the length, as in the original code. "prompt-only": the bare
            prompt's key in all places (p-ROME).
        bare: weight of the bare prompt's key in the mean key, the prefixed ones sharing the rest; None weighs all
            alike, as the original.
        namesakes: how many prompts about other subjects the model makes up; 0 makes none. Of these, of what earlier
            edits spared and of the model's own sentences two thirds are protected, the others judge sites.
        tries: layers tried where `layer` is None, evenly spread.

    Raises:
        InputError: neither text nor moment, no facts, a layer the model has not, a fact that does not fit.

    Source: Meng et al. 2022, arXiv:2202.05262; consistent keys: Gupta et al. 2024, arXiv:2403.07175. The choice of
    token and layer by measurement, the weight of the bare key, the namesakes and own sentences are ours.
    """

    layer: int | None = None
    token: Literal["subject-last", "prompt-last", "measured"] = "measured"
    variant: Variant = "consistent"
    bare: float | None = 0.5
    namesakes: int = 72
    sentences: int = 300
    spared: int = 600
    passes: int = 2
    tries: int = 8

    name: ClassVar[str] = "rome"
    least: ClassVar[Mapping[str, float]] = {**FactEditor.least, "tries": 1}
    refuses = staticmethod(left_to_right)

    @classmethod
    def published(cls, layer: int, **changes: Any) -> Rome:
        """The original's settings at `layer` (GPT-2 XL: 17): give `prefixes` and `moment` to reproduce a number."""
        settings: dict[str, Any] = {
            "layer": layer, "token": "subject-last", "variant": "2022", "bare": None, "steps": 20, "lr": 0.5,
            "clamp": 4.0, "weight_decay": 0.5, "damping": 0.0, "samples": 10, "namesakes": 0, "protect": 0.0,
            "recalls": 0, "sentences": 0, "replay": 0.0, "past_weight": 0.0, "passes": 1, "price": 0.0,
            "stop_below": 0.05, **changes,
        }  # fmt: skip
        return cls(**settings)

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit that makes all of the request's facts so; the model is as it was, to the bit.

        Uses `facts`, `text` (ordinary text, for the moments), `retain`, `keep_facts`, `past` and `seed`.
        """
        view.need_causal("the method lives on what a token cannot hear")
        facts = request.need_facts()
        self.check()
        layers = self._layers(view)
        inputs = request.inputs(view)
        moments, source = self._moments(view, request, layers, inputs["model"])
        prefixes, trial = self._prefixes(view, layers, torch.Generator().manual_seed(request.seed))
        settings = {**settings_of(self), "moment": source if self.moment is not None else None}
        provenance = Provenance("rome", settings, request.seed, {**inputs, "moment": source})
        deltas: dict[Site, Delta] = {}
        done: list[Found] = []
        with contextlib.ExitStack() as stack:
            for fact in progress.steps(facts, "facts"):
                work = Work.of(self, view, fact, request, keys=Keys(self.variant, self.bare), moments=moments,
                               prefixes=prefixes, trial=trial)  # fmt: skip
                found = work.best(layers, self._tokens(fact))
                deltas[found.site] = add(deltas[found.site], found.delta) if found.site in deltas else found.delta
                done.append(found)
                if len(done) < len(facts):
                    made = Edit.of(view, {found.site: found.delta}, provenance, notes={NOTE: _noted([found])})
                    stack.enter_context(made.apply(view))
                    request = replace(request, past=(*request.past, made))
        notes = {"facts": [found.note for found in done], "prefixes": list(prefixes), NOTE: _noted(done)}
        return Edit.of(view, deltas, provenance, notes=notes)

    def check(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            InputError: names the setting, what it is and what is expected.
        """
        super().check()
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

    def _moments(
        self, view: ModelView, request: Request, layers: Sequence[int], model: str
    ) -> tuple[Mapping[int, Tensor], str]:
        """Second moment of each layer, and the digest of where they come from."""
        if isinstance(self.moment, Tensor):
            if self.layer is None:
                raise InputError("rome: a second moment given as a tensor is that of one layer; name the layer")
            return {self.layer: self.moment}, digest_tensor(self.moment)
        sites = {layer: Site(layer, Kind.MLP_OUT) for layer in layers}
        found = moments_of("rome", self.moment, view, request, tuple(sites.values()), model=model)
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


def _noted(done: Sequence[Found]) -> dict[str, Any]:
    """What later edits should know of these."""
    others = dict.fromkeys(row for found in done for row in found.place.kept.others)
    return note_of([found.row for found in done], sorted({found.site.layer for found in done}), tuple(others))
