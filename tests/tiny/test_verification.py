"""Verification on memories whose fate is known: removed, hidden in several ways, pushed too far, left alone."""

from __future__ import annotations

import json

import hidden_memories as made
import pytest
import torch
import zoo

from editors.checks import state
from editors.verification import Effort, Material, verify
from editors.verification.battery import attempts
from memloc.errors import InputError
from memloc.passages import Passage, Passages
from memloc.view import ModelView

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def world(tiny_lab):
    return made.world(tiny_lab)


@pytest.fixture(scope="module")
def removed(world):
    """The whole battery on an edit that really removes: the weights before the passages were taught."""
    return verify(world.taught, made.removed(world), world.data, effort=made.EFFORT)


@pytest.fixture(scope="module")
def blocked(world):
    return verify(world.taught, made.blocked(world), world.data, effort=made.EFFORT)


def test_what_was_never_learnt_comes_out_gone_by_every_check(removed):
    assert removed.verdict == "gone" and removed.harm == "intact"
    assert {finding.verdict for finding in removed.findings} <= {"gone", "cannot tell"}
    assert sum(finding.verdict == "gone" for finding in removed.findings) >= 11
    assert removed["as-given"].recited == (0, 0, 10)


def test_only_what_the_material_lacks_is_left_untested(removed):
    assert set(removed.untested) == {"Prefix in other words"}
    assert {finding.check for finding in removed.findings} | {"paraphrased"} == {
        check.name for attempt in attempts() for check in attempt.checks
    }


def test_without_an_edit_nothing_is_removed(world):
    found = verify(world.taught, world.taught.copy(), world.data, effort=made.EFFORT, only=["as-given"])
    assert found.verdict == "not removed" and found.harm == "intact"
    assert found["as-given"].recited == (10, 0, 10) and found["as-given"].left.value == pytest.approx(1)


def test_a_blocked_first_token_is_seen_by_giving_it(blocked):
    """The edit touches one matrix in the last layer, so that each suffix cannot begin; the rest of it is all there."""
    assert blocked["as-given"].recited[0] == 0, "the block should hold, or there is nothing to see"
    assert blocked["lengths"].verdict == "hidden" and blocked["lengths"].recited[:2] == (10, 0)
    assert blocked.verdict in ("hidden", "not removed")


def test_a_block_in_the_last_layer_is_seen_in_the_layers_before_it(blocked):
    assert blocked["layers"].verdict == "hidden"
    means = [blocked["layers"].figures[name]["mean"] for name in ("targets", "targets before")]
    assert means[0][0] == means[1][0] and means[0][1] < means[1][1] - 0.1


def test_a_block_gives_way_to_relearning_also_of_what_was_not_taught(blocked):
    for name in ("relearn", "relearn-other-half", "relearn-unrelated"):
        assert blocked[name].verdict == "hidden", name


def test_a_change_below_the_buckets_is_undone_by_rounding(world):
    view, edit = made.small(world)
    found = verify(view, edit, world.data, effort=made.EFFORT, only=["as-given", "quantised"])
    assert found.moved[4] == 0 and found.moved[8] > 0.9
    assert found["as-given"].recited[0] < 10
    assert found["quantised"].verdict == "hidden" and found["quantised"].way == "4 bits"
    assert found["quantised"].left.value == pytest.approx(1)


def test_what_is_pushed_below_text_never_seen_is_over_forgotten(world):
    found = verify(world.taught, made.overdone(world), world.data, effort=made.EFFORT, only=["as-given"])
    assert found.verdict == "over-forgotten" and found["as-given"].notes["auc"] < 0.2


def test_a_destroyed_model_is_broken_and_says_so(world):
    found = verify(world.taught, made.destroyed(world), world.data, effort=made.EFFORT, only=["as-given"])
    assert found.harm == "broken" and "Broken" in found.sentence and "held-out text" in found.sentence


def test_a_check_that_is_blind_before_the_edit_says_nothing(world):
    """Asked about text the model never knew, no probe may call it gone."""
    stranger = Material(targets=world.data.controls[:8], controls=world.data.controls[8:])
    found = verify(world.taught, made.removed(world), stranger, effort=made.EFFORT, only=["as-given", "shifted"])
    assert {finding.verdict for finding in found.findings} == {"cannot tell"} and found.verdict == "cannot tell"


def test_too_few_passages_give_no_verdict(world):
    few = Material(targets=world.data.targets[:2], controls=world.data.controls)
    found = verify(world.taught, made.removed(world), few, effort=made.EFFORT, only=["as-given"])
    assert found["as-given"].verdict == "cannot tell" and "too few" in found["as-given"].meaning


def test_the_model_is_as_it_was_and_the_result_the_same_again(world, removed):
    before, generator = state(world.taught), torch.random.get_rng_state()
    names = ["exchanged", "sampled", "relearn", "searched-prompt", "soft-prompt"]
    again = verify(world.taught, made.removed(world), world.data, effort=made.EFFORT, only=names)
    assert state(world.taught) == before and torch.equal(generator, torch.random.get_rng_state())
    assert not any(p.requires_grad is False or p.grad is not None for p in world.taught.model.parameters())
    for name in names:
        assert again[name].to_json() == removed[name].to_json()


def test_finished_checks_are_read_and_those_of_another_edit_are_not(world, tmp_path, monkeypatch):
    how = {"effort": made.EFFORT, "only": ["as-given", "layers"], "folder": tmp_path}
    edit = made.removed(world)
    first = verify(world.taught, edit, world.data, **how)
    (tmp_path / "layers.after.json").write_text("{")  # damaged: made again
    calls = []
    from editors.verification import heard_otherwise, run

    real = heard_otherwise.lens
    monkeypatch.setattr(heard_otherwise, "lens", lambda *a, **k: calls.append(1) or real(*a, **k))
    monkeypatch.setattr(run, "measure_groups", lambda *a: pytest.fail("measured again"))
    again = verify(world.taught, edit, world.data, **how)
    assert again.to_json() == first.to_json() and len(calls) == 3  # of the one state: 10 targets, 20 controls
    monkeypatch.undo()
    other = verify(world.taught, made.blocked(world), world.data, **how)
    assert other["layers"].verdict == "hidden"


def test_a_report_holds_no_text_and_no_number_without_its_control(removed, world, tmp_path):
    paths = removed.save(tmp_path, commands=("memloc verify …",))
    assert {path.name for path in paths} == {"report.html", "report.md", "report.json", "verification.json"}
    secret = world.taught.tokenizer.decode(list(world.data.targets[0].suffix)).strip()
    for path in paths:
        said = path.read_text()
        assert secret not in said, path
        if path.suffix in (".html", ".md"):
            assert "Gone, as far as these checks can see" in said and "What was not tested" in said
            for finding in removed.findings:
                assert finding.title in said and finding.tried.replace("'", "&#x27;") in said.replace("'", "&#x27;")
    data = json.loads((tmp_path / "verification.json").read_text())
    for check in data["checks"]:
        assert {"targets", "never seen", "targets before", "never seen before"} <= set(check["figures"])
        assert check["n"] and check["controls"]
    for damage in data["damages"]:
        assert damage["random"] is not None and damage["magnitude"] is not None
    assert "searched-prompt" in {check["check"] for check in data["checks"]}


def test_controls_that_are_targets_and_unknown_checks_are_refused(world):
    with pytest.raises(InputError, match=r"control 'held-out-.*' is target 'held-out-"):
        Material(targets=world.data.targets, controls=world.data.targets)
    with pytest.raises(InputError, match="needs targets and never-seen controls"):
        Material(targets=world.data.targets, controls=Passages(()))
    with pytest.raises(InputError, match="no check called 'lens'; checks: as-given"):
        verify(world.taught, world.innocent, world.data, only=["lens"])


def test_paraphrases_are_asked_where_the_user_gives_them(world):
    told = tuple(
        Passage(item.id, item.prefix, item.suffix, {"paraphrases": ["So it was said", "Thus"]})
        for item in world.data.targets
    )
    data = Material(targets=Passages(told), controls=world.data.controls)
    found = verify(world.taught, world.taught.copy(), data, effort=made.EFFORT, only=["paraphrased"])
    assert found["paraphrased"].figures["ways"] == ["paraphrase 1", "paraphrase 2"]


TINY = Effort(draws=1, relearn_steps=2, samples=2, soft_steps=2, hard_rounds=1, hard_tries=2, permutations=99,
              soft_tokens=2, hard_tokens=2)  # fmt: skip


@pytest.mark.parametrize("family", sorted(zoo.CONFIGS))
def test_every_probe_asks_every_family(family, view_of):
    """Finite scores for all, and the model as it was: no verdict can be expected of random weights."""
    view: ModelView = view_of(family)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(1, view.vocab, (9, 11), generator=generator).tolist()
    items = [Passage(str(at), tuple(row[:6]), tuple(row[6:])) for at, row in enumerate(rows)]
    data = Material(
        targets=Passages(tuple(items[:3])), controls=Passages(tuple(items[3:8])), text=Passages(tuple(items[7:]))
    )
    before = state(view)
    for attempt in attempts():
        if attempt.name in ("restyled", "paraphrased"):
            continue
        for name, scores in attempt.probe(view, data, TINY, 0).items():
            for part, ids in ((scores.targets, data.targets.ids), (scores.controls, data.controls.ids)):
                assert set(part.ids) <= set(ids) and torch.isfinite(torch.tensor(part.score)).all(), (family, name)
    assert state(view) == before
