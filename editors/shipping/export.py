"""Edits as others take them: a PEFT LoRA adapter, or a whole checkpoint with its model card.

An adapter keeps the factors an edit of low rank holds: `lora_B` is its left one, `lora_A` its right one, and alpha is
the rank, so the scale is 1 wherever it is read (vLLM, which knows one alpha and one rank for all modules, too). Edits
of query, key or value in a fused matrix become terms whose other rows are zero. Both patterns of the config carry the
ranks of modules that differ from the largest, and modules are named by their full paths: a short name would also meet
modules of the same name elsewhere.

Experts have no modules of their own: their changes go into factors of the whole parameter they lie in (PEFT's
`target_parameters`), of one rank for all experts, so experts that do not change have terms of zero. Where both of a
block's parameters change, PEFT wraps them one in the other, the later outside; the names in the file say so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from editors.binding import Touched
from editors.deltas import LowRank
from editors.disk.adapters import CONFIG, EMBEDDING, LINEAR, PREFIX, TENSORS
from editors.disk.edit_record import record_of, write_record
from editors.disk.stored_matrix import experts_of
from editors.edit import Edit
from editors.shipping import model_card
from editors.shipping.checkpoint import Written, apply_edit, expect_base
from memloc.errors import InputError, ModelError
from memloc.sites import ALL, Kind, Site
from memloc.store import fresh_folder

Dtype = Literal["float32", "bfloat16", "float16"]

_CARRIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
            "*.tiktoken", "*.model")  # fmt: skip
"""What a tokenizer is made of: with it, the adapter's folder is all that lm-eval and vLLM need beside the base."""


@dataclass(frozen=True)
class Module:
    """What one module of an adapter holds.

    Attributes:
        sites: whose deltas it carries.
        rank: of its factors.
        norm: Frobenius norm of the change.
        cut: what a truncated SVD left out, over `norm`; 0 where the edit holds the factors.
        rounded: what the cast of the factors changed, over `norm`; 0 for float32.
    """

    sites: tuple[str, ...]
    rank: int
    norm: float
    cut: float
    rounded: float


@dataclass(frozen=True)
class Exported:
    """An adapter that was written.

    Attributes:
        folder: the adapter.
        dtype: of its factors.
        modules: module path to what it holds.
        bytes: of the tensors' file.
        carried: files taken over from the base.
    """

    folder: Path
    dtype: str
    modules: Mapping[str, Module]
    bytes: int
    carried: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        modules = {name: asdict(module) for name, module in self.modules.items()}
        return {**vars(self), "folder": str(self.folder), "modules": modules, "carried": list(self.carried)}


def export_adapter(
    edit: Edit,
    model: str | Path,
    out: str | Path,
    *,
    base: str = "",
    dtype: Dtype = "float32",
    rank: int | None = None,
    evidence: Sequence[Mapping[str, Any]] = (),
) -> Exported:
    """Write `out`: a PEFT LoRA adapter that does to `model` what `edit` does. No model is built.

    Memory: the factors; with `rank`, one dense delta and its decomposition.

    Args:
        edit: of low rank everywhere, or `rank` is given.
        model: the checkpoint folder it was made for.
        out: a new or empty folder.
        base: what the adapter calls its base (a hub name, say); by default `model`, as given.
        dtype: of the stored factors. PEFT computes with float32 factors whatever they were stored in.
        rank: terms of a truncated SVD for deltas that hold no factors; by default they are refused.
        evidence: rows of figures for the card, as `model_card.evidence` gives them.

    Raises:
        InputError: a bias, or a delta that holds no factors.
        CheckpointError, MismatchError: `model` cannot be read, or is not what the edit was made for.
        ModelError: a factor does not fit `dtype`.
        TargetError: `out` is occupied, or cannot be written. Nothing is left behind in any of these cases.
    """
    units = [sites for sites in edit.parameters.values() if sites[0].expert == ALL]
    parts = {_module(edit, sites): _gather(edit, sites, rank) for sites in units}
    stacks = {name: [_gather(edit, sites, rank) for sites in units] for name, units in _stacks(edit).items()}
    expect_base(edit, model)
    source, modules = Path(model), {}
    tensors: dict[str, Tensor] = {}
    for name, (sites, factor, cut) in parts.items():
        stored = _stored(name, sites[0].kind is Kind.EMBED, factor, dtype)
        tensors |= stored
        modules[name] = _told(sites, factor, cut, tuple(stored.values()), sites[0].kind is Kind.EMBED)
    ranks = {name: module.rank for name, module in modules.items()}
    most = max([*ranks.values(), *(factor.rank for found in stacks.values() for _, factor, _ in found)])
    for name, found in stacks.items():
        for sites, factor, cut in found:
            modules[edit.touched[sites[0]].parameter] = _told(sites, factor, cut, _cast(name, factor, dtype), False)
        tensors |= _stacked(edit, source, name, found, most, dtype, inner=_inner(name, stacks, edit))
    config = _config(edit, ranks, base or str(model), _task(source), most, sorted(stacks))
    named = {f"{name}.weight": entry[0] for name, entry in parts.items()}
    named |= {edit.touched[sites[0]].parameter: sites for found in stacks.values() for sites, _, _ in found}
    with fresh_folder(out) as part:
        carried = _carry(source, part)
        _write(part, config, tensors)
        record = record_of(edit, named, edit.survived, evidence)
        write_record(part, [record])
        front = model_card.fresh(base or source.name, library="peft")
        (part / model_card.CARD).write_text(model_card.put(front, [record]), encoding="utf8")
        size = (part / TENSORS).stat().st_size
    return Exported(Path(out), dtype, modules, size, carried)


def export_checkpoint(
    edit: Edit,
    model: str | Path,
    out: str | Path,
    *,
    link: bool = False,
    evidence: Sequence[Mapping[str, Any]] = (),
) -> Written:
    """Write `out`: the checkpoint with the edit in it and a model card that says so; see `apply_edit`."""
    return apply_edit(edit, model, out, link=link, card=True, evidence=evidence)


def _module(edit: Edit, sites: Sequence[Site]) -> str:
    parameter = edit.touched[sites[0]].parameter
    beside = [site for site in sites if not site.kind.is_map]
    if beside:
        raise InputError(f"{beside[0]}: a LoRA adapter holds changes of linear maps only; write it --as checkpoint")
    biases = [site for site in sites if site.bias]
    if biases:
        raise InputError(f"{biases[0]}: a LoRA adapter holds no change of a bias; write it --as checkpoint")
    if not parameter.endswith(".weight") or len(edit.touched[sites[0]].shape) != 2:
        raise InputError(f"{sites[0]}: {parameter} is no module's weight matrix; write it --as checkpoint")
    return parameter.removesuffix(".weight")


def _stacks(edit: Edit) -> dict[str, list[list[Site]]]:
    """Parameters that hold several experts' matrices, to the sites of each that changes."""
    found: dict[str, list[list[Site]]] = {}
    for sites in edit.parameters.values():
        if sites[0].expert != ALL:
            found.setdefault(edit.touched[sites[0]].place.parameter, []).append(sites)
    return found


def _inner(name: str, stacks: Mapping[str, object], edit: Edit) -> bool:
    """Whether PEFT wraps this parameter inside another of its module: that into the experts, where both change."""
    beside = [other for other in stacks if other != name and other.rpartition(".")[0] == name.rpartition(".")[0]]
    kinds = {site.kind for site, touched in edit.touched.items() if touched.place.parameter == name}
    return bool(beside) and Kind.MLP_OUT not in kinds


def _stacked(
    edit: Edit,
    source: Path,
    name: str,
    found: Sequence[tuple[list[Site], LowRank, float]],
    rank: int,
    dtype: Dtype,
    *,
    inner: bool,
) -> dict[str, Tensor]:
    """The two tensors of a stack: `lora_A` [experts · r, in], by expert, and `lora_B` [out, r · experts], by term."""
    count = experts_of(source, name)
    out, into = found[0][1].shape
    first, second = torch.zeros(count, rank, into), torch.zeros(out, rank, count)
    for sites, factor, _ in found:
        expert = sites[0].expert
        first[expert, : factor.rank], second[:, : factor.rank, expert] = factor.right, factor.left
    module = name.rpartition(".")[0] + (".base_layer" if inner else "")
    whole = LowRank(second.flatten(1), first.flatten(0, 1))
    return _stored(module, False, whole, dtype)


def _cast(name: str, factor: LowRank, dtype: Dtype) -> tuple[Tensor, ...]:
    return tuple(_stored(name, False, factor, dtype).values())


def _gather(edit: Edit, sites: list[Site], rank: int | None) -> tuple[list[Site], LowRank, float]:
    """The whole matrix's change as factors: terms of all sites side by side, rows of others zero; and the share cut."""
    lefts, rights, lost = [], [], 0.0
    for site in sites:
        factor, cut = _factors(edit, site, rank)
        lefts.append(_spread(factor.left, edit.touched[site]))
        rights.append(factor.right)
        lost += cut**2
    whole = LowRank(torch.cat(lefts, 1), torch.cat(rights, 0))
    # Sites of one parameter share no row, so squared norms add up.
    norm = sum(edit.deltas[site].norm() ** 2 for site in sites) ** 0.5
    return sites, whole, lost**0.5 / norm if norm else 0.0


def _factors(edit: Edit, site: Site, rank: int | None) -> tuple[LowRank, float]:
    """Factors of one delta, and the norm of what they leave out."""
    delta = edit.deltas[site]
    if isinstance(delta, LowRank):
        return delta, 0.0
    form = type(delta).__name__.lower()
    if rank is None:
        raise InputError(
            f"{site}: a {form} delta holds no factors, and a LoRA adapter holds nothing else; write it --as "
            "checkpoint, or ask for the nearest of a --rank"
        )
    if rank < 1:
        raise InputError(f"rank {rank}: a truncated SVD keeps at least one term")
    left, sizes, right = torch.linalg.svd(delta.dense().double(), full_matrices=False)
    kept = max(1, min(rank, int((sizes > 1e-7 * sizes[0]).sum())))
    root = sizes[:kept].sqrt()
    return LowRank(left[:, :kept] * root, root[:, None] * right[:kept]), float(sizes[kept:].norm())


def _spread(left: Tensor, touched: Touched) -> Tensor:
    """`left` on the rows of the whole stored matrix, zero on the others."""
    rows = touched.place.rows
    if rows is None:
        return left
    whole = torch.zeros(touched.shape[1 if touched.place.transposed else 0], left.shape[1])
    whole[rows if isinstance(rows, slice) else list(rows)] = left
    return whole


def _stored(name: str, embedding: bool, factor: LowRank, dtype: Dtype) -> dict[str, Tensor]:
    """The two tensors of a module, by their names in the file."""
    first, second = (factor.left.T, factor.right.T) if embedding else (factor.right, factor.left)
    names = EMBEDDING if embedding else LINEAR
    kind = getattr(torch, dtype)
    stored = {f"{PREFIX}{name}.{ending}": part.to(kind) for ending, part in zip(names, (first, second), strict=True)}
    for part in stored.values():
        if not bool(torch.isfinite(part).all()):
            raise ModelError(f"{name}: a factor does not fit {dtype}; choose another dtype; nothing was written")
    return {key: part.contiguous() for key, part in stored.items()}


def _told(sites: Sequence[Site], factor: LowRank, cut: float, stored: Sequence[Tensor], embedding: bool) -> Module:
    first, second = (part.float() for part in stored)
    left, right = (first.T, second.T) if embedding else (second, first)
    exact = torch.equal(left, factor.left) and torch.equal(right, factor.right)
    off = LowRank(torch.cat([left, -factor.left], 1), torch.cat([right, factor.right], 0))
    norm = factor.norm()
    rounded = 0.0 if exact or not norm else off.norm() / norm
    return Module(tuple(map(str, sites)), factor.rank, norm, cut, rounded)


def _config(
    edit: Edit, ranks: Mapping[str, int], base: str, task: str | None, most: int, parameters: Sequence[str]
) -> dict[str, Any]:
    smaller = {name: rank for name, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA", "task_type": task, "base_model_name_or_path": base, "r": most, "lora_alpha": most,
        "rank_pattern": smaller, "alpha_pattern": smaller, "target_modules": sorted(ranks), "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": any(entry.place.transposed for entry in edit.touched.values()),
        "inference_mode": True, "init_lora_weights": True, "use_rslora": False, "use_dora": False,
        "modules_to_save": None, **({"target_parameters": list(parameters)} if parameters else {}),
    }  # fmt: skip


def _task(source: Path) -> str | None:
    """PEFT's word for what the model does; None (a plain model) for any but causal language models."""
    try:
        names = json.loads((source / "config.json").read_bytes()).get("architectures") or [""]
    except (OSError, ValueError, AttributeError):
        return None
    return "CAUSAL_LM" if str(names[0]).endswith(("ForCausalLM", "LMHeadModel")) else None


def _carry(source: Path, part: Path) -> tuple[str, ...]:
    names = sorted({path.name for pattern in _CARRIED for path in source.glob(pattern) if path.is_file()})
    for name in names:
        shutil.copyfile(source / name, part / name)
    return tuple(names)


def _write(part: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (part / CONFIG).write_text(text + "\n", encoding="utf8")
    save_file(dict(tensors), part / TENSORS, metadata={"format": "pt"})
