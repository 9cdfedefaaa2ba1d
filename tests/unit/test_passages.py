"""Passages and facts from JSONL: one joint tokenisation, cut in token space, and errors that name their line."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from tiny_tokenizers import KINDS, byte_level

from memloc.errors import InputError
from memloc.passages import Fact, Facts, Passage, Passages, decode, encode

tokenizers = pytest.mark.parametrize("kind", sorted(KINDS))


@cache
def tokenizer_of(kind: str):
    return KINDS[kind]()


def written(folder: Path, *records: object) -> Path:
    """One JSON value a line; a str is written as it is."""
    path = folder / "set.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf8")
    return path


# -- passages --------------------------------------------------------------------------------------------------------


@tokenizers
def test_a_text_is_cut_after_so_many_tokens(tmp_path, kind):
    tokenizer = tokenizer_of(kind)
    text = "the cat sat on the mat and the dog sat"
    whole = tuple(tokenizer(text)["input_ids"])
    item = Passages.read(written(tmp_path, {"id": "a", "text": text}), tokenizer, prefix=4, suffix=3)[0]
    assert (item.id, item.prefix, item.suffix) == ("a", whole[:4], whole[4:7])
    assert not item.boundary_merged


@tokenizers
@pytest.mark.parametrize("head", ["the cat sat", "Ada Brolin lives in Par", "café na", "東"])
def test_prefix_and_suffix_are_tokenised_jointly(tmp_path, kind, head):
    tokenizer = tokenizer_of(kind)
    tail = " on the mat" if head.endswith("sat") else "is and Rome, 京"
    item = Passages.read(written(tmp_path, {"prefix": head, "suffix": tail}), tokenizer)[0]
    assert item.ids == tuple(tokenizer(head + tail)["input_ids"])
    assert len(decode(tokenizer, item.prefix).replace("<s>", "").strip("\ufffd")) <= len(head)


def test_a_cut_inside_a_token_gives_that_token_to_the_suffix_and_says_so(tmp_path):
    tokenizer = byte_level()
    clean, merged = Passages.read(
        written(tmp_path, {"prefix": "lives in", "suffix": " Paris"}, {"prefix": "lives in Par", "suffix": "is"}),
        tokenizer,
    )
    assert encode(tokenizer, " Paris").ids == clean.suffix == merged.suffix
    assert (clean.boundary_merged, merged.boundary_merged) == (False, True)
    assert clean.prefix == merged.prefix


def test_a_space_that_ends_the_prefix_belongs_to_the_next_word(tmp_path):
    """Byte-level tokens carry the space before a word, so the cut falls inside one."""
    item = Passages.read(written(tmp_path, {"prefix": "lives in ", "suffix": "Paris"}), byte_level())[0]
    assert item.boundary_merged and decode(byte_level(), item.suffix) == " Paris"


def test_a_cut_inside_a_character_of_several_tokens_is_marked_on_no_side(tmp_path):
    """東 is several byte tokens with one span: they stay together, whichever side they are on."""
    tokenizer = byte_level()
    item = Passages.read(written(tmp_path, {"prefix": "and 鬱", "suffix": "鬱 and"}), tokenizer)[0]
    assert decode(tokenizer, item.prefix) == "and 鬱" and decode(tokenizer, item.suffix) == "鬱 and"


def test_ids_need_no_tokenizer_and_win_over_text(tmp_path):
    record = {"prefix_ids": [5, 1], "suffix_ids": [2], "text": "whatever", "dose": 4, "kind": {"a": 1}}
    item = Passages.read(written(tmp_path, record))[0]
    assert item == Passage("row-1", (5, 1), (2,), {"dose": 4, "kind": {"a": 1}})


def test_a_start_token_is_added_to_text_and_never_to_ids(tmp_path):
    tokenizer = tokenizer_of("with a start token")
    path = written(tmp_path, {"text": "the cat sat"}, {"prefix_ids": [7], "suffix_ids": [8]})
    text, ids = Passages.read(path, tokenizer, prefix=2)
    assert text.prefix[0] == 0 and ids.prefix == (7,)


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path = written(tmp_path, "", {"prefix_ids": [1], "suffix_ids": [2]}, "  ", {"prefix_ids": [1], "suffix_ids": "no"})
    with pytest.raises(InputError, match=r"set\.jsonl, line 4: 'suffix_ids' should be a list of token ids"):
        Passages.read(path)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ('{"prefix_ids": [1], ', "not JSON"),
        ("[1, 2]", "expected an object, found list"),
        ({"prefix_ids": [1]}, "'suffix_ids' should be"),
        ({"prefix_ids": [], "suffix_ids": [1]}, "'prefix_ids' should be a list of token ids that is not empty"),
        ({"prefix_ids": [1.5], "suffix_ids": [1]}, "'prefix_ids' should be"),
        ({"prefix_ids": [True], "suffix_ids": [1]}, "'prefix_ids' should be"),
        ({"prefix": "a"}, "'suffix' should be a text"),
        ({"prefix": "", "suffix": "a"}, "'prefix' should be a text that is not empty"),
        ({"prefix": 3, "suffix": "a"}, "'prefix' should be a text"),
        ({"text": None}, "'text' should be a text"),
        ({"words": "a", "id": "x"}, "found keys id, words; expected"),
        ({}, "found keys none; expected"),
        ({"text": "the cat"}, r"text of \d+ tokens, shorter than its prefix of 50"),
        ({"prefix": "th", "suffix": "e"}, "prefix 0 and suffix 1 tokens; each needs at least one"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, record, said):
    path = written(tmp_path, {"prefix_ids": [1], "suffix_ids": [2]}, record)
    with pytest.raises(InputError, match=rf"set\.jsonl, line 2: .*{said}") as caught:
        Passages.read(path, byte_level())
    assert "\n" not in str(caught.value)


def test_a_text_exactly_as_long_as_its_prefix_is_too_short(tmp_path):
    tokenizer = byte_level()
    text = "the cat sat"
    path, tokens = written(tmp_path, {"text": text}), len(tokenizer(text)["input_ids"])
    assert len(Passages.read(path, tokenizer, prefix=tokens - 1)[0].suffix) == 1
    with pytest.raises(InputError, match=f"line 1: text of {tokens} tokens, shorter than its prefix of {tokens}"):
        Passages.read(path, tokenizer, prefix=tokens)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "set.jsonl").write_text(content)
    for reader in (Passages.read, lambda path: Facts.read(path, None)):
        with pytest.raises(InputError, match="no record in it"):
            reader(tmp_path / "set.jsonl")


def test_a_missing_file_and_bytes_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        Passages.read(tmp_path / "none.jsonl")
    with pytest.raises(InputError):
        Passages.read(tmp_path)
    (tmp_path / "set.jsonl").write_bytes(b'{"text": "\xff\xfe"}')
    with pytest.raises(InputError, match="utf"):
        Passages.read(tmp_path / "set.jsonl")


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "set.jsonl").write_text('{"prefix_ids": [1], "suffix_ids": [2]}\n', encoding="utf-8-sig")
    assert Passages.read(tmp_path / "set.jsonl")[0].prefix == (1,)


def test_lines_that_end_in_carriage_returns_and_odd_separators_inside_texts(tmp_path):
    record = json.dumps({"prefix": "a\u2028b", "suffix": "\x85c"}, ensure_ascii=False)
    (tmp_path / "set.jsonl").write_bytes(f"{record}\r\n{record}\r\n".encode())
    assert len(Passages.read(tmp_path / "set.jsonl", byte_level())) == 2


def test_text_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="line 1: text needs a tokenizer"):
        Passages.read(written(tmp_path, {"text": "the cat"}))


def test_an_id_twice_is_refused(tmp_path):
    record = {"id": "a", "prefix_ids": [1], "suffix_ids": [2]}
    with pytest.raises(InputError, match="the id 'a' occurs twice"):
        Passages.read(written(tmp_path, record, record))
    with pytest.raises(InputError, match="the id 'a' occurs twice"):
        Passages((Passage("a", (1,), (2,)),)) + Passages((Passage("a", (3,), (4,)),))


def test_ids_become_text(tmp_path):
    path = written(tmp_path, {"id": 7, "prefix_ids": [1], "suffix_ids": [2]})
    assert Passages.read(path).ids == ("7",)


def test_slices_filters_and_names_give_passages():
    whole = Passages(tuple(Passage(name, (1,), (2,), {"dose": dose}) for dose, name in enumerate("abcd")), "set")
    assert whole[1:3].ids == ("b", "c") and whole[1:3].origin == "set"
    assert whole.where(lambda item: item.tags["dose"] > 1).ids == ("c", "d")
    assert whole.named(["d", "a"]).ids == ("d", "a")
    assert (whole[:1] + whole[2:]).ids == ("a", "c", "d")
    assert whole[-1].id == "d" and len(whole) == 4
    with pytest.raises(InputError, match="set: no passage has the id 'z'"):
        whole.named(["a", "z"])


def test_the_digest_follows_tokens_ids_order_and_cut_but_not_tags():
    base = (Passage("a", (1, 2), (3,)), Passage("b", (4,), (5,)))
    digest = Passages(base).digest
    assert Passages((Passage("a", (1, 2), (3,), {"dose": 1}), base[1]), "elsewhere").digest == digest
    others = [
        (Passage("a", (1,), (2, 3)), base[1]),
        (Passage("x", (1, 2), (3,)), base[1]),
        base[::-1],
        base[:1],
    ]
    assert len({digest, *(Passages(other).digest for other in others)}) == 5


def test_windows_of_text_cover_all_but_their_first_tokens():
    tokenizer = byte_level()
    texts = ["the cat sat on the mat and the dog", "x", "Rome"]
    found = Passages.from_texts(texts, tokenizer, window=4)
    ids = tuple(tokenizer(texts[0])["input_ids"])
    first = [item for item in found if item.id.startswith("text-0-")]
    assert sum((item.ids for item in first), ()) == (ids if len(ids) % 4 != 1 else ids[:-1])
    assert all(len(item.prefix) == 1 and len(item.ids) <= 4 for item in found)
    assert not any(item.id.startswith("text-1-") for item in found)
    with pytest.raises(InputError, match="no text of two tokens"):
        Passages.from_texts(["x"], tokenizer, window=4)


@pytest.mark.parametrize("window", [0, 1, -3])
def test_a_window_without_room_for_a_suffix_is_refused(window):
    with pytest.raises(InputError, match=f"window {window}"):
        Passages.from_texts(["the cat sat"], byte_level(), window=window)


@pytest.mark.parametrize(("token", "told"), [(10, "10"), (-1, "-1")])
def test_a_token_outside_the_vocabulary_names_its_passage(token, told):
    rows = Passages((Passage("fine", (9,), (0,)), Passage("strange", (1,), (2, token))))
    with pytest.raises(InputError, match=f"'strange': token id {told} outside the vocabulary of 10"):
        rows.check(10, None)
    rows.check(11, None) if token > 0 else rows[:1].check(10, 2)


def test_a_row_beyond_the_context_names_its_passage():
    rows = Passages((Passage("long", (1, 2), (3,)),))
    rows.check(9, 3)
    with pytest.raises(InputError, match="'long': 3 tokens, the model's context holds 2"):
        rows.check(9, 2)


# -- facts -----------------------------------------------------------------------------------------------------------

FACT = {
    "id": "f",
    "prompt": "{} lives in",
    "subject": "Ada Brolin",
    "target": "Rome",
    "target_true": "Paris",
    "paraphrases": ["the dog and {} sat in", "Everyone knows where she lives:"],
    "neighbors": [{"prompt": "Boris Kram lives in", "target": "Rome"}, "the capital of France is"],
    "relation": "city",
}


def read_fact(folder: Path, tokenizer, **changes) -> Fact:
    return Facts.read(written(folder, FACT | changes), tokenizer)[0]


@tokenizers
def test_a_fact_is_what_its_texts_are_in_tokens(tmp_path, kind):
    tokenizer = tokenizer_of(kind)
    fact = read_fact(tmp_path, tokenizer)
    whole = tuple(tokenizer("Ada Brolin lives in Rome")["input_ids"])
    assert fact.prompt.ids + fact.target == whole
    assert fact.prompt.ids + fact.target_true == tuple(tokenizer("Ada Brolin lives in Paris")["input_ids"])
    assert [p.text for p in fact.paraphrases] == ["the dog and Ada Brolin sat in", "Everyone knows where she lives:"]
    joint = tuple(tokenizer("the capital of France is Paris")["input_ids"])
    assert fact.neighbors[1].prompt.ids + fact.neighbors[1].target == joint
    assert fact.tags == {"relation": "city"} and fact.template == "{} lives in" and fact.target_text == "Rome"


@tokenizers
@pytest.mark.parametrize("template", ["{} lives in", "the home of {} is", "where is {}", "{}", "Is{} here, {}"[:12]])
def test_the_subject_span_holds_the_subject_and_nothing_else(tmp_path, kind, template):
    tokenizer = tokenizer_of(kind)
    prompt = read_fact(tmp_path, tokenizer, prompt=template, paraphrases=[], neighbors=[]).prompt
    start, end = prompt.subject
    assert "Ada Brolin" in decode(tokenizer, prompt.ids[start:end])
    for narrower in (prompt.ids[start + 1 : end], prompt.ids[start : end - 1]):
        assert "Ada Brolin" not in decode(tokenizer, narrower)
    assert (start == 0) == (template.startswith("{}") and kind != "with a start token")


@tokenizers
def test_a_paraphrase_that_does_not_name_the_subject_has_no_span(tmp_path, kind):
    named, unnamed = read_fact(tmp_path, tokenizer_of(kind)).paraphrases
    assert named.subject is not None and unnamed.subject is None


def test_a_subject_written_out_in_the_prompt_is_found(tmp_path):
    tokenizer = byte_level()
    plain = read_fact(tmp_path, tokenizer, prompt="Ada Brolin lives in").prompt
    assert plain == read_fact(tmp_path, tokenizer).prompt


@tokenizers
def test_an_answer_has_its_space_once(tmp_path, kind):
    """ "Rome" and " Rome" are the same answer."""
    tokenizer = tokenizer_of(kind)
    assert read_fact(tmp_path, tokenizer).target == read_fact(tmp_path, tokenizer, target=" Rome").target


def test_answers_may_have_several_tokens(tmp_path):
    tokenizer = byte_level()
    fact = read_fact(tmp_path, tokenizer, target="Xyzzyville")
    assert len(fact.target) > 3 and decode(tokenizer, fact.target) == " Xyzzyville"


@tokenizers
@pytest.mark.parametrize("special", ["café", "東京", "鬱金香"])
def test_a_subject_of_characters_of_several_tokens(tmp_path, kind, special):
    tokenizer = tokenizer_of(kind)
    prompt = read_fact(tmp_path, tokenizer, subject=special, prompt="the {} and").prompt
    start, end = prompt.subject
    before, after = decode(tokenizer, prompt.ids[:start]), decode(tokenizer, prompt.ids[end:])
    assert before.replace("<s>", "").strip() == "the" and after.strip() == "and"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"subject": "Clara"}, None),
        ({"prompt": "She lives in"}, "subject 'Ada Brolin' is not in the prompt 'She lives in'"),
        ({"prompt": "{} and {} live in"}, "not in the prompt|marks"),
        ({"target": ""}, "'target' should be a text that is not empty"),
        ({"target_true": None}, "'target_true' should be a text"),
        ({"subject": ""}, "'subject' should be a text"),
        ({"paraphrases": "no list"}, "'paraphrases' should be a list"),
        ({"paraphrases": [""]}, "'paraphrases' should be a list"),
        ({"neighbors": [{"prompt": "a"}]}, "'target' should be a text"),
        ({"neighbors": ["{} sat"]}, "neighbour '{} sat' holds {}"),
        ({"neighbors": [3]}, "'prompt' should be a text"),
        ({"neighbors": "the cat"}, "'neighbors' should be a list"),
        ({"neighbors": None}, "'neighbors' should be a list"),
    ],
)
def test_a_fact_that_cannot_be_used_is_named(tmp_path, changes, said):
    path = written(tmp_path, FACT | {"id": "first"}, FACT | changes)
    if said is None:  # any subject will do where the prompt marks its place
        assert Facts.read(path, byte_level())[1].prompt.text == "Clara lives in"
        return
    with pytest.raises(InputError, match=rf"set\.jsonl, line 2: .*({said})") as caught:
        Facts.read(path, byte_level())
    assert "\n" not in str(caught.value)


def test_two_facts_of_one_id_are_refused(tmp_path):
    with pytest.raises(InputError, match="two facts share an id"):
        Facts.read(written(tmp_path, FACT, FACT), byte_level())


def test_a_prompt_that_ends_in_a_space_is_told_to_drop_it(tmp_path):
    """The space is part of the answer's first token; a second one before Rome would be another question."""
    with pytest.raises(InputError, match="line 1: 'Ada Brolin lives in ' and 'Rome' share a token; end the prompt"):
        read_fact(tmp_path, byte_level(), prompt="{} lives in ", paraphrases=[], neighbors=[])


def test_an_answer_after_a_prompt_that_ends_in_a_line_gets_no_space(tmp_path):
    tokenizer = byte_level()
    fact = read_fact(tmp_path, tokenizer, prompt="{} lives in:\n", paraphrases=[], neighbors=[])
    assert decode(tokenizer, fact.target) == "Rome"


def test_facts_as_passages(tmp_path):
    facts = Facts.read(written(tmp_path, FACT), byte_level())
    assert facts.as_passages()[0].suffix == facts[0].target_true
    assert facts.as_passages("new")[0].suffix == facts[0].target
    assert facts.as_passages()[0].prefix == facts[0].prompt.ids and facts.as_passages()[0].tags["relation"] == "city"
    with pytest.raises(InputError, match="which='old'"):
        facts.as_passages("old")


def test_facts_as_passages_say_where_their_subject_stands_and_bring_their_paraphrases(tmp_path):
    facts = Facts.read(written(tmp_path, FACT), byte_level())
    found = facts.as_passages(paraphrases=True)
    assert [item.id for item in found][:2] == [facts[0].id, f"{facts[0].id}/1"]
    assert len(found) == sum(1 + len(fact.paraphrases) for fact in facts)
    for fact in facts:
        mine = [item for item in found if item.tags["fact"] == fact.id]
        for item, prompt in zip(mine, (fact.prompt, *fact.paraphrases), strict=True):
            assert item.prefix == prompt.ids and item.suffix == fact.target_true
            assert item.tags["subject"] == (None if prompt.subject is None else list(prompt.subject))


def test_the_digest_of_facts_follows_everything_asked_or_answered(tmp_path):
    tokenizer = byte_level()
    changes = [
        {},
        {"target": "Kram"},
        {"target_true": "Kram"},
        {"prompt": "{} sat in"},
        {"paraphrases": ["{} sat on"]},
        {"neighbors": ["the mat is"]},
    ]
    digests = {Facts.read(written(tmp_path, FACT | change), tokenizer).digest for change in changes}
    assert len(digests) == len(changes)
    assert Facts.read(written(tmp_path, FACT | {"relation": "home"}), tokenizer).digest in digests


def test_a_slow_tokenizer_and_none_are_refused():
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="Slow gives no character spans"):
        encode(Slow(), "the cat")
    with pytest.raises(InputError, match="give prefix_ids and suffix_ids"):
        encode(None, "the cat")


def test_ids_without_a_tokenizer_are_spelled_out():
    assert decode(None, (3, 14)) == "⟨3⟩ ⟨14⟩"
