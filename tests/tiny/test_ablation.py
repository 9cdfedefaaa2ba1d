"""Ablations against models whose weights were edited by hand, and against everything that must not matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo

from memloc.ablations.ablation import HOWS, Ablation
from memloc.ablations.components import (
    Directions,
    apart,
    everything,
    heads,
    layers,
    named,
    names_of,
    neurons,
    sublayers,
)
from memloc.ablations.draws import addresses, choices, normals
from memloc.ablations.reference import Reference
from memloc.checks import hands_off
from memloc.errors import InputError, ModelError
from memloc.measures.extraction import Extraction
from memloc.passages import Passage, Passages
from memloc.running.decoding import continuation
from memloc.scores import Selection, selected
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView

LOOSE = {"rtol": 1e-5, "atol": 1e-5}
"""GPT-Neo's attention is float32 in every dtype."""


@pytest.fixture(params=zoo.FAMILIES)
def view(request, view_of) -> ModelView:
    return view_of(request.param, torch.float64)


@pytest.fixture
def passages() -> Passages:
    return zoo.passages(3)


def reference() -> Reference:
    return Reference(zoo.passages(3, seed=5), tokens=17)


@torch.no_grad()
def logits(view: ModelView, passages: Passages, size: int = 32) -> dict[str, torch.Tensor]:
    """Real tokens' logits of every row."""
    found = {}
    for batch in view.batches(passages, size=size):
        for row, line in zip(batch.rows, view.logits(batch), strict=True):
            found[passages[row].id] = line[: len(passages[row].ids)]
    return found


@torch.no_grad()
def usual(view: ModelView, site: Site, passages: Passages) -> torch.Tensor:
    """Every real token's input of `site`, one text at a time."""
    rows = []
    for item in passages:
        with view.record([site]) as seen:
            view.model(torch.tensor([item.ids]))
        rows.append(seen[site][0])
    return torch.cat(rows)


def pick(view: ModelView) -> Selection:
    return neurons(view, [(0, 3), (1, 0), (1, 36), (2, 7)])


def columns(view: ModelView, selection: Selection) -> dict[Site, list[int]]:
    """Which columns of which weight a selection of heads or neurons stands for."""
    wide = view.head_width if selection.grain == Grain.HEAD else 1
    return {
        site: [wide * entry + inner for entry in entries for inner in range(wide)]
        for site, entries in selection.indices().items()
    }


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


def distances(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


def apart_from(found: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(float((found[name] - other[name]).abs().max()) > 1e-6 for name in found)


@pytest.mark.parametrize("how, factor", [("zero", 0.0), ("scale", 2.0), ("scale", -0.5)])
@pytest.mark.parametrize("grain", [Grain.NEURON, Grain.HEAD])
def test_scaling_units_is_scaling_the_columns_that_read_them(view, passages, grain, how, factor):
    chosen = pick(view) if grain == Grain.NEURON else heads(view, [(0, 1), (2, 0), (2, 2)])
    twin = view.copy()
    with torch.no_grad():
        for site, entries in columns(view, chosen).items():
            twin.weight(site)[:, entries] *= factor
    ablation = Ablation(of=(chosen,), how=how, factor=factor if how == "scale" else None)
    with hands_off(view), ablation.applied(view):
        found = logits(view, passages)
    close(found, logits(twin, passages))
    assert apart_from(found, logits(view, passages))


def test_mean_ablation_is_a_constant_in_the_place_of_the_columns(view, passages):
    chosen, text = pick(view), reference()
    twin = view.copy()
    constants = {}
    with torch.no_grad():
        for site, entries in columns(view, chosen).items():
            mean = usual(view, site, text.passages).mean(0)[entries]
            constants[site] = view.weight(site)[:, entries] @ mean
            twin.weight(site)[:, entries] = 0
    with Ablation(of=(chosen,), how="mean").applied(view, reference=text):
        found = logits(view, passages)
    with twin.replace(constants, lambda site, out: out + constants[site], side="output"):
        close(found, logits(twin, passages))


def test_a_skipped_layer_and_a_silent_sublayer_are_maps_of_zeros(view, passages):
    for chosen, kinds in (
        (layers(view, [1]), (Kind.ATTN_OUT, Kind.MLP_OUT)),
        (sublayers(view, [Site(1, Kind.ATTN_OUT)]), (Kind.ATTN_OUT,)),
        (sublayers(view, [Site(1, Kind.MLP_OUT)]), (Kind.MLP_OUT,)),
        (sublayers(view, [Site(1, Kind.ATTN_V)]), (Kind.ATTN_V,)),
    ):
        twin = view.copy()
        with torch.no_grad():
            for site in (Site(1, kind, bias) for kind in kinds for bias in (False, True)):
                if twin.has(site):
                    place = twin.place(site)
                    place.write(twin.parameter(site), torch.zeros_like(twin.weight(site)))
        with hands_off(view), Ablation(of=(chosen,)).applied(view):
            close(logits(view, passages), logits(twin, passages))


def test_a_scaled_layer_adds_its_part_times_the_factor(view_of, passages):
    view = view_of("gpt_neox", torch.float64)
    twin = view.copy()
    with torch.no_grad():
        for site in (Site(1, kind, bias) for kind in (Kind.ATTN_OUT, Kind.MLP_OUT) for bias in (False, True)):
            twin.weight(site).mul_(2)
    with Ablation(of=(layers(view, [1]),), how="scale").applied(view):
        close(logits(view, passages), logits(twin, passages))


def test_directions_are_projected_out_of_what_a_map_reads(view, passages):
    site = Site(1, Kind.MLP_OUT)
    rows = torch.linalg.qr(torch.randn(37, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q.T
    twin = view.copy()
    with torch.no_grad():
        weight = twin.weight(site)
        weight.sub_(weight @ rows.T @ rows)
    with hands_off(view), Ablation(of=(Directions({site: rows}),)).applied(view):
        close(logits(view, passages), logits(twin, passages))
    full = torch.eye(37, dtype=torch.float64)
    with Ablation(of=(Directions({site: full}),)).applied(view):
        whole = logits(view, passages)
    with Ablation(of=(neurons(view, [(1, index) for index in range(37)]),)).applied(view):
        close(whole, logits(view, passages))


def test_all_directions_of_the_residual_stream_leave_nothing_of_the_text(view, passages):
    """With the whole stream gone after a block, every text gives one answer; before, they do not."""
    for layer in (-1, 1):
        gone = Directions({layer: torch.eye(view.width, dtype=torch.float64)})
        with Ablation(of=(gone,)).applied(view):
            found = torch.cat(list(logits(view, passages).values()))
        if layer == 1:
            assert float(found.std(0).max()) < 1e-9
        assert float(torch.cat(list(logits(view, passages).values())).std(0).max()) > 0.1


@pytest.mark.parametrize("how", HOWS)
def test_neither_company_nor_padding_nor_batch_size_matters(view, how):
    chosen = heads(view, [(0, 1), (1, 2)]) if how == "short-circuit" else pick(view)
    passages, text = zoo.passages(4), reference()
    with Ablation(of=(chosen,), how=how, seed=4).applied(view, reference=text):
        together = logits(view, passages)
        close(logits(view, passages, size=1), together)
        close(logits(view, passages[2:], size=2), {item.id: together[item.id] for item in passages[2:]})
    close(logits(view, passages), logits(view, passages, size=1))
    assert apart_from(together, logits(view, passages))


@pytest.mark.parametrize("how", HOWS)
def test_greedy_on_a_cache_is_greedy_on_whole_rows(view, how):
    chosen = heads(view, [(0, 1), (1, 2)]) if how == "short-circuit" else pick(view)
    settings = {"how": how, "seed": 2}
    places = ["all"] if how == "short-circuit" else ["all", "prefix", "suffix", (0, 9, 10, 12)]
    ids = torch.tensor([item.prefix for item in zoo.passages(2, ragged=False)])
    text = reference()
    for positions in places:
        ablation = Ablation(of=(chosen,), positions=positions, **settings)
        with ablation.applied(view, reference=text, prefixes=ids.tolist()), torch.no_grad():
            cached = continuation(view, ids, 5)
            whole = view.model.base_model(input_ids=cached.ids[:, :-1], use_cache=False).last_hidden_state
            torch.testing.assert_close(cached.hidden, whole, **LOOSE)
            alone = continuation(view, ids[1:], 5)
            torch.testing.assert_close(alone.hidden, cached.hidden[1:], **LOOSE)


def test_a_block_skipped_on_a_cache_is_skipped_at_every_token(view):
    ids = torch.tensor([item.prefix for item in zoo.passages(2, ragged=False)])
    for chosen in (layers(view, [0]), layers(view, [1]), sublayers(view, [Site(1, Kind.ATTN_OUT)])):
        with Ablation(of=(chosen,)).applied(view), torch.no_grad():
            cached = continuation(view, ids, 4)
            whole = view.model.base_model(input_ids=cached.ids[:, :-1], use_cache=False).last_hidden_state
        torch.testing.assert_close(cached.hidden, whole, **LOOSE)


def test_positions_count_from_the_first_token_of_the_row(view_of, passages):
    """A change at one position of the last layer's neurons reaches that position and no other."""
    view = view_of("llama", torch.float64)
    last = neurons(view, [(2, index) for index in range(37)])
    before = logits(view, passages)
    with Ablation(of=(last,), positions=(4,)).applied(view):
        found = logits(view, passages)
    for name, line in found.items():
        moved = (line - before[name]).abs().amax(1) > 1e-9
        assert moved.nonzero().flatten().tolist() == [4]
    for where, kept in (("prefix", lambda item: len(item.prefix)), ("suffix", lambda item: len(item.suffix))):
        prefixes = [item.prefix for item in passages]
        with Ablation(of=(last,), positions=where).applied(view, prefixes=prefixes):
            found = logits(view, passages)
        for item in passages:
            moved = ((found[item.id] - before[item.id]).abs().amax(1) > 1e-9).nonzero().flatten().tolist()
            count = kept(item)
            assert moved == (list(range(count)) if where == "prefix" else list(range(len(item.prefix), len(item.ids))))


def test_a_selection_of_positions_changes_all_that_is_there(view_of, passages):
    view = view_of("gpt2", torch.float64)
    site = Site(2, Kind.MLP_OUT)
    chosen = selected({site: [1, 4]}, {site: 13}, Grain.POSITION)
    whole = neurons(view, [(2, index) for index in range(37)])
    with Ablation(of=(chosen,)).applied(view):
        found = logits(view, passages)
    with Ablation(of=(whole,), positions=(1, 4)).applied(view):
        close(found, logits(view, passages))
    assert names_of(chosen) == ("L2@1", "L2@4")
    embed = Site.parse("embed")
    with Ablation(of=(selected({embed: [0]}, {embed: 13}, Grain.POSITION),)).applied(view):
        assert apart_from(logits(view, passages), found)


def test_noise_has_the_spread_that_was_asked_for(view_of):
    """In units of each neuron's own std, over 8000 draws."""
    view, text = view_of("gpt2", torch.float64), reference()
    site, passages = Site(0, Kind.MLP_OUT), zoo.passages(24, prefix=9, suffix=4, seed=9, ragged=False)
    clean = usual(view, site, passages)
    changed: list[torch.Tensor] = []
    all_of_it = neurons(view, [(0, index) for index in range(37)])
    with Ablation(of=(all_of_it,), how="noise", factor=3.0, seed=1).applied(view, reference=text):
        changed.append(usual(view, site, passages))
    std = usual(view, site, text.passages).std(0, correction=0)
    drawn = ((changed[0] - clean) / std).flatten()
    assert abs(float(drawn.std()) - 3) < 0.1 and abs(float(drawn.mean())) < 0.1
    with Ablation(of=(all_of_it,), how="noise", factor=3.0, seed=2).applied(view, reference=text):
        assert not torch.allclose(usual(view, site, passages), changed[0])


def test_resampled_numbers_are_numbers_of_the_reference_at_one_token(view_of):
    view, text = view_of("gpt_neo", torch.float64), Reference(zoo.passages(3, seed=5))
    site, passages = Site(0, Kind.MLP_OUT), zoo.passages(2)
    all_of_it = neurons(view, [(0, index) for index in range(37)])
    with Ablation(of=(all_of_it,), how="resample").applied(view, reference=text):
        found = usual(view, site, passages)
    known = usual(view, site, text.passages)
    far = distances(found, known)
    assert float(far.min(1).values.max()) < 1e-6
    assert len(set(far.argmin(1).tolist())) > 5
    # On its own text, a token never draws itself.
    with Ablation(of=(all_of_it,), how="resample").applied(view, reference=text):
        own = usual(view, site, text.passages)
    assert bool((own - known).abs().amax(1).gt(1e-6).all())


def test_a_reference_is_read_once_a_model_and_without_its_padding(view_of):
    view, text = view_of("qwen3", torch.float64), reference()
    site = Site(1, Kind.MLP_OUT)
    known = usual(view, site, text.passages)
    for size in (1, 3):
        other = Reference(text.passages, tokens=17, batch_size=size)
        with Ablation(of=(pick(view),), how="mean").applied(view, reference=other):
            pass
        found = next(entry for (_, port, _), entry in other._known.items() if port == "L1.mlp.out.input")
        torch.testing.assert_close(found.mean, known.mean(0))
        torch.testing.assert_close(found.std, known.std(0, correction=0))
        assert len(found.tokens) == 17 and float(distances(found.tokens, known).min(1).values.max()) < 1e-9
    size = len(other._known)
    with Ablation(of=(pick(view),), how="noise").applied(view, reference=other):
        assert len(other._known) == size
    assert not replace(other, tokens=5)._known, "another reference has read nothing yet"


def test_strict_extraction_under_noise_is_what_greedy_decoding_gives(view_of):
    """Teacher-forced verdicts and generation agree, because draws follow the text and not the pass."""
    view, text = view_of("llama", torch.float64), reference()
    ids = torch.tensor([item.prefix for item in zoo.passages(4, ragged=False)])
    ablation = Ablation(of=(pick(view),), how="noise", factor=2.0, seed=3)
    with ablation.applied(view, reference=text):
        said = continuation(view, ids, 6).ids[:, ids.shape[1] :].tolist()
    rows = [Passage(f"r{row}", tuple(ids[row].tolist()), tuple(said[row])) for row in range(4)]
    rows += [Passage("wrong", rows[0].prefix, (*rows[0].suffix[:3], (rows[0].suffix[3] + 1) % zoo.VOCAB))]
    with ablation.applied(view, reference=text):
        measured = Extraction()(view, Passages(tuple(rows)))
    assert [row["strict"] for row in measured.rows] == [True] * 4 + [False]
    assert measured.rows[-1]["first_miss"] == 3
    assert not all(row["strict"] for row in Extraction()(view, Passages(tuple(rows))).rows)


def test_short_circuit_of_a_layer_is_that_of_all_its_heads(view, passages):
    with Ablation(of=(layers(view, [1]),), how="short-circuit").applied(view):
        whole = logits(view, passages)
    with Ablation(of=(heads(view, [(1, head) for head in range(view.heads)]),), how="short-circuit").applied(view):
        close(whole, logits(view, passages))
    assert apart_from(whole, logits(view, passages))
    one = Passages(tuple(Passage(item.id, item.ids[:1], item.ids[:1]) for item in passages))
    with Ablation(of=(layers(view, [1]),), how="short-circuit").applied(view):
        found = logits(view, one)
    # A text's first token looks at itself anyway.
    torch.testing.assert_close(
        {name: line[0] for name, line in found.items()}, {name: line[0] for name, line in logits(view, one).items()}
    )


@pytest.mark.parametrize("how", HOWS)
def test_everything_works_in_bfloat16_and_is_undone_after_an_error(view_of, how):
    view, text = view_of("mistral", torch.bfloat16), reference()
    chosen = heads(view, [(0, 1)]) if how == "short-circuit" else pick(view)
    before = logits(view, zoo.passages(2))
    with (
        pytest.raises(ZeroDivisionError),
        hands_off(view),
        Ablation(of=(chosen,), how=how).applied(view, reference=text),
    ):
        assert apart_from(logits(view, zoo.passages(2)), before)
        raise ZeroDivisionError
    torch.testing.assert_close(logits(view, zoo.passages(2)), before, rtol=0, atol=0)


def test_grains_join_in_one_ablation(view_of, passages):
    view = view_of("gpt2", torch.float64)
    of = named(view, ["L0H1", "L1N4", "L2.attn", "L0N2"])
    assert [str(entry.grain) for entry in of] == ["component", "head", "neuron"]
    twin = view.copy()
    with torch.no_grad():
        twin.weight(Site(0, Kind.ATTN_OUT))[:, view.head_width : 2 * view.head_width] = 0
        twin.weight(Site(1, Kind.MLP_OUT))[:, 4] = 0
        twin.weight(Site(0, Kind.MLP_OUT))[:, 2] = 0
        for bias in (False, True):
            twin.weight(Site(2, Kind.ATTN_OUT, bias)).zero_()
    ablation = Ablation(of=of)
    assert ablation.names == ("L2.attn", "L0H1", "L0N2", "L1N4")
    with ablation.applied(view):
        close(logits(view, passages), logits(twin, passages))


def test_everything_taken_apart_is_every_place_once(view_of):
    view = view_of("qwen2")
    for grain, count in (("layer", 3), ("component", 6), ("head", 18), ("neuron", 111)):
        alone = apart(everything(view, Grain(grain)))
        assert len(alone) == len({names_of(entry) for entry in alone}) == count
        assert all(entry.count == 1 for entry in alone)


def test_digests_tell_ablations_apart(view_of):
    view = view_of("gpt2")
    chosen = (pick(view),)
    same = Ablation(of=chosen, seed=1).digest == Ablation(of=(pick(view),), seed=2).digest
    assert same, "the seed of what draws nothing is no difference"
    others = [
        Ablation(of=chosen), Ablation(of=(heads(view, [(0, 1)]),)), Ablation(of=chosen, how="scale"),
        Ablation(of=chosen, how="scale", factor=3.0), Ablation(of=chosen, how="noise"),
        Ablation(of=chosen, how="noise", seed=1), Ablation(of=chosen, positions="prefix"),
        Ablation(of=chosen, positions=(1,)), Ablation(of=(Directions({0: torch.eye(24)[:1]}),)),
        Ablation(of=(Directions({0: torch.eye(24)[1:2]}),)),
    ]  # fmt: skip
    assert len({entry.digest for entry in others}) == len(others)
    assert Ablation(of=chosen, how="scale").digest == Ablation(of=chosen, how="scale", factor=2.0).digest


def test_draws_follow_the_text_and_fill_their_range():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 1, 8]])
    whole = addresses(ids, 0)
    assert torch.equal(whole[0, :2], whole[1, :2]) and bool((whole[0, 2:] != whole[1, 2:]).all())
    assert torch.equal(addresses(ids[:, 2:], 2, whole[:, 1]), whole[:, 2:])
    assert len(set(addresses(torch.zeros(1, 500, dtype=torch.long), 0)[0].tolist())) == 500
    many = addresses(torch.arange(4000)[:, None], 0)
    drawn = normals(many, torch.arange(20), 3)
    assert abs(float(drawn.mean())) < 0.01 and abs(float(drawn.std()) - 1) < 0.01
    assert float(torch.corrcoef(drawn[:, 0].T).fill_diagonal_(0).abs().max()) < 0.1
    counts = torch.bincount(choices(many, 7, 3).flatten(), minlength=7)
    assert int(counts.min()) > 4000 / 7 * 0.8 and int(counts.max()) < 4000 / 7 * 1.2


def test_what_cannot_be_is_refused_in_one_line(view_of, passages):
    view = view_of("gpt2")
    chosen = (pick(view),)
    for settings, said in (
        ({"how": "erase"}, "how 'erase': expected one of zero, mean"),
        ({"factor": 2.0}, "factor 2.0: 'zero' takes none"),
        ({"positions": "middle"}, "positions 'middle': expected all"),
        ({"positions": (-1,)}, "numbers from 0"),
        ({"how": "short-circuit", "positions": "prefix"}, "short-circuit changes whole patterns"),
    ):
        with pytest.raises(InputError, match=said):
            Ablation(of=chosen, **settings)
    with pytest.raises(InputError, match="at least one component"):
        Ablation(of=())
    for ablation, said in (
        (Ablation(of=chosen, how="mean"), "'mean' takes its numbers from a reference"),
        (Ablation(of=chosen, positions="suffix"), "the rows' prefixes are needed"),
        (Ablation(of=chosen, how="short-circuit"), "L0.mlp.out.input is not attention"),
        (Ablation(of=(Directions({9: torch.eye(24)[:1]}),)), "after block 9: the model has 3"),
        (Ablation(of=(Directions({0: torch.eye(5)}),)), "width 5, the model has 24"),
        (Ablation(of=(selected({Site(0, Kind.MLP_OUT): [1]}, {Site(0, Kind.MLP_OUT): 9}, Grain.NEURON),)), r"\[37\]"),
        (Ablation(of=(selected({Site(0, Kind.MLP_OUT): [1]}, {Site(0, Kind.MLP_OUT): 9}, Grain.WEIGHT),)), "weights"),
    ):
        with pytest.raises(InputError, match=said), ablation.applied(view):
            pass
    with pytest.raises(InputError, match="rows are not orthonormal"):
        Directions({0: torch.ones(2, 24)})
    for names, said in (
        (["L9"], "no layer L9.mlp.out: the model has 3 layers"), (["L0H3"], r"no head \[3\] of L0.attn.out"),
        (["head 2"], "no component called 'head 2'; names are like L2 "), ([], "no component is named"),
        (["L0.mlp.gate"], "no component L0.mlp.gate"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            named(view, names)


def test_rows_that_were_not_foretold_are_refused(view_of, passages):
    view = view_of("gpt2")
    ablation = Ablation(of=(pick(view),), positions="suffix")
    prefixes = [item.prefix for item in passages]
    with pytest.raises(InputError, match="begins with none of the prefixes"), ablation.applied(view, prefixes=prefixes):
        logits(view, zoo.passages(2, seed=77))
    nested = [prefixes[0], prefixes[0][:3]]
    with pytest.raises(InputError, match="begins with another"), ablation.applied(view, prefixes=nested):
        pass
    batch = next(view.batches(passages))
    tail = view.tail(0, batch)
    with (
        pytest.raises(ModelError, match="known in whole forward passes only"),
        Ablation(of=(pick(view),), positions=(1,)).applied(view),
    ):
        tail.hidden(tail.residual)
    with Ablation(of=(pick(view),)).applied(view), torch.no_grad():
        assert tail.hidden(tail.residual).shape == tail.residual.shape, "what asks for no position needs no pass"
