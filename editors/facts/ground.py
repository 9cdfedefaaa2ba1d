"""What work on many facts starts from, whichever layers are changed: the facts as rows, and what should stay."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from editors.base import Request
from editors.edit import Edit
from editors.facts.asked import demands_of
from editors.facts.batch_settings import BatchEditor
from editors.facts.closed_forms import Metric
from editors.facts.contexts import Demand, Row, Token, check_context, row_of, sample_prefixes
from editors.facts.keys_values import read_at
from editors.facts.protected import Protected, protected_rows, second_moment_at
from memloc.errors import InputError
from memloc.moments import Moments
from memloc.passages import Facts
from memloc.sites import Site
from memloc.view import ModelView


class Stays(NamedTuple):
    """What should stay at some sites.

    Attributes:
        metrics: which directions are cheap.
        beside: keys that should stay and stand beside those asked for.
        energy: mean ‖output‖² over what should stay.
    """

    metrics: Mapping[Site, Metric]
    beside: Mapping[Site, Tensor]
    energy: Mapping[Site, float]


@dataclass(frozen=True)
class Ground:
    """What is read from the model as it is, at one token of the prompts.

    Attributes:
        editor: its settings.
        view: the model.
        facts: what is asked.
        prefixes: texts that stand before the prompts.
        demands: the facts as rows.
        own: how many of each one's rows are the model's own ways to it.
        kept: rows that should stay.
        moments: of ordinary text.
        past: edits the model already holds.
        known: metric and energy of the sites asked for so far.
    """

    editor: BatchEditor
    view: ModelView
    facts: Facts
    prefixes: tuple[str, ...]
    demands: tuple[Demand, ...]
    own: tuple[int, ...]
    kept: Protected
    moments: Moments
    past: tuple[Edit, ...] = ()
    known: dict[Site, tuple[Metric, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, editor: BatchEditor, view: ModelView, request: Request, facts: Facts, moments: Moments) -> Ground:
        """With prefixes, ways to the facts and protected rows, drawn by the request's seed.

        Raises:
            InputError: a fact that does not fit, with its prefix, into the model's context.
        """
        draw = torch.Generator().manual_seed(request.seed)
        prefixes = editor.prefixes
        if prefixes is None:
            prefixes = sample_prefixes(view, editor.lengths, editor.samples, draw, top_k=editor.top_k)
        demands, own = demands_of(editor, view, facts, prefixes, draw)
        check_context(demands, view.context)
        kept = protected_rows(view, facts, editor.place, request, editor.amounts, draw)
        return cls(editor, view, facts, tuple(prefixes), demands, tuple(own), kept, moments,
                   request.past)  # fmt: skip

    def without(self, rows: Collection[Row]) -> Ground:
        """The same with these rows neither protected nor among the model's own ways to a fact."""
        demands, own = [], []
        for entry, count in zip(self.demands, self.own, strict=True):
            first = len(entry.prompts) - count
            ways = tuple(row for row in entry.prompts[first:] if row not in rows)
            demands.append(replace(entry, prompts=entry.prompts[:first] + ways))
            own.append(len(ways))
        kept = self.kept.without(rows)
        return replace(self, demands=tuple(demands), own=tuple(own), kept=kept, known={})

    def ways(self) -> list[tuple[Row, ...]]:
        """Of each fact the model's own ways to it, the likeliest first."""
        pairs = zip(self.demands, self.own, strict=True)
        return [entry.prompts[len(entry.prompts) - count :] for entry, count in pairs]

    def stays(self, sites: Sequence[Site]) -> Stays:
        """What should stay at `sites`; each one's metric is worked out once.

        Raises:
            InputError: no moment of a site, or none that the editor can use.
        """
        view, editor = self.view, self.editor
        self._learn([site for site in sites if site not in self.known])
        past = read_at(view, sites, self.kept.past) if self.kept.past and editor.past_weight else {}
        metrics, beside = editor.holding({site: self.known[site][0] for site in sites}, past, editor.past_weight)
        return Stays(metrics, beside, {site: self.known[site][1] for site in sites})

    def _learn(self, sites: Sequence[Site]) -> None:
        total = {site: self.moments.mean(site) for site in sites}
        for site, moment in total.items():
            if moment.shape != 2 * self.view.weight(site).shape[1:]:
                wanted = self.view.weight(site).shape[1]
                raise InputError(f"{site}: second moment {list(moment.shape)} for keys of {wanted} entries")
        for rows, share in ((self.kept.named, self.editor.protect), (self.kept.said, self.editor.replay)):
            if rows and share and sites:
                more = second_moment_at(self.view, sites, rows)
                total = {site: moment + share * more[site] for site, moment in total.items()}
        for site, moment in total.items():
            weight = self.view.weight(site).detach().to("cpu", torch.float64)
            self.known[site] = self.editor.metric(moment), float(((weight @ moment) * weight).sum())


def refuse_unheard(view: ModelView, facts: Facts, token: Token, layers: Sequence[int]) -> None:
    """Refuse an edit of the last block at a token after which nothing is left to hear it.

    Raises:
        InputError: names the fact.
    """
    for fact in facts:
        row = row_of(fact.prompt, token)
        if layers[-1] == view.layers - 1 and row.at < len(row.ids) - 1:
            where = "what the last block puts out at the subject reaches no later token"
            raise InputError(f"fact {fact.id!r}: {where}; edit lower layers, or at prompt-last")
