"""What a probe returns: how likely every target and every never-seen text is, in each of several ways of asking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memloc.errors import ArtifactError
from memloc.measures.record import token_record
from memloc.passages import Passages
from memloc.view import ModelView

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Heard:
    """How a set of passages is known, each asked in k ways.

    Attributes:
        ids: of the n passages.
        score: [n, k], larger is better known: mean log-probability of a suffix token, in nats, where a probe says
            nothing else.
        recited: [n, k], whether the suffix (or what is left of it) is written whole; None where nothing is written.
    """

    ids: tuple[str, ...]
    score: Array
    recited: NDArray[np.bool_] | None = None

    def rows(self, index: NDArray[np.int64]) -> Heard:
        """Some of the passages."""
        kept = None if self.recited is None else self.recited[index]
        return Heard(tuple(self.ids[at] for at in index), self.score[index], kept)


@dataclass(frozen=True)
class Scores:
    """One probe on one state of the model.

    Attributes:
        ways: names of the k ways of asking: prefixes, steps, layers, bits.
        targets: of the passages that were to be forgotten.
        controls: of texts never seen, asked in the very same ways.
        notes: what else the probe saw, JSON values.
    """

    ways: tuple[str, ...]
    targets: Heard
    controls: Heard
    notes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, ways: Sequence[str], parts: Sequence[Heard], notes: Mapping[str, Any] | None = None) -> Scores:
        """Of targets and controls, in that order."""
        targets, controls = parts
        return cls(tuple(ways), targets, controls, dict(notes or {}))

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "ways": list(self.ways),
            "targets": _out(self.targets),
            "controls": _out(self.controls),
            "notes": dict(self.notes),
        }

    @classmethod
    def from_json(cls, value: Any) -> Scores:
        """Back from `to_json`.

        Raises:
            ArtifactError: not scores.
        """
        try:
            return cls(tuple(value["ways"]), _in(value["targets"]), _in(value["controls"]), dict(value["notes"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"not scores of a probe: {error}") from error


def joined(parts: Sequence[Heard], ids: Sequence[str]) -> Heard:
    """Heard in parts, in the order of `ids`."""
    known = {name: (part, at) for part in parts for at, name in enumerate(part.ids)}
    rows = [known[name] for name in ids]
    recited = None
    if all(part.recited is not None for part in parts):
        recited = np.stack([part.recited[at] for part, at in rows if part.recited is not None])
    return Heard(tuple(ids), np.stack([part.score[at] for part, at in rows]), recited)


def heard(view: ModelView, ways: Sequence[Passages], ids: Sequence[str]) -> Heard:
    """Teacher-force the same n passages put in k ways.

    Args:
        view: the model.
        ways: k sets of n passages each, in one order.
        ids: what to call the passages.

    Cost: k forwards over the passages.
    """
    score, recited = np.empty((len(ids), len(ways))), np.empty((len(ids), len(ways)), dtype=bool)
    for column, passages in enumerate(ways):
        record = token_record(view, passages, label="verify: asked")
        score[:, column] = -record.nll().numpy()
        recited[:, column] = record.strict.numpy()
    return Heard(tuple(ids), score, recited)


def _out(part: Heard) -> dict[str, Any]:
    recited = None if part.recited is None else part.recited.tolist()
    return {"ids": list(part.ids), "score": part.score.tolist(), "recited": recited}


def _in(value: Any) -> Heard:
    recited = None if value["recited"] is None else np.asarray(value["recited"], dtype=bool)
    score = np.asarray(value["score"], dtype=np.float64)
    if score.shape != (len(value["ids"]), score.shape[-1]):
        raise ValueError(f"{len(value['ids'])} ids for scores of shape {score.shape}")
    return Heard(tuple(value["ids"]), score, recited)
