"""nnsight: the numbers of plain hooks, a process and a model left as they were, names that resolve, hosted models."""

import contextlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import zoo

from memloc.engines import remote, tracing
from memloc.engines.names import LensNames, NnsightNames, exported
from memloc.errors import InputError, ModelError, UnknownName
from memloc.localizers.activation import Activation
from memloc.localizers.grad_activation import GradActivation
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.localizers.zero_out import ZeroOut
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView

pytestmark = pytest.mark.xdist_group("nnsight")
ROOT = Path(__file__).parents[2]


def opened(family: str) -> tuple[ModelView, ModelView]:
    """The same model by plain hooks, and handed over as an nnsight model and run in traces."""
    model = zoo.build(family)
    return ModelView.open(model), ModelView.open(tracing.library().NNsight(model), engine="nnsight")


def batch_of(view: ModelView):
    # Of one length: what stands at padding is nobody's, and differs with the mask given.
    return next(iter(view.batches(zoo.passages(ragged=False))))


@pytest.mark.parametrize("family", [family for family in zoo.CONFIGS if family not in zoo.MIXTURES])
def test_every_site_is_recorded_as_by_hooks(family):
    plain, view = opened(family)
    batch, sites = batch_of(plain), plain.sites(*plain.kinds)
    for side in ("input", "output"):
        with torch.no_grad():
            with plain.record(sites, side=side) as wanted, plain.record_blocks(range(plain.layers)) as streams:
                logits = plain.logits(batch)
            with view.record(sites, side=side) as found, view.record_blocks(range(plain.layers)) as seen:
                told = view.logits(batch)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen, streams, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(told, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gpt_neox", "qwen3"])
def test_methods_find_the_same_by_traces(family):
    """Recording, replacing and gradients, as methods use them; one passage at a time and all at once."""
    plain, view = opened(family)
    passages = zoo.passages(2)
    for method in (Activation(grain="head"), GradActivation(), GradActivation(grain="component"), ZeroOut(grain="head"),
                   IntegratedGradients()):  # fmt: skip
        wanted, found = method(plain, passages), method(view, passages)
        torch.testing.assert_close(dict(found.scores), dict(wanted.scores), rtol=1e-4, atol=1e-5)
        assert any(scores.abs().max() > 0 for scores in wanted.scores.values())


def test_a_replaced_stream_changes_the_same_and_a_later_look_sees_it():
    plain, view = opened("gpt_neo")
    batch, site = batch_of(plain), Site(1, Kind.MLP_OUT)
    ends = []
    for each in (plain, view):
        with (
            torch.no_grad(),
            each.record([site]) as before,
            each.replace([site], lambda _, tensor: 2 * tensor),
            each.record([site]) as after,
            each.replace_blocks([0], lambda _, tensor: tensor - 1),
        ):
            ends.append(each.hidden(batch))
        torch.testing.assert_close(after[site], 2 * before[site])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert float((plain.hidden(batch) - ends[0]).abs().max()) > 0.1


def test_a_recording_that_stops_leaves_early_and_what_a_visitor_raises_comes_out_as_it_was():
    plain, view = opened("gpt2")
    batch, site = batch_of(plain), Site(0, Kind.MLP_OUT)
    reached = False
    with torch.no_grad(), view.record([site], stop=True) as seen:
        view.logits(batch)
        reached = True
    assert not reached and seen[site].shape[-1] == plain.neurons

    def refuse(_, tensor):
        raise InputError("not this one")

    with pytest.raises(InputError, match=r"^not this one$"), view.replace([site], refuse):
        view.logits(batch)
    with torch.no_grad():
        torch.testing.assert_close(view.logits(batch), plain.logits(batch))


def test_the_engine_runs_traces_and_not_the_model_alone(monkeypatch):
    """Equal numbers would also come from an engine that did nothing of its own."""
    plain, view = opened("gpt2")
    traces = []
    envoy = tracing.library().Envoy
    trace = envoy.trace
    monkeypatch.setattr(envoy, "trace", lambda *given, **more: (traces.append(1), trace(*given, **more))[1])
    with monkeypatch.context() as inner:
        inner.setattr("memloc.hooks.visiting", lambda *_: contextlib.nullcontext())
        with view.record([Site(0, Kind.MLP_OUT)]) as seen:
            view.hidden(batch_of(plain))
    assert traces == [1] and len(seen) == 1


def test_the_users_model_is_left_as_it_was():
    model = zoo.build("gpt_neox")
    names, weights = list(model.state_dict()), [p.clone() for p in model.parameters()]
    view = ModelView.open(model, engine="nnsight")
    GradActivation()(view, zoo.passages(2))
    assert view.model is model and list(model.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_engine_can_be_chosen_against_what_was_handed_over():
    model = tracing.library().NNsight(zoo.build("gpt2"))
    view = ModelView.open(model)
    assert view.engine.name == "hooks" and view.model is model._module
    with pytest.raises(UnknownName, match=r"no engine called 'jax'; engines: hooks, nnsight, transformer-lens"):
        ModelView.open(zoo.build("gpt2"), engine="jax")


def test_paths_resolve_to_the_same_tensors():
    for family in ("gpt2", "gpt_neox", "llama"):
        plain, view = opened(family)
        batch, names = batch_of(plain), NnsightNames(plain.row, plain.head_width)
        for site in plain.sites(Kind.ATTN_OUT, Kind.MLP_IN, Kind.MLP_OUT)[3:6]:
            for side in ("input", "output"):
                path = names.name(site, side)
                assert names.parse(path) == names.parse(f"model.{path}") == (site, side)
                with torch.no_grad(), plain.record([site], side=side) as wanted:
                    plain.logits(batch)
                model, kept = view.engine.traced, {}
                with torch.no_grad(), model.trace(input_ids=batch.ids, attention_mask=batch.mask.long()):
                    kept["seen"] = eval(f"model.{path}")
                torch.testing.assert_close(kept["seen"], wanted[site], rtol=1e-5, atol=1e-5)


def test_a_hosted_model_is_read_by_the_path_that_is_sent(tiny_lab):
    """nnsight's own dry run: the trace is serialised, read back and run in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tracing.library().TransformersModel(str(tiny_lab), task="text-generation", dispatch=True)
        plain = ModelView.open(tiny_lab)
        batch = batch_of(plain)
        sites = plain.sites(Kind.MLP_OUT, Kind.ATTN_OUT)
        with torch.no_grad(), plain.record(sites) as wanted:
            logits = plain.logits(batch)
        found, told = remote.record(model, batch, list(reversed(sites)), remote="local")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(told, logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="gradients do not come back from a remote model"):
        remote.record(model, batch, sites, grad=True)
    with pytest.raises(InputError, match="needs an nnsight TransformersModel"):
        remote.record(plain.model, batch, sites)


def test_a_model_without_weights_here_is_refused():
    with torch.device("meta"):
        model = type(zoo.build("gpt2"))(zoo.build("gpt2").config)
    with pytest.raises(ModelError, match="has no weights here; open it with dispatch=True"):
        ModelView.open(tracing.library().NNsight(model))


def test_the_process_is_not_polluted_and_nothing_is_imported_early():
    code = """
import sys, os
import torch
import memloc.engines, memloc.view, memloc.engines.names, memloc.engines.opening
assert not {'nnsight', 'transformer_lens'} & set(sys.modules)
torch.manual_seed(0)
w = torch.randn(3, requires_grad=True)
(w ** 2).sum().backward()
before, environ = w.grad.clone(), dict(os.environ)
from memloc.engines import tracing
tracing.library()
assert 'nnsight' in sys.modules and not hasattr(3, 'save') and not hasattr('x', 'save')
assert dict(os.environ) == environ
w.grad = None
(w ** 2).sum().backward()
assert torch.equal(w.grad, before)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(
    ("engine", "package", "open_it"),
    [("nnsight", "nnsight", "nnsight"), ("transformer-lens", "transformer_lens", "transformer-lens")],
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, engine, package, open_it):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    if engine == "nnsight":
        monkeypatch.delitem(sys.modules, package)
        monkeypatch.setattr("builtins.__import__", _without(package))
    with pytest.raises(InputError, match=f"the engine {engine} needs a package; pip install {open_it}"):
        ModelView.open(zoo.build("gpt2"), engine=engine)


def _without(package: str):
    real = __import__

    def importing(name, *rest, **more):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest, **more)

    return importing


def test_a_localization_is_said_in_both_languages():
    plain = ModelView.open(zoo.build("qwen3"))
    passages = zoo.passages(2)
    heads = Activation(grain="head")(plain, passages).top(2)
    neurons = Activation()(plain, passages).top(2)
    lens, paths = LensNames(), NnsightNames(plain.row, plain.head_width)
    for chosen, grain in ((heads, Grain.HEAD), (neurons, Grain.NEURON)):
        for one, other in zip(exported(chosen, lens), exported(chosen, paths), strict=True):
            assert lens.parse(one.name) == paths.parse(other.name) == (one.site, "input")
            with torch.no_grad(), plain.record([one.site]) as seen:
                plain.hidden(batch_of(plain))
            whole = seen[one.site]
            apart = whole.view(*whole.shape[:2], plain.heads, -1) if grain is Grain.HEAD else whole
            names = {"apart": apart, "whole": whole}
            torch.testing.assert_close(eval(f"apart{one.index}", names), eval(f"whole{other.index}", names))


def test_show_prints_names(tmp_path, tiny_lab, capsys):
    from editors.cli import main

    view = ModelView.open(tiny_lab)
    Activation()(view, zoo.passages(2)).save(tmp_path / "localization.safetensors")
    file = str(tmp_path / "localization.safetensors")
    assert not main(["show", file, "--top", "3", "--names", "transformer-lens", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert len(told["places"]) == 3 and told["places"][0]["name"].endswith("mlp.hook_post")
    assert not main(["show", file, "--top", "3", "--names", "nnsight", "--model", str(tiny_lab), "--json"])
    first = json.loads(capsys.readouterr().out)["places"][0]
    assert NnsightNames(view.row).parse(first["name"])[0] == Site.parse(first["place"])
    assert main(["show", file, "--names", "nnsight"]) == 2
    assert "add --model FOLDER" in capsys.readouterr().err
