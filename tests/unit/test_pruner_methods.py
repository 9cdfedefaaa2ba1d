"""Each pruner against a slow version of its formula, written another way; and the traps of the published code."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.testing import assert_close

from editors.base import Request
from editors.deltas import LowRank
from editors.pruners.balanced_subnet import BalancedSubnet
from editors.pruners.durable import Durable
from editors.pruners.greedy import Greedy
from editors.pruners.magnitude import Magnitude
from editors.pruners.obs import Obs
from editors.pruners.subnet import Subnet
from editors.pruners.subspace import Subspace, contrasting
from editors.pruning.activity import moments_at, root_mean_squares
from editors.pruning.fisher_blocks import Blocks, Estimate, fisher_blocks
from editors.pruning.prunings import allowed, how_many
from editors.pruning.trained_masks import initial_scores, mixed_batches, row_weights
from memloc.errors import InputError
from memloc.sites import Kind, Site
from memloc.view import ModelView

FORGET, TEXT = zoo.passages(3), zoo.passages(6, seed=5)
ASKED = Request(forget=FORGET, text=TEXT)
OUT = tuple(Site(layer, Kind.MLP_OUT) for layer in range(3))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def view(request) -> ModelView:
    return ModelView.open(zoo.build(request.param, dtype=torch.float64))


def pruned(edit):
    return {site: delta.dense() != 0 for site, delta in edit.deltas.items()}


def nll(view, item, steps=None):
    """Mean -log p of a passage's suffix tokens (or of some), from all logits."""
    ids = torch.tensor([item.ids])
    logp = view.model(ids).logits[0].log_softmax(-1)
    cut = len(item.prefix)
    every = [-logp[cut - 1 + step, token] for step, token in enumerate(item.suffix)]
    return sum(every) / len(every) if steps is None else every[steps]


def gradient(view, loss, sites):
    """Site to gradient [out, in], by way of `.grad` of every parameter."""
    view.model.zero_grad()
    for parameter in view.model.parameters():
        parameter.requires_grad_(True)
    loss.backward()
    found = {site: view.place(site).read(view.parameter(site).grad.clone()) for site in sites}
    view.model.zero_grad()
    return found


# -- subspace --------------------------------------------------------------------------------------------------------


def read_slowly(view, passages, site, suffix_only):
    """Every token's input to `site`, one passage at a time."""
    rows = []
    for item in passages:
        with torch.no_grad(), view.record([site]) as seen:
            view.model(torch.tensor([item.ids]))
        first = len(item.prefix) - 1 if suffix_only else 0
        rows += [seen[site][0, at] for at in range(first, len(item.ids) - (1 if suffix_only else 0))]
    return torch.stack(rows)


@pytest.mark.parametrize("normalized", [False, True])
def test_set_difference_is_its_formula_row_by_row(view, normalized):
    edit = Subspace(share=0.3, normalized=normalized, batch_size=2)(view, ASKED)
    total = 0
    for site in OUT:
        used, usual = read_slowly(view, FORGET, site, True), read_slowly(view, TEXT, site, False)
        if normalized:
            used, usual = used / used.norm(dim=1, keepdim=True), usual / usual.norm(dim=1, keepdim=True)
        a, b = used.square().mean(0).sqrt(), usual.square().mean(0).sqrt()
        weight = view.weight(site).detach()
        wanted = torch.zeros_like(weight, dtype=torch.bool)
        for row in range(len(weight)):
            mine = [float(weight[row, column].abs() * a[column]) for column in range(weight.shape[1])]
            best = sorted(range(len(mine)), key=lambda column: -mine[column])[: int(0.3 * len(mine))]
            for column in best:
                wanted[row, column] = mine[column] > float(weight[row, column].abs() * b[column])
        assert torch.equal(pruned(edit)[site], wanted)
        total += len(weight) * int(0.3 * weight.shape[1])
    assert edit.notes["pruned"] < edit.notes["top share"] == total, "text's own inputs are spared"


def test_set_difference_does_not_depend_on_how_much_text_there_is(view):
    """A trap: sums over tokens, as published, would let the larger set win."""
    twice = zoo.passages(6, seed=5) + type(TEXT)(tuple(type(item)(f"{item.id}'", *parts(item)) for item in TEXT))
    one, two = (
        Subspace(share=0.3)(view, Request(forget=FORGET, text=text)) for text in (TEXT, twice)
    )  # fmt: skip
    assert one.digest == two.digest
    sums = root_mean_squares(view, twice, OUT, "all")[OUT[0]] * 2**0.5
    assert not torch.allclose(sums, root_mean_squares(view, TEXT, OUT, "all")[OUT[0]])


def parts(item):
    return item.prefix, item.suffix


def test_directions_are_no_longer_read_and_the_rest_is_kept(view):
    edit = Subspace(mode="directions", rank=3, damping=0.05)(view, ASKED)
    for site in OUT:
        used = read_slowly(view, FORGET, site, True)
        usual = read_slowly(view, TEXT, site, False)
        c_f, c_b = used.T @ used / len(used), usual.T @ usual / len(usual)
        damped = c_b + 0.05 * c_b.diagonal().mean() * torch.eye(len(c_b), dtype=torch.float64)
        values, vectors = torch.linalg.eig(torch.linalg.solve(damped, c_f))
        order = values.real.argsort(descending=True)[:3]
        v = vectors[:, order].real
        assert_close(torch.tensor(edit.notes["ratios"][str(site)]).double(), values.real[order], rtol=1e-3, atol=1e-4)
        weight = view.weight(site).detach()
        wanted = -weight @ damped @ v @ torch.linalg.solve(v.T @ damped @ v, v.T)
        delta = edit.deltas[site]
        assert isinstance(delta, LowRank) and delta.rank == 3
        assert_close(delta.dense().double(), wanted, rtol=0, atol=1e-5 * float(weight.abs().max()))
        new = weight + wanted
        assert float((new @ damped @ v).abs().max()) < 1e-9 * float((weight @ damped @ v).abs().max())
        kernel = torch.linalg.svd(v.T, full_matrices=True).Vh[3:]
        assert_close(new @ kernel.T, weight @ kernel.T, msg="what V does not see is read as before")


def test_a_change_of_low_rank_prunes_no_weight_and_says_so(view):
    assert set(Subspace(mode="directions", rank=1)(view, ASKED).notes) == {"ratios"}
    assert Subspace(share=0.3)(view, ASKED).notes["pruned"] > 0


def test_the_projection_moves_text_least_in_units_of_its_spread(view):
    used, usual = (moments_at(view, rows, OUT, kind)[OUT[0]] for rows, kind in ((FORGET, "suffix"), (TEXT, "all")))
    damped, found = contrasting(used, usual, 2, 0.05)
    v = found.directions
    assert_close(v.T @ damped @ v, torch.eye(2, dtype=torch.float64))
    oblique, plain = damped @ v @ v.T, v @ torch.linalg.inv(v.T @ v) @ v.T
    inverse = torch.linalg.inv(damped)

    def moved(projection):
        return float((inverse @ projection @ damped @ projection.T).trace())

    assert moved(oblique) == pytest.approx(2.0) and moved(plain) > moved(oblique) * (1 + 1e-6)


# -- durable ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("among", ["matrix", "model"])
def test_durable_sums_gradients_before_it_takes_their_size(view, among):
    sites = view.sites(Kind.MLP_IN, Kind.MLP_GATE, Kind.MLP_OUT)
    each = [gradient(view, nll(view, item), sites) for item in FORGET]
    size = {site: sum(found[site] for found in each).abs() for site in sites}
    late = {site: sum(found[site].abs() for found in each) for site in sites}

    def best(scores):
        if among == "matrix":
            cut = {
                site: s.flatten().sort(descending=True).values[int(0.04 * s.numel()) - 1] for site, s in scores.items()
            }
        else:
            flat = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
            cut = dict.fromkeys(scores, flat[int(0.04 * len(flat)) - 1])
        return {site: s >= cut[site] for site, s in scores.items()}

    found = pruned(Durable(share=0.04, among=among, batch_size=2)(view, ASKED))
    wanted, other = best(size), best(late)
    assert all(torch.equal(found[site], wanted[site]) for site in found)
    assert any(not torch.equal(found[site], other[site]) for site in found), "the order of sum and size matters"


# -- optimal brain surgeon ---------------------------------------------------------------------------------------------


def slow_fisher(view, site, block, damping):
    """Damped inverse by the published recursion, one gradient at a time, block by block, and F itself."""
    grads = []
    for item in FORGET:
        grads += [gradient(view, nll(view, item, step), [site])[site].flatten() for step in range(len(item.suffix))]
    found = []
    for start in range(0, len(grads[0]), block):
        rows = torch.stack([g[start : start + block] for g in grads])
        size, fisher = rows.shape[1], rows.T @ rows / len(rows)
        inverse = torch.eye(size, dtype=torch.float64) / damping
        for g in rows:
            turned = inverse @ g
            inverse = inverse - torch.outer(turned, turned) / (len(rows) + g @ turned)
        found.append((fisher + damping * torch.eye(size, dtype=torch.float64), inverse))
    return found


def test_saliency_and_its_update_are_those_of_slow_surgery(view):
    site, block, damping = OUT[1], 7, 1e-3
    settings = {"share": 0.05, "block": block, "damping": damping, "damping_unit": "absolute", "kinds": "mlp-out"}
    edit = Obs(**settings)(view, ASKED)
    weight = view.weight(site).detach()
    blocks = slow_fisher(view, site, block, damping)
    diagonal = torch.cat([inverse.diagonal() for _, inverse in blocks])
    saliency = (weight.flatten().square() / (2 * diagonal)).view(weight.shape)
    count = how_many(0.05, weight.numel())
    gone = saliency >= saliency.flatten().sort(descending=True).values[count - 1]
    assert torch.equal(pruned(edit)[site], gone)
    made_up = Obs(**settings, compensate="forget")(view, ASKED).deltas[site].dense().double().flatten()
    flat, out = weight.flatten(), gone.flatten()
    for index, (fisher, inverse) in enumerate(blocks):
        part = slice(index * block, index * block + len(fisher))
        q = out[part].nonzero()[:, 0]
        wanted = torch.zeros(len(fisher), dtype=torch.float64)
        if len(q):
            wanted = -inverse[:, q] @ torch.linalg.solve(inverse[q][:, q], flat[part][q])
            bare = torch.where(out[part], -flat[part], 0.0)
            assert wanted @ fisher @ wanted <= bare @ fisher @ bare
        assert_close(made_up[part], wanted, rtol=1e-4, atol=1e-6)
    assert (made_up != 0).sum() > count


def test_one_pruned_weight_is_the_classical_update():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    blocks = Blocks((rows.T @ rows / 9)[None], 0.01, 5)
    weight = torch.randn(5, generator=generator, dtype=torch.float64)
    inverse = torch.linalg.inv(blocks.damped(0, 1)[0])
    where = torch.tensor([False, False, True, False, False])
    wanted = -weight[2] / inverse[2, 2] * inverse[:, 2]
    assert_close(blocks.compensation(weight, where), wanted)
    assert_close(blocks.inverse_diagonal(), inverse.diagonal())


def test_less_memory_gives_the_same_fisher():
    view = ModelView.open(zoo.build("gpt2"))
    where = allowed(view, Request(), "all")
    big, small = (
        list(fisher_blocks(view, where, FORGET, Estimate(5, 50, 0.1, False, megabytes, 3))) for megabytes in (64, 1)
    )
    assert len(big) == 1 < len(small)
    joined = {site: blocks for group in small for site, blocks in group.items()}
    for site, blocks in big[0].items():
        assert torch.equal(blocks.fisher, joined[site].fisher) and blocks.count == where[site].sum()


def test_a_damping_that_drowns_the_fisher_prunes_the_largest_weights(view):
    """A trap of the published settings: an absolute damping says nothing of how small these gradients are."""
    obs = Obs(share=0.05, gradients=4, damping=1e9, damping_unit="absolute")(view, ASKED)
    size = Magnitude(share=0.05, order="largest")(view, Request())
    assert obs.digest == size.digest
    assert min(obs.notes["damping over mean diagonal"].values()) > 1e3
    assert Obs(share=0.05, gradients=4)(view, ASKED).digest != size.digest


# -- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_a_weight_a_gradient_is_the_published_loop(view, keep):
    edit_of = Greedy(share=0.003, backwards=10**6, keep_weight=0.5, kinds="mlp-out")
    edit = edit_of(view, ASKED if keep else Request(forget=FORGET))
    model = view.copy()
    count = int(0.003 * sum(view.weight(site).numel() for site in OUT))
    assert count > 5 and edit.notes["backwards"] == count
    gone = set()
    for _ in range(count):
        loss = -sum(nll(model, item) for item in FORGET) / len(FORGET)
        if keep:
            loss = 0.5 * loss + 0.5 * sum(nll(model, item) for item in TEXT) / len(TEXT)
        found = gradient(model, loss, OUT)
        scores = [
            (float(model.weight(site)[row, column].detach() * found[site][row, column]), site, row, column)
            for site in OUT for row in range(24) for column in range(37) if (site, row, column) not in gone
        ]  # fmt: skip
        _, site, row, column = max(scores, key=lambda entry: entry[0])
        gone.add((site, row, column))
        with torch.no_grad():
            model.weight(site)[row, column] = 0
    wanted = {(site, *place) for site, mask in pruned(edit).items() for place in map(tuple, mask.nonzero().tolist())}
    assert wanted == gone
    once = Greedy(share=0.003, backwards=1, kinds="mlp-out")(view, Request(forget=FORGET))
    assert once.count == count, "the budget is met whatever the number of gradients"


def test_greedy_raises_the_loss_it_should_raise(view):
    edit = Greedy(share=0.02, backwards=20)(view, ASKED)
    random = Magnitude(share=0.02)(view, Request())
    with random.apply(view), torch.no_grad():
        chance = float(sum(nll(view, item) for item in FORGET)) / len(FORGET)
    assert edit.notes["after"] > edit.notes["before"] + 0.1 and edit.notes["after"] > chance


def test_greedy_ends_where_enough_is_forgotten(view):
    """A trap: the whole budget is spent long after the passages are gone."""
    whole = Greedy(share=0.02, backwards=20)(view, ASKED)
    level = (whole.notes["before"] + whole.notes["after"]) / 2
    some = Greedy(share=0.02, backwards=20, enough=level)(view, ASKED)
    assert some.notes["after"] > level and some.count < whole.count and some.notes["backwards"] < 20
    first = pruned(some)
    assert all(bool((pruned(whole)[site] | ~mask).all()) for site, mask in first.items()), "the same path, cut short"
    with pytest.raises(InputError, match="enough 0"):
        Greedy(enough=0.0)


# -- learned masks -----------------------------------------------------------------------------------------------------


class Straight(torch.autograd.Function):
    """Drops the entries of smallest |s|; the gradient goes through to |s|."""

    @staticmethod
    def forward(ctx, scores, drop):
        ctx.save_for_backward(scores)
        mask = torch.ones(scores.numel(), dtype=torch.float64)
        mask[scores.abs().flatten().argsort(stable=True)[:drop]] = 0
        return mask.view(scores.shape)

    @staticmethod
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0].sign(), None


def test_subnet_is_straight_through_descent_by_torch(view):
    """Written the usual way: masks by an autograd function, a functional call, torch's own SGD."""
    settings = Subnet(share=0.1, epochs=4, lr=0.5, kinds="mlp-out")
    edit = settings(view, Request(forget=FORGET, seed=2))
    where = allowed(view, Request(), "mlp-out")
    scores = {site: found.double().requires_grad_() for site, found in initial_scores(where, 2).items()}
    drop = how_many(0.1, 24 * 37)
    first = {site: Straight.apply(found, drop).detach() == 0 for site, found in scores.items()}
    optimiser = torch.optim.SGD(scores.values(), lr=0.5, momentum=0.9, weight_decay=5e-4)
    for _ in range(4):
        masked = {}
        for site, found in scores.items():
            place, stored = view.place(site), view.parameter(site).detach()
            mask = Straight.apply(found, drop)
            masked[place.parameter] = stored * (mask.T if place.transposed else mask)
        loss = 0.0
        for item in FORGET:
            ids = torch.tensor([item.ids])
            logp = torch.func.functional_call(view.model, masked, (ids,)).logits[0].log_softmax(-1)
            spoken = [logp[len(item.prefix) - 1 + step, token] for step, token in enumerate(item.suffix)]
            loss = loss + sum(spoken) / len(spoken) / len(FORGET)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    last = {site: Straight.apply(found, drop).detach() == 0 for site, found in scores.items()}
    for site, mask in pruned(edit).items():
        assert mask.sum() == drop
        assert (mask != last[site]).sum() <= 2, "but for scores that lie within float32's rounding of each other"
    moved = sum(int((first[site] & ~last[site]).sum()) for site in OUT)
    assert moved > 10 and abs(edit.notes["chosen by training"] - moved) <= 6


def test_the_untrained_mask_deletes_at_random_and_the_notes_say_what_that_does(view):
    edit = Subnet(share=0.3, epochs=0)(view, Request(forget=FORGET, seed=1))
    notes = edit.notes
    assert notes["chosen by training"] == 0 and notes["untrained mask"] == notes["trained mask"] != notes["before"]
    for site, delta in edit.deltas.items():
        mask = initial_scores({site: torch.ones(delta.shape, dtype=torch.bool)}, 1)[site]
        assert float(mask.abs().max()) <= delta.shape[1] ** -0.5
    with edit.apply(view), torch.no_grad():
        after = float(sum(nll(view, item) for item in FORGET)) / len(FORGET)
    assert after == pytest.approx(notes["trained mask"]["forget"], rel=1e-6)
    with torch.no_grad():
        before = float(sum(nll(view, item) for item in FORGET)) / len(FORGET)
    assert notes["before"]["forget"] == pytest.approx(before)


def test_a_batch_without_one_side_is_no_nan(view):
    """A trap: a mean over no rows is not a number, and spreads to every score."""
    assert row_weights(torch.tensor([False, False]), 0.7).tolist() == pytest.approx([0.35, 0.35])
    assert row_weights(torch.tensor([True, True, True]), 0.7).tolist() == pytest.approx([-0.1] * 3)
    assert row_weights(torch.tensor([True, False, False]), 0.7).tolist() == pytest.approx([-0.3, 0.35, 0.35])
    edit = BalancedSubnet(share=0.2, epochs=2, batch_size=2)(view, Request(forget=FORGET[:1], text=TEXT))
    assert edit.notes["batches of one side"] >= 4 and edit.notes["steps"] == 8
    assert all(value == value for value in edit.notes["trained mask"].values())


def test_the_weight_decides_which_side_wins(view):
    found = {
        weight: BalancedSubnet(share=0.3, epochs=20, keep_weight=weight, lr=0.5, mixing="both")(view, ASKED).notes
        for weight in (0.1, 0.9)
    }
    assert found[0.9]["trained mask"]["keep"] < found[0.1]["trained mask"]["keep"] - 0.1
    assert found[0.9]["trained mask"]["forget"] < found[0.1]["trained mask"]["forget"] - 0.1
    assert found[0.1]["trained mask"]["forget"] > found[0.1]["untrained mask"]["forget"]


def test_batches_show_every_row_to_forget_once_an_epoch():
    view = ModelView.open(zoo.build("gpt2"))
    for mixing, steps in (("drawn", 3), ("both", 2)):
        epochs = mixed_batches(view, FORGET, TEXT, size=4, mixing=mixing, seed=0)
        for _ in range(2):
            epoch = next(epochs)
            assert len(epoch) == steps
            shown = [
                tuple(batch.ids[row, : batch.length[row]].tolist())
                for batch, gone in epoch
                for row in gone.nonzero()[:, 0]
            ]
            assert sorted(shown) == sorted(item.ids for item in FORGET)
            assert all(mixing == "drawn" or (~gone).any() for _, gone in epoch)


def test_a_share_of_no_weight_is_refused():
    view = ModelView.open(zoo.build("gpt2"))
    for editor in (Greedy(share=1e-6), Subnet(share=1e-6), Durable(share=1e-6), Obs(share=1e-6, gradients=1)):
        with pytest.raises(InputError, match="ask for more"):
            editor(view, ASKED)


def test_a_round_of_rows_to_keep_may_end_inside_a_batch(view):
    keep = TEXT[:3]  # two batches' shares of two rows each: one of the three comes round again at once
    epochs = mixed_batches(view, FORGET, keep, size=4, mixing="both", seed=0)
    seen = [int((~forgotten).sum()) for _ in range(4) for _, forgotten in next(epochs)]
    assert seen and set(seen) == {2}
