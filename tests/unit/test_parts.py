"""Localizations in parts: what an interrupt costs, what is read again, and what is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import zoo

from memloc.errors import InputError, TargetError
from memloc.parts import discard, finished, in_parts, joined
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView

SITE = Site(0, Kind.MLP_OUT)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Score of a position = its token; counts its runs, and stops when told to."""

    factor: int = 1
    in_parts: ClassVar[bool] = True
    seen: ClassVar[list[str]] = []
    stop_at: ClassVar[str] = ""

    def __call__(self, view, passages, *, contrast=None):
        if self.stop_at in passages.ids:
            raise KeyboardInterrupt
        self.seen.extend(passages.ids)
        lengths = tuple(len(item.ids) for item in passages)
        rows = [list(item.ids) + [0] * (max(lengths) - len(item.ids)) for item in passages]
        notes = {"rows": list(lengths), "longest": max(lengths), "name": "lengths", "inner": {"n": len(passages)}}
        made = Provenance("lengths", settings_of(self), inputs={"model": "m", "passages": passages.digest})
        scores = {SITE: self.factor * torch.tensor(rows).float()}
        return Localization(Grain.POSITION, scores, made, passages.ids, notes, lengths)


@pytest.fixture
def view():
    return ModelView.open(zoo.build("gpt2"))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(Lengths, "seen", [])


def test_an_interrupted_run_goes_on_where_it_stopped(view, tmp_path, monkeypatch):
    passages = zoo.passages(5)
    monkeypatch.setattr(Lengths, "stop_at", "p4")
    with pytest.raises(KeyboardInterrupt):
        in_parts(Lengths(), view, passages, tmp_path, size=2)
    assert Lengths.seen == ["p0", "p1", "p2", "p3"] and finished(tmp_path) == 2
    monkeypatch.setattr(Lengths, "stop_at", "")
    found = in_parts(Lengths(), view, passages, tmp_path, size=2)
    assert Lengths.seen == ["p0", "p1", "p2", "p3", "p4"]
    whole = Lengths()(view, passages)
    assert torch.equal(found.scores[SITE], whole.scores[SITE])
    assert (found.passages, found.lengths) == (whole.passages, whole.lengths)
    assert found.provenance.inputs["passages"] == passages.digest
    discard(tmp_path)
    assert not tmp_path.exists()


def test_parts_of_another_run_are_not_read(view, tmp_path):
    passages = zoo.passages(2)
    in_parts(Lengths(), view, passages, tmp_path)
    in_parts(Lengths(factor=2), view, passages, tmp_path)
    in_parts(Lengths(), view, passages, tmp_path, contrast=zoo.passages(1, seed=3))
    in_parts(Lengths(), ModelView.open(zoo.build("gpt2", seed=1)), passages, tmp_path)
    in_parts(Lengths(), view, passages[::-1], tmp_path)
    assert len(Lengths.seen) == 10
    in_parts(Lengths(), view, passages, tmp_path)
    assert len(Lengths.seen) == 10


def test_a_part_that_was_cut_is_made_again(view, tmp_path):
    passages = zoo.passages(2)
    in_parts(Lengths(), view, passages, tmp_path, size=1)
    part = sorted(tmp_path.glob("*/part-*"))[1]
    part.write_bytes(part.read_bytes()[:40])
    found = in_parts(Lengths(), view, passages, tmp_path, size=1)
    assert Lengths.seen == ["p0", "p1", "p1"]
    assert torch.equal(found.scores[SITE], Lengths()(view, passages).scores[SITE])


def test_notes_are_joined_by_what_they_hold(view, tmp_path):
    passages = zoo.passages(3)
    lengths = [len(item.ids) for item in passages]
    notes = in_parts(Lengths(), view, passages, tmp_path, size=2).notes
    assert notes["rows"] == lengths and notes["name"] == "lengths"
    mean = (2 * max(lengths[:2]) + lengths[2]) / 3
    assert notes["longest"] == {"least": max(lengths[:2]), "mean": mean, "most": lengths[2]}
    assert notes["inner"]["n"] == {"least": 1, "mean": 5 / 3, "most": 2}


def test_what_cannot_be_listed_otherwise_is_listed_part_by_part():
    made = Provenance("by hand")
    parts = [Localization(Grain.LAYER, {SITE: torch.zeros(1)}, made, (name,), {"said": name}) for name in "ab"]
    assert joined(parts, made).notes == {"said": ["a", "b"]}


def test_what_is_scored_together_is_refused(view, tmp_path):
    from memloc.localizers.weight_gradient import WeightGradient

    with pytest.raises(InputError, match="WeightGradient scores all passages together; it cannot be run in parts"):
        in_parts(WeightGradient(), view, zoo.passages(2), tmp_path)
    with pytest.raises(InputError, match="no passages given"):
        in_parts(Lengths(), view, zoo.passages(2)[:0], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match=r"cannot be made: .*; nothing was run"):
        in_parts(Lengths(), view, zoo.passages(2), tmp_path / "file")
