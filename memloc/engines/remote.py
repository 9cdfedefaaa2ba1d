"""Hosted models: what passes places of a model that runs elsewhere, by nnsight's remote traces.

A hosted model has no weights here, so it is no `ModelView`, and nothing is proved. Reading is what can be done: a
function of this process cannot replace anything there, and no gradient comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memloc import hooks
from memloc.architectures import row_for
from memloc.batches import Batch
from memloc.engines import tracing
from memloc.engines.names import NnsightNames
from memloc.errors import InputError, ModelError
from memloc.hooks import Side
from memloc.sites import Kind, Site

ORDER = (Kind.ATTN_Q, Kind.ATTN_K, Kind.ATTN_V, Kind.ATTN_OUT, Kind.MLP_GATE, Kind.MLP_IN, Kind.MLP_OUT)
"""A block's maps as they are run; what reads attention and MLP side by side may differ."""


def record(
    model: Any,
    batch: Batch,
    sites: Sequence[Site],
    *,
    side: Side = "input",
    grad: bool = False,
    remote: bool | str = True,
) -> tuple[dict[Site, Tensor], Tensor]:
    """What flows into (or out of) `sites` of a model that runs elsewhere, and the logits.

    Args:
        model: an nnsight `TransformersModel`, loaded or not.
        batch: token rows; only they and the trace's few lines travel.
        sites: where to read, of attention's and the MLP's maps.
        side: which side of them.
        grad: refused: no gradient crosses.
        remote: True for the configured host, "local" to run the same path, serialised, in this process.

    Returns:
        Site to [n, t, width], and logits [n, t, v], on the host's terms of dtype.

    Raises:
        InputError: gradients, a site the family lacks, or a model that nnsight cannot send.
        ModelError: no row for the family.
    """
    if grad:
        raise InputError("gradients do not come back from a remote model; load it here, or take a forward-only method")
    if not tracing.is_nnsight(model) or not hasattr(model, "to_model_key"):
        raise InputError("remote reading needs an nnsight TransformersModel opened by its hub name or folder")
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError("this nnsight model carries no config, so its family is not known")
    row = row_for(config)
    ordered = sorted(set(sites), key=lambda site: (site.layer, ORDER.index(site.kind)))
    names = [NnsightNames(row).name(site, side) for site in ordered]
    paths = [name.rpartition(".")[0].replace("[", ".").replace("]", "") for name in names]
    save = tracing.library().save
    inputs = {"input_ids": batch.ids, "attention_mask": torch.ones_like(batch.ids), "use_cache": False}
    entering = side == "input"
    with model.trace(remote=remote, **inputs):
        envoys = [model.get(path) for path in paths]
        seen = save([envoy.input if entering else envoy.output for envoy in envoys])
        logits = save(model.output.logits)
    return dict(zip(ordered, map(hooks.first, seen), strict=True)), logits
