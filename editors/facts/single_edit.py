"""One fact: its values, keys and closed form at every site that is tried, and the change at the one that serves best.

A site is judged by what the model says with the change in (`editors.facts.site_trial`); at the chosen one the change is
made again with what it would take along held (`editors.facts.held`). No weight is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from editors.base import Request
from editors.deltas import LowRank
from editors.facts.contexts import Row, Token, check_context, demand, row_of
from editors.facts.fact_settings import FactEditor
from editors.facts.held import Watch
from editors.facts.joint_values import optimise_jointly
from editors.facts.keys_values import optimise_values, read_at, stream_norm
from editors.facts.least_squares import insert_pair, whiten
from editors.facts.own_words import namesakes, recalls
from editors.facts.place import Found, Keys, Place
from editors.facts.protected import Protected, protected_rows, second_moment_at
from editors.facts.site_trial import tried
from memloc.errors import InputError
from memloc.passages import Fact, Facts, Prompt
from memloc.sites import Kind, Site
from memloc.view import ModelView


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
        request: what else should stay, and edits already made.
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
    others: tuple[Prompt, ...]
    ways: tuple[Prompt, ...]

    @classmethod
    def of(cls, editor: FactEditor, view: ModelView, fact: Fact, request: Request, **shared: Any) -> Work:
        """With what the model says about others and about the fact itself, as it is now."""
        draw = torch.Generator().manual_seed(request.seed)
        others = namesakes(view, fact.prompt, editor.namesakes, draw, top_k=2 * editor.top_k)
        ways = recalls(view, [fact], editor.recalls, draw, top_k=2 * editor.top_k)[0]
        return cls(editor, view=view, fact=fact, request=request, others=others, ways=ways, **shared)

    def best(self, layers: Sequence[int], tokens: Sequence[Token]) -> Found:
        """The change at the site that serves the fact best; at the only one without trying it."""
        judged = len(layers) * len(tokens) > 1
        found = [entry for token in tokens for entry in self._at(layers, self._place(token, judged), judged)]
        chosen = max(found, key=lambda entry: entry.merit)
        if judged:
            told = ("layer", "token", "said", "kept", "lost", "drift")
            every = [{key: entry.note[key] for key in told} for entry in found]
            chosen = replace(chosen, note={**chosen.note, "tried": every})
        return self._held(chosen) if self.editor.passes > 1 else chosen

    def _place(self, token: Token, judged: bool) -> Place:
        editor, view = self.editor, self.view
        asked = demand(self.fact, view.tokenizer, self.prefixes, token,
                       essence=token == "subject-last" and editor.kl_weight > 0)  # fmt: skip
        own = tuple(row_of(prompt, token) for prompt in self.ways)
        asked = replace(asked, prompts=asked.prompts + own)
        check_context([asked], view.context)
        draw = torch.Generator().manual_seed(self.request.seed)
        kept = protected_rows(view, Facts((self.fact,)), token, self.request, editor.amounts, draw, made=self.others)
        return Place(token, asked, own, kept, kept.third() if judged else Protected())

    def _at(self, layers: Sequence[int], place: Place, judged: bool) -> list[Found]:
        view, judges = self.view, place.judges
        kept = place.kept.without({*judges.others, *judges.named, *judges.said})
        watch = Watch.of(view, judges, [place.asked]) if judged else None
        sites = [Site(layer, Kind.MLP_OUT) for layer in layers]
        keys = read_at(view, sites, place.asked.prompts)
        clean = read_at(view, sites, place.asked.prompts[:1], side="output")
        stays = self._weighed(sites, kept)
        more = {"token": place.token, "protected": len(kept.named), "own": len(kept.said), "recalls": len(place.own)}
        found = []
        for site in sites:
            entry = self._solve(site, place, keys[site], float(clean[site].norm()), stays[site])
            entry = replace(entry, note={**entry.note, **more})
            found.append(entry if watch is None else self._judged(entry, watch))
        return found

    def _judged(self, found: Found, watch: Watch) -> Found:
        """With its merit: whether the bare prompt says the target, then what is said and kept, less what is lost."""
        place, deltas, judges = found.place, {found.site: found.delta}, found.place.judges
        asked = demand(self.fact, self.view.tokenizer, self.trial, place.token, essence=False)
        seen, lost = tried(self.view, deltas, asked, place.own, judges.others), watch.lost(deltas)
        gone = lost.of(judges)
        return replace(found, note={**found.note, "said": seen.said, "kept": seen.kept, "lost": gone},
                       merit=(float(seen.right), seen.said + seen.kept - gone))  # fmt: skip

    def _held(self, found: Found) -> Found:
        """The same, made again with the keys held at which it would change an answer, the judges' among them.

        As often as less is lost for it, and the fact is not.
        """
        site, place = found.site, found.place
        watch, keys = Watch.of(self.view, place.kept, [place.asked]), read_at(self.view, [site], place.asked.prompts)
        missed, lost = watch.missed({site: found.delta}), watch.lost({site: found.delta})
        moment, held, seen, least = None, set[Row](), [lost.counts], lost.of(place.kept)
        while len(seen) < self.editor.passes:
            fresh = [[row for row in rows if row not in held] for rows in lost]
            if not any(fresh):
                break
            held.update(*fresh)
            moment = self._weighed([site], place.kept)[site] if moment is None else moment
            for rows, weight in zip(fresh, (self.editor.hold, self.editor.hold_own), strict=True):
                moment = moment + self._holding([site], rows, weight)[site]
            again = replace(found, delta=self._inserted(site, keys[site], found.wanted, moment))
            lost = watch.lost({site: again.delta})
            seen.append(lost.counts)
            if lost.of(place.kept) >= least or watch.missed({site: again.delta}) != missed:
                break
            found, least = again, lost.of(place.kept)
        return replace(found, note={**found.note, **self._size(site, found.delta), "passes": seen})

    def _weighed(self, sites: Sequence[Site], kept: Protected) -> dict[Site, Tensor]:
        """What should stay at each site: text, what was named, what the model says itself, edits already made."""
        editor, view = self.editor, self.view
        total = {site: self.moments[site.layer].double() for site in sites}
        for site, moment in total.items():
            if moment.shape != 2 * view.weight(site).shape[1:]:
                raise InputError(f"second moment {list(moment.shape)} for keys of {view.weight(site).shape[1]} entries")
        for rows, weight in ((kept.named, editor.protect), (kept.said, editor.replay)):
            if rows and weight:
                more = second_moment_at(view, sites, rows)
                total = {site: moment + weight * more[site] for site, moment in total.items()}
        past = self._holding(sites, kept.past, editor.past_weight)
        return {site: moment + past[site] for site, moment in total.items()}

    def _holding(self, sites: Sequence[Site], rows: Sequence[Row], weight: float) -> dict[Site, Tensor | float]:
        """What holds the key of each of `rows` at `weight` times an average token of text."""
        if not rows or not weight:
            return dict.fromkeys(sites, 0.0)
        # A key as unusual as that of an average token of text is half held at 1: kᵀC⁻¹k is f over text.
        return {site: weight / keys.shape[1] * keys.T @ keys for site, keys in read_at(self.view, sites, rows).items()}

    def _solve(self, site: Site, place: Place, keys: Tensor, scale: float, moment: Tensor) -> Found:
        asked = place.asked
        stream = stream_norm(self.view, site.layer, asked.prompts[:1])
        weight, editor = self._weight(site), self.editor
        if editor.price:
            mean = self.keys.mean(keys)
            ease = float(mean @ whiten(mean, moment, damping=editor.damping))
            price = torch.tensor([[editor.price / max(ease * _energy(weight, moment), 1e-300)]])
            every = [[0] * (len(asked.prompts) + (asked.essence is not None))]
            values = optimise_jointly(self.view, site.layer, [asked], every, price, stream, editor.descent)
        else:
            values = optimise_values(
                self.view, site.layer, [asked], torch.tensor([scale]), editor.descent, stream=stream
            )
        wanted = weight @ keys[0] + values.change[0].double()
        delta = self._inserted(site, keys, wanted, moment)
        note = {
            "id": self.fact.id,
            "layer": site.layer,
            "loss": float(values.loss[0]),
            "updates": int(values.updates[0]),
            "before": float(values.before[0]),
            "after": float(values.after[0]),
            "value": float(values.change[0].norm()) / scale,
            "alignment": float(torch.cosine_similarity(keys[0], self.keys.mean(keys), dim=0)),
            **self._size(site, delta),
        }
        return Found(site, delta, wanted, place, note)

    def _inserted(self, site: Site, keys: Tensor, wanted: Tensor, moment: Tensor) -> LowRank:
        """The change that puts out `wanted` at the bare prompt, or at the mean of `keys`, as the variant says."""
        mean = self.keys.mean(keys)
        key = mean if self.keys.variant == "consistent" else keys[0]
        toward = mean if self.keys.variant == "2022" else None
        return insert_pair(self._weight(site), key, wanted, moment, damping=self.editor.damping, toward=toward)

    def _size(self, site: Site, delta: LowRank) -> dict[str, float]:
        """In shares of the map's: the change's norm, and its mean squared output over ordinary text."""
        weight, base = self._weight(site), self.moments[site.layer].double()
        drift = _energy(delta.left.double() @ delta.right.double(), base) / max(_energy(weight, base), 1e-300)
        return {"norm": delta.norm() / float(weight.norm()), "drift": drift}

    def _weight(self, site: Site) -> Tensor:
        return self.view.weight(site).detach().to("cpu", torch.float64)


def _energy(matrix: Tensor, moment: Tensor) -> float:
    """Mean squared output of `matrix` over what the moment was taken of."""
    return float(((matrix @ moment.to(matrix)) * matrix).sum())
