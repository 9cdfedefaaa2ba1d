"""The demo, on the tiny lab: everything it promises to write is there, and what must hold on any model holds."""

import json
import shutil

import pytest

from editors.cli import main
from memloc.store import header_of

pytestmark = [pytest.mark.lab, pytest.mark.slow]


@pytest.fixture(scope="module")
def shown(tiny_lab, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    shutil.copytree(tiny_lab, out / "lab")
    assert main(["demo", "--size", "tiny", "--out", str(out)]) == 0
    return out


def test_everything_promised_is_written(shown):
    names = {path.name for path in shown.iterdir()}
    assert names == {
        "lab", "localization.safetensors", "unlearn.edit.safetensors", "fact.edit.safetensors", "unlearned", "edited",
        "report.html", "report.json", "report.md", "verified",
    }  # fmt: skip
    assert header_of(shown / "unlearn.edit.safetensors")["kind"] == "edit"
    assert (shown / "edited" / "memloc_edit.json").is_file()


def test_what_needs_no_large_model_holds(shown):
    report = json.loads((shown / "report.json").read_text())
    held = {verdict["text"]: verdict["holds"] for verdict in report["verdicts"]}
    must = [text for text in held if "transformers" in text or "Undoing" in text or "reloaded" in text]
    must += ["After: no target is recited", "Before: controls, never trained on, are not"]
    assert len(must) == 7 and all(held[text] for text in must), held


def test_what_is_not_recited_is_asked_for_otherwise(shown):
    found = json.loads((shown / "verified" / "verification.json").read_text())
    report = json.loads((shown / "report.json").read_text())
    told = next(verdict for verdict in report["verdicts"] if "gone, or only hidden?" in verdict["text"])
    assert told["measured"] == found["sentence"] and told["holds"] is None
    assert len(found["checks"]) > 10 and (shown / "verified" / "report.html").is_file()


def test_every_group_stands_beside_its_random_control(shown):
    report = json.loads((shown / "report.json").read_text())
    assert len(report["comparisons"]) == 8
    for group in report["comparisons"]:
        for figure in group["figures"]:
            assert figure["after"] is not None and figure["random"] is not None, (group["name"], figure)


def test_the_page_asks_the_network_for_nothing(shown):
    page = (shown / "report.html").read_text()
    assert 'src="http' not in page and 'href="http' not in page and "url(http" not in page and "<script" not in page
