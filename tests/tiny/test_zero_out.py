"""Zero-out: exact against weights set to 0 and whole forwards; the shortlist against all; what it falls back to."""

from __future__ import annotations

import pytest
import torch
import zoo
from slow_gates import slow_nll, slow_zero_out, without
from torch import nn
from torch.testing import assert_close

from memloc.ablations.gates import gate_gradients, gate_sites
from memloc.ablations.variants import Variants
from memloc.errors import InputError
from memloc.localizers import zero_out
from memloc.localizers.zero_out import ZeroOut
from memloc.sites import Kind, Site
from memloc.view import ModelView

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)


@every_family
def test_silencing_a_neuron_costs_what_a_model_without_it_costs(family, view_of):
    """float64; RMSNorm computes in float32 in every dtype, which is where its families' last digits go."""
    view, item = view_of(family, torch.float64), zoo.passages(2)[1:]
    assert Variants.of(view, item[0]).norm is not None
    found, units = ZeroOut()(view, item), range(0, view.neurons, 5)
    rounding = 1e-8 if type(view._module(view.row.final_norm)) is nn.LayerNorm else 5e-7
    for site, scores in found.scores.items():
        expected = slow_zero_out(view, item[0], site, units)
        assert float(expected.abs().max()) > 1e-3
        assert_close(scores[0, ::5].double(), expected, atol=rounding, rtol=1e-6)


@every_family
def test_silencing_a_head_costs_what_a_model_without_it_costs(family, view_of):
    view, item = view_of(family, torch.float64), zoo.passages(2)[1:]
    for site, scores in ZeroOut(grain="head")(view, item).scores.items():
        expected = slow_zero_out(view, item[0], site, range(view.heads))
        assert float(expected.abs().max()) > 1e-3
        assert_close(scores[0].double(), expected, atol=5e-7, rtol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "mistral"])
def test_a_prefix_of_one_token_leaves_nothing_to_cut(family, view_of):
    view, item = view_of(family, torch.float64), zoo.passages(1, prefix=1, suffix=6)
    assert Variants.of(view, item[0]).cut == 0
    for site, scores in ZeroOut()(view, item).scores.items():
        assert_close(scores[0, ::9].double(), slow_zero_out(view, item[0], site, range(0, view.neurons, 9)), atol=5e-7,
                     rtol=1e-6)  # fmt: skip


def test_a_model_of_one_layer_is_all_last_layer():
    view = ModelView.open(zoo.build("gpt2", n_layer=1, dtype=torch.float64))
    item = zoo.passages(1)
    ((site, scores),) = ZeroOut()(view, item).scores.items()
    assert_close(scores[0].double(), slow_zero_out(view, item[0], site, range(view.neurons)), atol=1e-8, rtol=1e-6)


class Bent(nn.Module):
    """A norm of no known form."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, hidden):
        return self.norm(hidden) + 0.3 * torch.tanh(hidden)


def test_a_final_norm_of_another_form_is_run_instead(view_of):
    model = zoo.build("gpt2", dtype=torch.float64)
    model.transformer.ln_f = Bent(model.transformer.ln_f)
    view, item = ModelView.open(model), zoo.passages(1)
    assert Variants.of(view, item[0]).norm is None
    assert Variants.of(view_of("gpt2"), item[0]).norm is not None
    site, units = Site(2, Kind.MLP_OUT), range(0, view.neurons, 4)
    scores = ZeroOut()(view, item).scores[site][0, ::4]
    assert_close(scores.double(), slow_zero_out(view, item[0], site, units), atol=1e-8, rtol=1e-6)


def test_memory_chunks_do_not_change_scores(view_of, monkeypatch):
    view, passages = view_of("gpt2", torch.float64), zoo.passages(2)
    whole = ZeroOut()(view, passages)
    for rows in (1, 5):
        monkeypatch.setattr(zero_out, "variant_bytes", lambda *_, rows=rows: 2**20 // rows)
        parts = ZeroOut(memory_mb=1)(view, passages)
        for site in whole.scores:
            assert_close(parts.scores[site], whole.scores[site], atol=1e-7, rtol=1e-5)


# -- the shortlist -----------------------------------------------------------------------------------------------


def test_a_shortlist_is_exact_where_it_looked_and_the_estimate_elsewhere(view_of):
    view, passages = view_of("qwen2", torch.float64), zoo.passages(3)
    exact, short = ZeroOut()(view, passages), ZeroOut(mode="shortlist", verify=20, audit=10)(view, passages)
    for row, name in enumerate(passages.ids):
        batch = next(view.batches(passages[row : row + 1]))
        estimate = -gate_gradients(view, batch)[0].flatten().float()
        mine, truth = (torch.cat(list(entry.of(name).scores.values())) for entry in (short, exact))
        listed = estimate.argsort(descending=True)[:20]
        assert_close(mine[listed], truth[listed], atol=1e-7, rtol=1e-5)
        looked = (mine - truth).abs() < 1e-7
        assert 30 <= int(looked.sum()) < 60
        assert_close(mine[~looked], estimate[~looked], atol=1e-7, rtol=1e-5)


def test_the_audit_bounds_what_the_shortlist_missed(view_of):
    """All intervals hold the truth, which the exact scores tell; a worse shortlist is seen to be worse."""
    view, passages = view_of("gpt_neox"), zoo.passages(4)
    exact = ZeroOut()(view, passages)
    told = {verify: ZeroOut(mode="shortlist", verify=verify, audit=40)(view, passages).notes for verify in (3, 40)}
    for verify, notes in told.items():
        reached, missed, whole = 0, 0.0, 0.0
        for row, name in enumerate(passages.ids):
            estimate = -gate_gradients(view, next(view.batches(passages[row : row + 1])))[0].flatten()
            truth = torch.cat(list(exact.of(name).scores.values()))
            order = estimate.argsort(descending=True)
            best, rest = truth[order[:verify]], truth[order[verify:]]
            bar = best.sort(descending=True).values[-(-verify // 10) - 1]
            reached += int((rest >= bar).sum())
            missed += float(rest.clamp_min(0).sum())
            whole += float(truth.clamp_min(0).sum())
        units = len(passages) * (view.layers * view.neurons - verify)
        low, high = notes["missed_share_interval"]
        assert low <= reached / units <= high
        low, high = notes["missed_mass_interval"]
        assert low <= missed / whole <= high
    assert told[3]["missed_mass"] > told[40]["missed_mass"] > 0


def test_a_shortlist_of_all_is_exact_and_has_nothing_to_audit(view_of):
    view, passages = view_of("gpt2"), zoo.passages(2)
    found = ZeroOut(mode="shortlist", verify=10_000)(view, passages)
    for site, scores in ZeroOut()(view, passages).scores.items():
        assert_close(found.scores[site], scores, atol=2e-6, rtol=1e-4)
    assert found.notes == {}


def test_the_audit_draws_by_seed_and_passage(view_of):
    view, passages = view_of("gpt2"), zoo.passages(2)
    scores = [
        ZeroOut(mode="shortlist", verify=5, audit=5, seed=seed)(view, passages).scores[gate_sites(view, "neuron")[0]]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


def test_settings_of_no_use_are_refused():
    with pytest.raises(InputError, match="audit 1; expected at least 1, 1 and 2"):
        ZeroOut(audit=1)


def test_the_slow_reference_does_silence(view_of):
    """A reference that changes nothing would agree with a method that does nothing."""
    view, item = view_of("gpt2", torch.float64), zoo.passages(1)[0]
    site = Site(0, Kind.MLP_OUT)
    assert slow_nll(without(view, site, [3]), item) != slow_nll(view, item) == slow_nll(without(view, site, []), item)
