"""Weights with the norms before them folded in: the convention of papers that process a model before they look at it.

A norm gives x̂·γ + β and a map reads it: W(x̂·γ + β) + b. Folded, W·diag(γ) reads x̂ and the bias is b + Wβ: the same
function, other coordinates. The gradient by the folded weight is Σ δ x̂ᵀ, with δ the gradient by what the map puts out,
and is had from x̂ itself: no division by γ, which may be 0, and β, which multiplies no folded weight, stays out. (It is
the raw gradient's columns over γ only where β = 0.) Maps that write into a stream read by norms which take the mean
away are centred: what they write has mean 0, and so has the gradient over their outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from memloc import hooks
from memloc.errors import ModelError
from memloc.gradients.flows import wide
from memloc.sites import Kind, Site
from memloc.view import ModelView

Convention = Literal["raw", "folded"]
WRITERS = (Kind.ATTN_OUT, Kind.MLP_OUT)
"""The maps that write into the residual stream; all others read a norm's output."""


@contextlib.contextmanager
def reading(
    view: ModelView, sites: Sequence[Site], convention: Convention = "raw"
) -> Iterator[Callable[[], dict[Site, Tensor]]]:
    """What the maps of `sites` read in the last forward pass inside the block, asked for after it.

    Yields:
        A function that gives site to `[n, t, in]`; folded, what a norm puts out before its gain and bias.

    Raises:
        ModelError: folded, and the family's row knows no norm before one of the maps.
    """
    norms = {} if convention == "raw" else {s: norm_before(view, s) for s in sites if s.kind not in WRITERS}
    points = {id(norm): hooks.Point(norm, "input", view.block(site.layer)) for site, norm in norms.items()}
    with view.record([site for site in sites if site not in norms]) as entering, hooks.record(points) as streams:

        def found() -> dict[Site, Tensor]:
            normed = {id(norm): view.row.bare_norm(norm, wide(streams[id(norm)])) for norm in norms.values()}
            return {site: normed[id(norms[site])] if site in norms else entering[site] for site in sites}

        yield found


def norm_before(view: ModelView, site: Site) -> nn.Module:
    """The norm whose output the map of `site` reads.

    Raises:
        ModelError: the row names none; the message says what to use.
    """
    path = view.row.norms.get(site.kind)
    if path is None:
        why = f"the row of {view.row.family} names no norm before it (its blocks norm what they write, or it is unset)"
        raise ModelError(f"{site} cannot be folded: {why}; use the raw convention, or add `norms` to its row")
    return view.block(site.layer).get_submodule(path)


@torch.no_grad()
def centres(view: ModelView) -> bool:
    """Whether the norm that reads the stream last takes its mean away: found by arithmetic, a shift changes nothing."""
    probe = torch.linspace(-1, 2, view.width, device=view.device, dtype=view.dtype)[None].square()
    here, moved = view.final_norm(probe), view.final_norm(probe + 3)
    return float((here - moved).abs().max()) < 0.1 * float(here.abs().max())


def centred(view: ModelView, pulled: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    """Gradients by what folded maps put out, [..., out]: their means taken away where the maps are centred."""
    if not centres(view):
        return dict(pulled)
    return {site: pull - pull.mean(-1, keepdim=True) if site.kind in WRITERS else pull for site, pull in pulled.items()}
