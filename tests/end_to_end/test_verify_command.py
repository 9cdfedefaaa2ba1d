"""memloc verify as a stranger meets it: from the edit's own suggestion to a report, and what it refuses."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.lab


def full_dose(lab: Path) -> str:
    rows = [json.loads(line) for line in (lab / "passages.jsonl").read_text().splitlines()]
    return f"{lab / 'passages.jsonl'}#dose={max(row['dose'] for row in rows)}"


@pytest.fixture
def edited(tiny_lab, command):
    """A small edit of the tiny lab, and what the command said of it."""
    passages = full_dose(tiny_lab)
    command("localize", "activation", "--model", tiny_lab, "--passages", passages, "--out", "where.safetensors")
    return command("edit", "neuron-dropout", "--model", tiny_lab, "--localization", "where.safetensors",
                   "--passages", passages, "--count", 40, "--out", "e.safetensors", "--no-control")  # fmt: skip


def test_the_suggestion_of_an_edit_runs(edited, tiny_lab, command):
    code, said, err = edited
    assert code == 0, err
    line = next(line for line in said.splitlines() if "memloc verify" in line)
    words = shlex.split(line[line.index("memloc verify") :])[1:]
    words[words.index("NEVER-SEEN")] = str(tiny_lab / "controls.jsonl")
    before = (tiny_lab / "model.safetensors").read_bytes()
    text = f"{tiny_lab / 'corpus.jsonl'}#split=held-out"
    more = ["--only", "as-given", "layers", "quantised", "--text", text, "--facts", tiny_lab / "facts.jsonl", "--json"]
    code, out, err = command(*words, *more)
    found = json.loads(out)
    assert code == 0, err
    assert found["verdict"] in ("gone", "cannot tell", "over-forgotten", "hidden", "not removed")
    assert [check["check"] for check in found["checks"]] == ["as-given", "quantised", "layers"]
    assert {"Asked as given", "Prefix shifted"} & set(found["untested"]) == {"Prefix shifted"}
    assert {path.name for path in Path("e.verified").iterdir()} == {
        "report.html", "report.md", "report.json", "verification.json", "checks",
    }  # fmt: skip
    assert (tiny_lab / "model.safetensors").read_bytes() == before
    assert "facts" in {damage["group"] for damage in found["damages"]}


def test_an_edit_with_text_never_seen_is_verified_at_once(tiny_lab, command, monkeypatch):
    from editors.verbs import verify

    asked = []

    def verified(view, edit, arguments, terminal):
        asked.append((edit.provenance.method, arguments))
        return SimpleNamespace(to_json=lambda: {"verdict": "asked"})

    monkeypatch.setattr(verify, "_verified", verified)
    passages, controls = full_dose(tiny_lab), str(tiny_lab / "controls.jsonl")
    text = f"{tiny_lab / 'corpus.jsonl'}#split=held-out"
    made = [
        "edit",
        "magnitude",
        "--share",
        "0.01",
        "--model",
        tiny_lab,
        "--passages",
        passages,
        "--out",
        "m.safetensors",
    ]
    code, out, err = command(*made, "--controls", controls, "--held-out", text, "--json")
    assert code == 0 and json.loads(out)["verified"] == {"verdict": "asked"}, err
    ((method, arguments),) = asked
    assert method == "magnitude" and arguments.out == Path("m.verified") and str(arguments.controls.path) == controls
    assert arguments.text.path == tiny_lab / "corpus.jsonl" and arguments.effort == "quick"
    code, out, _ = command(*made, "--controls", controls, "--no-verify")
    assert code == 0 and "gone or only hidden? memloc verify" in out and len(asked) == 1


def test_an_edited_checkpoint_is_verified_without_its_edit(edited, tiny_lab, command):
    assert edited[0] == 0 and command("apply", "e.safetensors", "--model", tiny_lab, "--out", "done")[0] == 0
    where = ["--passages", full_dose(tiny_lab), "--controls", tiny_lab / "controls.jsonl", "--only", "as-given"]
    answers = []
    for target in ("e.safetensors", "done"):
        code, out, err = command("verify", tiny_lab, target, *where, "--out", f"r-{target}", "--json")
        assert code == 0, err
        answers.append(json.loads(out))
    assert answers[0]["checks"] == answers[1]["checks"]


def test_what_is_missing_is_named_in_one_line(edited, tiny_lab, command):
    assert edited[0] == 0
    code, _, err = command("verify", tiny_lab, "e.safetensors", "--passages", full_dose(tiny_lab), "--out", "r")
    assert code == 2 and "verify needs --passages FILE" in err and len(err.strip().splitlines()) == 1
    same = full_dose(tiny_lab)
    code, _, err = command("verify", tiny_lab, "e.safetensors", "--passages", same, "--controls", same, "--out", "r")
    assert code == 2 and "controls are never seen" in err
    Path("file").write_text("x")
    code, _, err = command("verify", tiny_lab, "e.safetensors", "--passages", same, "--controls",
                           tiny_lab / "controls.jsonl", "--out", "file")  # fmt: skip
    assert code == 2 and "file is a file; name a folder" in err
