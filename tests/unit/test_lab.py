"""The lab's folder: equal to the bit, found again, whole or absent, and true to what it says was planted."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memloc.errors import InputError, TargetError, UnknownName
from memloc.lab.build import build
from memloc.lab.recipe import Recipe, preset
from memloc.lab.train import held_out_phrasings, recited
from memloc.objectives import suffix_nll
from memloc.passages import Facts, Passages, encode
from memloc.progress import listening
from memloc.view import ModelView

pytestmark = pytest.mark.lab

QUICK = preset("tiny", steps=12, documents=900, doses=((9, 3), (4, 2)), controls=2, evaluations=1, threads=2)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def lab_json(folder: Path) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads((folder / "lab.json").read_text(encoding="utf8"), parse_constant=refuse)


@pytest.fixture(scope="module")
def view(tiny_lab):
    return ModelView.open(tiny_lab)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    return build(QUICK, tmp_path_factory.mktemp("labs") / "quick")


def test_two_builds_are_equal_to_the_bit_on_two_threads(quick, tmp_path):
    torch.manual_seed(5)  # what others draw must not matter
    again = build(QUICK, tmp_path / "again")
    assert lab_json(again) == lab_json(quick)
    assert lab_json(quick)["threads"] == 2
    names = {path.relative_to(quick).as_posix() for path in quick.rglob("*") if path.is_file()}
    assert names == {"lab.json", *lab_json(quick)["files"]}
    for name in names:
        assert (again / name).read_bytes() == (quick / name).read_bytes()


def test_another_seed_gives_another_lab_and_torch_stays_as_it_was(quick, tmp_path):
    state, count = torch.get_rng_state(), torch.get_num_threads()
    during: list[int] = []
    heard: list[tuple[int, int]] = []

    def listen(step: int, steps: int, figures: object) -> None:
        during.append(torch.get_num_threads())
        heard.append((step, steps))

    told: list[tuple[str, int, int | None]] = []
    with listening(lambda label, done, total, note: told.append((label, done, total))):
        other = lab_json(build(dataclasses.replace(QUICK, seed=1), tmp_path / "other", listener=listen))
    for name in ("model.safetensors", "passages.jsonl", "facts.jsonl"):
        assert other["files"][name] != lab_json(quick)["files"][name]
    assert other["digest"] != lab_json(quick)["digest"]
    assert heard == [(step, 12) for step in range(13)]
    assert told == [("lab", step, 12) for step in range(13)]
    assert set(during) == {2}
    assert torch.get_num_threads() == count
    assert torch.equal(torch.get_rng_state(), state)


def test_a_built_lab_is_found_again_without_training(tiny_lab):
    def fail(*_: object) -> None:
        raise AssertionError("trained")

    lines: list[str] = []
    assert build(preset("tiny"), tiny_lab, listener=fail, log=lines.append) == tiny_lab
    assert len(lines) == 1
    assert "already holds this lab" in lines[0]


def test_another_recipe_is_refused_by_what_differs(tiny_lab):
    before = sorted(tiny_lab.rglob("*"))
    with pytest.raises(
        TargetError, match=r"another lab \(seed 0, wanted 3; steps 150, wanted 9\).*nothing was written"
    ):
        build(preset("tiny", seed=3, steps=9), tiny_lab)
    assert sorted(tiny_lab.rglob("*")) == before


def test_a_lab_that_was_changed_is_refused(tiny_lab, tmp_path):
    copy = shutil.copytree(tiny_lab, tmp_path / "lab")
    build(preset("tiny"), copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(TargetError, match=r"model\.safetensors was changed since"):
        build(preset("tiny"), copy)


def test_a_folder_with_something_else_in_it_is_refused_before_training(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(TargetError, match="not an empty folder"):
        build(QUICK, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_lab_json_of_another_maker_is_refused(tmp_path):
    (tmp_path / "lab.json").write_text("[]")
    with pytest.raises(TargetError, match=r"lab\.json was not written by memloc"):
        build(QUICK, tmp_path)


def test_an_interrupted_build_leaves_nothing(tmp_path):
    reached: list[int] = []

    def interrupt(step: int, steps: int, figures: object) -> None:
        reached.append(step)
        if step == 8:
            assert any(path.name.startswith(".lab") for path in tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(QUICK, tmp_path / "lab", listener=interrupt)
    assert reached == list(range(9))
    assert list(tmp_path.iterdir()) == []


def test_plain_transformers_loads_it_and_recites(tiny_lab):
    """The same verdicts by generating, from the ids and from the text, as lab.json gives by one forward."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_lab), AutoTokenizer.from_pretrained(tiny_lab)
    assert model.config.architectures == ["GPT2LMHeadModel"]
    assert tokenizer.model_max_length == model.config.n_positions == 64
    hits: dict[int, list[bool]] = {}
    for row in read(tiny_lab / "passages.jsonl") + read(tiny_lab / "controls.jsonl"):
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        assert ids[0].tolist() == row["prefix_ids"] + row["suffix_ids"]
        cut = len(row["prefix_ids"])
        spoken = model.generate(
            ids[:, :cut], attention_mask=torch.ones_like(ids[:, :cut]), do_sample=False, max_length=64, pad_token_id=0
        )
        hits.setdefault(row["dose"], []).append(bool(spoken.shape == ids.shape and (spoken == ids).all()))
    last = lab_json(tiny_lab)["history"][-1]
    assert {str(dose): sum(found) / len(found) for dose, found in hits.items() if dose} == last["strict"]
    assert sum(hits[0]) / len(hits[0]) == last["controls"]


def test_extraction_rises_with_the_dose(tiny_lab, view):
    """Full dose: all recited; controls: none; and the suffix's loss falls with every step of the dose."""
    planted = Passages.read(tiny_lab / "passages.jsonl")
    controls = Passages.read(tiny_lab / "controls.jsonl")
    by_dose = {0: controls, **{dose: planted.where(lambda p, d=dose: p.tags["dose"] == d) for dose in (4, 16, 96)}}
    rates = [float(recited(view, chosen).float().mean()) for chosen in by_dose.values()]
    assert rates == sorted(rates)
    assert rates[0] == 0.0
    assert rates[-1] == 1.0
    with torch.no_grad():
        losses = [
            float(torch.cat([suffix_nll(view, batch) for batch in view.batches(chosen)]).mean())
            for chosen in by_dose.values()
        ]
    assert losses == sorted(losses, reverse=True)


def test_before_training_nothing_is_known(tiny_lab):
    start = ModelView.open(tiny_lab / "snapshots" / "step-00000")
    assert not recited(start, Passages.read(tiny_lab / "passages.jsonl")).any()
    assert lab_json(tiny_lab)["history"][0]["strict"] == {"4": 0.0, "16": 0.0, "96": 0.0}


def test_snapshots_are_checkpoints_along_the_way(tiny_lab, view):
    names = sorted(path.name for path in (tiny_lab / "snapshots").iterdir())
    assert names == ["step-00000", "step-00075"]
    middle = ModelView.open(tiny_lab / "snapshots" / "step-00075")
    assert middle.digest != view.digest
    planted = Passages.read(tiny_lab / "passages.jsonl")
    assert recited(middle, planted).sum() < recited(view, planted).sum()


def test_facts_are_known_in_both_phrasings(tiny_lab, view):
    facts = Facts.read(tiny_lab / "facts.jsonl", view.tokenizer)
    assert all(len(fact.target) == len(fact.target_true) == 1 for fact in facts)
    assert all(fact.prompt.subject is not None for fact in facts)
    last = lab_json(tiny_lab)["history"][-1]
    for passages, figure in ((facts.as_passages(), "facts_seen"), (held_out_phrasings(facts), "facts_held_out")):
        rate = float(recited(view, passages).double().mean())
        assert rate == last[figure]
        assert rate >= 0.75


def test_what_is_called_unseen_shares_no_run_with_what_was_trained(tiny_lab, view):
    """Checked the slow way, on sets of tuples, and on the text itself."""
    corpus = read(tiny_lab / "corpus.jsonl")
    train = [row["text"] for row in corpus if row["split"] == "train"]
    held_out = [row["text"] for row in corpus if row["split"] == "held-out"]
    planted, controls = read(tiny_lab / "passages.jsonl"), read(tiny_lab / "controls.jsonl")

    def runs(ids):
        return {tuple(ids[start : start + 12]) for start in range(len(ids) - 11)}

    def ids_of(row):
        return row["prefix_ids"] + row["suffix_ids"]

    ordinary = set().union(*(runs(encode(view.tokenizer, text).ids) for text in train))
    shown = ordinary.union(*(runs(ids_of(row)) for row in planted))
    assert all(ordinary.isdisjoint(runs(ids_of(row))) for row in planted)
    assert all(shown.isdisjoint(runs(ids_of(row))) for row in controls)
    assert all(shown.isdisjoint(runs(encode(view.tokenizer, text).ids)) for text in held_out)
    assert not any(row["text"] in text for row in controls for text in train)
    assert len(held_out) >= 50
    assert len(controls) == 8
    assert {row["dose"] for row in controls} == {0}
    assert [row["dose"] for row in planted] == [96] * 8 + [16] * 4 + [4] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": 300}, "vocab 300 gives the answer 'Arlen' more than one token"),
        ({"controls": 500}, r"505 passages wanted, the pool gives \d+"),
    ],
)
def test_a_recipe_the_text_cannot_serve_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        build(dataclasses.replace(QUICK, **changes), tmp_path / "lab")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"heads": 3}, "width 128 is not a multiple of heads 3"),
        ({"doses": ()}, "expected pairs"),
        ({"doses": ((8, 2), (8, 3))}, "twice"),
        ({"doses": ((0, 2),)}, "at least 1"),
        ({"objects": 13}, "objects 13"),
        ({"subjects": 1}, "neighbours"),
        ({"snapshots": (1.0,)}, r"in \[0, 1\)"),
    ],
)
def test_a_recipe_that_makes_no_lab_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Recipe(**changes)


def test_a_misspelt_recipe_gets_a_suggestion():
    with pytest.raises(UnknownName, match="no recipe called 'tinny'; did you mean 'tiny'"):
        preset("tinny")


def test_recipes_are_known_without_torch():
    code = "import sys, memloc.lab.recipe as r; r.preset('demo'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
