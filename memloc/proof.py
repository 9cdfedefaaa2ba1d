"""The proof of an architecture's row: arithmetic on one small forward, in whichever dtype the model has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from memloc import hooks
from memloc.batches import pad
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

    Proved: every map puts out input @ weight.T + bias; heads are read as the values they are at position 0 (where
    attention can see one token only); each block adds its two maps' outputs to its input; maps read the norms the row
    names, whose gains are stored as it says; the logits are the unembedded final norm.

    Raises:
        ModelError: names the first place that differs, by how much, and what to look at.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(6, view.context or 6)
    batch = pad(torch.randint(view.vocab, (2, length), generator=generator).tolist(), device=view.device)
    sites = view.sites(*view.kinds)
    layers = range(view.layers)
    with (
        torch.no_grad(),
        view.record(sites) as inputs,
        view.record(sites, side="output") as outputs,
        view.record_blocks(layers, side="input") as before,
        view.record_blocks(layers) as after,
        hooks.record(_norms(view)) as normed,
    ):
        logits = view.logits(batch)
    _all_called(sites, inputs, normed, view)
    for site in sites:
        _prove_map(view, site, inputs[site], _own(view, site, outputs))
        _prove_norm(view, site, inputs[site], normed)
    for layer in layers:
        _prove_values(view, layer, inputs, outputs)
        _prove_gate(view, layer, inputs, outputs)
        with torch.no_grad():
            parts = [
                view.added(site, outputs[site]) for site in (Site(layer, k) for k in (Kind.ATTN_OUT, Kind.MLP_OUT))
            ]
        added = before[layer] + parts[0] + parts[1]
        _same(
            f"L{layer}",
            "the block's output",
            added,
            after[layer],
            "input + attention + mlp; check attn.out, mlp.out and added",
        )
    with torch.no_grad():
        spoken = view.unembed(view.final_norm(after[view.layers - 1]))
    _same("unembed", "the logits", spoken, logits, "the unembedded final norm; check final_norm and unembed")


def _prove_map(view: ModelView, site: Site, entering: Tensor, leaving: Tensor) -> None:
    weight = view.weight(site).detach()
    if entering.shape[-1] != weight.shape[1]:
        raise ModelError(
            f"{site}: input has {entering.shape[-1]} entries, weight is {list(weight.shape)}; check stored_in_out"
        )
    made = entering.to(torch.float64) @ weight.to(torch.float64).T
    if view.has(Site(site.layer, site.kind, bias=True)):
        made = made + view.weight(Site(site.layer, site.kind, bias=True)).detach().to(torch.float64)
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
    return any(view.row.norms.get(kind) == path for kind in view.kinds)


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


def _all_called(
    sites: Sequence[Site], inputs: Mapping[Site, Tensor], normed: Mapping[NormSide, Tensor], view: ModelView
) -> None:
    """What the model computes without calling its module is seen by no hook."""
    for site in sites:
        path = view.row.norms.get(site.kind)
        if site not in inputs or (path is not None and (site.layer, path, "output") not in normed):
            what = view.row.path(site.kind) if site not in inputs else path
            raise ModelError(
                f"{site}: {what} is not called in a forward pass, so nothing can be read there; check maps"
            )


def _prove_gate(view: ModelView, layer: int, inputs: Mapping[Site, Tensor], outputs: Mapping[Site, Tensor]) -> None:
    """A gated neuron is a function of the gate times what `mlp.in` puts out: which of the two is which."""
    gate, into, out = (Site(layer, kind) for kind in (Kind.MLP_GATE, Kind.MLP_IN, Kind.MLP_OUT))
    if not view.has(gate):
        return
    opened, passed, neurons = _own(view, gate, outputs), _own(view, into, outputs), inputs[out]
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
    rows = view.place(site).rows
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
