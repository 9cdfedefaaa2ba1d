"""Which rows a gradient editor keeps as they are: what the request names, and what the model says by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from editors.base import Request
from editors.tuning.keep import Keep, Source
from editors.tuning.replay import own_samples
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.view import ModelView

REPLAY_SHARE = 2
"""Rows of the model's own samples to one row of each other keep set."""


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """The settings of a keep term.

    Attributes:
        keep_weight: of the keep term.
        keep_rows: rows to keep in a step.
        keep_retain: draw from `retain`, if given.
        keep_text: draw from `text`, if given.
        replay: how many samples of the model to draw, before filtering; 0 for none.
        replay_length: tokens of each; by default as long as the longest target, within the context.
        replay_temperature: of the samples.
        replay_ngram: a sample that shares that many tokens in a row with a target is left out.
    """

    keep_weight: float = 5.0
    keep_rows: int = 20
    keep_retain: bool = True
    keep_text: bool = True
    replay: int = 2400
    replay_length: int | None = None
    replay_temperature: float = 0.7
    replay_ngram: int = 8

    def check_keeping(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            InputError: names the setting.
        """
        for name in ("keep_rows", "replay_ngram"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.replay_temperature <= 0:
            raise InputError(f"replay_temperature {self.replay_temperature}: expected above 0")
        if self.replay < 0 or self.keep_weight < 0:
            raise InputError(f"expected replay and keep_weight of 0 or more, found {self.replay}, {self.keep_weight}")

    def kept(
        self, view: ModelView, request: Request, avoid: Passages, notes: dict[str, Any], *, steps: int,
        teach: bool = True,
    ) -> Keep | None:  # fmt: skip
        """The keep term; what it draws from goes to `notes`. None where there is nothing to keep, or no weight.

        Args:
            view: the model before training, in the dtype of the work.
            request: its `retain`, `text` and seed are used.
            avoid: passages that samples must not recite, and that may not be retained.
            notes: filled.
            steps: at most that many steps.
            teach: see `Keep`.

        Raises:
            InputError: a passage both to change and to retain, or tokens that the model does not know.
        """
        if not self.keep_weight:
            return None
        named = _rows(request.retain, avoid, view) if self.keep_retain else None
        text = _rows(request.text, None, view) if self.keep_text else None
        sources = []
        if self.replay:
            made = own_samples(self, view, avoid, request.text, request.retain, seed=request.seed)
            notes["replay"] = {"kept": len(made.ids), "filtered": made.filtered, "length": made.ids.shape[1]}
            sources.append(Source.of("replay", made.ids.tolist(), made.hidden))
        sources += [Source.of(name, rows) for name, rows in (("retain", named), ("text", text)) if rows]
        if not sources:
            return None
        weights = [REPLAY_SHARE if source.name == "replay" else 1 for source in sources]
        shares = [max(1, round(self.keep_rows * weight / sum(weights))) for weight in weights]
        notes["keep_rows"] = {source.name: share for source, share in zip(sources, shares, strict=True)}
        return Keep(view, sources, shares, steps=steps, seed=request.seed, teach=teach)


def _rows(given: Passages | None, avoid: Passages | None, view: ModelView) -> list[tuple[int, ...]] | None:
    """Token rows of a keep set, checked."""
    if given is None:
        return None
    given.check(view.vocab, view.context)
    targets = {item.ids for item in avoid or ()}
    for item in given:
        if item.ids in targets:
            raise InputError(f"passage {item.id!r} is both to change and to retain; take it out of one set")
    return [item.ids for item in given]
