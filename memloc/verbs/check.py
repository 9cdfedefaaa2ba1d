"""memloc check: prove that memloc understands a model; print its map."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memloc.command import common
from memloc.methods import LOCALIZERS
from memloc.registry import Registry
from memloc.terminal import Terminal

if TYPE_CHECKING:
    from memloc.sites import Site
    from memloc.view import ModelView


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.add_argument("model", help="checkpoint folder (or hub name)")
    common(parser, "device-map")
    parser.add_argument(
        "--paths",
        type=Path,
        metavar="FILE",
        help="module paths of the model, as editing configurations name them (rewrite_module_tmp and its like): JSON, "
        "or lines 'key: value'",
    )


def run(arguments: argparse.Namespace, terminal: Terminal, tables: Sequence[Registry] = (LOCALIZERS,)) -> None:
    """Prove the model's row; print what it says, and which methods of `tables` can work on the model."""
    from memloc.view import ModelView

    view = ModelView.open(arguments.model, paths=arguments.paths, device_map=arguments.device_map)
    about, maps = _about(view), _maps(view)
    terminal.table("proved by arithmetic on this model", ["", ""], list(about.items()))
    terminal.table("maps of a block", list(maps[0]), [list(entry.values()) for entry in maps])
    terminal.note("neurons are read at the input of mlp.out, heads at the input of attn.out")
    found: dict[str, Any] = {}
    for table in tables:
        reasons = {name: refusal(table[name], view) for name in sorted(table)}
        found[table.noun + "s"] = {name: reason is None or reason for name, reason in reasons.items()}
        shown = [[name, "yes" if reason is None else f"no: {reason}"] for name, reason in reasons.items()]
        terminal.table(f"{table.noun}s that work on it", ["name", ""], shown)
    terminal.result({**about, "maps": maps, **found})


def refusal(method: Any, view: ModelView) -> str | None:
    """Why a method cannot work on models of this family, or None where it can; nothing is run.

    A method that some families rule out tells so by a function of its class, `refuses(view)`.
    """
    asked = getattr(method, "refuses", None)
    reason: str | None = None if asked is None else asked(view)
    return reason


def _about(view: ModelView) -> dict[str, Any]:
    from memloc.sites import Kind

    row = view.row
    about = {
        "model": view.name, "family": row.family, "type": view.config.model_type, "layers": view.layers,
        "width": view.width, "heads": view.heads, "key-value heads": view.kv_heads, "head width": view.head_width,
        "neurons": view.told_neurons, "vocabulary": view.vocab, "context": view.context, "dtype": str(view.dtype),
        "tokenizer": type(view.tokenizer).__name__ if view.tokenizer else None, "digest": view.digest,
        "blocks": row.blocks, "final norm": row.final_norm, "unembedding": row.unembed, "soft cap": view.soft_cap,
        "norms before maps": ", ".join(dict.fromkeys(row.norms.values())) or "none, so maps cannot be folded",
        "norms behind maps": ", ".join(row.added.values()) or None,
        "norms of sums": ", ".join(row.summed.values()) or None,
        "reads": "from left to right" if row.causal else "both ways: a masked language model",
        "row": "found in the order of the model's calls" if row.found else "in the table",
    }  # fmt: skip
    counts = [view.experts(layer) for layer in range(view.layers)]
    if any(counts):
        dense = [str(layer) for layer, count in enumerate(counts) if not count]
        about["experts"] = f"{max(counts)} a block" + (f"; dense blocks: {', '.join(dense)}" if dense else "")
    unembed = view.place(view.sites(Kind.UNEMBED)[0]).parameter
    about["tied"] = ", ".join((unembed, *view.tied(unembed))) if view.tied(unembed) else None
    return about


def _maps(view: ModelView) -> list[dict[str, Any]]:
    from memloc.sites import Kind, Site

    columns = ["kind", "parameter", "weight [out, in]", "stored", "bias", "note"]
    dense = [layer for layer in range(view.layers) if not view.experts(layer)]
    mixed = [layer for layer in range(view.layers) if view.experts(layer)]
    layers = sorted(dense[:1] + mixed[:1])
    sites = [
        Site(layer, kind)
        for kind in (*view.kinds, Kind.MLP_ROUTER)
        for layer in (layers if kind.of_experts or kind is Kind.MLP_ROUTER else layers[:1])
    ]
    return [dict(zip(columns, _map(view, site), strict=True)) for site in sites if view.has(site)]


def _map(view: ModelView, site: Site) -> list[Any]:
    unit = view.units(site)[0]
    place = view.place(unit)
    stored = "[in, out]" if place.transposed else "[out, in]"
    biased = view.has(replace(site, bias=True))
    return [str(site.kind), place.unit, list(view.weight(unit).shape), stored, biased, _note(view, site)]


def _note(view: ModelView, site: Site) -> str | None:
    """What a map shares its parameter with."""
    if view.units(site) != (site,):
        return f"of each of {view.experts(site.layer)} experts"
    return None if view.place(site).rows is None else "part of a fused map"
