"""TransformerLens: the numbers of plain hooks, a model and a bridge left as they were, hook names that resolve."""

import pytest
import torch
import zoo

from memloc import hooks
from memloc.engines import lens
from memloc.engines.names import LensNames
from memloc.engines.twins import twin
from memloc.errors import ModelError
from memloc.localizers.activation import Activation
from memloc.localizers.grad_activation import GradActivation
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.localizers.logit_lens import LogitLens
from memloc.localizers.zero_out import ZeroOut
from memloc.sites import Kind, Site
from memloc.view import ModelView

pytestmark = pytest.mark.xdist_group("transformer-lens")


def handed(family: str):
    """A bridge as a user has one (its model rewritten), and plain hooks on an equal model."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = zoo.build(family)
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    return bridge, ModelView.open(zoo.build(family))


def batch_of(view: ModelView):
    # Of one length: where every key in a sliding window is padding, an attention's result is nobody's.
    return next(iter(view.batches(zoo.passages(ragged=False))))


ELSEWISE = ("falcon_new", "falcon_rw", *zoo.MIXTURES)
"""The library cannot build a bridge of the first (grouped queries in one matrix), and computes the second otherwise;
what it shows of mixtures is told in tests/tiny/test_experts.py."""


@pytest.mark.parametrize("family", [family for family in zoo.CONFIGS if family not in ELSEWISE])
def test_sites_are_recorded_and_replaced_as_by_hooks(family):
    bridge, plain = handed(family)
    view = ModelView.open(bridge, engine="transformer-lens")
    split = {kind for fused in plain.row.fused for kind in fused.kinds}
    kinds = [kind for kind in plain.kinds if kind not in split]
    batch, sites = batch_of(plain), plain.sites(*kinds)
    for side in ("input", "output"):
        with torch.no_grad():
            with plain.record(sites, side=side) as wanted, plain.record_blocks([0, 1], side=side) as streams:
                logits = plain.logits(batch)
            with view.record(sites, side=side) as found, view.record_blocks([0, 1], side=side) as seen:
                told = view.logits(batch)
            torch.testing.assert_close((found, seen, told), (wanted, streams, logits), rtol=1e-5, atol=1e-5)
            ends = []
            for each in (plain, view):
                with each.replace(sites[-3:], lambda _, x: x / 2, side=side), each.replace_blocks([0], lambda _, x: -x):
                    ends.append(each.hidden(batch))
            torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)
            assert float((ends[0] - plain.hidden(batch)).abs().max()) > 0.1


def test_a_family_the_library_computes_otherwise_is_refused():
    bridge, _ = handed("falcon_rw")
    with pytest.raises(ModelError, match=r"L0\.attn\.out: transformer-lens and plain hooks differ .* engine hooks\)$"):
        ModelView.open(bridge, engine="transformer-lens")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gpt_neox", "qwen3"])
def test_methods_find_the_same_by_hook_points(family):
    bridge, plain = handed(family)
    view, passages = ModelView.open(bridge, engine="transformer-lens"), zoo.passages(2)
    for method in (Activation(grain="head"), GradActivation(), GradActivation(grain="layer"), ZeroOut(grain="head"),
                   IntegratedGradients(), LogitLens()):  # fmt: skip
        wanted, found = method(plain, passages), method(view, passages)
        torch.testing.assert_close(dict(found.scores), dict(wanted.scores), rtol=1e-4, atol=1e-5)


def test_a_bridge_by_plain_hooks_is_the_plain_model_again():
    bridge, plain = handed("gpt_neox")
    weights = {name: tensor.clone() for name, tensor in bridge.original_model.named_parameters()}
    tree = [name for name, _ in bridge.original_model.named_modules()]
    view = ModelView.open(bridge)
    assert view.engine.name == "hooks" and view.digest == plain.digest
    assert list(view.model.state_dict()) == list(plain.model.state_dict())
    wanted, found = GradActivation()(plain, zoo.passages(2)), GradActivation()(view, zoo.passages(2))
    torch.testing.assert_close(dict(found.scores), dict(wanted.scores), rtol=1e-5, atol=1e-6)
    assert [name for name, _ in bridge.original_model.named_modules()] == tree
    assert all(torch.equal(weights[name], tensor) for name, tensor in bridge.original_model.named_parameters())
    assert not any(point.fwd_hooks or point.bwd_hooks for point in bridge.hook_dict.values())
    site = Site(1, Kind.MLP_OUT)
    inner = lens.inside(bridge.original_model, "gpt_neox.layers.1.mlp.dense_4h_to_h")
    assert view.parameter(site) is inner.weight  # no second copy of the weights


def test_a_users_model_keeps_its_tree_when_a_bridge_is_built_for_it():
    for family in ("gpt2", "gpt_neox"):
        model = zoo.build(family)
        modules = [(name, type(module)) for name, module in model.named_modules()]
        weights, implementation = [p.clone() for p in model.parameters()], model.config._attn_implementation
        view = ModelView.open(model, engine="transformer-lens")
        GradActivation()(view, zoo.passages(2))
        assert view.model is model and [(name, type(module)) for name, module in model.named_modules()] == modules
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
        assert model.config._attn_implementation == implementation
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_twin_shares_weights_and_not_modules():
    model = zoo.build("llama")
    other = twin(model)
    assert not set(map(id, model.modules())) & set(map(id, other.modules()))
    assert list(map(id, model.parameters())) == list(map(id, other.parameters()))
    ids = torch.arange(7)[None]
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=0, atol=0)
    del model.model.layers[1].mlp._modules["up_proj"]
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj: not in this LlamaForCausalLM"):
        twin(model)


@pytest.mark.parametrize("family", ["gpt_neox"])
def test_an_edit_on_one_side_of_a_fused_map_is_noticed(family):
    """The bridge computes with copies split from it: each side can be edited without the other."""
    path = "gpt_neox.layers.1.attention"
    for engine in ("hooks", "transformer-lens"):
        bridge, _ = handed(family)
        with torch.no_grad():
            lens.inside(bridge.original_model, f"{path}.query_key_value").weight.mul_(1.5)
        with pytest.raises(
            ModelError,
            match=r"L1\.attn\.out: transformer-lens and plain hooks differ by .*one side of a fused map was edited",
        ):
            ModelView.open(bridge, engine=engine)
        bridge, _ = handed(family)
        with torch.no_grad():
            bridge.blocks[1].attn.v.original_component.weight.mul_(1.5)
        with pytest.raises(ModelError, match=r"L1\.attn\.out: transformer-lens and plain hooks differ by"):
            ModelView.open(bridge, engine=engine)


def test_an_edit_after_opening_is_noticed_and_others_are_followed():
    model = zoo.build("gpt_neox")
    plain, view = ModelView.open(model), ModelView.open(model, engine="transformer-lens")
    batch = batch_of(plain)
    with torch.no_grad():
        before = view.logits(batch)
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.mul_(1.5)
        torch.testing.assert_close(view.logits(batch), plain.logits(batch), rtol=1e-5, atol=1e-5)
        assert float((view.logits(batch) - before).abs().max()) > 0.1
        model.gpt_neox.layers[1].attention.query_key_value.weight.mul_(1.5)
        with pytest.raises(
            ModelError, match=r"layers\.1\.attention\.query_key_value\.weight was edited, but the bridge"
        ):
            view.logits(batch)


def test_processed_weights_are_refused():
    bridge, _ = handed("gpt2")
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(
        ModelError, match="in compatibility mode: its weights are folded and no longer the checkpoint's"
    ):
        ModelView.open(bridge)


def test_a_place_that_transformer_lens_runs_past_is_refused():
    bridge, plain = handed("gpt2")
    view = ModelView.open(bridge, engine="transformer-lens")
    past = r"L0\.attn\.q: TransformerLens computes past this place"
    with pytest.raises(ModelError, match=past), view.record([Site(0, Kind.ATTN_Q)]):
        view.hidden(batch_of(plain))


def test_a_method_that_listens_on_modules_itself_is_served_by_the_plain_model():
    bridge, plain = handed("gpt2")
    view, batch = ModelView.open(bridge, engine="transformer-lens"), batch_of(plain)
    site = Site(0, Kind.MLP_OUT)
    with torch.no_grad(), view.record([site]) as seen, hooks.record({0: hooks.Point(view.block(0), "output")}) as found:
        view.hidden(batch)
    with torch.no_grad(), plain.record([site]) as wanted, plain.record_blocks([0]) as stream:
        plain.hidden(batch)
    torch.testing.assert_close((seen, found), (wanted, stream), rtol=1e-5, atol=1e-5)


def test_what_a_visitor_raises_comes_out_and_leaves_nothing_behind():
    bridge, plain = handed("gpt2")
    view, batch = ModelView.open(bridge, engine="transformer-lens"), batch_of(plain)
    mine = []
    bridge.hook_dict["blocks.0.mlp.out.hook_in"].add_hook(lambda tensor, hook: mine.append(1))

    def refuse(_, tensor):
        raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"), view.replace([Site(0, Kind.MLP_OUT)], refuse):
        view.logits(batch)
    reached = False
    with torch.no_grad(), view.record([Site(0, Kind.MLP_OUT)], stop=True):
        view.logits(batch)
        reached = True
    assert not reached and len(mine) >= 2
    assert sum(len(point.fwd_hooks) for name, point in bridge.hook_dict.items()) >= 1
    assert len(bridge.hook_dict["blocks.0.mlp.out.hook_in"].fwd_hooks) == 1


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3"])
def test_hook_names_resolve_to_the_same_tensors(family):
    bridge, plain = handed(family)
    names, batch = LensNames(gated=family == "qwen3"), batch_of(plain)
    _, cache = bridge.run_with_cache(batch.ids)
    for side in ("input", "output"):
        for site in (*plain.sites(*plain.kinds), *plain.sites(Kind.EMBED, Kind.UNEMBED)):
            with torch.no_grad(), plain.record([site], side=side) as seen:
                plain.logits(batch)
            wanted = seen[site]
            if side == "output" and plain.place(site).rows is not None:
                rows = plain.place(site).rows
                wanted = wanted[..., rows if isinstance(rows, slice) else list(rows)]
            found = cache[names.name(site, side)]
            torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-5)
    for layer in range(plain.layers):
        with torch.no_grad(), plain.record_blocks([layer]) as streams:
            plain.logits(batch)
        torch.testing.assert_close(cache[names.block(layer)], streams[layer], rtol=1e-5, atol=1e-5)
    for hook in ("mlp.hook_pre", "mlp.hook_post", "attn.hook_z", "attn.hook_v", "attn.o.hook_in", "mlp.out.hook_in"):
        site, side = names.parse(f"blocks.1.{hook}")
        torch.testing.assert_close(cache[f"blocks.1.{hook}"], cache[names.name(site, side)])
