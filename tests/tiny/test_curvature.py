"""Curvature factors against explicit outer products, token by token, and explicit gradients, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import zoo
from torch.testing import assert_close

from memloc.errors import InputError, MismatchError
from memloc.gradients import curvature
from memloc.gradients.curvature import Basis, Factors, corrected, curvature_factors
from memloc.gradients.curvature_bands import band_energies, band_maps, bands_of
from memloc.localizers.curvature import Curvature
from memloc.passages import Passages
from memloc.sites import Kind, Site

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)
MLP = (Kind.MLP_GATE, Kind.MLP_IN, Kind.MLP_OUT)


def reads_and_pulls(view, item, site):
    """([t, in], [t, out]): what `site` reads, and the gradient of the sum of true-token losses by a shift of its
    output; plain forwards of one passage, the last token left out."""
    ids, rows = torch.tensor([item.ids]), view.place(site).rows
    with torch.no_grad(), view.record([site]) as seen:
        view.model(ids, use_cache=False)
    width = view.module(site)(seen[site][:, :1]).shape[-1]
    shift = torch.zeros(len(item.ids), width, dtype=torch.float64).requires_grad_()
    with view.replace([site], lambda _, tensor: tensor + shift, side="output"):
        logits = view.model(ids, use_cache=False).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    (pull,) = torch.autograd.grad(loss, shift)
    pull = pull if rows is None else pull[:, rows if isinstance(rows, slice) else list(rows)]
    return seen[site][0, :-1], pull[:-1]


@every_family
def test_factors_are_the_mean_outer_products_of_tokens(family, view_of):
    """All kinds of map, fused or transposed; batches padded."""
    view, text = view_of(family, torch.float64), zoo.passages(3)
    sites = [site for site in view.sites(*view.kinds) if site.layer == 1]
    found = curvature_factors(view, text, sites, labels="true", size=2)
    assert found.count == sum(len(item.ids) - 1 for item in text)
    for site in sites:
        tokens = [reads_and_pulls(view, item, site) for item in text]
        reads, pulled = (torch.cat(part) for part in zip(*tokens, strict=True))
        read = sum(torch.outer(row, row) for row in reads) / len(reads)
        pull = sum(torch.outer(row, row) for row in pulled) / len(pulled)
        # GPT-Neo's attention is float32 in every dtype.
        assert_close(found.read.mean(site), read, atol=1e-6, rtol=1e-5)
        assert_close(found.pull.mean(site), pull, atol=1e-6, rtol=1e-5)
        basis = found.basis(site)
        assert_close(basis.read @ basis.read_energy.diag() @ basis.read.T, found.read.mean(site))
        assert_close(basis.write @ basis.write_energy.diag() @ basis.write.T, found.pull.mean(site))
        assert bool((basis.read_energy.diff() <= 0).all() and (basis.write_energy.diff() <= 0).all())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_corrected_curvatures_are_squares_of_the_gradients_coordinates(family, view_of):
    """Of every passage's whole gradient by autograd; or of every token's own g aᵀ, which is another number."""
    view, text = view_of(family, torch.float64), zoo.passages(3)
    sites = [Site(1, Kind.ATTN_V), Site(2, Kind.MLP_IN)]
    factors = curvature_factors(view, text, sites, labels="true")
    bases = {site: factors.basis(site) for site in sites}
    whole = corrected(view, text, bases, labels="true", size=2)
    single = corrected(view, text, bases, labels="true", per="token", size=2)
    for site, basis in bases.items():
        per_passage, per_token = 0, 0
        for item in text:
            ids, place = torch.tensor([item.ids]), view.place(site)
            logits = view.model(ids, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            gradient = place.read(torch.autograd.grad(loss, view.parameter(site))[0])
            per_passage = per_passage + (basis.write.T @ gradient @ basis.read).square()
            for read, pull in zip(*reads_and_pulls(view, item, site), strict=True):
                per_token = per_token + (basis.write.T @ torch.outer(pull, read) @ basis.read).square()
        assert_close(whole[site].curvature(), per_passage / factors.count)
        assert_close(single[site].curvature(), per_token / factors.count)
        assert not torch.allclose(whole[site].curvature(), basis.curvature(), rtol=0.1)


def test_sampled_labels_follow_the_model_and_a_passages_own_generator(view_of, monkeypatch):
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64).expand(20000, 4)
    shares = torch.bincount(curvature._draw(probabilities, [0, [1]]), minlength=4) / 20000
    assert_close(shares, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.015, rtol=0)
    assert shares[1] == 0
    view, text = view_of("gpt2", torch.float64), zoo.passages(4)
    sites = view.sites(Kind.MLP_IN)
    together = curvature_factors(view, text, sites, size=4)
    apart = curvature_factors(view, text[::-1], sites, size=1)
    other = curvature_factors(view, text, sites, seed=1)
    for site in sites:
        assert_close(together.pull.mean(site), apart.pull.mean(site))
        assert not torch.allclose(together.pull.mean(site), other.pull.mean(site), rtol=1e-2)
        assert_close(together.read.mean(site), other.read.mean(site))


def test_factors_of_parts_of_a_text_merge_and_survive_the_disk(view_of, tmp_path):
    view, text = view_of("llama", torch.float64), zoo.passages(4)
    sites = view.sites(Kind.MLP_OUT)
    whole = curvature_factors(view, text, sites)
    merged = curvature_factors(view, text[:1], sites).merge(curvature_factors(view, text[1:], sites))
    merged.save(tmp_path / "curvature.safetensors")
    loaded = Factors.load(tmp_path / "curvature.safetensors")
    assert loaded.count == whole.count and loaded.sites == whole.sites
    assert loaded.provenance.to_json() == merged.provenance.to_json()
    for site in sites:
        assert_close(loaded.read.mean(site), whole.read.mean(site))
        assert_close(loaded.pull.mean(site), whole.pull.mean(site))
    with pytest.raises(MismatchError, match="other labels or another seed"):
        whole.merge(curvature_factors(view, zoo.passages(2, seed=5), sites, labels="true"))
    with pytest.raises(MismatchError, match="its tokens would count twice"):
        whole.merge(whole)


def drawn_basis(outputs=5, inputs=7):
    generator = torch.Generator().manual_seed(0)
    square = {size: torch.randn(size, size, dtype=torch.float64, generator=generator) for size in (inputs, outputs)}
    energy = {size: torch.rand(size, dtype=torch.float64, generator=generator) for size in (inputs, outputs)}
    read, write = (torch.linalg.qr(square[size]).Q for size in (inputs, outputs))
    falling = [energy[size].sort(descending=True).values for size in (inputs, outputs)]
    return Basis(read, write, *falling)


def test_the_steep_pairs_are_the_fewest_that_hold_the_mass():
    basis = drawn_basis()
    found = torch.outer(basis.write_energy, basis.read_energy)
    for mass in (0.3, 0.6, 0.95):
        mask = basis.steep(mass)
        assert float(found[mask].min()) >= float(found[~mask].max())
        assert float(found[mask].sum()) >= mass * float(found.sum()) > float(found[mask].sum() - found[mask].min())
    assert not basis.steep(0.0).any() and basis.steep(1.0).all()
    with pytest.raises(InputError, match=r"mass 1\.2: expected between 0 and 1"):
        basis.steep(1.2)
    weight = torch.arange(35, dtype=torch.float64).view(5, 7)
    assert_close(basis.weight(basis.coordinates(weight)), weight)
    kept = basis.weight(basis.coordinates(weight) * basis.steep(0.6))
    assert_close(basis.flat_part(weight, 0.6), weight - kept)
    # Ranked by corrected curvatures where there are any.
    turned = dataclasses.replace(basis, corrected=found.flip(0, 1))
    assert torch.equal(turned.steep(0.6), basis.steep(0.6).flip(0, 1))


@every_family
def test_bands_sum_to_the_whole(family, view_of):
    """Every rank in one band; energies of what is read to ‖a‖²; what the parts write to W a."""
    for ranks in (4, 7, 20, 37):
        assert [rank for band in bands_of(ranks) for rank in range(ranks)[band]] == list(range(ranks))
    view, passages, text = view_of(family, torch.float64), zoo.passages(2), zoo.passages(3, seed=9)
    sites = [Site(1, Kind.ATTN_V), Site(1, Kind.MLP_OUT)]
    factors = curvature_factors(view, text, sites)
    bases = {site: factors.basis(site) for site in sites}
    for positions in ("predicting", "all"):
        found = band_energies(view, passages, bases, positions=positions, size=2)
        for index, item in enumerate(passages):
            first = len(item.prefix) - 1 if positions == "predicting" else 0
            for site in sites:
                read = reads_and_pulls(view, item, site)[0][first:]
                assert_close(found[site][index].sum(), read.square().sum(1).mean(), atol=1e-6, rtol=1e-5)
                low = read @ bases[site].read[:, round(0.5 * read.shape[1]) :]
                assert_close(found[site][index, -1], low.square().sum(1).mean(), atol=1e-6, rtol=1e-5)
    for site in sites:
        maps = band_maps(view, site, bases[site], "output")
        read = reads_and_pulls(view, passages[0], site)[0]
        made = sum(read @ part for part in maps) @ bases[site].write.T
        assert_close(made, read @ view.weight(site).detach().T)


def test_text_like_the_reference_scores_nothing_and_other_text_does(view_of):
    """Every fifth passage of the contrast set is the reference: given as passages, their mean score is 0."""
    view, text = view_of("gpt2", torch.float64), zoo.passages(10, seed=9)
    same = Passages(tuple(text[row] for row in (4, 9)), "reference")
    found = Curvature(positions="all")(view, same, contrast=text)
    assert found.notes["reference"] == 2 and found.notes["text"] == 8
    for site, scores in found.scores.items():
        assert_close(scores.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
        assert_close(found.notes["bands"][str(site)]["top 10%"], 1.0)
    few = Curvature(positions="all", limit=5)(view, same, contrast=text)
    assert few.notes["reference"] == 1 and few.notes["text"] == 4
    other = Curvature(positions="all")(view, zoo.passages(3), contrast=text)
    assert max(float(scores.mean().abs()) for scores in other.scores.values()) > 0.01


def test_neurons_are_columns_of_the_weights(view_of):
    """Column norms of the weight scores, where one passage makes both."""
    view, passages, text = view_of("qwen2", torch.float64), zoo.passages(1), zoo.passages(3, seed=9)
    weights = Curvature(grain="weight", correction=True)(view, passages, contrast=text)
    neurons = Curvature(grain="neuron", correction=True)(view, passages, contrast=text)
    for site in view.sites(Kind.MLP_OUT):
        assert_close(neurons.scores[site][0], weights.scores[site].norm(dim=0), atol=1e-6, rtol=1e-5)


def test_what_cannot_be_used_is_refused(view_of):
    view, passages = view_of("gpt2"), zoo.passages(2)
    for contrast in (None, zoo.passages(1)):
        with pytest.raises(InputError, match="passages of ordinary text, limit 2000; give two or more"):
            Curvature()(view, passages, contrast=contrast)
    with pytest.raises(InputError, match="a neuron has none to choose from"):
        Curvature(grain="neuron", kinds="mlp.out")(view, passages, contrast=zoo.passages(2))
    with pytest.raises(InputError, match="curvature of 0 sites over 2 passages"):
        curvature_factors(view, passages, [])
    assert set(Curvature()(view_of("llama"), passages, contrast=zoo.passages(2, seed=9)).scores) == set(
        view_of("llama").sites(*MLP)
    )
