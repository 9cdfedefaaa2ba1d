"""Places in a transformer by name. No torch model is needed to speak of them.

A `Site` names one linear map of one block: `L3.attn.out` is the output projection of attention in block 3. Its
*input* is where heads (attn.out) and neurons (mlp.out) are read; its weight is `[out, in]` in every family.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from memloc.errors import InputError
from memloc.lazy import method


class Kind(enum.StrEnum):
    """A linear map inside a block, one of the two outside (`embed`, `unembed`), or what a model has beside its maps.

    Beside them: norms before attention and the MLP, behind them, of queries and keys by head, of the embedding, the
    final one (`norm`), and positions. No method looks there unless it names them (`BESIDE`); edits can.
    """

    ATTN_Q = "attn.q"
    ATTN_K = "attn.k"
    ATTN_V = "attn.v"
    ATTN_OUT = "attn.out"
    MLP_GATE = "mlp.gate"
    MLP_IN = "mlp.in"
    MLP_OUT = "mlp.out"
    EMBED = "embed"
    UNEMBED = "unembed"
    ATTN_NORM = "attn.norm"
    ATTN_QNORM = "attn.qnorm"
    ATTN_KNORM = "attn.knorm"
    ATTN_OUTNORM = "attn.outnorm"
    MLP_NORM = "mlp.norm"
    MLP_OUTNORM = "mlp.outnorm"
    NORM = "norm"
    EMBED_NORM = "embed.norm"
    POSITION = "embed.position"

    @property
    def in_block(self) -> bool:
        """Whether it lies inside blocks."""
        return self not in (Kind.EMBED, Kind.UNEMBED, Kind.NORM, Kind.EMBED_NORM, Kind.POSITION)

    @property
    def is_map(self) -> bool:
        """Whether it is a linear map, or an embedding: an `[out, in]` weight and perhaps a bias."""
        return self not in BESIDE

    @property
    def is_norm(self) -> bool:
        """Whether it is a norm: a gain `[d]` and perhaps a bias."""
        return self in BESIDE and self is not Kind.POSITION


BESIDE = (
    Kind.ATTN_NORM, Kind.ATTN_QNORM, Kind.ATTN_KNORM, Kind.ATTN_OUTNORM, Kind.MLP_NORM, Kind.MLP_OUTNORM, Kind.NORM,
    Kind.EMBED_NORM, Kind.POSITION,
)  # fmt: skip
"""What is no map: a family has some of them."""

MAPS = tuple(kind for kind in Kind if kind not in BESIDE)
"""Linear maps and the two embeddings."""


def kinds_named(names: str) -> tuple[Kind, ...]:
    """Kinds of map from a list such as "attn.v,mlp.out".

    Raises:
        InputError: a name is not a kind of map.
    """
    known = {str(kind): kind for kind in MAPS}
    found = [name.strip() for name in names.split(",")]
    for name in found:
        if name not in known:
            raise InputError(f"no kind called {name!r}; kinds: {', '.join(known)}")
    return tuple(dict.fromkeys(known[name] for name in found))


class Grain(enum.StrEnum):
    """What one score speaks of."""

    LAYER = "layer"
    COMPONENT = "component"
    HEAD = "head"
    NEURON = "neuron"
    WEIGHT = "weight"
    POSITION = "position"
    DIRECTION = "direction"


OUTSIDE = -1
"""The layer of a site outside the blocks."""

_NAME = re.compile(r"^(?:L(?P<layer>\d+)\.)?(?P<kind>[a-z]+(?:\.(?!bias$)[a-z]+)?)(?P<bias>\.bias)?$")


@dataclass(frozen=True, order=True)
class Site:
    """One linear map: its layer, its kind, and whether the bias is meant instead of the weight.

    Raises:
        InputError: a block's kind without a layer, or an embedding with one.
    """

    layer: int
    kind: Kind
    bias: bool = False

    _repr_html_ = method("memloc.notebook:html")

    def __post_init__(self) -> None:
        if self.kind.in_block == (self.layer == OUTSIDE) or self.layer < OUTSIDE:
            raise InputError(f"{self.kind} at layer {self.layer}: kinds inside a block need a layer, others none")

    def __str__(self) -> str:
        place = f"L{self.layer}.{self.kind}" if self.kind.in_block else str(self.kind)
        return place + ".bias" if self.bias else place

    @classmethod
    def parse(cls, name: str) -> Site:
        """The site that prints as `name`, such as `L3.attn.out` or `L0.mlp.out.bias`.

        Raises:
            InputError: `name` is not of that form.
        """
        found = _NAME.match(name)
        kinds = {str(kind) for kind in Kind}
        if found is None or found["kind"] not in kinds:
            raise InputError(f"no site called {name!r}; expected L<layer>.<kind>, kinds: {', '.join(sorted(kinds))}")
        layer = OUTSIDE if found["layer"] is None else int(found["layer"])
        return cls(layer, Kind(found["kind"]), found["bias"] is not None)
