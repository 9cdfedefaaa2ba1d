"""Patching, attribution patching and causal tracing against whole forwards, one place at a time, in float64."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
import torch
import zoo
from torch import nn
from torch.testing import assert_close

from memloc.errors import InputError
from memloc.localizers.activation_patching import ActivationPatching
from memloc.localizers.attribution_patching import AttributionPatching
from memloc.localizers.causal_trace import CausalTrace
from memloc.parts import in_parts
from memloc.passages import Passage, Passages
from memloc.patching.corruption import EMBED, Corruption
from memloc.patching.first_order import FirstOrder
from memloc.patching.places import READS, Places
from memloc.patching.spot_check import Audit
from memloc.patching.sweep import Sweep
from memloc.sites import Kind, Site
from memloc.view import ModelView

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)


# -- the slow way: whole forwards, the suffix's last token included, one row at a time ----------------------------


class Slow:
    """One passage and one corrupted row of it, by hand."""

    def __init__(self, view, passage, corrupted, draw=0, metric="nll"):
        self.view, self.passage, self.metric = view, passage, metric
        self.clean = torch.tensor([passage.ids])
        self.other = corrupted.ids[draw : draw + 1]
        self.noise = None if corrupted.noise is None else corrupted.noise[draw]
        logits = view.model(self.clean, use_cache=False).logits[0].detach().clone()
        logits[torch.arange(len(passage.ids) - 1), self.clean[0, 1:]] = -math.inf
        self.rival = logits.argmax(-1)

    def loss(self, corrupted, *contexts):
        with contextlib.ExitStack() as stack:
            if corrupted and self.noise is not None:
                stack.enter_context(self.view.replace([EMBED], lambda _, x: x + self.noise, side="output"))
            for context in contexts:
                stack.enter_context(context)
            logits = self.view.model(self.other if corrupted else self.clean, use_cache=False).logits[0]
        each = []
        for at in range(len(self.passage.prefix), len(self.passage.ids)):
            row, gold = logits[at - 1], self.passage.ids[at]
            each.append({
                "nll": -row.log_softmax(0)[gold],
                "probability": -row.softmax(0)[gold],
                "logit": -row[gold],
                "logit-difference": row[self.rival[at - 1]] - row[gold],
            }[self.metric])  # fmt: skip
        return torch.stack(each).mean()

    def values(self, corrupted, sites, side):
        with torch.no_grad(), self.view.record(sites, side=side) as seen:
            self.loss(corrupted)
        return {site: tensor.clone() for site, tensor in seen.items()}

    def blocks(self, corrupted):
        with torch.no_grad(), self.view.record_blocks(range(self.view.layers)) as seen:
            self.loss(corrupted)
        return seen

    @torch.no_grad()
    def effect(self, direction, context):
        if direction == "noise":
            return float(self.loss(False, context) - self.loss(False))
        return float(self.loss(True) - self.loss(True, context))


def part(view, grain, site, unit, tensor):
    """True where unit `unit` of a site is, [t, width]."""
    mask = torch.zeros(tensor.shape[1:], dtype=torch.bool)
    if grain == "neuron":
        mask[:, unit] = True
    elif grain == "head":
        mask[:, unit * view.head_width : (unit + 1) * view.head_width] = True
    elif grain == "position":
        mask[unit] = True
    else:
        mask[:] = True
    return mask


def slow_effect(slow, places, site, unit, direction):
    view, grain, giver = slow.view, places.grain, direction == "denoise"
    if places.after_blocks:
        values = slow.blocks(not giver)[site.layer]
        mask = part(view, grain, site, unit, values)
        return slow.effect(direction, view.replace_blocks([site.layer], lambda _, x: torch.where(mask, values, x)))
    sites = {"layer": [Site(site.layer, Kind.ATTN_OUT), site]}.get(grain, [site])
    if places.window == 2:
        sites = [Site(layer, site.kind) for layer in range(site.layer, min(site.layer + 2, view.layers))]
    side = "input" if grain in ("neuron", "head") else "output"
    values = slow.values(not giver, sites, side)
    mask = {each: part(view, grain, each, unit, values[each]) for each in sites}
    return slow.effect(direction, view.replace(sites, lambda s, x: torch.where(mask[s], values[s], x), side=side))


CASES = [
    ("component", "block", "perturbed", "denoise", "nll"),
    ("head", "block", "resample", "noise", "logit-difference"),
    ("neuron", "block", "noise", "denoise", "logit"),
    ("layer", "block", "noise", "noise", "probability"),
    ("position", "block", "perturbed", "noise", "nll"),
    ("position", "attn", "resample", "denoise", "nll"),
]


@every_family
def test_exact_patching_is_what_whole_forwards_say(family, view_of):
    view, passages = view_of(family, torch.float64), zoo.passages(2)
    contrast = zoo.passages(2, prefix=14, seed=9)
    for grain, stream, how, direction, metric in CASES:
        places = Places(view, grain, stream)
        sweep = Sweep(Corruption(how, noise=1.0, draws=2), direction, metric, rows=5)
        given = sweep.corruption.of(view, passages, contrast)
        found = sweep(view, places, passages, contrast)
        item, corrupted = passages[1], given[1]
        rows = [Slow(view, item, corrupted, draw, metric) for draw in range(len(corrupted.ids))]
        largest = 0.0
        for site in (places.scored[0], places.scored[-1]):
            scores = found.scores[site][1].reshape(-1)
            units = {"neuron": [0, 7, 36], "position": [0, 5, 9, 13]}.get(grain, range(len(scores)))
            for unit in units:
                each = [slow_effect(slow, places, site, unit, direction) for slow in rows]
                assert_close(float(scores[unit]), sum(each) / len(each), atol=1e-8, rtol=1e-7)
                largest = max(largest, abs(float(scores[unit])))
        assert largest > 1e-4, (grain, how)


@every_family
@pytest.mark.parametrize("node", ["query", "key", "value"])
def test_heads_patched_through_what_they_read_recompute_their_softmax(family, node, view_of):
    """One head's rows of the map's output exchanged in a whole forward; shared keys and values: all heads together."""
    view, item = view_of(family, torch.float64), zoo.passages(1)[0]
    sweep = Sweep(Corruption("perturbed"), "noise")
    places = Places(view, "head", node=node)
    ((_, _, pair),) = sweep.pairs(view, places, Passages((item,)), None)
    slow = Slow(view, item, sweep.corruption.of(view, Passages((item,)), None)[0])
    grouped = node != "query" and view.kv_heads < view.heads
    for layer in range(view.layers):
        site, out = Site(layer, READS[node]), Site(layer, Kind.ATTN_OUT)
        rows = view.place(site).rows
        width = view.weight(site).shape[0]
        own = (
            torch.arange(width)
            if rows is None
            else torch.arange(10**4)[rows if isinstance(rows, slice) else list(rows)]
        )
        values = slow.values(True, [site], "output")[site]
        for head in range(1 if grouped else view.heads):
            mine = own if grouped else own[head * view.head_width : (head + 1) * view.head_width]
            mask = torch.zeros(values.shape[-1], dtype=torch.bool)
            mask[mine] = True
            context = view.replace([site], lambda _, x, m=mask, v=values: torch.where(m, v, x), side="output")
            heads = range(view.heads) if grouped else [head]
            found = pair.patched(pair.union([(out, each) for each in heads]))
            assert_close(float(found[0]), slow.effect("noise", context), atol=1e-8, rtol=1e-7)


def slow_slope(slow, places, site, unit, direction, step):
    """Central difference along the patch."""
    view, sites = slow.view, places.members(site)
    side = "input" if places.grain in ("neuron", "head") else "output"
    if places.after_blocks:
        clean, other = ({site: slow.blocks(which)[site.layer]} for which in (False, True))
    else:
        clean, other = (slow.values(which, sites, side) for which in (False, True))

    def moved(step):
        def change(at, tensor):
            at = site if isinstance(at, int) else at
            return tensor + step * (other[at] - clean[at]) * part(view, places.grain, at, unit, tensor)

        if places.after_blocks:
            return view.replace_blocks([site.layer], change)
        return view.replace(sites, change, side=side)

    with torch.no_grad():
        ends = [float(slow.loss(direction == "denoise", moved(way * step))) for way in (1, -1)]
    return (ends[0] - ends[1]) / (2 * step)


@every_family
def test_attribution_is_the_slope_along_the_patch(family, view_of):
    """By central differences of whole forwards: no gradient is asked for.

    GPT-Neo's attention and Llama's norms are float32 in every dtype, which is what their differences are good to.
    """
    step, gap = (1e-4, 1e-6) if family in ("gpt2", "gpt_neox") else (1e-3, 2e-3)
    view, passages = view_of(family, torch.float64), zoo.passages(2)
    contrast = zoo.passages(2, prefix=14, seed=9)
    for grain, stream, how, direction, metric in CASES:
        places = Places(view, grain, stream)
        sweep = Sweep(Corruption(how, noise=0.5, draws=1), direction, metric)
        given = sweep.corruption.of(view, passages, contrast)
        with view.frozen():
            batch = next(view.batches(passages))
            found = FirstOrder(sweep)(view, places, batch, given)
        row, site = batch.rows.index(0), places.scored[0]
        slow = Slow(view, passages[0], given[0], 0, metric)
        units = {"neuron": [0, 7], "position": [given[0].first, len(passages[0].ids) - 2]}.get(grain, [0])
        for unit in units:
            slope = slow_slope(slow, places, site, unit, direction, step)
            assert_close(float(found[site][row].reshape(-1)[unit]), slope, atol=gap, rtol=gap)


@every_family
def test_attribution_equals_patching_where_the_loss_is_linear(family, view_of):
    """No final norm, a logit: the last layer's neurons and residual stream are linear in it; the first layer's not."""
    model = zoo.build(family, dtype=torch.float64)
    path, _, name = ModelView.open(model).row.final_norm.rpartition(".")
    setattr(model.get_submodule(path), name, nn.Identity())
    view, passages = ModelView.open(model), zoo.passages(2)
    for places in (Places(view, "neuron"), Places(view, "position"), Places(view, "position", "mlp")):
        for how, direction in (("zero", "noise"), ("perturbed", "noise"), ("noise", "denoise")):
            if how == "zero" and places.after_blocks:
                continue
            sweep = Sweep(Corruption(how, draws=2), direction, "logit")
            exact = sweep(view, places, passages, None).scores
            with view.frozen():
                batch = next(view.batches(passages))
                given = sweep.corruption.of(view, passages, None) or sweep.constants(view, places, None)
                line = FirstOrder(sweep)(view, places, batch, given)
            first, *_, last = places.scored
            assert float(exact[last].abs().max()) > 1e-3
            for row, index in enumerate(batch.rows):
                width = exact[last].shape[1]
                assert_close(line[last][row, :width], exact[last][index], atol=1e-8, rtol=1e-8)
            apart = [(line[first][row, : exact[first].shape[1]] - exact[first][index]).abs().max()
                     for row, index in enumerate(batch.rows)]  # fmt: skip
            assert max(apart) > 1e-3, "the first layer is not linear, so a check that passes there checks nothing"


@every_family
def test_dropped_gradients_skip_one_layers_contribution_each(family, view_of):
    """The slow way detaches: one forward and one backward a layer."""
    view, item = view_of(family, torch.float64), zoo.passages(1)[0]
    found = AttributionPatching(graddrop=True)(view, Passages((item,))).scores
    sites = view.sites(Kind.MLP_OUT)
    total = {site: torch.zeros(view.neurons, dtype=torch.float64) for site in sites}
    for skipped in range(view.layers):
        both = [Site(skipped, Kind.ATTN_OUT), Site(skipped, Kind.MLP_OUT)]
        leaves = {}

        def leaf(site, tensor, leaves=leaves):
            leaves[site] = tensor + torch.zeros_like(tensor).requires_grad_()
            return leaves[site]

        slow = Slow(view, item, Corruption("perturbed").of(view, Passages((item,)), None)[0])
        with view.replace(sites, leaf), view.replace(both, lambda _, x: x.detach(), side="output"):
            loss = slow.loss(False)
        slopes = torch.autograd.grad(loss, [leaves[site] for site in sites], allow_unused=True)
        for site, slope in zip(sites, slopes, strict=True):
            if slope is not None:
                total[site] += (-leaves[site].detach() * slope).sum((0, 1)).abs() / (view.layers - 1)
    for site in sites:
        assert float(total[site].max()) > 0
        assert_close(found[site][0].double(), total[site], atol=1e-7, rtol=1e-5)


# -- verification and audit ---------------------------------------------------------------------------------------


def test_verified_scores_are_exact_and_the_others_estimates(view_of):
    view, passages = view_of("llama", torch.float64), zoo.passages(2)
    plain = AttributionPatching()(view, passages)
    exact = ActivationPatching(grain="neuron", corrupt="zero", direction="noise")(view, passages)
    found = AttributionPatching(verify=5)(view, passages)
    for row, name in enumerate(passages.ids):
        line, mixed, true = (torch.cat([*entry.of(name).scores.values()]) for entry in (plain, found, exact))
        best = line.argsort(descending=True)[:5]
        others = torch.ones(len(line), dtype=torch.bool)
        others[best] = False
        assert_close(mixed[best], true[best], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(mixed[best], line[best], atol=1e-4)
        assert torch.equal(mixed[others], line[others])
        expected = torch.corrcoef(torch.stack([line[best], true[best]]).double())[0, 1]
        assert_close(found.notes["verified_correlation"][row], float(expected), atol=1e-4, rtol=1e-3)
        assert_close(found.notes["verified_exact"][row], float(true[best].sum()), atol=1e-5, rtol=1e-5)


def test_an_audit_of_all_others_counts_the_missed_mass_itself(view_of):
    view, passages = view_of("qwen3", torch.float64), zoo.passages(2)
    exact = ActivationPatching(grain="head", corrupt="zero", direction="noise")(view, passages)
    plain = AttributionPatching(grain="head")(view, passages)
    audit = Audit.of(AttributionPatching(grain="head", verify=2, audit=100)(view, passages).notes)
    missed, found, hits, places = 0.0, 0.0, 0, 0
    for name in passages.ids:
        line, true = (torch.cat([*entry.of(name).scores.values()]) for entry in (plain, exact))
        best, rest = line.argsort(descending=True).split([2, len(line) - 2])
        missed += float(true[rest].clamp_min(0).sum()) / 2
        found += float(true[best].clamp_min(0).sum()) / 2
        hits += int((true[rest] > true[best].min()).sum())
        places += len(rest)
    assert (audit.places, audit.hits) == (places, hits)
    assert_close(audit.missed, missed, atol=1e-5, rtol=1e-5)
    assert_close(audit.found, found, atol=1e-5, rtol=1e-5)
    assert audit.interval[0] <= audit.missed <= audit.interval[1]
    assert audit.share[0] <= hits / places <= audit.share[1]


def test_an_audit_by_hand():
    """Ten others, four looked at: 0.6 is above the least verified effect; the positive ones stand for 2.5 each."""
    notes = {"verified_least": [0.5], "verified_found": [2.0], "audit_others": [10],
             "audit_estimate": [[0.5, 0.1, 0.0, 0.4]], "audit_exact": [[0.6, 0.1, -0.2, 0.4]]}  # fmt: skip
    audit = Audit.of(notes)
    assert (audit.places, audit.hits, audit.found) == (4, 1, 2.0)
    assert_close(audit.missed, 2.75)
    assert_close(audit.error, 0.075)
    assert 0 < audit.share[0] < 0.25 < audit.share[1] < 1


def test_an_audit_is_the_same_in_parts(view_of, tmp_path):
    view, passages = view_of("gpt2"), zoo.passages(3)
    method = AttributionPatching(grain="head", verify=2, audit=3)
    whole = Audit.of(method(view, passages).notes)
    parts = Audit.of(in_parts(method, view, passages, tmp_path, size=2).notes)
    assert whole.places == 9
    for one, other in zip(dataclasses.astuple(whole), dataclasses.astuple(parts), strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="these notes hold no audit"):
        Audit.of(AttributionPatching(verify=2)(view, passages).notes)


def test_patching_all_places_together_is_told_beside_the_sum(view_of):
    """All heads at 0 at once, by a whole forward."""
    view, item = view_of("mistral", torch.float64), zoo.passages(1)[0]
    notes = AttributionPatching(grain="head", verify=2)(view, Passages((item,))).notes
    slow = Slow(view, item, Corruption("perturbed").of(view, Passages((item,)), None)[0])
    silent = view.replace(view.sites(Kind.ATTN_OUT), lambda _, x: torch.zeros_like(x))
    assert_close(notes["joint_all"][0], slow.effect("noise", silent), atol=1e-8, rtol=1e-7)
    assert len({round(notes[f"joint_{name}"][0], 6) for name in ("all", "rest", "verified")}) == 3


# -- causal tracing -----------------------------------------------------------------------------------------------


def facts():
    items = [dataclasses.replace(item, tags={"subject": [2, 5]}) for item in zoo.passages(2, prefix=7, suffix=1)]
    return Passages(tuple(items))


@every_family
@pytest.mark.parametrize(("stream", "window"), [("block", 1), ("mlp", 1), ("attn", 2)])
def test_a_trace_is_what_whole_forwards_say(family, stream, window, view_of):
    view, passages = view_of(family, torch.float64), facts()
    found = CausalTrace(stream=stream, window=window, draws=2, seed=4)(view, passages)
    places = Places(view, "position", stream, window)
    item = passages[1]
    corrupted = Corruption("noise", draws=2, seed=4).of(view, passages, None)[1]
    rows = [Slow(view, item, corrupted, draw, "probability") for draw in range(2)]
    for site, scores in found.scores.items():
        for at in range(len(item.ids)):
            expected = sum(slow_effect(slow, places, site, at, "denoise") for slow in rows) / 2
            assert_close(float(scores[1, at]), expected, atol=1e-7, rtol=1e-5)
        assert not scores[1, :2].any() and not scores[1, len(item.ids) - 1 :].any()
        assert scores[1, 2:].any()
    with torch.no_grad():
        assert_close(found.notes["clean"][1], -float(rows[0].loss(False)))
        assert_close(found.notes["corrupted"][1], -sum(float(row.loss(True)) for row in rows) / 2)


def test_restoring_the_last_layer_where_the_answer_is_read_brings_all_of_it_back(view_of):
    """Of one suffix token: the residual stream after the last block, at the last prefix token, is all there is."""
    view, passages = view_of("qwen3", torch.float64), facts()
    found = CausalTrace(stream="block", draws=3)(view, passages)
    last = found.scores[Site(view.layers - 1, Kind.MLP_OUT)]
    item = passages[0]
    total = found.notes["clean"][0] - found.notes["corrupted"][0]
    assert_close(float(last[0, len(item.prefix) - 1]), total, atol=1e-6, rtol=1e-4)
    assert_close(last[0, : len(item.prefix) - 1], torch.zeros(len(item.prefix) - 1), atol=1e-12, rtol=0)


# -- corruptions --------------------------------------------------------------------------------------------------


def test_noise_is_on_the_subject_or_on_the_whole_prefix_and_its_own_in_any_company(view_of):
    view = view_of("gpt2")
    passages = facts() + Passages((Passage("bare", (1, 2, 3), (4, 5)),))
    one, two, bare = Corruption("noise", draws=3, noise=2.0).of(view, passages, None)
    assert one.noise.any(-1).any(0).nonzero()[:, 0].tolist() == [2, 3, 4] and one.first == 2
    assert bare.noise.any(-1).any(0).nonzero()[:, 0].tolist() == [0, 1, 2]
    alone = Corruption("noise", draws=3, noise=2.0).of(view, passages[1:2], None)[0]
    assert torch.equal(alone.noise, two.noise)
    many = Corruption("noise", draws=2000, noise=2.0).of(view, passages[2:], None)[0].noise[:, :3]
    assert_close(float(many.std()), 2 * float(view.weight(EMBED).detach().double().std()), rtol=0.02, atol=0)


def test_rare_tokens_are_those_the_contrast_seldom_says(view_of):
    item = Passage("a", (3, 4, 5, 3, 4, 5, 6, 7), (1,))
    contrast = Passages((Passage("c", (3, 4, 5, 3, 4, 5, 7), (7,)),))
    found = Corruption("rare").of(view_of("gpt2"), Passages((item,)), contrast)[0]
    assert found.noise.any(-1).any(0).nonzero()[:, 0].tolist() == [0, 6]


def test_another_prefix_is_as_long_as_the_passages_own(view_of):
    view, passages = view_of("gpt2"), zoo.passages(2)
    others = zoo.passages(3, prefix=20, seed=9, ragged=False)
    for item, found in zip(passages, Corruption("resample", draws=2).of(view, passages, others), strict=True):
        assert found.ids.shape == (2, len(item.ids))
        assert all(tuple(row[len(item.prefix) :]) == item.suffix for row in found.ids.tolist())
        starts = {other.ids[: len(item.prefix)] for other in others}
        assert {tuple(row[: len(item.prefix)]) for row in found.ids.tolist()} <= starts
    short = Passages((Passage("s", (1, 2), (3,)),))
    with pytest.raises(InputError, match=r"passage 'p0': a prefix of 9 tokens, and no contrast passage is another"):
        Corruption("resample").of(view, passages, short)


def test_a_place_at_its_mean_is_its_mean_over_the_contrast(view_of):
    view, passages, contrast = view_of("gpt_neox", torch.float64), zoo.passages(1), zoo.passages(3, seed=9)
    found = AttributionPatching(corrupt="mean", grain="component")(view, passages, contrast=contrast)
    exact = ActivationPatching(corrupt="mean", direction="noise")(view, passages, contrast=contrast)
    slow = Slow(view, passages[0], Corruption("perturbed").of(view, passages, None)[0])
    for site in view.sites(Kind.ATTN_OUT, Kind.MLP_OUT):
        rows = []
        for item in contrast:
            with torch.no_grad(), view.record([site], side="output") as seen:
                view.model(torch.tensor([item.ids]), use_cache=False)
            rows.append(seen[site][0])
        mean = torch.cat(rows).mean(0)
        context = view.replace([site], lambda _, x, mean=mean: mean.expand_as(x), side="output")
        assert_close(float(exact.scores[site][0]), slow.effect("noise", context), atol=1e-6, rtol=1e-5)
    assert set(found.scores) == set(exact.scores)
    assert found.provenance.inputs["contrast"] == contrast.digest


def test_what_cannot_be_patched_is_refused(view_of):
    view, passages = view_of("gpt2"), zoo.passages(1)
    with pytest.raises(InputError, match="corrupt='zero' is no run that could be restored; take direction=noise"):
        ActivationPatching(corrupt="zero")
    with pytest.raises(InputError, match="node='query': only heads"):
        AttributionPatching(node="query")
    with pytest.raises(InputError, match="verify 0, audit 3"):
        AttributionPatching(audit=3)
    with pytest.raises(InputError, match="window 3: expected 1"):
        CausalTrace(stream="block", window=3)
    with pytest.raises(InputError, match="batch_size, draws and alternatives"):
        CausalTrace(draws=0)
    for how in ("mean", "resample", "rare"):
        with pytest.raises(InputError, match=f"corrupt='{how}' needs a contrast set"):
            AttributionPatching(corrupt=how)(view, passages)
    wrong = Passages((dataclasses.replace(passages[0], tags={"subject": [3, 99]}),))
    with pytest.raises(InputError, match=r"passage 'p0': subject \[3, 99\) outside its prefix of 9"):
        CausalTrace()(view, wrong)
