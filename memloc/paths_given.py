"""Module paths that a caller names, in the six keys of existing editing configurations.

They are read from a mapping, or from a file: JSON, or lines `key: value` (flat YAML) or `key = "value"` (flat TOML);
other keys of such a configuration are left alone. `{}` stands for the number of a block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memloc.architectures import Row
from memloc.call_order import Hints
from memloc.errors import InputError, ModelError
from memloc.sites import Kind

KEYS = (
    "rewrite_module_tmp",
    "layer_module_tmp",
    "mlp_module_tmp",
    "attn_module_tmp",
    "ln_f_module",
    "lm_head_module",
)
"""The projection that is rewritten (`mlp.out`), a block, its MLP, its attention, the final norm, the unembedding."""

_LINE = re.compile(r"""^(?P<key>[A-Za-z_]\w*)\s*[:=]\s*(?P<value>"[^"]*"|'[^']*'|[^#]*?)\s*(?:#.*)?$""")


@dataclass(frozen=True)
class Given:
    """What a caller says about a model.

    Attributes:
        paths: key to path; empty where nothing is said.
        origin: file it came from, for messages.
    """

    paths: Mapping[str, str]
    origin: str = "paths"

    def __bool__(self) -> bool:
        return bool(self.paths)

    @property
    def blocks(self) -> str | None:
        """Path of the list of blocks."""
        found = self.paths.get("layer_module_tmp")
        return None if found is None else found.removesuffix(".{}")

    def hints(self, model: Any) -> Hints:
        """What is known before a row is looked for."""
        attention, down = (self._inside(key) for key in ("attn_module_tmp", "rewrite_module_tmp"))
        return Hints(self.blocks, attention, down, self.paths.get("ln_f_module"), self._unembed(model))

    def over(self, row: Row, model: Any) -> Row:
        """The table's row with these paths in the place of its own.

        Raises:
            ModelError: a module the model has not, or attention or MLP modules that do not hold the row's maps.
        """
        self._check(model)
        down = self._inside("rewrite_module_tmp")
        maps = dict(row.maps) | ({} if down is None else {Kind.MLP_OUT: down})
        for key, kind in (("attn_module_tmp", Kind.ATTN_OUT), ("mlp_module_tmp", Kind.MLP_OUT)):
            inside = self._inside(key)
            if inside is not None and not maps[kind].startswith(inside + "."):
                raise ModelError(f"{self.origin}: {key} names {inside}, but {kind} of {row.family} is {maps[kind]}")
        final_norm, unembed = self.paths.get("ln_f_module", row.final_norm), self._unembed(model) or row.unembed
        return replace(row, maps=maps, blocks=self.blocks or row.blocks, final_norm=final_norm, unembed=unembed)

    def _unembed(self, model: Any) -> str | None:
        """The unembedding; where an embedding tied to it is named, as configurations of GPT-2 do, the real one."""
        named = self.paths.get("lm_head_module")
        if named is None:
            return None
        self._check(model)
        head = model.get_output_embeddings()
        if head is not None and getattr(model.get_submodule(named), "weight", None) is getattr(head, "weight", 0):
            return next((name for name, module in model.named_modules() if module is head), named)
        return named

    def _inside(self, key: str) -> str | None:
        """A path inside a block."""
        path = self.paths.get(key)
        if path is None:
            return None
        blocks = self.blocks or path.partition(".{}")[0]
        start = f"{blocks}.{{}}."
        if not path.startswith(start):
            raise InputError(f"{self.origin}: {key} is {path!r}; expected it below {start!r}")
        return path.removeprefix(start)

    def _check(self, model: Any) -> None:
        modules = dict(model.named_modules())
        for key, path in self.paths.items():
            if path.replace("{}", "0") not in modules:
                raise ModelError(f"{self.origin}: {key} names {path}, which the model has not")


def given_paths(paths: Mapping[str, str] | str | Path | None) -> Given:
    """Paths from a mapping or a file; keys that are not of the six are left alone.

    Raises:
        InputError: a file that cannot be read, a path that is no string, or none of the keys.
    """
    if paths is None:
        return Given({})
    origin = "paths" if isinstance(paths, Mapping) else str(paths)
    found = dict(paths) if isinstance(paths, Mapping) else _read(Path(paths))
    kept = {key: value for key, value in found.items() if key in KEYS}
    for key, value in kept.items():
        if not isinstance(value, str) or not re.fullmatch(r"[\w{}]+(\.[\w{}]+)*", value):
            raise InputError(f"{origin}: {key} is {value!r}; expected a module path such as model.layers.{{}}.mlp")
        if key.endswith("_tmp") and value.count("{}") != 1:
            raise InputError(f"{origin}: {key} is {value!r}; expected one {{}} for the number of the block")
    if not kept:
        raise InputError(f"{origin}: none of the keys {', '.join(KEYS)}")
    return Given(kept, origin)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON: {error}") from error
        return dict(found)
    # Flat lines only: what is indented, listed or nested belongs to other keys of the configuration.
    lines = (_LINE.match(line) for line in text.splitlines())
    return {line["key"]: line["value"].strip("\"' ") for line in lines if line is not None}
