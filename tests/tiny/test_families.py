"""Families with unusual traits: what a row says of them is proved, what a method says of them is true or refused."""

from __future__ import annotations

import dataclasses
import json

import cases
import pytest
import torch
import zoo
from torch.testing import assert_close

from editors.base import Request
from editors.checks import check_applies_and_undoes, check_survives_disk
from editors.cli import main
from editors.facts.contexts import Demand, Row
from editors.facts.keys_values import Descent, optimise_values
from editors.methods import EDITORS
from editors.pruners.neuron_dropout import NeuronDropout
from editors.rewriters.sparse_fine_tune import SparseFineTune
from memloc import architectures
from memloc.architectures import Fused
from memloc.checks import check_localizer, hands_off, shape_of
from memloc.errors import ModelError
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.localizers.logit_lens import LogitLens
from memloc.localizers.zero_out import ZeroOut
from memloc.methods import LOCALIZERS
from memloc.objectives import suffix_nll
from memloc.patching.corruption import Corruption
from memloc.proof import prove_row
from memloc.provenance import Provenance
from memloc.reading.attribution import Norm, attribute
from memloc.scores import Selection, selected
from memloc.sites import OUTSIDE, Grain, Kind, Site
from memloc.verbs.check import refusal
from memloc.view import ModelView

NEW = (*zoo.UNUSUAL, *zoo.OTHERS)
NORMED = ("gemma2", "gemma3", "olmo2")
"""Their blocks norm what they write."""


# -- rows --------------------------------------------------------------------------------------------------------

HEADS = {
    "gptj": (3, 3, 8), "opt": (3, 3, 8), "phi": (3, 3, 8), "phi3": (6, 2, 4), "olmo": (6, 2, 4), "olmo2": (6, 2, 4),
    "gemma2": (6, 2, 10), "gemma3": (6, 2, 10), "falcon": (6, 1, 4), "falcon_new": (6, 2, 4), "falcon_rw": (6, 6, 4),
    "bloom": (3, 3, 8), "mixtral": (6, 2, 4), "qwen3_moe": (6, 2, 10), "olmoe": (6, 2, 4),
}  # fmt: skip


@pytest.mark.parametrize("family", NEW)
def test_heads_are_counted_in_the_weights(family, view_of):
    view = view_of(family)
    assert (view.heads, view.kv_heads, view.head_width) == HEADS[family]
    assert view.context == (None if family == "bloom" else 64)


WRONG = {
    "no norm behind": (
        "gemma2", {"added": {}}, r"^L0: the block's output differs by .* check attn\.out, mlp\.out, added and summed",
    ),
    "gain as it is stored": ("gemma3", {"norm_offset": 0.0}, r"^L0\.\w+_layernorm: output differs by .* norm_offset"),
    "another norm": (
        "olmo2",
        {"norms": {Kind.MLP_IN: "post_attention_layernorm"}},
        r"^L0\.mlp\.in: input differs by .* what post_attention_layernorm puts out",
    ),
    "groups as one": (
        "falcon_new",
        {"fused": (Fused("self_attention.query_key_value", "qkv"),)},
        r"^L0\.attn\.v: values at position 0 differs? by .* check the fused layout",
    ),
    "gate for in": (
        "phi3",
        {"fused": (Fused("self_attn.qkv_proj", "qkv"),), "maps": {
            Kind.MLP_IN: "self_attn.qkv_proj", Kind.ATTN_OUT: "self_attn.o_proj", Kind.MLP_OUT: "mlp.down_proj",
            Kind.MLP_GATE: "mlp.gate_up_proj"}},
        r"^L0\.mlp\.in: input differs by|^L0\.mlp\.gate: neurons are no function of the gate",
    ),
    "a module that is not called": (
        "gptj",
        {"norms": {Kind.MLP_IN: "attn.resid_dropout_"}},
        r"attn\.resid_dropout_",
    ),
    "attention and MLP taken for their modules": (
        "bloom",
        {"maps": {Kind.ATTN_OUT: "self_attention", Kind.MLP_IN: "mlp.dense_h_to_4h", Kind.MLP_OUT: "mlp"}},
        r"^L0\.mlp\.out: BloomMLP holds no such parameter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_row_fails_and_says_where(wrong):
    family, changes, sentence = WRONG[wrong]
    model = zoo.build(family)
    row = dataclasses.replace(architectures.row_for(model.config), **changes)
    with pytest.raises(Exception, match=sentence) as caught:
        prove_row(ModelView(model, row))
    assert "\n" not in str(caught.value)


def test_a_gate_taken_for_what_it_opens_fails():
    model = zoo.build("llama")
    row = architectures.row_for(model.config)
    maps = {**row.maps, Kind.MLP_GATE: "mlp.up_proj", Kind.MLP_IN: "mlp.gate_proj"}
    with pytest.raises(ModelError, match=r"^L0\.mlp\.gate: neurons are no function of the gate times mlp\.in"):
        prove_row(ModelView(model, dataclasses.replace(row, maps=maps)))


def test_falcon_models_have_the_row_of_their_layout():
    names = {family: architectures.row_for(zoo.build(family).config).family for family in NEW if "falcon" in family}
    assert names == {"falcon": "Falcon", "falcon_new": "Falcon, two norms", "falcon_rw": "Falcon, sequential"}


def test_what_a_block_adds_in_place_does_not_change_what_was_seen(view_of):
    """Falcon adds attention onto what the MLP put out: without a copy, both would be seen as one."""
    view = view_of("falcon_new", torch.float64)
    site, batch = Site(1, Kind.MLP_OUT), next(view.batches(zoo.passages(2)))
    with torch.no_grad(), view.record([site]) as entering, view.record([site], side="output") as leaving:
        view.hidden(batch)
    assert_close(leaving[site], entering[site] @ view.weight(site).T)
    with view.frozen(), view.record([site], side="output", grad=True) as seen:
        suffix_nll(view, batch).sum().backward()
    assert_close(seen[site].detach(), leaving[site])


def test_flat_tokens_are_seen_row_by_row(view_of):
    """OPT hands its MLP all tokens in one line; `f[1, 2]` must still be token 2 of row 1."""
    view, site = view_of("opt", torch.float64), Site(1, Kind.MLP_OUT)
    batch = next(view.batches(zoo.passages(3, ragged=False)))
    with torch.no_grad(), view.record([site]) as together:
        view.hidden(batch)
    for row in range(3):
        with torch.no_grad(), view.record([site]) as alone:
            view.model(batch.ids[row : row + 1], use_cache=False)
        assert_close(together[site][row], alone[site][0])


def test_capped_logits_are_the_models_own_and_the_others_are_linear(view_of):
    view = view_of("gemma2", torch.float64)
    batch = next(view.batches(zoo.passages(2)))
    with torch.no_grad():
        hidden = view.hidden(batch)
        whole, free = view.unembed(hidden), view.unembed(hidden, capped=False)
        assert_close(whole, view.model(batch.ids, use_cache=False).logits)
    assert float(whole.abs().max()) <= view.soft_cap == 3.0 < float(free.abs().max())
    assert_close(free, hidden @ view.weight(Site(OUTSIDE, Kind.UNEMBED)).T)
    assert view_of("gemma3").soft_cap is None


def test_noise_is_in_units_of_what_the_embedding_puts_out(view_of):
    """Gemma multiplies its embeddings by √d; noise in units of the stored matrix would be lost in them."""
    view, stored = view_of("gemma3"), view_of("gemma3").weight(Site(OUTSIDE, Kind.EMBED)).detach()
    (found,) = Corruption("noise", noise=2.0, draws=400).of(view, zoo.passages(1), None)
    drawn = found.noise[:, : len(zoo.passages(1)[0].prefix)]
    assert_close(float(drawn.std()), 2 * 24**0.5 * float(stored.std()), rtol=0.03, atol=0)


# -- methods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", zoo.OTHERS)
@pytest.mark.parametrize("name", sorted(LOCALIZERS))
def test_every_method_scores_real_places_or_says_why_not(name, family, view_of, tmp_path):
    view, passages = view_of(family), zoo.passages(3)
    method, reason = cases.made(name, view, tmp_path), refusal(LOCALIZERS[name], view)
    if reason is not None:
        with pytest.raises(ModelError) as caught:
            method(view, passages, contrast=zoo.passages(2, seed=9))
        assert reason in str(caught.value) and "\n" not in str(caught.value)
        return
    with hands_off(view):
        found = method(view, passages, contrast=zoo.passages(2, seed=9)).mean()
    for site, scores in found.scores.items():
        assert bool(torch.isfinite(scores).all()), site
        assert shape_of(view, site, found.grain) in (None, tuple(scores.shape)), site


@pytest.mark.parametrize("family", zoo.UNUSUAL)
@pytest.mark.parametrize("name", sorted(LOCALIZERS))
def test_every_method_passes_the_battery_in_unusual_families(name, family, view_of, tmp_path):
    view = view_of(family)
    if refusal(LOCALIZERS[name], view) is None:
        method = cases.made(name, view, tmp_path)
        if hasattr(method, "halvings"):
            # Where what is written is normed, paths bend sharply near 0, and halving them takes its time.
            method = dataclasses.replace(method, halvings=0, nodes=4)
        # Of two passages, a spread may be of rounding alone: neurons of experts that few tokens are sent to.
        check_localizer(method, view, zoo.passages(3), contrast=zoo.passages(6, seed=9))


def test_what_is_refused_is_refused_where_values_do_not_reach_the_stream_only(view_of):
    refusing = {family for family in zoo.CONFIGS for name in LOCALIZERS if refusal(LOCALIZERS[name], view_of(family))}
    assert refusing == set(NORMED)
    with pytest.raises(ModelError, match=r"Gemma: post_feedforward_layernorm norms what mlp\.out writes"):
        LOCALIZERS["ffn-memory"]()(view_of("gemma2"), zoo.passages(2))


@pytest.mark.parametrize("family", NEW)
def test_silencing_a_neuron_is_a_column_of_zeros(family):
    """Whole forwards of a model that is written to, one neuron at a time; in norms behind what is written too."""
    view, item = ModelView.open(zoo.build(family, dtype=torch.float64)), zoo.passages(1)
    scores = ZeroOut()(view, item).scores
    for layer, neuron in ((0, 3), (1, 30), (2, 11)):
        units = view.units(Site(layer, Kind.MLP_OUT))
        whose, own = divmod(neuron, view.widths[layer] // len(units))
        weight = view.place(units[whose]).matrix(view.parameter(units[whose]))
        column = (own,) if view.row.stored_in_out else (slice(None), own)
        kept, clean = weight[column].detach().clone(), _nll(view, item)
        with torch.no_grad():
            weight[column] = 0
            expected = _nll(view, item) - clean
            weight[column] = kept
        assert_close(scores[Site(layer, Kind.MLP_OUT)][0, neuron].double(), expected, atol=2e-6, rtol=1e-4)


@torch.no_grad()
def _nll(view, passages):
    logs = view.model(torch.tensor([passages[0].ids]), use_cache=False).logits[0].log_softmax(-1)
    start = len(passages[0].prefix)
    return -logs[start - 1 : -1].gather(1, torch.tensor(passages[0].suffix)[:, None]).mean()


@pytest.mark.parametrize("family", NEW)
def test_integrated_gradients_are_those_of_whole_forwards(family, view_of):
    """Reference: whole forwards of the text cut at the token, one point of one layer at a time."""
    view, item = view_of(family, torch.float64), zoo.passages(1)
    found = IntegratedGradients(nodes=3, quadrature="riemann-right", position="last")(view, item).scores
    ids, token = torch.tensor([item[0].ids[:-1]]), item[0].ids[-1]
    for site in view.sites(Kind.MLP_OUT):
        with torch.no_grad(), view.record([site]) as seen:
            view.model(ids, use_cache=False)
        reading = seen[site][0, -1]
        total = torch.zeros_like(reading)
        for step in (1, 2, 3):
            scaled = (step / 3 * reading).requires_grad_()
            with view.frozen(), view.replace([site], lambda _, t, s=scaled: torch.cat([t[:, :-1], s[None, None]], 1)):
                gold = view.model(ids, use_cache=False).logits[0, -1].softmax(-1)[token]
            total += torch.autograd.grad(gold, scaled)[0] * reading / 3
        scale = float(total.abs().max())
        assert_close(found[site][0].double() / scale, total / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", NEW)
def test_direct_attribution_adds_up_to_the_uncapped_logit(family, view_of):
    view = view_of(family, torch.float64)
    batch = next(view.batches(zoo.passages(2)))
    for kind in (Kind.ATTN_OUT, Kind.MLP_OUT):
        found = attribute(view, Norm.of(view), batch, entering=kind)
        total = found.embedding + found.constant + sum(found.components.values())
        assert_close(total, found.logit, atol=1e-5, rtol=1e-5)
        for site in view.sites(kind):
            bias = Site(site.layer, kind, bias=True)
            said = found.neurons(view, site).sum(-1)
            if view.has(bias):
                said = said + found.inside[site] @ view.weight(bias)
            assert_close(said, found.components[site], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        logits = view.unembed(view.hidden(batch), capped=False)[found.row, found.column]
    gold = logits.gather(1, found.token[:, None])[:, 0] - logits.mean(-1)
    assert_close(found.logit, gold, atol=1e-5, rtol=1e-5)


def test_neurons_and_heads_have_attributions_behind_norms_too(view_of):
    for grain in ("head", "neuron"):
        method = LogitLens(mode="attribution", grain=grain)
        check_localizer(method, view_of("gemma2"), zoo.passages(3))


# -- editors -----------------------------------------------------------------------------------------------------


def of_neurons(view):
    sites = {Site(0, Kind.MLP_OUT): [1, 8], Site(2, Kind.MLP_OUT): [0]}
    return selected(sites, {site: view.neurons for site in sites}, Grain.NEURON)


def of_weights(view):
    generator = torch.Generator().manual_seed(0)
    masks = {site: torch.rand(view.weight(site).shape, generator=generator) < 0.3 for site in view.sites(*view.kinds)}
    return Selection(Grain.WEIGHT, masks, Provenance("by hand"))


@pytest.mark.parametrize("family", NEW)
def test_edits_round_trip_to_the_bit(family, tmp_path):
    view, passages = ModelView.open(zoo.build(family)), zoo.passages(3)
    asked = {
        "zero": (NeuronDropout(), Request(selection=of_neurons(view), text=passages)),
        "train": (
            SparseFineTune(steps=3, lr=1e-2, replay=8, keep_rows=2, floor=-30.0),
            Request(forget=passages, retain=zoo.passages(2, seed=4), text=zoo.passages(2, seed=5),
                    selection=of_weights(view)),
        ),
    }  # fmt: skip
    for name, (editor, request) in asked.items():
        with hands_off(view):
            edit = editor(view, request)
        check_survives_disk(edit, tmp_path / f"{name}.safetensors")
        check_applies_and_undoes(edit, view)


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "opt", "falcon", "phi"])
def test_values_are_sought_where_the_model_would_feel_them(family, view_of):
    """What the search takes for the model's answer is what a hook on `mlp.out` makes of the model."""
    view, ids, at = view_of(family, torch.float64), (5, 9, 2, 7, 11), 3
    asked = Demand("f", (Row(ids, at),), (41,))
    found = optimise_values(view, 1, [asked], torch.tensor([2.0]), Descent(steps=4, lr=0.3, clamp=9.0))

    def change(_, tensor):
        tensor = tensor.clone()
        tensor[:, at] += found.change[0].to(tensor)
        return tensor

    with torch.no_grad(), view.replace([Site(1, Kind.MLP_OUT)], change, side="output"):
        said = view.model(torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1)[41]
    assert_close(found.after[0].double(), said, atol=1e-6, rtol=1e-4)
    assert float(found.after[0]) != float(found.before[0])


def test_every_editor_has_its_round_trip_here_or_in_its_own_tests(view_of):
    assert set(EDITORS) >= {"neuron-dropout", "sparse-fine-tune", "rome"}
    assert not any(refusal(EDITORS[name], view_of("gpt2")) for name in EDITORS)


# -- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "falcon", "phi3"])
def test_check_prints_the_map_and_what_can_be_done(family, tmp_path, capsys):
    model = zoo.build(family)
    model.save_pretrained(tmp_path / "model")
    assert main(["check", str(tmp_path / "model"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["row"] == "in the table" and found["heads"] == 6
    assert set(found["localizers"]) == set(LOCALIZERS) and set(found["editors"]) == set(EDITORS)
    refused = {name for name, value in found["localizers"].items() if value is not True}
    assert refused == ({"ffn-memory"} if family == "gemma2" else set())
    assert main(["check", str(tmp_path / "model")]) == 0
    text = capsys.readouterr().out
    assert "localizers that work on it" in text and "zero-out" in text
    assert ("no: post_feedforward_layernorm norms" in text) == (family == "gemma2")


def test_check_takes_paths_from_a_file(tmp_path, capsys):
    zoo.build("opt").save_pretrained(tmp_path / "model")
    (tmp_path / "hparams.yaml").write_text(
        'alg_name: "ROME"\nlayers: [1]\nrewrite_module_tmp: "model.decoder.layers.{}.fc2"\n'
        'layer_module_tmp: "model.decoder.layers.{}"\nln_f_module: "model.decoder.final_layer_norm"\n'
    )
    assert main(["check", str(tmp_path / "model"), "--paths", str(tmp_path / "hparams.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == "model.decoder.layers"
    (tmp_path / "hparams.yaml").write_text('rewrite_module_tmp: "model.decoder.layers.{}.fc3"\n')
    assert main(["check", str(tmp_path / "model"), "--paths", str(tmp_path / "hparams.yaml")]) == 2
    assert "rewrite_module_tmp names model.decoder.layers.{}.fc3, which the model has not" in capsys.readouterr().err
