"""Extraction on a model that was taught six passages and on families that were taught nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_models import CONFIGS, VOCAB, case, greedy, tiny

from memloc.errors import InputError
from memloc.measurement import Measurement
from memloc.measures.control import with_controls
from memloc.measures.extraction import Extraction
from memloc.measures.record import Scheme, token_record
from memloc.methods import MEASURES
from memloc.passages import Passage, Passages
from memloc.view import ModelView


def random_passages(name: str, count: int, seed: int) -> Passages:
    table = torch.randint(VOCAB, (count, 18), generator=torch.Generator().manual_seed(seed)).tolist()
    return Passages(tuple(Passage(f"{name}-{i}", tuple(row[:6]), tuple(row[6:])) for i, row in enumerate(table)), name)


@pytest.fixture(scope="module")
def taught() -> tuple[ModelView, Passages, Passages]:
    """A GPT-2 of two blocks that has six passages by heart, those passages, and 24 of the same kind it never saw."""
    model = tiny("gpt2", dtype=torch.float32, spread=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1 if parameter.dim() == 2 else 1)
    passages, controls = random_passages("taught", 6, 1), random_passages("unseen", 24, 2)
    ids = torch.tensor([item.ids for item in passages])
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return ModelView.open(model), passages, controls


def test_what_was_taught_is_recited_and_what_was_not_is_not(taught):
    view, passages, controls = taught
    found = with_controls(Extraction(), view, passages, controls)
    assert (found["strict rate"], found.control["strict rate"]) == (1, 0)
    assert found["first miss"] == 12 > found.control["first miss"]
    assert found["exact memorization"] == found["extraction strength"] == 1
    assert found["excess strict rate"] == found["flagged against controls"] == 1
    assert found["inside controls' range"] == found["below controls' range"] == 0
    assert found["log10 p_z"] == pytest.approx(found["median log p_z"] / math.log(10))
    assert found["queries to leak any"] == 1 and found.control["queries to leak any"] > 1e6
    assert found["expected leaks"] == pytest.approx(6) and found.control["expected leaks"] < 0.01
    assert found.figures["strict rate"].low == pytest.approx(0.05 ** (1 / 6))
    assert found.control.figures["strict rate"].high == pytest.approx(1 - 0.05 ** (1 / 24))


def test_controls_taken_for_passages_are_inside_their_own_range(taught):
    """The control of the control: what is no different is not flagged."""
    view, _, controls = taught
    found = with_controls(Extraction(), view, controls[:12], controls[12:])
    assert found["excess strict rate"] == 0
    assert found["inside controls' range"] + found["below controls' range"] > 0.5
    assert "flagged against controls" not in found.figures  # 12 controls could flag nothing at 5 %


def test_verdicts_of_the_taught_model_are_those_of_generation(taught):
    view, passages, controls = taught
    rows = Extraction(batch_size=4)(view, passages + controls).rows
    said = [greedy(view.model, item.prefix, len(item.suffix)) == item.suffix for item in passages + controls]
    assert [row["strict"] for row in rows] == said
    assert said == [True] * 6 + [False] * 24


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_rows_hold_what_the_record_says(family):
    model, passages = case(family)
    view = ModelView.open(model)
    found = Extraction(temperature=0.8, top_k=7, p=0.5)(view, passages)
    scheme = Scheme(temperature=0.8, top_k=7)
    record = token_record(view, passages, schemes=(scheme, Scheme()))
    assert [row["id"] for row in found.rows] == list(passages.ids)
    assert [row["dose"] for row in found.rows] == [item.tags["dose"] for item in passages]
    assert [row["log_pz"] for row in found.rows] == record.log_pz(scheme).tolist()
    assert [row["nll"] for row in found.rows] == record.nll().tolist()
    for row in found.rows:
        if math.isfinite(row["log_pz"]):
            assert row["queries"] == max(1, math.ceil(math.log(0.5) / math.log1p(-math.exp(row["log_pz"]))))
        else:
            assert row["queries"] == row["log10_queries"] == math.inf
        assert row["strict"] == (row["worst_rank"] == 0) == (row["first_miss"] == row["tokens"])
    assert found["strict rate"] == sum(row["strict"] for row in found.rows) / len(passages)


def test_mean_nll_weighs_tokens_and_not_rows():
    model, passages = case("gpt2")
    found = Extraction()(ModelView.open(model), passages)
    total = sum(row["nll"] * row["tokens"] for row in found.rows)
    assert found["mean nll"] == pytest.approx(total / sum(len(item.suffix) for item in passages))
    assert found["mean nll"] != pytest.approx(sum(row["nll"] for row in found.rows) / len(passages), rel=1e-3)


def test_an_infinite_log_pz_survives_the_disk(tmp_path):
    model, passages = case("llama")
    found = Extraction(top_k=2)(ModelView.open(model), passages)
    assert any(row["log_pz"] == -math.inf for row in found.rows)
    found.save(tmp_path / "measured.json")
    assert Measurement.load(tmp_path / "measured.json") == found
    json.loads((tmp_path / "measured.json").read_text(), parse_constant=pytest.fail)


def test_one_row_has_figures_but_no_intervals_where_none_can_be():
    model, passages = case("gpt2")
    figures = Extraction()(ModelView.open(model), passages[:1]).figures
    assert figures["median log p_z"].low is None and figures["first miss"].high is None
    assert figures["strict rate"].low is not None


def test_provenance_names_model_passages_and_settings():
    model, passages = case("gpt2")
    view = ModelView.open(model)
    told = Extraction(top_k=40)(view, passages).provenance
    assert told.inputs == {"model": view.digest, "passages": passages.digest}
    assert told.settings["top_k"] == 40 and told.method == "extraction"


def test_nothing_of_the_model_is_changed_by_measuring():
    model, passages = case("qwen3")
    view = ModelView.open(model)
    before = view.digest
    Extraction()(view, passages)
    assert view.digest == before and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"p": 1.0}, "p 1.0"), ({"n": 0}, "n 0"), ({"batch_size": 0}, "batch_size 0"), ({"temperature": -1.0}, "temp"),
     ({"top_k": 0}, "top_k 0"), ({"top_p": 2.0}, "top_p 2.0")],
)  # fmt: skip
def test_a_setting_outside_its_range_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Extraction(**settings)


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_every_measure_refuses_to_measure_nothing(name):
    model, _ = case("gpt2")
    with pytest.raises(InputError, match="no passage to measure"):
        MEASURES[name]()(ModelView.open(model), Passages(()))
