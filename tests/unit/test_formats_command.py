"""memloc convert and memloc validate: all of a file or nothing, exit code 2 where something is wrong."""

import json
import math
import statistics

import numpy as np
import pytest
from format_samples import BAG, CASE, TOFU, VERBMEM
from tiny_tokenizers import byte_level

from editors.cli import main
from memloc.errors import ArtifactError
from memloc.formats.results import WRITERS, lm_eval, open_unlearning, open_unlearning_summary
from memloc.measurement import Figure, Measurement
from memloc.passages import Facts, Passages
from memloc.provenance import Provenance


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    byte_level().save_pretrained("words")
    return tmp_path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf8")
    return path


def test_convert_writes_facts_that_memloc_reads(folder, capsys):
    written(folder / "cf", CASE, CASE | {"case_id": 8})
    assert main(["convert", "cf", "--out", "new/cf.jsonl", "--tokenizer", "words"]) == 0
    assert Facts.read(folder / "new/cf.jsonl", byte_level()).ids == ("7", "8")
    assert "cf: counterfact, 2 records; 2 facts written to new/cf.jsonl" in capsys.readouterr().out


def test_with_a_tokenizer_passages_become_ids(folder):
    written(folder / "muse", VERBMEM)
    assert main(["convert", "muse", "--out", "ids.jsonl", "--tokenizer", "words"]) == 0
    (found,) = Passages.read(folder / "ids.jsonl")
    tokenizer = byte_level()
    assert tokenizer.decode(found.prefix) == VERBMEM["prompt"] and tokenizer.decode(found.suffix) == " mat and the dog"
    assert found.tags == {"format": "muse-verbmem", "joined-with": " "}


def test_the_flags_reach_the_reader(folder):
    (folder / "book").write_text("the cat sat on the mat and the dog sat on the log " * 4)
    words = ["--tokenizer", "words", "--prefix", "4", "--suffix", "3", "--stride", "5"]
    assert main(["convert", "book", "--out", "book.jsonl", *words]) == 0
    assert [entry["start"] for entry in lines(folder / "book.jsonl")][:3] == [0, 5, 10]
    written(folder / "tofu", TOFU)
    assert main(["convert", "tofu", "--out", "tofu.jsonl", "--template", "Q: {question}\\nA:"]) == 0
    assert lines(folder / "tofu.jsonl")[0]["prefix"] == "Q: Where does Ada Brolin live?\nA:"
    written(folder / "zsre", {"subject": "Ada", "src": "Ada?", "alt": "Rome", "answers": ["Paris"]})
    assert main(["convert", "zsre", "--out", "zsre.jsonl", "--as", "zsre-answers"]) == 0
    assert lines(folder / "zsre.jsonl")[0]["target"] == "Paris"


@pytest.mark.parametrize(
    ("records", "more", "says"),
    [
        ([CASE, CASE], [], "line 2: the id '7' was taken at line 1"),
        ([TOFU, {"question": "a"}], [], "line 2: key 'answer'"),
        ([VERBMEM, VERBMEM | {"prompt": " "}], ["--tokenizer", "words"], "line 2: key 'prompt'"),
        ([{"text": "the cat"}], ["--tokenizer", "words", "--prefix", "9"], "line 1: text of 3 tokens"),
        ([{"prefix_ids": [1], "suffix_ids": [777]}], ["--tokenizer", "words"], "token id 777 outside the vocabulary"),
        ([TOFU], ["--as", "tofu"], "no format called 'tofu'"),
        ([TOFU], ["--as", "lm-eval"], "not a measurement"),
        ([TOFU], ["--tokenizer", "nowhere"], "nowhere: no tokenizer there"),
        ([{"words": 1}], [], "found keys words; known are facts, counterfact"),
    ],
)
def test_nothing_is_half_written(folder, capsys, records, more, says):
    written(folder / "in", *records)
    (folder / "out.jsonl").write_text("before")
    assert main(["convert", "in", "--out", "out.jsonl", *more]) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and not out
    assert (folder / "out.jsonl").read_text() == "before"
    assert {path.name for path in folder.iterdir()} == {"in", "out.jsonl", "words"}


def test_validate_says_what_files_are_and_lists_every_problem(folder, capsys):
    written(folder / "good", TOFU)
    written(folder / "bad", CASE, CASE, CASE | {"requested_rewrite": None})
    np.save(folder / "odd.npy", np.ones((2, 3)))
    assert main(["validate", "good"]) == 0
    capsys.readouterr()
    assert main(["validate", "good", "bad", "odd.npy", "--json"]) == 2
    out, err = capsys.readouterr()
    good, bad, odd = json.loads(out)["files"]
    assert (good["format"], good["source"], good["records"], good["problems"]) == ("question-answer", 1, 1, [])
    assert [problem["where"] for problem in bad["problems"]] == ["line 3", "line 2"] and bad["source"] == 3
    assert odd["format"] == "" and "values of float64; expected token ids" in odd["problems"][0]["message"]
    assert err == "memloc: 3 problems in 2 of 3 files\n"
    assert main(["validate", "bad", "--top", "1"]) == 2
    assert "bad: 1 of 2 problems" in capsys.readouterr().out


def test_validate_tells_what_was_left_out(folder, capsys):
    (folder / "bags").write_text(json.dumps([BAG, [BAG[1]]]))
    assert main(["validate", "bags"]) == 0
    assert "no sentence ends in its slot, so a left-to-right model cannot be asked" in capsys.readouterr().out


# -- results ----------------------------------------------------------------------------------------------------------


def measured(strict=(True, False, True), nll=(0.5, 1.5, 4.0), control=None):
    """An extraction measurement by hand: two figures that are means of rows, one that is not, one that is infinite."""
    rows = tuple(
        {"id": f"p{n}", "strict": hit, "nll": loss} for n, (hit, loss) in enumerate(zip(strict, nll, strict=True))
    )
    n = len(rows)
    figures = (
        Figure("strict rate", sum(strict) / n, n, 0.1, 0.9, "share", "lower"),
        Figure("mean nll", sum(nll) / n + 0.25, n, None, None, "nats/token", "higher"),  # weighted by tokens, say
        Figure("queries to leak any, p", math.inf, n, None, None, "queries", "higher"),
        Figure("fragile rows", 0.0, n, None, None, "passages"),
    )
    made = Provenance("extraction", {"p": 0.9}, None, {"model": "abc"})
    return Measurement("extraction", {entry.name: entry for entry in figures}, rows, made, control)


def test_lm_evals_results(folder):
    """Layout as lm-eval's EvaluationTracker writes it; errors only where they are those of the rows' mean."""
    found = lm_eval(measured(control=measured((False, False, False))))
    task, control = found["results"]["extraction"], found["results"]["extraction_control"]
    assert task["strict_rate,none"] == 2 / 3 and control["strict_rate,none"] == 0
    error = statistics.stdev([1, 0, 1]) / math.sqrt(3)
    assert task["strict_rate_stderr,none"] == pytest.approx(error) and task["mean_nll_stderr,none"] == "N/A"
    assert task["alias"] == "extraction" and task["queries_to_leak_any_p,none"] == "inf"
    assert all(key == "alias" or key.count(",") == 1 for key in task)
    assert found["higher_is_better"]["extraction"] == {
        "strict_rate": False, "mean_nll": True, "queries_to_leak_any_p": True,
    }  # fmt: skip
    assert found["n-samples"]["extraction"] == {"original": 3, "effective": 3}
    for part in ("group_subtasks", "configs", "versions", "n-shot"):
        assert set(found[part]) == {"extraction", "extraction_control"}
    assert found["memloc"]["intervals"]["extraction"]["strict_rate"]["low"] == 0.1


def test_open_unlearnings_results(folder):
    found = open_unlearning(measured(control=measured((False, False, False))))
    assert found["strict_rate"]["agg_value"] == 2 / 3
    assert found["strict_rate"]["value_by_index"] == {"0": {"score": 1.0}, "1": {"score": 0.0}, "2": {"score": 1.0}}
    assert "value_by_index" not in found["mean_nll"] and found["control_strict_rate"]["agg_value"] == 0
    rows = found["probability"]["value_by_index"]
    assert rows["1"] == {"prob": math.exp(-1.5), "avg_loss": 1.5} and len(rows) == 3
    assert found["probability"]["agg_value"] == pytest.approx(sum(math.exp(-x) for x in (0.5, 1.5, 4)) / 3)
    assert list(found) == sorted(found) and found["queries_to_leak_any_p"]["agg_value"] is None
    summary = open_unlearning_summary(measured())
    assert summary["strict_rate"] == 2 / 3 and "queries_to_leak_any_p" not in summary


@pytest.mark.parametrize("name", WRITERS)
def test_a_measurement_is_written_as_strict_json(folder, capsys, name):
    measured(control=measured()).save("m.json")
    assert main(["convert", "m.json", "--as", name, "--out", "r.json"]) == 0

    def never(text):
        raise AssertionError(text)

    made = json.loads((folder / "r.json").read_text(), parse_constant=never)
    assert made == json.loads(json.dumps(WRITERS[name](Measurement.load("m.json"))))
    assert main(["convert", "m.json", "--out", "x.jsonl"]) == 2
    assert "a measurement; `memloc show` prints it, convert writes it --as lm-eval" in capsys.readouterr().err
    with pytest.raises(ArtifactError):
        Measurement.load("r.json")
