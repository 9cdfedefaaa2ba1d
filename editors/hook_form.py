"""An edit as hooks: the model answers as if it were edited, and no weight is touched.

For trying an edit, for engines that run the model elsewhere, and as the other way to the same answer: what an edit
makes of a model must be what its hooks make of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from editors.deltas import Delta, LowRank
from memloc.errors import InputError
from memloc.sites import Site
from memloc.view import ModelView


@contextlib.contextmanager
def as_if(view: ModelView, deltas: Mapping[Site, Delta]) -> Iterator[None]:
    """While it lasts, every map of `deltas` puts out W x + b + Δ x (+ Δb) instead of W x + b.

    Equal to the applied edit up to rounding: here the sum is made behind the map, there the cast inside it, so in
    float16 and bfloat16 both differ by what the cast to the stored dtype loses.

    Args:
        view: the model, run by any engine that can read and replace its maps' sides.
        deltas: such as `edit.deltas`; those of one fused map may come apart.

    Raises:
        InputError: a site outside the blocks (embeddings are looked up, not multiplied).

    Cost: O(rank) for each output of a low-rank delta; for any other form a second product as large as the map's own,
    with the delta in memory in full.
    """
    for site in deltas:
        if not (site.kind.in_block and site.kind.is_map):
            raise InputError(f"{site}: only maps inside blocks can be changed by hooks; apply the edit instead")
    sites = sorted({Site(site.layer, site.kind) for site in deltas})
    parts = {site: _factors(deltas[site], view) for site in deltas if not site.bias}
    rows = {site: view.place(site).rows for site in sites}

    def change(site: Site, output: Tensor) -> Tensor:
        more = output.new_zeros(()).float()
        if site in parts:
            read = seen[site].to(parts[site][0])
            for factor in parts[site]:
                read = read @ factor.T
            more = read
        bias = Site(site.layer, site.kind, bias=True)
        if bias in deltas:
            more = more + deltas[bias].dense().to(output.device)
        if rows[site] is None:
            return (output + more).to(output.dtype)
        # A fused map puts out several sites side by side; only this one's columns move.
        where = rows[site] if isinstance(rows[site], slice) else list(rows[site])  # type: ignore[arg-type]
        whole = output.clone()
        whole[..., where] = (whole[..., where] + more).to(output.dtype)
        return whole

    with view.record(sites, grad=True) as seen, view.replace(sites, change, side="output"):
        yield


def _factors(delta: Delta, view: ModelView) -> tuple[Tensor, ...]:
    """What an input row is multiplied by, one after the other, each `[out, in]`."""
    if isinstance(delta, LowRank):
        factors: tuple[Tensor, ...] = (delta.right, delta.left)
    else:
        factors = (delta.dense(),)
    exact = view.weight(Site(0, next(iter(view.kinds)))).dtype.itemsize > 4
    return tuple((factor.double() if exact else factor.float()).to(view.device) for factor in factors)
