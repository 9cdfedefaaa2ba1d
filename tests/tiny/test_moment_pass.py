"""One pass for all sites: what is drawn, what is summed, what is kept, what is picked up again."""

from __future__ import annotations

import json

import pytest
import torch
import zoo

from memloc import moments as sums
from memloc import progress
from memloc.errors import InputError, MismatchError
from memloc.moment_pass import MomentPass, draw
from memloc.moments import Moments, second_moments
from memloc.passages import Passage, Passages
from memloc.sites import Kind, Site
from memloc.view import ModelView


def rows(count, seed=0, low=2, high=19, origin="t"):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    ids = [torch.randint(1, zoo.VOCAB, (length,), generator=generator).tolist() for length in lengths]
    items = (Passage(f"{origin}{index}", tuple(row[:1]), tuple(row[1:])) for index, row in enumerate(ids))
    return Passages(tuple(items))


@pytest.fixture
def view():
    return ModelView.open(zoo.build("gpt2", dtype=torch.float64))


@pytest.fixture
def text():
    return rows(41)


QUICK = MomentPass(tokens=200, batch_tokens=40, every=0)


def same_bits(found: Moments, other: Moments) -> bool:
    tensors = [
        [*made.sums.values(), *made.split.first.values(), *made.split.probes.values()] for made in (found, other)
    ]
    counts = [(made.count, made.split.count, made.provenance) for made in (found, other)]
    return counts[0] == counts[1] and all(torch.equal(one, two) for one, two in zip(*tensors, strict=True))


# -- what is drawn ----------------------------------------------------------------------------------------------------


def test_a_draw_stops_at_the_tokens_asked_for_and_comes_from_all_over_the_text(text):
    drawn = draw(text, 100, seed=3)
    lengths = [len(item.ids) for item in drawn.text]
    assert 100 <= sum(lengths) == drawn.tokens < 100 + max(lengths)
    places = [text.ids.index(name) for name in drawn.text.ids]
    assert places == sorted(places)
    assert places[0] < 10 and places[-1] > 30
    assert draw(text, 100, seed=4).text.ids != drawn.text.ids
    assert draw(text, 10**9).text == text


def test_halves_are_runs_of_neighbours_and_about_as_long(text):
    drawn = draw(rows(320), 10**6)
    changes = sum(one != other for one, other in zip(drawn.first, drawn.first[1:], strict=False))
    assert sum(drawn.first) == 160
    assert changes == 15
    assert draw(text[:2], 99).first == (True, False)
    assert sum(drawn.probed) == 32 and drawn.probed[0] and drawn.probed[-1]


def test_as_many_tokens_as_the_widest_site_has_entries_some_times_over(view, text):
    sites = [Site(0, Kind.MLP_OUT), Site(0, Kind.ATTN_OUT)]
    assert MomentPass(multiplier=2).draw(view, text, sites).settings["tokens"] == 2 * 37
    assert MomentPass(multiplier=2).draw(view, text, sites[1:]).settings["tokens"] == 2 * 24


# -- what is summed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "falcon_new", "phi3"])
def test_one_pass_equals_a_loop_over_passages_and_sites(family):
    view = ModelView.open(zoo.build(family, dtype=torch.float64))
    text = rows(23, seed=2)
    sites = view.sites(Kind.MLP_OUT, Kind.ATTN_OUT)
    made = MomentPass(tokens=150, batch_tokens=33)(view, text, sites)
    drawn = draw(text, 150)
    for site in sites:
        whole, first, probes = 0, 0, []
        for item, half, probed in zip(drawn.text, drawn.first, drawn.probed, strict=True):
            seen = []
            hook = view.module(site).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                view.model(torch.tensor([item.ids]))
            hook.remove()
            keys = seen[0].reshape(-1, seen[0].shape[-1])
            for key in keys:
                whole = whole + torch.outer(key, key)
                first = first + half * torch.outer(key, key)
            probes += [keys[-1].float()] if probed else []
        torch.testing.assert_close(made.sums[site], whole, rtol=1e-12, atol=1e-11)
        torch.testing.assert_close(made.split.first[site], first, rtol=1e-12, atol=1e-11)
        torch.testing.assert_close(made.split.probes[site], torch.stack(probes), rtol=1e-5, atol=1e-5)
    assert made.count == drawn.tokens
    assert made.split.count == sum(len(item.ids) for item, half in zip(drawn.text, drawn.first, strict=True) if half)


@pytest.mark.parametrize("width", [1, 63, 64, 65, 700])
def test_blocks_above_the_diagonal_give_the_whole_product(width):
    keys = torch.randn(13, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    total = sums.empty(width, keys.device)
    sums.add_keys(total, keys[:6])
    sums.add_keys(total, keys[6:])
    torch.testing.assert_close(sums.mirrored(total), keys.T @ keys, rtol=1e-12, atol=1e-12)
    assert torch.equal(sums.mirrored(total), sums.mirrored(total).T)


def test_sums_keep_what_float32_would_lose():
    """A large key and then many small ones, batch by batch: a sum in float32 never gets past the first."""
    keys = [torch.tensor([[3e4, 1.0]], dtype=torch.float16), *[torch.tensor([[3e4, 1e-4]], dtype=torch.float16)] * 2000]
    total, plain = sums.empty(2, keys[0].device), torch.zeros(2, 2)
    for part in keys:
        sums.add_keys(total, part)
        plain += part.float().T @ part.float()
    exact = sum(float(part[0, 1]) ** 2 for part in keys)
    assert float(total[1, 1]) == pytest.approx(exact, rel=1e-12)
    assert float(plain[1, 1]) == 1.0
    assert bool((torch.linalg.eigvalsh(sums.mirrored(total)) > 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_products_of_many_keys_are_exact_to_what_the_keys_are_rounded_to(dtype, monkeypatch):
    """More rows than go into one product, widths that blocks do not divide; coarse products are not used."""
    keys = torch.randn(2 * sums.ROWS + 7, 131, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    keys = (keys * torch.logspace(-3, 3, 131, dtype=torch.float64)).to(dtype)
    exact = keys.double().T @ keys.double()
    scale = exact.diagonal().sqrt()
    for precision, bound in (("highest", 1e-14 if dtype == torch.float64 else 1e-6), ("high", 1e-14)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        total = sums.empty(131, keys.device)
        sums.add_keys(total, keys)
        gap = (sums.mirrored(total) - exact).abs() / (scale[:, None] * scale)
        assert float(gap.max()) < bound


@pytest.mark.parametrize("batch_tokens", [1, 17, 10**6])
def test_how_many_tokens_run_together_does_not_matter(view, text, batch_tokens):
    site = Site(1, Kind.MLP_OUT)
    one, other = (MomentPass(tokens=150, batch_tokens=size)(view, text, [site]) for size in (64, batch_tokens))
    torch.testing.assert_close(one.mean(site), other.mean(site), rtol=1e-6, atol=1e-7)
    assert torch.equal(one.split.probes[site], other.split.probes[site]) or torch.allclose(
        one.split.probes[site], other.split.probes[site], rtol=1e-6
    )


def test_a_batch_holds_no_more_tokens_than_allowed_however_long_the_context(view, text, monkeypatch):
    seen = []
    hidden = ModelView.hidden
    monkeypatch.setattr(ModelView, "hidden", lambda self, batch: (seen.append(batch.ids.numel()), hidden(self, batch)))
    MomentPass(tokens=10**6, batch_tokens=60)(view, text, [Site(0, Kind.MLP_OUT)])
    assert max(seen) <= 60 and len(seen) > 5


def test_without_halves_the_whole_is_the_same_and_nothing_is_kept_beside_it(view, text):
    site = Site(2, Kind.MLP_OUT)
    apart, together = (MomentPass(tokens=150, halves=halves)(view, text, [site]) for halves in (True, False))
    assert together.split is None
    torch.testing.assert_close(together.mean(site), apart.mean(site), rtol=1e-12, atol=1e-12)


# -- picked up again --------------------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    pass


def stop_after(batches):
    def listen(label, done, total, note):
        if label == "second moments" and done == batches:
            raise Stopped

    return listen


@pytest.mark.parametrize("batches", [1, 4])
def test_interrupted_and_taken_up_again_it_is_the_same_to_the_bit(view, text, tmp_path, batches, monkeypatch):
    sites = view.sites(Kind.MLP_OUT, Kind.ATTN_OUT)
    whole = QUICK(view, text, sites)
    with pytest.raises(Stopped), progress.listening(stop_after(batches + 1)):
        QUICK(view, text, sites, folder=tmp_path)
    assert [path.name.split(".", 1)[1] for path in tmp_path.iterdir()] == ["part.safetensors"]
    ran = []
    hidden = ModelView.hidden
    monkeypatch.setattr(ModelView, "hidden", lambda self, batch: (ran.append(1), hidden(self, batch)))
    again = QUICK(view, text, sites, folder=tmp_path)
    assert same_bits(again, whole)
    first = len(ran)
    QUICK(view, text, sites)
    assert len(ran) - first - first == batches  # so many were not run again
    assert [path.suffixes for path in tmp_path.iterdir()] == [[".safetensors"]]


def test_that_a_batch_is_lost_or_counted_twice_shows(view, text, tmp_path):
    """The control of the test above: another number of batches done gives other bits."""
    with pytest.raises(Stopped), progress.listening(stop_after(3)):
        QUICK(view, text, view.sites(Kind.MLP_OUT), folder=tmp_path)
    (part,) = tmp_path.iterdir()
    raw = part.read_bytes()
    wrong = raw.replace(b'\\"done\\": 2', b'\\"done\\": 1')
    assert wrong != raw
    part.write_bytes(wrong)
    found = QUICK(view, text, view.sites(Kind.MLP_OUT), folder=tmp_path)
    assert not same_bits(found, QUICK(view, text, view.sites(Kind.MLP_OUT)))


def test_what_cannot_be_read_is_summed_again(view, text, tmp_path):
    sites = view.sites(Kind.MLP_OUT)
    whole = QUICK(view, text, sites, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert same_bits(QUICK(view, text, sites, folder=tmp_path), whole)
    with pytest.raises(Stopped), progress.listening(stop_after(2)):
        MomentPass(tokens=60, batch_tokens=20, every=0)(view, text, sites, folder=tmp_path)
    (part,) = tmp_path.glob("*.part.safetensors")
    part.write_bytes(b"cut")
    expected = MomentPass(tokens=60, batch_tokens=20)(view, text, sites)
    assert same_bits(MomentPass(tokens=60, batch_tokens=20)(view, text, sites, folder=tmp_path), expected)


def test_another_file_under_its_name_is_not_believed(view, text, tmp_path):
    site = Site(0, Kind.MLP_OUT)
    made = QUICK(view, text, [site], folder=tmp_path)
    (path,) = tmp_path.iterdir()
    second_moments(view, text[:3], [site]).save(path)
    assert same_bits(QUICK(view, text, [site], folder=tmp_path), made)


# -- what it is known by ----------------------------------------------------------------------------------------------


def test_what_is_finished_is_read_and_not_run(view, text, tmp_path, monkeypatch):
    made = QUICK(view, text, view.sites(Kind.MLP_OUT), folder=tmp_path)
    monkeypatch.setattr(ModelView, "hidden", lambda *_: pytest.fail("ran again"))
    assert same_bits(QUICK(view, text, view.sites(Kind.MLP_OUT), folder=tmp_path), made)
    assert same_bits(QUICK(view, text, view.sites(Kind.MLP_OUT)[::-1], folder=tmp_path), made)


CHANGES = {
    "tokens": {"tokens": 201}, "seed": {"seed": 1}, "batch": {"batch_tokens": 41}, "halves": {"halves": False},
}  # fmt: skip


@pytest.mark.parametrize("what", [*CHANGES, "model", "dtype", "sites", "text", "order", "shard"])
def test_every_part_of_the_key_counts(view, text, tmp_path, what):
    """Caches keyed too weakly are this field's oldest trap: by name and layer, but not by data, count or dtype."""
    sites = view.sites(Kind.MLP_OUT)
    QUICK(view, text, sites, folder=tmp_path)
    shard = None
    settings = {"tokens": 200, "batch_tokens": 40, **CHANGES.get(what, {})}
    if what == "model":
        changed = zoo.build("gpt2", dtype=torch.float64)
        with torch.no_grad():
            changed.transformer.h[2].mlp.c_proj.bias[0] += 1e-9
        view = ModelView.open(changed)
    if what == "dtype":
        view = ModelView.open(zoo.build("gpt2", dtype=torch.float32))
    if what == "sites":
        sites = sites[:2]
    if what == "text":
        last = text[-1]
        changed = Passage(last.id, last.prefix, (*last.suffix[:-1], (last.suffix[-1] + 1) % zoo.VOCAB))
        text = Passages((*text.items[:-1], changed))
    if what == "order":
        text = Passages(text.items[::-1])
    if what == "shard":
        shard = (1, 2)
    MomentPass(**settings)(view, text, sites, folder=tmp_path, shard=shard)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_same_again_has_the_same_key(view, text, tmp_path):
    """The control of the test above."""
    other = Passages(text.items, "another file")
    for given in (text, other):
        QUICK(view, given, view.sites(Kind.MLP_OUT), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


# -- shards -----------------------------------------------------------------------------------------------------------


def test_shards_of_one_draw_merge_to_the_whole(view, text):
    sites = view.sites(Kind.MLP_OUT)
    whole = QUICK(view, text, sites)
    one, two, three = (QUICK(view, text, sites, shard=(number, 3)) for number in (1, 2, 3))
    merged = one.merge(two).merge(three)
    assert (merged.count, merged.split.count) == (whole.count, whole.split.count)
    for site in sites:
        torch.testing.assert_close(merged.sums[site], whole.sums[site], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(merged.split.first[site], whole.split.first[site], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(merged.split.probes[site], whole.split.probes[site], rtol=1e-6, atol=1e-6)


def test_draws_that_may_share_passages_do_not_merge(view, text):
    site = [Site(0, Kind.MLP_OUT)]
    with pytest.raises(MismatchError, match="would count twice"):
        QUICK(view, text, site).merge(QUICK(view, text, site))
    with pytest.raises(MismatchError, match="drawn from one text, not as shards of one draw"):
        QUICK(view, text, site).merge(MomentPass(tokens=200, seed=1)(view, text, site))
    with pytest.raises(MismatchError, match="would count twice"):
        QUICK(view, text, site, shard=(1, 2)).merge(QUICK(view, text, site, shard=(1, 2)))
    QUICK(view, text, site).merge(QUICK(view, rows(9, seed=7, origin="other"), site))


def test_halves_probes_and_shrinkage_survive_the_disk(view, text, tmp_path):
    sites = view.sites(Kind.MLP_OUT)
    made = QUICK(view, text, sites).shrunk({sites[0]: 0.25})
    made.save(tmp_path / "m.safetensors")
    again = Moments.load(tmp_path / "m.safetensors")
    assert same_bits(again, made)
    assert (again.shrinkage, again.digest) == ({sites[0]: 0.25}, made.digest)
    assert again.digest != QUICK(view, text, sites).digest
    json.dumps(again.provenance.to_json())


# -- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_summed_is_refused_in_one_line(view, text, tmp_path):
    site = Site(0, Kind.MLP_OUT)
    with pytest.raises(InputError, match="of no sites"):
        QUICK(view, text, [])
    with pytest.raises(InputError, match="from 0 passages"):
        QUICK(view, text[:0], [site])
    with pytest.raises(InputError, match="multiplier is 0"):
        MomentPass(multiplier=0)
    with pytest.raises(InputError, match="tokens is 0"):
        MomentPass(tokens=0)
    with pytest.raises(InputError, match="shard 2/3 of 1 passages is empty"):
        MomentPass(tokens=1)(view, text, [site], shard=(2, 3))


def test_keys_that_are_not_finite_are_named_at_once(text):
    model = zoo.build("gpt2", dtype=torch.float16)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.fill_(6e4)
    view = ModelView.open(model, prove=False)
    with pytest.raises(InputError, match=r"L1\.mlp\.out: keys that are not finite in torch.float16"):
        QUICK(view, text, view.sites(Kind.MLP_OUT))
