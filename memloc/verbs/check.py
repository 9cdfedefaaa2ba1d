"""memloc check: prove that memloc understands a model; print its map."""

from __future__ import annotations

import argparse

from memloc.command import open_view
from memloc.terminal import Terminal


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.add_argument("model", help="checkpoint folder (or hub name)")


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Prove the model's row and print what it says."""
    from memloc.sites import Kind, Site

    view = open_view(arguments)
    about = {
        "model": view.name, "family": view.row.family, "type": view.config.model_type, "layers": view.layers,
        "width": view.width, "heads": view.heads, "key-value heads": view.kv_heads, "head width": view.head_width,
        "neurons": view.neurons, "vocabulary": view.vocab, "context": view.context, "dtype": str(view.dtype),
        "tokenizer": type(view.tokenizer).__name__ if view.tokenizer else None, "digest": view.digest,
    }  # fmt: skip
    unembed = view.place(view.sites(Kind.UNEMBED)[0]).parameter
    about["tied"] = ", ".join((unembed, *view.tied(unembed))) if view.tied(unembed) else None
    maps = []
    for kind in view.kinds:
        place = view.place(Site(0, kind))
        biased = view.has(Site(0, kind, bias=True))
        stored = "[in, out]" if place.transposed else "[out, in]"
        rows = None if place.rows is None else "part of a fused map"
        maps.append([str(kind), place.parameter, list(view.weight(Site(0, kind)).shape), stored, biased, rows])
    terminal.table("proved by arithmetic on this model", ["", ""], list(about.items()))
    columns = ["kind", "parameter at layer 0", "weight [out, in]", "stored", "bias", "note"]
    terminal.table("maps of a block", columns, maps)
    terminal.note("neurons are read at the input of mlp.out, heads at the input of attn.out")
    terminal.result({**about, "maps": [dict(zip(columns, row, strict=True)) for row in maps]})
