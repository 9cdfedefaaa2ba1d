"""Files from strangers: nothing in them is run, nothing grows, every refusal is one line that says where and why."""

import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from format_samples import CASE, MQUAKE, OWN_FACT, TOFU, ZSRE
from tiny_tokenizers import byte_level

from memloc.errors import InputError
from memloc.formats import arrays, content, table
from memloc.formats.format import Settings


class Bomb:
    """Pickled, it leaves a file behind when it is read."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


def refuses(path, says, **settings):
    with pytest.raises(InputError, match=says) as caught:
        table.read(path, Settings(**settings)).sound()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# -- pickles ----------------------------------------------------------------------------------------------------------


def test_the_bomb_goes_off_where_it_is_let(tmp_path):
    """A check that cannot fail checks nothing."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").is_dir()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_bare_pickle_is_never_read(tmp_path, protocol):
    mark = tmp_path / "mark"
    refuses(written(tmp_path / "x.jsonl", pickle.dumps(Bomb(mark), protocol=protocol)), "a pickle, which can run code")
    assert not mark.exists()


def test_an_array_of_objects_is_never_read(tmp_path):
    mark = tmp_path / "mark"
    np.save(tmp_path / "x.npy", np.array([[Bomb(mark)]], dtype=object), allow_pickle=True)
    refuses(tmp_path / "x.npy", "not a plain array of numbers .*nothing in it was run")
    assert not mark.exists()


@pytest.mark.parametrize("held", ["bomb", "module", "list"])
def test_a_tensor_file_that_holds_something_else_is_refused(tmp_path, held):
    mark = tmp_path / "mark"
    values = {"bomb": Bomb(mark), "module": torch.nn.Linear(2, 3), "list": [torch.ones(2, 3).long()]}
    torch.save(values[held], tmp_path / "x.pt")
    refuses(tmp_path / "x.pt", "found list, expected one tensor" if held == "list" else "not a plain tensor .*it names")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"\x80\x02cposix\nmkdir\n(X\x04\x00\x00\x00marktR.", "it names posix mkdir"),
        (b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93.", "its pickle has STACK_GLOBAL"),
        (b"\x80\x02c__builtin__\nbytearray\n(J\xff\xff\xff\x7ftR.", "it names __builtin__ bytearray"),
        (b"\x80\x02\xff\xff", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_a_tensors_pickle_names_nothing_but_tensors(tmp_path, raw, says, monkeypatch):
    """Listed before torch's own restricted loader sees it, which would make two gigabytes of bytes when asked to."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", raw)
    refuses(tmp_path / "x.pt", says)
    assert not (tmp_path / "mark").exists()


def test_a_tensor_file_of_the_old_kind_is_refused(tmp_path):
    torch.save(torch.ones(2, 80).long(), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    refuses(tmp_path / "x.pt", "a pickle, which can run code")


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_a_tensor_that_claims_more_than_its_file_holds_is_refused(tmp_path):
    torch.save(torch.ones(1, 1).long().expand(10**7, 80), tmp_path / "x.pt")
    refuses(tmp_path / "x.pt", r"a tensor of shape \[10000000, 80\] claims more than the file holds")


@pytest.mark.parametrize("kind", ["float32", "bool", "complex64"])
def test_a_tensor_of_another_kind_is_refused(tmp_path, kind):
    torch.save(torch.zeros(2, 80, dtype=getattr(torch, kind)), tmp_path / "x.pt")
    refuses(tmp_path / "x.pt", f"{kind}; expected token ids")


@pytest.mark.parametrize("kind", ["float64", "S4", "bool", "datetime64[s]"])
def test_an_array_of_another_kind_is_refused(tmp_path, kind):
    np.save(tmp_path / "x.npy", np.zeros((2, 80)).astype(kind))
    refuses(tmp_path / "x.npy", "expected token ids")


@pytest.mark.parametrize("shape", [(100,), (2, 3, 4), (0, 100), (3, 0), ()])
def test_an_array_of_another_shape_is_refused(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.zeros(shape, dtype="int64"))
    refuses(tmp_path / "x.npy", r"expected \[n, t\], rows of token ids|not a plain array")


def header(text, data=b""):
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text + data


@pytest.mark.parametrize(
    "raw",
    [
        header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000, 100), }\n"),
        header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (-3, 100), }\n"),
        header(b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 100), }\n", b"x" * 900),
        header(b"{" + b" " * 200000 + b"}\n"),
        header(b"__import__('os').mkdir('mark')\n"),
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{",
        b"\x93NUMPY\x09\x00",
        b"\x93NUMPY",
    ],
    ids=["claims much", "negative", "objects", "long header", "code", "huge header", "version", "cut"],
)
def test_a_header_that_lies_is_refused(tmp_path, raw, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses(written(tmp_path / "x.npy", raw), "not a plain array of numbers")
    assert not (tmp_path / "mark").exists()


def test_an_array_cut_short_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((30, 100), dtype="uint16"))
    refuses(written(tmp_path / "y.npy", (tmp_path / "x.npy").read_bytes()[:-100]), "not a plain array")


def test_an_archive_that_grows_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02.")
        archive.writestr("x/data/0", b"\0" * 10**6)
    refuses(tmp_path / "x.pt", "grows when unpacked; torch.save does not compress")
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        archive.writestr("y/data.pkl", b"\x80\x02" + b"0" * arrays.PICKLE_LIMIT)
    refuses(tmp_path / "y.pt", "describe its tensors, at most 65536 are read")


@pytest.mark.parametrize("names", [[], ["a.npy"], ["a/data.pkl", "b/data.pkl"]])
def test_another_archive_is_refused(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in names or ["empty"]:
            archive.writestr(name, b"1")
    refuses(tmp_path / "x.pt", "expected a tensor that torch.save wrote")
    refuses(written(tmp_path / "y.pt", (tmp_path / "x.pt").read_bytes()[:30]), "an archive that cannot be read")


def test_a_file_too_large_to_be_read_whole_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "LIMIT", 10)
    refuses(written(tmp_path / "x", "the cat sat on"), "14 bytes; at most 10 are read whole")


def test_a_negative_token_is_named_with_its_row(tmp_path):
    matrix = np.zeros((3, 64), dtype="int64")
    matrix[2, 9] = -7
    np.save(tmp_path / "x.npy", matrix)
    refuses(tmp_path / "x.npy", "row 2: token id -7; expected whole numbers from 0")


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "empty, no record in it"),
        (b" \r\n\t ", "blank, no record in it"),
        (b"\xef\xbb\xbf", "blank, no record in it"),
        (b"[]", "JSON list with no record in it"),
        (b"[{}", "not JSON"),
        (b'[{"a": 1} {"a": 2}]', "line 1: not JSON .*expected ',' or ']' after record 0"),
        (b'[{"a": 1}] x', "more text after the list"),
        (b"[" * 100000, "not JSON"),
        (b'{"a":' * 100000, "not JSON"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": 1e999}', "1e999 is no JSON number"),
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{\n "a": 1,\n "b": oops\n}', "line 3: not JSON"),
        (b"\xff\xfe\x41\x00", "not UTF-8 at byte 0"),
        (b"text \x00 more", "zero bytes"),
        (b"\x1f\x8b\x08\x00", "compressed by gzip"),
        (b"PAR1PAR1", "parquet"),
        (b'{"words": 3}', r"line 1: found keys words; known are facts, counterfact, .*token-matrix"),
        (b"[3]", r"record 0 \(line 1\): found int; known are"),
        (b'{"question": "a", "answer": "b", "prompt": "c", "gt": "d"}', "question-answer or muse-verbmem; say which"),
        (b'{"schema": "memloc.measurement/1"}', "a measurement; `memloc show` prints it"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, raw, says):
    refuses(written(tmp_path / "x", raw), says)


def test_no_such_file(tmp_path):
    refuses(tmp_path / "x", "no such file")
    refuses(tmp_path, "directory")


def test_marks_and_line_ends_of_other_systems_do_not_matter(tmp_path):
    plain = written(tmp_path / "a", "".join(json.dumps(CASE | {"case_id": n}) + "\n" for n in range(3)))
    odd = written(tmp_path / "b", b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert table.read(plain).records == table.read(odd).records
    listed = written(tmp_path / "c", "\ufeff\n [" + ",\r\n".join(plain.read_text().splitlines()) + "\r\n]\r\n")
    assert table.read(plain).records == table.read(listed).records


def test_a_name_says_nothing(tmp_path):
    assert table.read(written(tmp_path / "zsre_counterfact.pt", json.dumps(MQUAKE))).format.name == "mquake"


# -- records ----------------------------------------------------------------------------------------------------------


def changed(record, path, value):
    *above, last = path.split(".")
    copy = json.loads(json.dumps(record))
    inner = copy
    for key in above:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return copy


@pytest.mark.parametrize(
    ("record", "path", "value", "says"),
    [
        (CASE, "requested_rewrite.prompt", ..., "key 'prompt': expected a text that is not empty, found None"),
        (CASE, "requested_rewrite.prompt", "{} and {}", r"'requested_rewrite\.prompt': expected one {}"),
        (CASE, "requested_rewrite.target_new", "Rome", r"'target_new\.str': expected a text .*found None"),
        (CASE, "requested_rewrite.target_true.str", 3, r"'target_true\.str': expected a text .*found 3"),
        (CASE, "paraphrase_prompts", "one", "'paraphrase_prompts': expected a list of texts, found 'one'"),
        (CASE, "neighborhood_prompts", ["of {}"], "'neighbors': 'of {}' holds {}"),
        (MQUAKE, "requested_rewrite", [], "'requested_rewrite': expected a list of rewrites"),
        (ZSRE, "subject", "Clara", "'src': the subject 'Clara' is not in 'Where does Ada Brolin live"),
        (ZSRE, "answers", [], "'answers': expected a list with the true answer first"),
        (ZSRE, "loc_ans", ..., "'loc_ans': expected a text"),
        (TOFU, "answer", " ", "'answer': expected a text that is not empty, found ' '"),
        (OWN_FACT, "subject", "", "'subject': expected a text"),
        ({"tokens": [1] * 64}, "tokens", [1, -2], "'tokens': expected token ids, whole numbers from 0"),
        ({"tokens": [1] * 64}, "tokens", "[1, two]", "'tokens': expected token ids"),
        ({"tokens": [1] * 64}, "tokens", [1, True, 2], "'tokens': expected token ids"),
        ({"tokens": [1] * 64}, "tokens", [1, 2], "2 tokens, no more than the prefix of 50"),
        ({"prefix_ids": [1], "suffix_ids": [2]}, "suffix_ids", [2.5], "'suffix_ids': expected token ids"),
    ],
)
def test_a_malformed_record_is_named_counted_and_nothing_is_given(tmp_path, record, path, value, says):
    file = written(tmp_path / "x", json.dumps(record) + "\n" + json.dumps(changed(record, path, value)) + "\n")
    reading = table.read(file)
    assert [problem.where for problem in reading.problems if "taken" not in problem.message] == ["line 2"]
    refuses(file, f"line 2: .*{says}")


def test_every_problem_is_told_with_its_line_and_the_first_is_raised(tmp_path):
    lines = [json.dumps(TOFU), "{oops", "", json.dumps({"question": 3}), "[1]", json.dumps(TOFU)]
    reading = table.read(written(tmp_path / "x", "\n".join(lines)))
    assert [problem.where for problem in reading.problems] == ["line 2", "line 4", "line 5"]
    assert (reading.source, len(reading.rows)) == (5, 2)
    refuses(tmp_path / "x", r"line 2: not JSON .*\(and 2 more of 5 records; `memloc validate` lists them\)")


def test_an_id_taken_twice_names_both_places(tmp_path):
    file = written(tmp_path / "x", json.dumps([CASE, CASE | {"case_id": 8}, CASE]))
    refuses(file, r"record 2 \(line 1\): the id '7' was taken at record 0 \(line 1\)")


def test_what_only_tokenising_shows_is_told_with_its_line_too(tmp_path):
    good, bad = {"id": "a", "text": "the cat sat on the mat"}, {"id": "b", "text": "the"}
    settings = Settings(prefix=2, tokenizer=byte_level())
    reading = table.read(written(tmp_path / "x", "\n".join(map(json.dumps, (good, bad, bad | {"id": "c"})))), settings)
    assert not reading.problems
    found = table.problems_of(reading, settings)
    assert [problem.where for problem in found] == ["line 2", "line 3"] and "text of 1 tokens" in found[0].message


def test_a_wrong_name_or_setting_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no format called 'counterfacts'; did you mean 'counterfact'"):
        table.named("counterfacts")
    with pytest.raises(InputError, match="at least 1 of each"):
        Settings(stride=0)
    with pytest.raises(InputError, match=r"has no place for \{question\}"):
        Settings(template="Q:")
    refuses_as = written(tmp_path / "x", json.dumps(CASE))
    with pytest.raises(InputError, match="expected a matrix of token ids"):
        table.read(refuses_as, name="token-matrix")
