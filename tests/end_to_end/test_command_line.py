"""The command line as a stranger meets it: every verb on the tiny lab, and every kind of bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.lab


def full_dose(lab: Path) -> str:
    rows = [json.loads(line) for line in (lab / "passages.jsonl").read_text().splitlines()]
    return f"{lab / 'passages.jsonl'}#dose={max(row['dose'] for row in rows)}"


def test_the_whole_loop_by_hand(tiny_lab, command):
    """measure, localize, edit, apply, measure, report, undo: what a user types, and the original bytes at the end."""
    passages, controls = full_dose(tiny_lab), tiny_lab / "controls.jsonl"
    text = f"{tiny_lab / 'corpus.jsonl'}#split=held-out"
    measure = ["measure", "extraction", "--passages", passages, "--controls", controls, "--json"]
    code, before, _ = command(*measure, "--model", tiny_lab, "--out", "before.json")
    assert code == 0 and json.loads(before)["figures"]["strict rate"]["value"] > 0.5
    where = ["--grain", "weight", "--scale", "raw", "--out", "where.safetensors"]
    assert command("localize", "weight-gradient", "--model", tiny_lab, "--passages", passages, *where)[0] == 0
    how = ["--localization", "where.safetensors", "--fraction", "0.2", "--steps", "40", "--replay", "64"]
    given = ["--model", tiny_lab, "--passages", passages, "--text", text, *how, "--no-control"]
    code, _, err = command("edit", "sparse-fine-tune", *given, "--out", "gone.safetensors")
    assert code == 0, err
    assert command("apply", "gone.safetensors", "--model", tiny_lab, "--out", "gone")[0] == 0
    code, after, _ = command(*measure, "--model", "gone", "--out", "after.json")
    rates = [json.loads(text)["figures"]["strict rate"]["value"] for text in (before, after)]
    assert code == 0 and rates[1] < rates[0]
    shown = ["--edit", "gone.safetensors", "--localization", "where.safetensors", "--out", "r"]
    assert command("report", "--compare", "targets:forget", "before.json", "after.json", *shown)[0] == 0
    assert {path.name for path in Path("r").iterdir()} == {"report.html", "report.json", "report.md"}
    assert command("undo", "gone.safetensors", "--model", "gone", "--out", "back")[0] == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert Path("back", name).read_bytes() == (tiny_lab / name).read_bytes()
    assert command("show", "gone.safetensors")[0] == command("show", "before.json")[0] == 0


def test_an_edit_comes_with_its_random_control(tiny_lab, command):
    passages = full_dose(tiny_lab)
    command("localize", "activation", "--model", tiny_lab, "--passages", passages, "--out", "where.safetensors")
    code, out, _ = command("edit", "neuron-dropout", "--model", tiny_lab, "--localization", "where.safetensors",
                           "--count", 9, "--out", "e.safetensors", "--json")  # fmt: skip
    made = json.loads(out)
    assert code == 0 and Path("e.control.safetensors").is_file()
    assert made["edit"]["entries"] == made["control"]["entries"] and made["edit"]["digest"] != made["control"]["digest"]


def test_small_changes_of_a_bfloat16_model_survive_stochastic_rounding(tiny_lab, command):
    """Scaling by 0.999 is below bfloat16's step, so nearest rounding loses most of it."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_lab, dtype=torch.bfloat16).save_pretrained("half")
    shutil.copy(tiny_lab / "tokenizer.json", "half"), shutil.copy(tiny_lab / "tokenizer_config.json", "half")
    where = ["--model", "half", "--passages", full_dose(tiny_lab), "--out", "where.safetensors"]
    assert command("localize", "activation", *where)[0] == 0
    how = ["edit", "neuron-dropout", "--model", "half", "--localization", "where.safetensors", "--count", 20,
           "--mode", "scale", "--factor", "0.999", "--no-control", "--json"]  # fmt: skip
    shares = {}
    for rounding in ("nearest", "stochastic"):
        made = json.loads(command(*how, "--rounding", rounding, "--out", f"{rounding}.safetensors")[1])["edit"]
        shares[rounding] = max(site["changed"] / site["asked"] for site in made["sites"].values())
        assert command("apply", f"{rounding}.safetensors", "--model", "half", "--out", rounding)[0] == 0
        assert command("undo", f"{rounding}.safetensors", "--model", rounding, "--out", f"{rounding}-back")[0] == 0
        assert Path(f"{rounding}-back/model.safetensors").read_bytes() == Path("half/model.safetensors").read_bytes()
    assert shares["stochastic"] > 2 * shares["nearest"], shares


def test_check_prints_the_proved_map(tiny_lab, command):
    code, out, _ = command("check", tiny_lab, "--json")
    assert code == 0 and json.loads(out)["family"] == "GPT-2" and len(json.loads(out)["maps"]) == 6


def test_list_names_every_method(command):
    out = command("list", "--json")[1]
    assert {"localizers", "editors", "measures"} == set(json.loads(out)) and "rome" in json.loads(out)["editors"]


def test_help_and_list_do_not_import_torch():
    code = (
        "import sys, contextlib, io; from editors.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['list'])\n"
        "    try: main(['--help'])\n"
        "    except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def fails(command, *words, says):
    """Exit code 2 and one line on stderr that says what is wrong."""
    code, out, err = command(*words)
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    assert says in err, err


@pytest.mark.parametrize(
    "words, says",
    [
        (["meassure"], "invalid choice"),
        (["measure", "extractoin", "--model", "x"], "did you mean 'extraction'"),
        (["localize", "weight-gradients"], "did you mean 'weight-gradient'"),
        (["edit", "roam", "--model", "x"], "did you mean 'rome'"),
        (["measure"], "needs the NAME of a measure"),
        (["measure", "extraction"], "--model"),
        (["edit", "rome", "--model", "x", "--out", "y", "--steps", "many"], "--steps"),
        (["check", "./no/such/folder"], "no such folder"),
        (["check", "my-modle"], "my-modle: no such folder, and from the hub it cannot be loaded"),
        (["show", "nothing.safetensors"], "no such file"),
        (["apply", "nothing.safetensors", "--model", "x", "--out", "y"], "no such file"),
    ],
)
def test_a_wrong_word_is_one_line(command, words, says):
    fails(command, *words, says=says)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "no record"),
        ('{"id": "a", "prefix_ids": [1], "suffix_ids": [2]}\n{oops', "line 2: not JSON"),
        ("[1, 2]", "record 0 (line 1): found int; known are"),
        ('{"id": "a", "text": "short"}', "line 1: text of"),
        ('{"id": "a", "words": "x"}', "line 1: found keys"),
        ('{"id": "a", "prefix_ids": [1, 99999], "suffix_ids": [2]}', "token id 99999 outside the vocabulary"),
        ('{"id": "a", "prefix_ids": [], "suffix_ids": [2]}', "line 1: 'prefix_ids'"),
        ('{"id": "a", "prefix_ids": [1], "suffix_ids": [2]}\n' * 2, "occurs twice"),
    ],
)
def test_bad_passages_are_one_line(tiny_lab, command, tmp_path, text, says):
    (tmp_path / "p.jsonl").write_text(text)
    fails(command, "measure", "extraction", "--model", tiny_lab, "--passages", "p.jsonl", says=says)


def test_a_fact_without_its_subject_is_one_line(tiny_lab, command, tmp_path):
    fact = {"prompt": "The town of Ada is", "subject": "Boris", "target": "Rome", "target_true": "Paris"}
    (tmp_path / "f.jsonl").write_text(json.dumps(fact))
    words = ["measure", "facts", "--model", tiny_lab, "--facts", "f.jsonl"]
    fails(command, *words, says="line 1: subject 'Boris' is not in")


@pytest.mark.parametrize(
    "words, says",
    [
        (["facts", "--passages", "passages.jsonl"], "FactRecall is measured on --facts"),
        (["facts", "--facts", "facts.jsonl", "--controls", "controls.jsonl"], "FactRecall is measured on --facts"),
        (["extraction", "--facts", "facts.jsonl"], "Extraction is measured on --passages"),
        (["perplexity"], "--passages FILE is needed"),
    ],
)
def test_data_of_another_kind_is_one_line(tiny_lab, command, words, says):
    words = [tiny_lab / word if word.endswith(".jsonl") else word for word in words]
    fails(command, "measure", *words, "--model", tiny_lab, says=says)


def test_a_filter_that_matches_nothing_is_one_line(tiny_lab, command):
    fails(command, "measure", "extraction", "--model", tiny_lab, "--passages", f"{tiny_lab}/passages.jsonl#dose=77",
          says="no record matches")  # fmt: skip


def damaged(lab: Path, to: Path, how) -> Path:
    to.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        shutil.copy(lab / name, to / name)
    how(to)
    return to


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def poisoned(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("h.1.mlp.c_proj.weight"))
    weights[name] = weights[name].clone()
    weights[name][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lacking(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "model.safetensors", metadata={"format": "pt"})


def foreign(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))


@pytest.mark.parametrize(
    "how, says",
    [
        (cut, "cannot be loaded"),
        (pickled, "only pickles"),
        (poisoned, "mlp.c_proj.weight holds values that are not finite"),
        (lacking, "lacks"),
        (foreign, "no row for the model type"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(tiny_lab, command, tmp_path, how, says):
    fails(command, "check", damaged(tiny_lab, tmp_path / "m", how), says=says)


def test_an_edit_is_not_applied_twice_nor_to_another_model_nor_over_a_folder(tiny_lab, command):
    passages = full_dose(tiny_lab)
    command("localize", "random", "--model", tiny_lab, "--passages", passages, "--out", "where.safetensors")
    command("edit", "neuron-dropout", "--model", tiny_lab, "--localization", "where.safetensors", "--count", 3,
            "--out", "e.safetensors", "--no-control")  # fmt: skip
    assert command("apply", "e.safetensors", "--model", tiny_lab, "--out", "once")[0] == 0
    fails(command, "apply", "e.safetensors", "--model", "once", "--out", "twice", says="already applied")
    fails(command, "apply", "e.safetensors", "--model", tiny_lab, "--out", "once", says="not an empty folder")
    fails(command, "undo", "e.safetensors", "--model", tiny_lab, "--out", "back", says="")
    given = ["--model", "once", "--passages", passages]
    fails(command, "localize", "random", *given, "--out", "/proc/none/x", says="cannot be written")
    code, _, err = command("edit", "neuron-dropout", "--model", "once", "--localization", "where.safetensors",
                           "--count", 3, "--out", "f.safetensors")  # fmt: skip
    assert code == 2 and "another model" in err
    assert not Path("twice").exists() and not Path("back").exists() and not Path("f.safetensors").exists()


def test_ctrl_c_while_writing_leaves_no_folder(tiny_lab, command, monkeypatch):
    from editors.shipping import checkpoint

    passages = full_dose(tiny_lab)
    command("localize", "random", "--model", tiny_lab, "--passages", passages, "--out", "where.safetensors")
    command("edit", "neuron-dropout", "--model", tiny_lab, "--localization", "where.safetensors", "--count", 3,
            "--out", "e.safetensors", "--no-control")  # fmt: skip

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_put", interrupted)
    code, _, err = command("apply", "e.safetensors", "--model", tiny_lab, "--out", "m")
    assert code == 130 and "interrupted" in err
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["e.safetensors", "where.safetensors"]


# -- localizations: planned, compared, tested ---------------------------------------------------------------------


def test_localizations_are_planned_compared_and_tested_against_controls(tiny_lab, command):
    given = ["--model", tiny_lab, "--passages", full_dose(tiny_lab), "--controls", tiny_lab / "controls.jsonl"]
    code, out, _ = command("localize", "activation", *given, "--plan", "--out", "a.safetensors")
    assert code == 0 and "forward passes over" in out and not Path("a.safetensors").exists()
    for name, method in (("a", "activation"), ("b", "integrated-gradients")):
        code, out, err = command("localize", method, *given, "--out", f"{name}.safetensors")
        assert code == 0 and out.startswith("plan: "), err
    assert not list(Path().glob(".*.parts"))
    code, out, _ = command("compare", "a.safetensors", "b.safetensors", "--at", "5,20", "--json")
    found = json.loads(out)
    assert code == 0 and [row["k"] for row in found["pairs"][0]["top"]] == [5, 20]
    assert {row["localization"] for row in found["stability"]} == {"a", "b"}
    code, out, _ = command("significant", "b.safetensors", "--permutations", "200", "--out", "s.safetensors", "--json")
    called = json.loads(out)
    assert code == 0 and 0 < called["called"] < called["places"]
    code, out, _ = command("show", "s.safetensors", "--json")
    assert code == 0 and json.loads(out)["count"] == called["called"]


def test_joint_selection_beside_single_scores_and_random_order(tiny_lab, command):
    given = ["--model", tiny_lab, "--passages", full_dose(tiny_lab), "--joint", "6", "--step", "2", "--json"]
    code, out, err = command("localize", "grad-activation", *given, "--out", "j.safetensors")
    assert code == 0, err
    made = json.loads(out)
    assert [row["silenced"] for row in made["curves"]] == [0, 2, 4, 6]
    last = made["curves"][-1]
    assert last["joint"] > last["random"]
    assert made["curves"][0]["joint"] == pytest.approx(made["curves"][0]["random"])
    assert command("show", "j.safetensors")[0] == 0
    code, _, err = command("localize", "weight-gradient", *given[:-1])
    assert (code, err) == (2, "memloc: components have no gates; expected neurons or heads\n")


def test_bad_input_to_comparing_and_testing(tiny_lab, command):
    given = ["--model", tiny_lab, "--passages", full_dose(tiny_lab)]
    command("localize", "activation", *given, "--out", "a.safetensors")
    command("localize", "weight-gradient", *given, "--out", "w.safetensors")
    fails(command, "compare", "a.safetensors", "w.safetensors", says="a scores neurons and w components")
    assert command("compare", "a.safetensors", "w.safetensors", "--by-layer", "--at", "1")[0] == 0
    fails(command, "compare", "w.safetensors", says="nothing to compare it with")
    fails(command, "compare", "a.safetensors", "--at", "x", says="expected whole numbers")
    fails(command, "significant", "a.safetensors", says="localize with --controls")
    fails(command, "significant", "a.safetensors", "--fdr", "2", says="--fdr 2.0")
    fails(command, "localize", "activation", *given, "--paraphrases", says="--facts FILE")
    both = ["--text", tiny_lab / "corpus.jsonl", "--contrast", tiny_lab / "controls.jsonl"]
    fails(command, "localize", "activation", *given, *both, says="give one")
