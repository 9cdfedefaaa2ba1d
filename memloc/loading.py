"""From a folder or a hub name to a model in memory: safetensors only, stored dtype, nothing missing, no remote code."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memloc.errors import CheckpointError, InputError, ModelError


def load(
    model: str | Path, dtype: torch.dtype | None = None, *, device_map: str | Mapping[str, Any] | None = None
) -> tuple[nn.Module, Any]:
    """A language model and its tokenizer (or None) from a folder or a hub name, in the stored dtype.

    Only safetensors are read and no code of the checkpoint is run.

    Args:
        model: the folder, or the name.
        dtype: by default the stored one.
        device_map: how the model is spread over devices, the CPU and disk, in transformers' words ("auto", or module
            to device); what is to lie on disk is left in the checkpoint's own files.

    Raises:
        CheckpointError: missing, truncated, pickled, or with weights missing.
        InputError: a device map without accelerate.
        ModelError: neither a causal nor a masked language model.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer

    spread: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    folder = Path(model)
    if folder.exists():
        _check_folder(folder)
    elif str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        raise CheckpointError(f"{model}: no such folder")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(model))
            loaded, info = language_model(config).from_pretrained(
                str(model), dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **spread
            )
    except ImportError as error:  # of accelerate, which spreads models
        raise InputError(f"--device-map {device_map}: {' '.join(str(error).split())[:200]}") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        where = f"{model}" if folder.exists() else f"{model}: no such folder, and from the hub it"
        raise CheckpointError(f"{where} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    missing = sorted(info.get("missing_keys", ())) + sorted(map(str, info.get("mismatched_keys", ())))
    if missing:
        raise CheckpointError(f"{model} lacks {len(missing)} weights of its own config, the first {missing[0]}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model))
    except (OSError, ValueError, KeyError, TypeError):
        tokenizer = None
    _runnable(loaded)
    return loaded, None if _made_up(tokenizer) else tokenizer


def _made_up(tokenizer: Any) -> bool:
    """Whether it knows special tokens only: what transformers makes of a folder that holds no tokenizer."""
    return tokenizer is not None and len(tokenizer) <= len(set(tokenizer.all_special_ids))


def language_model(config: Any) -> Any:
    """The class of transformers that builds the language model of a configuration: from left to right, or masked.

    Masked where the checkpoint was saved as one, or where the model type has no other language model.

    Raises:
        ModelError: the model type has neither.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
    )

    saved = (getattr(config, "architectures", None) or [""])[0]
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and (
        saved.endswith(("ForMaskedLM", "ForPreTraining")) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        return AutoModelForMaskedLM
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"no row for the model type {config.model_type!r}: transformers has no language model of it, "
                         "causal or masked")  # fmt: skip
    return AutoModelForCausalLM


def _runnable(model: Any) -> None:
    """Have experts multiplied one by one where the usual grouped product cannot: float64, or rows of odd sizes."""
    stacks = [parameter for parameter in model.parameters() if parameter.dim() == 3]
    if any(stack.dtype == torch.float64 or stack.shape[-1] * stack.element_size() % 16 for stack in stacks):
        model.set_experts_implementation("eager")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' and the hub's warnings and bars inside the block; as they were afterwards."""
    from transformers.utils import logging as transformers_logging

    hub = logging.getLogger("huggingface_hub")
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_level = hub.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(hub_level)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name the checkpoint's folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json, so it is not a checkpoint folder")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise CheckpointError(
                f"{folder} holds only pickles ({pickles[0]}), which can run code; convert to safetensors"
            )
        raise CheckpointError(f"{folder} holds no .safetensors file")
