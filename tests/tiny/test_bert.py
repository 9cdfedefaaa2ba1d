"""Masked language models: the row's proof, clozes token for token, every method run or refused, and undone."""

from __future__ import annotations

import dataclasses
import json

import cases
import editor_cases
import numpy as np
import pytest
import torch
import zoo
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import BertTokenizerFast

from editors.base import Request
from editors.checks import check_applies_and_undoes, check_editor, check_survives_disk
from editors.cli import main as edit_main
from editors.hook_form import as_if
from editors.methods import EDITORS
from editors.rewriters.sparse_fine_tune import SparseFineTune
from memloc.batches import pad
from memloc.checks import check_localizer, hands_off
from memloc.errors import InputError, ModelError
from memloc.formats import table
from memloc.formats.format import Settings
from memloc.gradients.paths import Integral
from memloc.localizers.logit_lens import LogitLens
from memloc.localizers.random import Random
from memloc.localizers.rare_token_heads import queries_of
from memloc.localizers.weight_gradient import WeightGradient
from memloc.localizers.zero_out import ZeroOut
from memloc.measures.extraction import Extraction
from memloc.measures.facts import FactRecall
from memloc.measures.perplexity import Perplexity
from memloc.measures.zsre import Zsre
from memloc.methods import LOCALIZERS
from memloc.objectives import suffix_logprobs, suffix_nll
from memloc.passages import Facts, Passage, Passages
from memloc.proof import prove_row
from memloc.running.patterns import Attention
from memloc.sites import Kind, Site
from memloc.verbs.check import refusal
from memloc.view import ModelView

MASK = 3
WORDS = "[PAD] [UNK] [CLS] [MASK] [SEP] paris is the capital of france city in rome big . ,"
CAUSAL_LOCALIZERS = {"activation-patching", "causal-trace", "curvature", "ffn-memory", "prefix-perturbation"}
CAUSAL_EDITORS = {"alphaedit", "curvature", "emmet", "forget-passage", "memit", "rome"}
LOCALIZE = {
    "activation", "activation-gradient", "attention-bypass", "attribution-patching", "grad-activation", "hard-concrete",
    "integrated-gradients", "knowledge-neurons", "layer-retrain", "layer-rewind", "logit-lens", "outlier-set",
    "participation-ratio", "random", "rare-token-heads", "slimming", "weight-gradient", "zero-out",
}  # fmt: skip
EDIT = {
    "balanced-subnet", "constrained-fine-tune", "durable", "fine-tune", "gradient-ascent", "greedy", "head-dropout",
    "knowledge-neuron-surgery", "layer-rewind", "layernorm-removal", "magnitude", "neuron-dropout", "obs", "random",
    "subnet", "subspace", "svd", "ultraedit",
}  # fmt: skip
"""Methods that have to work; any other works, or refuses in one line."""


@pytest.fixture(scope="module")
def view():
    return ModelView.open(zoo.build("bert"))


@pytest.fixture(scope="module")
def exact():
    return ModelView.open(zoo.build("bert", dtype=torch.float64))


@pytest.fixture(scope="module")
def tokenizer():
    known = {word: index for index, word in enumerate(WORDS.split())}
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 4)]
    )
    return BertTokenizerFast(tokenizer_object=made)


def logits(view, item, seen=()):
    """Of the plain model, on one unpadded row: the suffix hidden, but for the tokens whose index is in `seen`."""
    hidden = [token if index in seen else MASK for index, token in enumerate(item.suffix)]
    ids = torch.tensor([[*item.prefix, *hidden, *item.after]])
    with torch.no_grad():
        return view.model(input_ids=ids).logits[0]


# -- the row -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_row_is_proved_in_every_dtype(dtype):
    found = ModelView.open(zoo.build("bert", dtype=dtype))
    assert (found.row.family, found.heads, found.neurons, found.mask_token) == ("BERT", 3, 37, MASK)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"causal": True}, r"L0\.attn\.v: values at position 0"),
        ({"summed": {}}, r"L0: the block's output differs"),
        ({"summed": {Kind.MLP_OUT: "output.LayerNorm"}}, r"L0: the block's output differs"),
        ({"transform": False}, r"hidden: the logits differs"),
        ({"final_norm": "bert.embeddings.LayerNorm"}, r"unembed: the logits differs"),
    ],
)
def test_a_row_that_lies_is_caught(view, lie, words):
    with pytest.raises(ModelError, match=words):
        prove_row(ModelView(view.model, dataclasses.replace(view.row, **lie)))


def test_values_taken_for_keys_are_caught(view):
    maps = {**view.row.maps, Kind.ATTN_V: view.row.maps[Kind.ATTN_K], Kind.ATTN_K: view.row.maps[Kind.ATTN_V]}
    with pytest.raises(ModelError, match=r"L0\.attn\.v: values"):
        prove_row(ModelView(view.model, dataclasses.replace(view.row, maps=maps)))


def test_a_model_that_reads_from_left_to_right_is_not_taken_for_one_that_reads_both_ways(view_of):
    plain = view_of("gpt2")
    with pytest.raises(ModelError, match="the first token does not hear the last"):
        prove_row(ModelView(plain.model, dataclasses.replace(plain.row, causal=False)))


def test_a_folder_is_loaded_as_what_it_was_saved_as(view, tmp_path):
    view.model.save_pretrained(tmp_path)
    assert ModelView.open(tmp_path).digest == view.digest
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["BertLMHeadModel"], "is_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no row for the model type 'bert'"):
        ModelView.open(tmp_path)


def test_a_model_whose_mask_token_nobody_names_is_asked_nothing():
    nameless = ModelView.open(zoo.build("bert", mask_token_id=None))
    with pytest.raises(ModelError, match="neither a tokenizer nor its configuration"):
        next(nameless.batches(zoo.cloze(1)))


def test_check_prints_the_map_and_what_can_be_done(view, tmp_path, capsys):
    view.model.save_pretrained(tmp_path)
    assert edit_main(["check", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reads"].startswith("both ways") and found["heads"] == 3
    for kind, ruled_out, sure in (("localizers", CAUSAL_LOCALIZERS, LOCALIZE), ("editors", CAUSAL_EDITORS, EDIT)):
        refused = {name for name, told in found[kind].items() if told is not True}
        assert ruled_out <= refused and not refused & sure
    assert {entry["kind"] for entry in found["maps"]} == {str(kind) for kind in view.kinds}


# -- clozes ------------------------------------------------------------------------------------------------------


def test_every_suffix_token_is_said_where_it_is_hidden(exact):
    items = zoo.cloze(5)
    batch = next(exact.batches(items))
    said = suffix_logprobs(exact, batch)
    for place, row in enumerate(batch.rows):
        item = items[row]
        own = logits(exact, item).log_softmax(-1)
        wanted = torch.stack([own[len(item.prefix) + step, token] for step, token in enumerate(item.suffix)])
        assert_close(said[place, : len(wanted)], wanted)
    assert bool((batch.ids[batch.predicting] == MASK).all())
    assert int(batch.predicting.sum()) == sum(len(item.suffix) for item in items)


def test_what_stands_behind_the_suffix_is_read_by_models_that_read_both_ways_only(exact, view_of):
    items = zoo.cloze(3)
    bare = Passages(tuple(dataclasses.replace(item, after=()) for item in items))
    here, there = (suffix_nll(exact, next(exact.batches(rows[1:2]))) for rows in (items, bare))
    assert not torch.allclose(here, there)
    plain = view_of("gpt2")
    assert torch.equal(*(suffix_nll(plain, next(plain.batches(rows))) for rows in (items, bare)))
    assert items.digest != bare.digest


def test_neither_padding_nor_company_changes_what_is_said(exact):
    items = zoo.cloze(5)
    together = {}
    for batch in exact.batches(items):
        together |= dict(zip(batch.rows, suffix_nll(exact, batch), strict=True))
    for row in range(len(items)):
        assert_close(suffix_nll(exact, next(exact.batches(items[row : row + 1])))[0], together[row])


def test_a_masked_model_is_never_shown_what_it_is_to_say(view):
    with pytest.raises(ModelError, match="was shown the tokens it is to predict"):
        view.hidden(pad([[5, 6, 7, 8]], [2]))
    with pytest.raises(ModelError, match="says what a mask token hides"):
        view.logits_at(pad([[5, 6, 7, 8]]), torch.tensor([0]), torch.tensor([3]))


def test_pseudo_perplexity_hides_one_token_at_a_time(exact):
    items = zoo.cloze(3)
    found = Perplexity()(exact, items)
    total = count = 0.0
    for item in items:
        for step, token in enumerate(item.suffix):
            others = [index for index in range(len(item.suffix)) if index != step]
            total -= float(logits(exact, item, others).log_softmax(-1)[len(item.prefix) + step, token])
            count += 1
    assert set(found.figures) == {"pseudo-perplexity", "nll"}
    assert found.figures["nll"].value == pytest.approx(total / count, rel=1e-6)
    assert [row["tokens"] for row in found.rows] == [len(item.suffix) for item in items]


def test_token_records_and_facts_are_those_of_the_joint_cloze(exact):
    items = zoo.cloze(4)
    found = Extraction()(exact, items)
    for row, item in zip(found.rows, items, strict=True):
        own = logits(exact, item)[len(item.prefix) :][: len(item.suffix)]
        assert row["strict"] == (own.argmax(-1).tolist() == list(item.suffix))
    facts = editor_cases.facts(2, seed=6)
    behind = Facts(tuple(dataclasses.replace(f, prompt=dataclasses.replace(f.prompt, after=(7, 8))) for f in facts))
    bare, told = (FactRecall()(exact, entry).rows[0]["nll_true"] for entry in (facts, behind))
    wanted = suffix_nll(exact, next(exact.batches(behind[:1].as_passages())))
    assert told == pytest.approx(float(wanted.detach()), rel=1e-9) and told != pytest.approx(bare, rel=1e-3)
    assert behind.digest != facts.digest


def test_protocols_that_ask_what_follows_a_prompt_refuse(view):
    with pytest.raises(ModelError, match="is asked for what follows a prompt"):
        Zsre()(view, editor_cases.facts(2, seed=6))


# -- texts -------------------------------------------------------------------------------------------------------


def test_a_closing_token_stands_behind_the_suffix_not_in_it(tokenizer):
    record = {"prefix": "Paris is the capital of", "suffix": " France", "after": " in the city."}
    (item,) = Passages.from_records([("line 1", record)], tokenizer)
    assert tokenizer.decode(item.prefix) == "[CLS] paris is the capital of"
    assert tokenizer.decode(item.suffix) == "france"
    assert tokenizer.decode(item.after) == "in the city . [SEP]"
    (item,) = Passages.from_records([("line 1", {"text": "Paris is the capital of France"})], tokenizer, prefix=3)
    assert (tokenizer.decode(item.suffix), tokenizer.decode(item.after)) == ("the capital of france", "[SEP]")


def test_a_fact_may_have_its_answer_inside_the_prompt(tokenizer, tmp_path):
    prompt = "{} is the capital of [MASK] , a city."
    fact = {"prompt": prompt, "subject": "Paris", "target": "Rome", "target_true": "France"}
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(fact))
    (found,) = Facts.read(path, tokenizer)
    assert tokenizer.decode(found.prompt.ids) == "[CLS] paris is the capital of"
    assert tokenizer.decode(found.prompt.after) == ", [UNK] city . [SEP]"
    assert (tokenizer.decode(found.target_true), found.prompt.subject) == ("france", (1, 2))
    deaf = BertTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, mask_token=None)
    with pytest.raises(InputError, match="stands inside it, and the model reads from left to right"):
        Facts.read(path, deaf)


@pytest.mark.parametrize("kind", ["lama", "pararel"])
def test_readers_keep_what_follows_the_slot_for_masked_models(kind, tokenizer, tmp_path):
    sentences = ["Paris is the capital of [MASK] .", "[MASK] is the city in France.", "In [MASK] is the capital Paris."]
    path = tmp_path / "cloze.jsonl"
    if kind == "lama":
        path.write_text(json.dumps({"obj_label": "France", "masked_sentences": sentences}))
    else:
        path.write_text(json.dumps([[[entry, "France", "P36"] for entry in sentences]]))
    settings = Settings(tokenizer=tokenizer)
    found = table.passages(table.read(path, settings), settings)
    told = [[tokenizer.decode(part) for part in (item.prefix, item.suffix, item.after)] for item in found]
    assert told == [
        ["[CLS] paris is the capital of", "france", ". [SEP]"],
        ["[CLS]", "france", "is the city in france . [SEP]"],
        ["[CLS] in", "france", "is the capital paris . [SEP]"],
    ]
    kept = table.tokenised(table.read(path, settings), settings).records
    assert [tuple(entry["after_ids"]) for entry in kept] == [item.after for item in found]
    assert len(table.read(path).records) == 1  # without a mask token: those that end in their slot


def test_patterns_that_go_on_behind_the_answer_become_prompts_with_a_slot(tokenizer, tmp_path):
    patterns = ["[X] is the capital of [Y] .", "[X] is [Y] city"]
    (tmp_path / "patterns.jsonl").write_text("".join(json.dumps({"pattern": entry}) + "\n" for entry in patterns))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"sub_label": "Paris", "obj_label": "France"}))
    settings = Settings(tokenizer=tokenizer, patterns=tmp_path / "patterns.jsonl")
    (fact,) = table.facts(table.read(tmp_path / "pairs.jsonl", settings), settings)
    assert [tokenizer.decode(prompt.after) for prompt in fact.prompts] == [". [SEP]", "city [SEP]"]
    causal = table.read(tmp_path / "pairs.jsonl", Settings(patterns=tmp_path / "patterns.jsonl"))
    assert (causal.records[0]["prompt"], causal.records[0]["paraphrases"]) == ("{} is the capital of", [])


# -- localizers --------------------------------------------------------------------------------------------------


SHORT = {"nodes": 3, "halvings": 0, "position": "first"}
QUICK = {"integrated-gradients": SHORT, "knowledge-neurons": SHORT}
ONCE = {"layer-retrain", "layer-rewind"}
"""Methods of a second checkpoint: slow, and nothing in them but their forward is another for a masked model."""


@pytest.mark.parametrize("name", sorted(LOCALIZERS))
def test_every_localizer_passes_the_battery_or_says_why_not(name, view, tmp_path):
    reason, items = refusal(LOCALIZERS[name], view), zoo.cloze(3)
    localizer = dataclasses.replace(cases.made(name, view, tmp_path), **QUICK.get(name, {}))
    if name in ONCE:
        assert len(localizer(view, items, contrast=zoo.cloze(2, seed=9)).scores) > 0
    elif name in LOCALIZE:
        check_localizer(localizer, view, items, contrast=zoo.cloze(2, seed=9))
    elif reason is None:
        one_line(lambda: localizer(view, items, contrast=zoo.cloze(2, seed=9)))
    else:
        short = Passages(tuple(dataclasses.replace(item, suffix=item.suffix[:1]) for item in items))
        for given in (items, short):
            with hands_off(view), pytest.raises(ModelError):
                localizer(view, given, contrast=zoo.cloze(2, seed=9))


def one_line(run):
    """Runs, or says why not in one line; whether it ran."""
    try:
        run()
    except (ModelError, InputError) as error:
        assert "\n" not in str(error)
        return False
    return True


@pytest.mark.parametrize(
    ("localizer", "words"),
    [
        (LogitLens(mode="attribution"), "make up the stream but for"),
        (WeightGradient(convention="folded"), "cannot be folded"),
    ],
)
def test_settings_that_need_norms_before_maps_refuse(localizer, words, view):
    with pytest.raises(ModelError, match=words):
        localizer(view, zoo.cloze(2))


@pytest.mark.parametrize("site", ["activation", "pre-activation"])
def test_integrated_gradients_are_complete_and_those_of_whole_forwards(site, exact):
    """Dai et al.: a layer's neurons at the mask scaled together, by the gold token's probability there."""
    item = zoo.cloze(3)[1]
    nodes = 6
    path = Integral(nodes=nodes, halvings=0, position="first", site=site).integrate(
        exact, next(exact.batches(Passages((item,))))
    )
    ids = torch.tensor([[*item.prefix, *[MASK] * len(item.suffix), *item.after]])
    at = len(item.prefix)
    points, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(nodes))
    kind, side = (Kind.MLP_OUT, "input") if site == "activation" else (Kind.MLP_IN, "output")
    for layer in range(exact.layers):
        place = [Site(layer, kind)]
        with torch.no_grad(), exact.record(place, side=side) as seen:
            exact.model(input_ids=ids)
        end = seen[place[0]][0, at].clone()
        total = torch.zeros_like(end)
        for point, weight in zip((points + 1) / 2, weights, strict=True):
            leaf = (point * end).requires_grad_()

            def change(_, tensor, leaf=leaf):
                return tensor.index_copy(1, torch.tensor([at]), leaf[None, None])

            with exact.replace(place, change, side=side):
                chance = exact.model(input_ids=ids).logits[0, at].softmax(-1)[item.suffix[0]]
            total += weight / 2 * torch.autograd.grad(chance, leaf)[0]
        assert_close(path.scores()[layer, 0], end * total)
    assert float(Integral(nodes=12).integrate(exact, next(exact.batches(zoo.cloze(3)))).gaps().max()) < 0.01


@pytest.mark.parametrize("grain", ["neuron", "head"])
def test_zero_out_is_the_loss_of_a_whole_forward_without_the_unit(grain, exact):
    items = zoo.cloze(2)
    found = ZeroOut(grain=grain)(exact, items)
    sites = exact.sites(Kind.MLP_OUT if grain == "neuron" else Kind.ATTN_OUT)
    units = exact.neurons if grain == "neuron" else exact.heads
    for site in sites:
        for unit in (0, units - 1):

            def silence(_, tensor, unit=unit):
                parts = tensor.unflatten(-1, (units, -1)).clone()
                parts[..., unit, :] = 0
                return parts.flatten(-2)

            batch = next(exact.batches(items))
            with torch.no_grad():
                clean = suffix_nll(exact, batch)
                with exact.replace([site], silence):
                    silent = suffix_nll(exact, batch)
            rise = (silent - clean)[torch.tensor(batch.rows).argsort()].float()
            assert_close(found.scores[site][:, unit], rise, atol=1e-6, rtol=1e-4)


def test_attention_is_read_both_ways(exact):
    batch = next(exact.batches(zoo.cloze(3)))
    pattern = Attention.of(exact, batch).pattern(1)
    eager = zoo.build("bert", dtype=torch.float64, attn_implementation="eager")
    wanted = eager(input_ids=batch.ids, attention_mask=batch.mask.long(), output_attentions=True).attentions[1]
    real = batch.mask[:, None, :, None]
    assert_close(pattern, (wanted * real).detach())
    assert float(pattern[:, :, 0, 1:].sum()) > 0.1, "the first token hears none behind it"
    _, weight = queries_of(batch, "all")
    assert_close(weight.sum(1), batch.mask * batch.read[:, None].double())


# -- editors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(EDITORS))
def test_every_editor_keeps_its_promises_or_says_why_not(name, tmp_path):
    view = ModelView.open(zoo.build("bert"))
    ran = one_line(
        lambda: check_editor(editor_cases.made(name, view, tmp_path), view, editor_cases.request(name, view), tmp_path)
    )
    assert ran or name not in EDIT
    assert not (ran and refusal(EDITORS[name], view))


@pytest.mark.parametrize("name", sorted(CAUSAL_EDITORS))
def test_editors_that_live_on_causality_refuse_at_once(name, tmp_path):
    view = ModelView.open(zoo.build("bert"))
    editor, asked = editor_cases.made(name, view, tmp_path), editor_cases.request(name, view)
    with hands_off(view), pytest.raises(ModelError, match="BERT reads both ways, and the method lives on"):
        editor(view, asked)


def test_the_hook_form_says_what_the_edit_says(exact):
    chosen = Random(grain="neuron")(exact, zoo.cloze(2)).top(fraction=0.2)
    edit = EDITORS["neuron-dropout"]()(exact, Request(selection=chosen))
    batch = next(exact.batches(zoo.cloze(3)))
    with torch.no_grad():
        plain = suffix_nll(exact, batch)
        with as_if(exact, edit.deltas):
            hooked = suffix_nll(exact, batch)
        with edit.apply(exact):
            edited = suffix_nll(exact, batch)
    assert_close(hooked, edited)
    assert float((plain - edited).abs().max()) > 1e-3


def test_sparse_fine_tuning_forgets_clozes(tmp_path):
    view, items = ModelView.open(zoo.build("bert")), zoo.cloze(3)
    chosen = Random(grain="neuron")(view, items).top(fraction=0.5)
    editor = SparseFineTune(steps=8, lr=1e-2, replay=0, floor=-30.0)
    edit = editor(view, Request(forget=items, selection=chosen))
    batch = next(view.batches(items))
    with torch.no_grad():
        before = suffix_nll(view, batch)
        with edit.apply(view):
            after = suffix_nll(view, batch)
    assert float(after.mean()) > float(before.mean()) + 0.1
    check_survives_disk(edit, tmp_path / "kept.edit.safetensors")
    check_applies_and_undoes(edit, view)
    with pytest.raises(ModelError, match="name no retain and no text"):
        editor(view, Request(forget=items, retain=zoo.cloze(2, seed=4), selection=chosen))


def test_an_edit_of_bert_is_found_again_in_its_folder(tmp_path):
    view = ModelView.open(zoo.build("bert"))
    view.model.save_pretrained(tmp_path / "model")
    chosen = Random(grain="weight")(view, zoo.cloze(2)).top(fraction=0.01)
    edit = EDITORS["magnitude"]()(view, Request(selection=chosen))
    edit.save(tmp_path / "one.edit.safetensors")
    given = [
        str(tmp_path / "one.edit.safetensors"),
        "--model",
        str(tmp_path / "model"),
        "--out",
        str(tmp_path / "edited"),
    ]
    assert edit_main(["apply", *given]) == 0
    edited = ModelView.open(tmp_path / "edited")
    batch = next(view.batches(zoo.cloze(2)))
    with torch.no_grad(), edit.apply(view):
        assert_close(suffix_nll(edited, batch), suffix_nll(view, batch))


def test_a_passage_needs_a_token_before_its_suffix():
    with pytest.raises(InputError, match="each needs at least one"):
        Passage("p", (), (5,), after=(6,))
