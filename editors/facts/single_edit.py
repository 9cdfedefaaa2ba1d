"""One fact: its values, keys and closed form at every site that is tried, and the change at the one that serves best.

A site is judged by what the model says with the change in (`editors.facts.site_trial`). No weight is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from editors.base import Request
from editors.deltas import LowRank
from editors.facts.contexts import Demand, Row, Token, check_context, demand, row_of
from editors.facts.fact_settings import FactEditor
from editors.facts.keys_values import optimise_values, read_at, stream_norm
from editors.facts.least_squares import insert_pair
from editors.facts.own_words import namesakes, recalls
from editors.facts.protected import own_sentences, rows_of_facts, rows_predicting, second_moment_at
from editors.facts.site_trial import tried
from memloc.errors import InputError
from memloc.passages import Fact, Facts, Prompt
from memloc.sites import Kind, Site
from memloc.view import ModelView

Variant = Literal["consistent", "2022", "prompt-only"]


class Keys(NamedTuple):
    """Which keys the closed form uses.

    Attributes:
        variant: the mean key in all places ("consistent"), its direction and the bare prompt's length ("2022"), or the
            bare prompt's in all places.
        bare: weight of the bare prompt's key in the mean key; None weighs all alike.
    """

    variant: Variant
    bare: float | None

    def mean(self, keys: Tensor) -> Tensor:
        """Of `keys` `[n, f]`, the bare prompt's first."""
        if self.bare is None or len(keys) == 1:
            return keys.mean(0)
        return self.bare * keys[0] + (1 - self.bare) * keys[1:].mean(0)


@dataclass(frozen=True)
class Found:
    """A change that makes a fact so.

    Attributes:
        site: of the map.
        delta: of rank one.
        note: what is worth knowing of it.
        row: the prompt, at the token it was edited at.
        merit: what it did when it was tried, to be compared.
    """

    site: Site
    delta: LowRank
    note: Mapping[str, Any]
    row: Row
    merit: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Work:
    """One fact at work.

    Attributes:
        editor: settings that all editors of facts have.
        keys: which keys the closed form uses.
        view: the model, with the facts before this one in.
        fact: what is asked.
        moments: of ordinary text, by layer.
        prefixes: texts that values are fitted behind.
        trial: texts that sites are judged behind.
        request: what else should stay.
        past: rows of edits already made.
        others: the same prompt about other subjects.
        ways: the model's own prompts for the fact.
    """

    editor: FactEditor
    keys: Keys
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
    def of(cls, editor: FactEditor, view: ModelView, fact: Fact, request: Request, **shared: Any) -> Work:
        """With what the model says about others and about the fact itself, as it is now."""
        draw = torch.Generator().manual_seed(request.seed)
        others = namesakes(view, fact.prompt, editor.namesakes, draw, top_k=2 * editor.top_k)
        ways = recalls(view, [fact], editor.recalls, draw, top_k=2 * editor.top_k)[0]
        return cls(editor, view=view, fact=fact, request=request, others=others, ways=ways, **shared)

    def named(self, token: Token) -> tuple[Row, ...]:
        """What the request names to keep."""
        return rows_of_facts(self.request.keep_facts, token) + rows_predicting(self.request.retain)

    def best(self, layers: Sequence[int], tokens: Sequence[Token]) -> Found:
        """The change at the site that serves the fact best; at the only one without trying it."""
        found = [entry for token in tokens for entry in self._at(layers, token, len(layers) * len(tokens) > 1)]
        chosen = max(found, key=lambda entry: entry.merit)
        if len(found) == 1:
            return chosen
        every = [{key: entry.note[key] for key in ("layer", "token", "said", "kept", "drift")} for entry in found]
        return replace(chosen, note={**chosen.note, "tried": every})

    def _at(self, layers: Sequence[int], token: Token, judged: bool) -> list[Found]:
        editor, view = self.editor, self.view
        asked = demand(self.fact, view.tokenizer, self.prefixes, token,
                       essence=token == "subject-last" and editor.kl_weight > 0)  # fmt: skip
        own = tuple(row_of(prompt, token) for prompt in self.ways)
        asked = replace(asked, prompts=asked.prompts + own)
        check_context([asked], view.context)
        others = tuple(row_of(prompt, token) for prompt in self.others)
        judges = others[2::3] if judged else ()
        named = tuple(row for row in others if row not in judges) + self.named(token)
        draw = torch.Generator().manual_seed(self.request.seed)
        said = own_sentences(view, Facts((self.fact,)), token, editor.amounts, draw)
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

    def _judged(self, found: Found, token: Token, own: Sequence[Row], judges: Sequence[Row]) -> Found:
        """With its merit: whether the bare prompt says the target, then what is said and what is kept, summed."""
        asked = demand(self.fact, self.view.tokenizer, self.trial, token, essence=False)
        seen = tried(self.view, {found.site: found.delta}, asked, own, judges)
        return replace(found, note={**found.note, "said": seen.said, "kept": seen.kept},
                       merit=(float(seen.right), seen.said + seen.kept))  # fmt: skip

    def _weighed(self, sites: Sequence[Site], named: Sequence[Row], said: Sequence[Row]) -> dict[Site, Tensor]:
        """What should stay at each site: text, what was named, what the model says itself, edits already made."""
        editor, view = self.editor, self.view
        total = {site: self.moments[site.layer].double() for site in sites}
        for site, moment in total.items():
            if moment.shape != 2 * view.weight(site).shape[1:]:
                raise InputError(f"second moment {list(moment.shape)} for keys of {view.weight(site).shape[1]} entries")
        for rows, weight in ((named, editor.protect), (said, editor.replay)):
            if rows and weight:
                more = second_moment_at(view, sites, rows)
                total = {site: moment + weight * more[site] for site, moment in total.items()}
        keys = read_at(view, sites, self.past) if self.past and editor.past_weight else {}
        # A key as unusual as that of an average token of text is half held at 1: kᵀC⁻¹k is f over text.
        return {site: moment + editor.past_weight / len(moment) * keys[site].T @ keys[site] if keys else moment
                for site, moment in total.items()}  # fmt: skip

    def _solve(self, site: Site, asked: Demand, keys: Tensor, scale: float, moment: Tensor) -> Found:
        stream = stream_norm(self.view, site.layer, asked.prompts[:1])
        values = optimise_values(
            self.view, site.layer, [asked], torch.tensor([scale]), self.editor.descent, stream=stream
        )
        weight = self.view.weight(site).detach().to("cpu", torch.float64)
        wanted = weight @ keys[0] + values.change[0].double()
        mean = self.keys.mean(keys)
        key = mean if self.keys.variant == "consistent" else keys[0]
        toward = mean if self.keys.variant == "2022" else None
        delta = insert_pair(weight, key, wanted, moment, damping=self.editor.damping, toward=toward)
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
        return Found(site, delta, note, asked.prompts[0])


def _energy(matrix: Tensor, moment: Tensor) -> float:
    """Mean squared output of `matrix` over what the moment was taken of."""
    return float(((matrix @ moment.to(matrix)) * matrix).sum())
