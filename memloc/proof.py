"""The proof of an architecture's row: arithmetic on one small forward, in whichever dtype the model has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from memloc import hooks
from memloc.batches import Batch, pad
from memloc.errors import ModelError
from memloc.sites import Kind, Site

if TYPE_CHECKING:
    from memloc.view import ModelView

NormSide = tuple[int, str, hooks.Side]
"""Layer and path of a norm, and which side of it."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far an output may be from input @ weight.T + bias, relative to its largest entry."""


def prove_row(view: ModelView) -> None:
    """Check by arithmetic, on one forward of two short random rows, that the row tells the truth about this model.

    Proved: every map puts out input @ weight.T + bias (experts' gates and `mlp.in` only for tokens sent to them; their
    output maps side by side for all tokens, from neurons times the router's weights); heads are read as the values they
    are at position 0, where attention can see one token only (where tokens hear both ways, in rows of one token, and it
    is shown that the first hears the last); each block adds its two maps' outputs to its input; maps
    read the norms the row names, whose gains are stored as it says; the logits are the unembedded final norm.

    Raises:
        ModelError: names the first place that differs, by how much, and what to look at.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(6, view.context or 6)
    batch = pad(torch.randint(view.vocab, (2, length), generator=generator).tolist(), device=view.device)
    sites = view.sites(*view.kinds, Kind.MLP_ROUTER)
    layers = range(view.layers)
    with (
        torch.no_grad(),
        view.record(sites) as inputs,
        view.record(sites, side="output") as outputs,
        view.record_blocks(layers, side="input") as before,
        view.record_blocks(layers) as after,
        view.record_routing(layers) as routed,
        hooks.record(_norms(view)) as normed,
    ):
        logits = _logits(view, batch)
    _all_called(sites, inputs, normed, view)
    for site in sites:
        _prove_map(view, site, inputs[site], _own(view, site, outputs), _sent(view, site, routed))
        _prove_norm(view, site, inputs[site], normed)
    for layer in layers:
        if view.row.causal:
            _prove_values(view, layer, inputs, outputs)
        _prove_gate(view, layer, inputs, outputs, routed)
        with torch.no_grad():
            added = before[layer]
            for site in (Site(layer, Kind.ATTN_OUT), Site(layer, Kind.MLP_OUT)):
                added = view.joined(site, added, outputs[site])
        _same(
            f"L{layer}",
            "the block's output",
            added,
            after[layer],
            "input + attention + mlp; check attn.out, mlp.out, added and summed",
        )
    if not view.row.causal:
        _prove_alone(view, batch)
        _prove_both_ways(view, batch)
    with torch.no_grad():
        spoken = view.unembed(view.final_norm(after[view.layers - 1]))
    _same("unembed", "the logits", spoken, logits, "the unembedded final norm; check final_norm and unembed")
    if not view.row.causal:
        with torch.no_grad():
            spoken = view.unembed(view.hidden(batch))
        _same("hidden", "the logits", spoken, logits, "what is unembedded; check transform")


def _logits(view: ModelView, batch: Batch) -> Tensor:
    try:
        return view.logits(batch)
    except RuntimeError as error:
        if view.row.experts is None:
            raise
        why = " ".join(str(error).split())[:120]
        raise ModelError(f"{view.name}: its own forward pass fails ({why}); a grouped product of experts takes no "
                         "float64 and no odd sizes: model.set_experts_implementation('eager')") from error  # fmt: skip


def _sent(view: ModelView, site: Site, routed: Mapping[int, Tensor]) -> Tensor | None:
    """The router's weight of every neuron, [n, t, neurons], where the site's map puts out experts' neurons."""
    if site.kind not in (Kind.MLP_GATE, Kind.MLP_IN) or site.layer not in routed:
        return None
    return routed[site.layer].repeat_interleave(view.widths[site.layer] // view.experts(site.layer), -1)


def _prove_map(view: ModelView, site: Site, entering: Tensor, leaving: Tensor, sent: Tensor | None) -> None:
    weight = view.weight(site).detach()
    if entering.shape[-1] != weight.shape[1]:
        raise ModelError(
            f"{site}: input has {entering.shape[-1]} entries, weight is {list(weight.shape)}; check stored_in_out"
        )
    made = entering.to(torch.float64) @ weight.to(torch.float64).T
    if view.has(Site(site.layer, site.kind, bias=True)):
        made = made + view.weight(Site(site.layer, site.kind, bias=True)).detach().to(torch.float64)
    made = made if sent is None else made * (sent != 0)
    _same(str(site), "output", made, leaving, "input @ weight.T; check stored_in_out and the paths")


def _norms(view: ModelView) -> dict[NormSide, hooks.Point]:
    """What flows into and out of every norm the row names."""
    places = {(layer, path) for layer in range(view.layers) for path in view.row.norms.values() if _reads(view, path)}
    sides: tuple[hooks.Side, ...] = ("input", "output")
    return {
        (layer, path, side): view.point(Site(layer, Kind.MLP_OUT), path, side)
        for layer, path in places
        for side in sides
    }


def _reads(view: ModelView, path: str) -> bool:
    return any(view.row.norms.get(kind) == path for kind in (*view.kinds, Kind.MLP_ROUTER))


def _prove_norm(view: ModelView, site: Site, entering: Tensor, seen: Mapping[NormSide, Tensor]) -> None:
    path = view.row.norms.get(site.kind)
    if path is None:
        return
    found = seen[site.layer, path, "output"]
    _same(str(site), "input", found, entering, f"what {path} puts out; check norms")
    norm, whole = view.block(site.layer).get_submodule(path), f"{view.row.blocks}.{site.layer}.{path}"
    stored = {name: view.values(f"{whole}.{name}").detach().double() for name, _ in norm.named_parameters()}
    gain = stored["weight"] + view.row.norm_offset if "weight" in stored else 1.0
    plain = view.row.bare_norm(norm, seen[site.layer, path, "input"].to(torch.float64))
    made = plain * gain + stored.get("bias", 0.0)
    # Some norms are float32 in every dtype.
    _same(f"L{site.layer}.{path}", "output", made, found, "its bare form, gain and bias; check norm_offset", least=1e-6)


def _prove_values(view: ModelView, layer: int, inputs: Mapping[Site, Tensor], outputs: Mapping[Site, Tensor]) -> None:
    value = Site(layer, Kind.ATTN_V)
    made = _own(view, value, outputs)[:, 0]
    if made.shape[1] % view.kv_heads or view.heads % view.kv_heads:
        raise ModelError(
            f"{value}: {made.shape[1]} values in {view.kv_heads} groups for {view.heads} heads; check fused"
        )
    groups = view.heads // view.kv_heads
    made = made.reshape(len(made), view.kv_heads, -1).repeat_interleave(groups, 1).flatten(1)
    heads = inputs[Site(layer, Kind.ATTN_OUT)][:, 0]
    if made.shape != heads.shape:
        raise ModelError(f"{value}: {made.shape[1]} values for {heads.shape[1]} head entries; check fused and head_dim")
    _same(str(value), "values at position 0", made, heads, "what the heads put out; check the fused layout")


def _prove_alone(view: ModelView, batch: Batch) -> None:
    """Heads are read as their values where a row has one token, so that attention has nothing to choose from."""
    values, outs = view.sites(Kind.ATTN_V), view.sites(Kind.ATTN_OUT)
    alone = pad(batch.ids[:, :1].tolist(), device=view.device)
    with torch.no_grad(), view.record(outs) as inputs, view.record(values, side="output") as outputs:
        view.logits(alone)
    for layer in range(view.layers):
        _prove_values(view, layer, inputs, outputs)


def _prove_both_ways(view: ModelView, batch: Batch) -> None:
    """The first token hears the last, in the first block already."""
    other = batch.ids.clone()
    other[:, -1] = (other[:, -1] + 1) % view.vocab
    heard = []
    for ids in (batch.ids, other):
        with torch.no_grad(), view.record([Site(0, Kind.ATTN_OUT)]) as mixed:
            view.logits(replace(batch, ids=ids))
        heard.append(mixed[Site(0, Kind.ATTN_OUT)][:, 0])
    if torch.equal(*heard):
        raise ModelError(f"{view.row.family}: the first token does not hear the last, so the model reads from left to "
                         "right; check causal (memloc/architectures.py)")  # fmt: skip


def _all_called(
    sites: Sequence[Site], inputs: Mapping[Site, Tensor], normed: Mapping[NormSide, Tensor], view: ModelView
) -> None:
    """What the model computes without calling its module is seen by no hook."""
    for site in sites:
        path = view.row.norms.get(site.kind)
        if site not in inputs or (path is not None and (site.layer, path, "output") not in normed):
            what = view.path(site) if site not in inputs else path
            raise ModelError(
                f"{site}: {what} is not called in a forward pass, so nothing can be read there; check maps"
            )


def _prove_gate(
    view: ModelView,
    layer: int,
    inputs: Mapping[Site, Tensor],
    outputs: Mapping[Site, Tensor],
    routed: Mapping[int, Tensor],
) -> None:
    """A gated neuron is a function of the gate times what `mlp.in` puts out: which of the two is which.

    An expert's is that times the router's weight.
    """
    gate, into, out = (Site(layer, kind) for kind in (Kind.MLP_GATE, Kind.MLP_IN, Kind.MLP_OUT))
    if not view.has(gate):
        return
    opened, passed, neurons = _own(view, gate, outputs), _own(view, into, outputs), inputs[out]
    sent = _sent(view, into, routed)
    passed = passed if sent is None else passed * sent.to(passed.dtype)
    allowed = TOLERANCE.get(neurons.dtype, 1e-4) * max(1.0, float(neurons.abs().max()))
    plain = [module for module in view.block(layer).modules() if not any(True for _ in _contents(module))]
    for module in plain:
        with torch.no_grad(), contextlib.suppress(TypeError):
            made = module(opened) * passed
            if made.shape == neurons.shape and float((made - neurons).abs().max()) <= allowed:
                return
    raise ModelError(f"{gate}: neurons are no function of the gate times mlp.in; check mlp.gate, mlp.in and "
                     "their layout (memloc/architectures.py)")  # fmt: skip


def _contents(module: nn.Module) -> Iterator[object]:
    yield from module.children()
    yield from module.parameters()
    yield from module.buffers()


def _own(view: ModelView, site: Site, outputs: Mapping[Site, Tensor]) -> Tensor:
    """What the site's map put out, of a shared matrix its own part."""
    rows = view.place(site).shown
    if rows is None:
        return outputs[site]
    return outputs[site][..., rows if isinstance(rows, slice) else list(rows)]


def _same(place: str, what: str, made: Tensor, found: Tensor, hint: str, *, least: float = 0.0) -> None:
    if made.shape != found.shape:
        raise ModelError(f"{place}: {what} is {list(found.shape)}, not {list(made.shape)} as {hint} "
                         "(memloc/architectures.py)")  # fmt: skip
    scale = float(found.abs().max()) or 1.0
    gap = float((made.to(torch.float64) - found.to(torch.float64)).abs().max())
    if not gap <= max(least, TOLERANCE.get(found.dtype, 1e-4)) * scale:
        raise ModelError(f"{place}: {what} differs by {gap:.2g} from {hint} (memloc/architectures.py)")
