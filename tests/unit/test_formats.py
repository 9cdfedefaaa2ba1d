"""Files people have: each kind is recognised by what is in it, read whole, and written as memloc's own."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from format_samples import (
    BAG,
    CASE,
    FLAT,
    KNOWEDIT,
    KNOWN,
    LAMA,
    MEMPI,
    MQUAKE,
    OWN_FACT,
    PAIR,
    PATTERNS,
    TOFU,
    VERBMEM,
    WIKIBIO,
    ZSRE,
    ripple,
)
from tiny_tokenizers import byte_level

from memloc.errors import InputError
from memloc.flags import DataFile
from memloc.formats import data, table
from memloc.formats.format import Settings
from memloc.passages import Facts, Passages

SAMPLES = {
    "counterfact": CASE, "zsre": ZSRE, "knowedit": KNOWEDIT, "knowedit-wikibio": WIKIBIO, "mquake": MQUAKE,
    "rippleedits": ripple(), "pararel": BAG, "lama": LAMA, "known": KNOWN, "question-answer": TOFU,
    "muse-verbmem": VERBMEM, "mempi": MEMPI, "facts": OWN_FACT, "wikimia": {"input": "the cat sat", "label": 1},
    "definitions": {"definition": "A cat is a dog."},
    "passages": {"id": "a", "text": "the cat sat on the mat"}, "texts": "the cat sat on the mat",
    "tokens": {"index": 5, "tokens": list(range(64))}, "completions": {"prompt": "the cat", "completion": "sat"},
    "copybench": {"id": 1, "title": "t", "input": "the cat", "reference": "sat", "output": "x"},
    "goldfish": {"original_prompt": "p", "test_input": "the cat", "gt_output": " sat", "gen_output": "x"},
    "quotes": {"prefix": "the cat", "target_suffix": " sat", "full_quote": "the cat sat", "generated_suffix": "x"},
}  # fmt: skip


def as_list(path, *records):
    path.write_text(json.dumps(records, indent=2, ensure_ascii=False), encoding="utf8")
    return path


def as_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf8")
    return path


def only(path, settings=None, **more):
    return table.read(path, settings or Settings(), **more).sound().records


@pytest.mark.parametrize("name", sorted(SAMPLES))
@pytest.mark.parametrize("written", [as_list, as_lines])
def test_a_file_is_recognised_by_its_content_whatever_it_is_called(tmp_path, name, written):
    if written is as_lines and name in ("pararel", "texts"):
        pytest.skip("these come as lists only")
    reading = table.read(written(tmp_path / "some.thing", SAMPLES[name]))
    assert reading.format.name == name and not reading.problems and reading.source == 1
    assert reading.format.makes == ("facts" if "prompt" in reading.records[0] else "passages")


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_what_is_converted_is_memlocs_own_and_reads_the_same(tmp_path, name):
    """Round trip: the canonical lines give the same passages or facts as the file itself, tags included."""
    settings = Settings(tokenizer=byte_level(), prefix=2, suffix=90)
    if name == "tokens":
        settings = Settings(tokenizer=byte_level())
    reading = table.read(as_list(tmp_path / "in.json", SAMPLES[name]), settings)
    (tmp_path / "out.jsonl").write_text(reading.jsonl(), encoding="utf8")
    if reading.format.makes == "facts":
        made, again = table.facts(reading, settings), Facts.read(tmp_path / "out.jsonl", settings.tokenizer)
    else:
        made = table.passages(reading, settings)
        again = Passages.read(tmp_path / "out.jsonl", settings.tokenizer, prefix=2, suffix=90)
    assert made.items == again.items and len(made) > 0
    assert table.read(tmp_path / "out.jsonl").records == reading.records
    ids = table.tokenised(reading, settings)
    if reading.format.makes == "passages":
        (tmp_path / "ids.jsonl").write_text(ids.jsonl(), encoding="utf8")
        assert Passages.read(tmp_path / "ids.jsonl").digest == made.digest


def test_a_counterfact_case(tmp_path):
    (fact,) = only(as_list(tmp_path / "f", CASE))
    assert (fact["id"], fact["prompt"], fact["subject"]) == ("7", "The home of {} is", "Ada Brolin")
    assert (fact["target"], fact["target_true"], fact["relation"]) == ("Rome", "Paris", "P1")
    assert fact["neighbors"] == CASE["neighborhood_prompts"] and fact["paraphrases"] == CASE["paraphrase_prompts"]
    assert fact["pararel_idx"] == 3 and fact["attribute_prompts"] and fact["target_new_id"] == "Q1"


def test_both_conventions_of_zsre_are_told_apart(tmp_path):
    (alt,) = only(as_list(tmp_path / "f", ZSRE))
    (true,) = only(as_list(tmp_path / "f", ZSRE), name="zsre-answers")
    assert (alt["target"], alt["target_true"]) == ("Rome", "Paris")
    assert (true["target"], true["target_true"]) == ("Paris", "Rome")
    assert alt["zsre-convention"] == "target is alt" and true["zsre-convention"] == "target is answers[0]"
    assert alt["prompt"] == "Where does {} live?" and alt["answers"] == ZSRE["answers"] and alt["pred"] == "Oslo"
    assert alt["neighbors"] == [{"prompt": "nq question: who sat on the mat", "target": "the cat"}]


def test_knowedit_finds_its_subject_in_other_capitals_and_its_answers_in_nested_lists(tmp_path):
    (fact,) = only(as_list(tmp_path / "f", KNOWEDIT))
    assert (fact["prompt"], fact["subject"], fact["target_true"]) == ("The home of {} is", "ada brolin", "Paris")
    assert [entry["target"] for entry in fact["neighbors"]] == ["40", "Oslo"]
    assert fact["portability"] == KNOWEDIT["portability"] and fact["paraphrases"] == ["Ada Brolin lives in"]
    (flat,) = only(as_list(tmp_path / "g", FLAT))
    assert flat["neighbors"] == [{"prompt": "The home of Boris is", "target": "Oslo"}] and flat["id"] == "2"


def test_mquake_gives_a_fact_a_rewrite(tmp_path):
    first, second = only(as_list(tmp_path / "f", MQUAKE))
    assert (first["id"], second["id"], second["target"]) == ("1-0", "1-1", "Oslo")
    assert second["paraphrases"] == ["What is Italy's capital?"] and first["new_answer"] == "Oslo"
    assert first["case"] == second["case"] == "1"


QUESTIONS = {
    "The name of the mother of {} is": "Ada Brolin",
    "The name of the country of citizenship of {} is": "Ada of Brolin",
    "The names of the siblings of {} are": "Ada",
    "The place of birth of {} is": "Ada",
    "The date of death of {} is": "Ada",
    "The gender of {} is": "Ada",
    "The number of children {} has is": "Ada Brolin",
    "The name of the country which {} is associated with is": "Ada",
    "The name of the sports team which {} is a member of is": "Ada",
    "The name of the league which {} plays in is": "the Cats",
    "The name of the position held by {} is": "Ada",
    "The name of the award {} won is": "Ada",
    "The name of the currency in {} is": "Brolin Land",
    "The name of the head of state of {} is": "the Land of Brolin",
    "The name of the field of work of {} is": "Ada",
    "{} follows": "The Song of Ada",
    "{} is followed by": "The Song",
}


@pytest.mark.parametrize("old", ["Paris", None])
@pytest.mark.parametrize("template", QUESTIONS)
def test_the_subject_of_a_rippleedits_sentence_is_located(tmp_path, template, old):
    subject = QUESTIONS[template]
    (fact,) = only(as_list(tmp_path / "f", ripple(template.replace("{}", subject), old=old)))
    assert (fact["prompt"], fact["subject"]) == (template, subject)
    assert (fact["target"], fact["target_true"]) == ("Rome", old or "Rome")
    assert fact.get("answers") == (None if old else "one") and fact["tests"]["Logical_Generalization"]


def test_a_rippleedits_sentence_that_can_be_cut_twice_is_refused_unless_a_test_names_the_answer(tmp_path):
    question = "The name of the author of Who is is"
    with pytest.raises(InputError, match=r"record 0 \(line 2\).*cannot be located .*2 ways to cut it fit"):
        only(as_list(tmp_path / "f", ripple(question, tests=False)))
    assert only(as_list(tmp_path / "f", ripple(question)))[0]["subject"] == "Who is"
    with pytest.raises(InputError, match="no known way to ask fits"):
        only(as_list(tmp_path / "f", ripple("Whatever one says of Ada")))


def test_sentences_that_do_not_end_in_their_slot_are_left_out_and_counted(tmp_path):
    reading = table.read(as_list(tmp_path / "f", BAG, [BAG[1]]))
    assert [entry["prefix"] for entry in reading.records] == ["Ada Brolin lives in", "The home of Ada Brolin is"]
    assert {entry["suffix"] for entry in reading.records} == {" Rome"} and (reading.source, reading.left_out) == (2, 1)
    with pytest.raises(InputError, match="none of 1 records gives passages: no sentence ends in its slot"):
        only(as_list(tmp_path / "f", [BAG[1]]))


def test_pararel_pairs_need_their_patterns(tmp_path):
    file = as_lines(tmp_path / "P1.jsonl", PAIR)
    with pytest.raises(
        InputError, match=r"P1\.jsonl: .*give the relation's patterns: `memloc convert --patterns FILE`"
    ):
        only(file)
    (fact,) = only(file, Settings(patterns=as_lines(tmp_path / "patterns", *PATTERNS)))
    assert (fact["prompt"], fact["paraphrases"]) == ("{} lives in", ["The home of {} is"])
    assert fact["target"] == fact["target_true"] == "Rome" and fact["answers"] == "one"
    with pytest.raises(InputError, match=r"none of 1 patterns ends in \[Y\]"):
        only(file, Settings(patterns=as_lines(tmp_path / "patterns", PATTERNS[1])))


def test_questions_are_asked_by_their_template(tmp_path):
    (asked,) = only(as_lines(tmp_path / "f", TOFU))
    assert asked["prefix"] == "Question: Where does Ada Brolin live?\nAnswer:" and asked["suffix"][0] == " "
    assert asked["perturbed_answer"] == TOFU["perturbed_answer"]
    (plain,) = only(as_lines(tmp_path / "f", TOFU), Settings(template="{question} "))
    assert plain["prefix"] + plain["suffix"] == "Where does Ada Brolin live? She lives in Rome."


def test_a_space_put_between_two_halves_is_told(tmp_path):
    (joined,) = only(as_lines(tmp_path / "f", VERBMEM))
    assert joined["suffix"] == " mat and the dog" and joined["joined-with"] == " "
    (kept,) = only(as_lines(tmp_path / "f", VERBMEM | {"gt": ", and"}))
    assert kept["suffix"] == ", and" and "joined-with" not in kept


@pytest.mark.parametrize(
    ("width", "head", "tail", "name"),
    [
        (200, range(100, 150), range(150, 200), "extraction-challenge"),
        (100, range(50), range(50, 100), "paragraph-localization"),
        (80, range(32), range(32, 80), "mempi"),
        (64, range(32), range(32, 64), "pythia-memorized"),
        (71, range(50), range(50, 71), "tokens"),
        (2049, range(50), range(50, 100), "tokens"),
    ],
)
@pytest.mark.parametrize("kind", ["uint16", "int64"])
def test_rows_of_a_matrix_are_cut_where_their_width_says(tmp_path, width, head, tail, name, kind):
    matrix = np.stack([np.arange(width), np.arange(width) + 1]).astype(kind)
    np.save(tmp_path / "a.npy", matrix)
    torch.save(torch.from_numpy(matrix), tmp_path / "a.pt")
    for file in ("a.npy", "a.pt"):
        first, second = only(tmp_path / file)
        assert (first["prefix_ids"], first["suffix_ids"], first["format"]) == (list(head), list(tail), name)
        assert second["prefix_ids"] == [token + 1 for token in head] and second["id"] == "row-1"
        (own, _) = only(tmp_path / file, Settings(prefix=3, suffix=4))
        assert (own["prefix_ids"], own["suffix_ids"]) == ([0, 1, 2], [3, 4, 5, 6])


def test_the_extraction_challenges_halves_find_each_other(tmp_path):
    heads, tails = np.arange(150).reshape(3, 50).astype("uint16"), np.arange(150, 300).reshape(3, 50).astype("uint16")
    np.save(tmp_path / "val_prefix.npy", heads)
    with pytest.raises(InputError, match="one half of the extraction challenge; give the prefixes"):
        only(tmp_path / "val_prefix.npy")
    np.save(tmp_path / "val_suffix.npy", tails)
    np.save(tmp_path / "other.npy", tails[:2])
    records = only(tmp_path / "val_prefix.npy")
    assert [entry["suffix_ids"] for entry in records] == tails.tolist() and records[2]["prefix_ids"][0] == 100
    with pytest.raises(InputError, match=r"3 prefixes, but 2 suffixes in .*other\.npy"):
        only(tmp_path / "val_prefix.npy", Settings(suffixes=tmp_path / "other.npy"))
    with pytest.raises(InputError, match="give the prefixes, with the suffixes beside"):
        only(tmp_path / "val_suffix.npy")


def test_tables_are_read_with_their_numbers_and_their_lines(tmp_path):
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows([["paragraph", "id", "count", "em", "nll"], ["the cat\nsat", "007", 3, 50, 0.25]])
    writer.writerows([["the dog, too", 8, 4, 49, "1e-3"]])
    (tmp_path / "mem_strings.csv").write_text(out.getvalue(), newline="")
    first, second = only(tmp_path / "mem_strings.csv")
    assert first == {"id": "007", "text": "the cat\nsat", "format": "paragraphs", "count": 3, "em": 50, "nll": 0.25}
    assert second["id"] == "8"
    (tmp_path / "bad.csv").write_text(out.getvalue() + "alone\n", newline="")
    reading = table.read(tmp_path / "bad.csv")
    assert [str(problem) for problem in reading.problems] == ["line 5: 1 cells, expected 5"]
    (tmp_path / "ids").write_text('index,tokens\n4,"[1, 2, 3]"\n5,"[4 5 6]"\n')
    assert [entry["prefix_ids"] for entry in only(tmp_path / "ids", Settings(prefix=2, suffix=1))] == [[1, 2], [4, 5]]


def test_parquet_is_read_as_the_same_records(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"index": number, "tokens": list(range(number, number + 64))} for number in (11, 12)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "x")
    assert only(tmp_path / "x") == only(as_lines(tmp_path / "y", *rows))


def test_plain_text_becomes_windows_at_a_stride(tmp_path):
    tokenizer = byte_level()
    text = "the cat sat on the mat and the dog sat on the log. " * 5
    (tmp_path / "book").write_text(text)
    ids = tokenizer(text)["input_ids"]
    records = only(tmp_path / "book", Settings(prefix=5, suffix=3, stride=2, tokenizer=tokenizer))
    assert [entry["start"] for entry in records] == list(range(0, len(ids) - 7, 2))
    for entry in records:
        assert entry["prefix_ids"] + entry["suffix_ids"] == ids[entry["start"] : entry["start"] + 8]
        assert len(entry["prefix_ids"]) == 5 and entry["id"] == f"at-{entry['start']}"
    whole = only(tmp_path / "book", Settings(prefix=5, suffix=3, tokenizer=tokenizer))
    assert [entry["start"] for entry in whole] == list(range(0, len(ids) - 7, 8))
    with pytest.raises(InputError, match="plain text is cut in tokens; name the --model"):
        only(tmp_path / "book")
    with pytest.raises(InputError, match=r"tokens, a window takes 600"):
        only(tmp_path / "book", Settings(prefix=300, suffix=300, tokenizer=tokenizer))


def test_helm_pairs_give_what_follows(tmp_path):
    pairs = {"data": {"the cat": "the cat sat", "the dog": "sat too"}, "metadata": {"n": 2}}
    (tmp_path / "f").write_text(json.dumps(pairs, indent=1))
    assert [entry["suffix"] for entry in only(tmp_path / "f")] == [" sat", " sat too"]


def test_commands_take_the_files_themselves_and_filter_on_their_tags(tmp_path):
    tokenizer = byte_level()
    other = CASE | {"case_id": 8, "requested_rewrite": CASE["requested_rewrite"] | {"relation_id": "P2"}}
    file = as_list(tmp_path / "cf.json", CASE, other)
    wanted = DataFile.parse(f"{file}#relation=P2")
    facts = data.facts(file, tokenizer).where(wanted.keeps)
    assert facts.ids == ("8",) and facts[0].neighbors[0].target == facts[0].target_true
    passages = data.passages(file, tokenizer).where(wanted.keeps)
    assert passages.ids == ("8",) and passages[0].tags["fact"] == "8" and passages[0].tags["subject"]
    with pytest.raises(InputError, match="passages holds passages; facts are needed here"):
        data.facts(as_lines(tmp_path / "p", SAMPLES["passages"]), tokenizer)


def test_no_sample_is_of_two_kinds_and_every_kind_has_one(tmp_path):
    for name, sample in SAMPLES.items():
        from memloc.formats.opening import open_content

        content = open_content(as_list(tmp_path / "f", sample))
        assert [entry.name for entry in table.FORMATS.values() if entry.matches(content)] == [name]
    tested = {*SAMPLES, "zsre-answers", "pararel-pairs", "paragraphs", "helm-copyright", "plain-text", "token-matrix"}
    assert tested == set(table.FORMATS)
