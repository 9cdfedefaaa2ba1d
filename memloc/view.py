"""ModelView: a live model seen through its family's row, which is proved on load.

Weights are `[out, in]` for every family. Two sites serve nearly every method: the input of `mlp.out` (the neurons)
and the input of `attn.out` (the heads). The view looks; it has no method that writes a weight.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memloc import hooks, offloading, slices
from memloc.architectures import Place, Row, Shape, row_in_table
from memloc.batches import Batch, batches
from memloc.call_order import rows_by_call_order
from memloc.engines.engine import HOOKS, Engine, PlainHooks
from memloc.engines.opening import open_engine
from memloc.engines.parity import prove_engine
from memloc.errors import InputError, ModelError
from memloc.experts import Inner
from memloc.lazy import method
from memloc.loading import load
from memloc.passages import Passages, decode
from memloc.paths_given import Given, given_paths
from memloc.proof import prove_row
from memloc.provenance import digest_tensor
from memloc.sites import ALL, MAPS, OUTSIDE, Kind, Site

_INSIDE: Mapping[tuple[Kind, hooks.Side, bool], Inner] = {
    (Kind.MLP_GATE, "input", False): "read", (Kind.MLP_IN, "input", False): "read",
    (Kind.MLP_GATE, "output", True): "gate", (Kind.MLP_GATE, "output", False): "gate",
    (Kind.MLP_IN, "output", True): "in", (Kind.MLP_IN, "output", False): "in",
    (Kind.MLP_OUT, "input", True): "neurons", (Kind.MLP_OUT, "input", False): "neurons",
    (Kind.MLP_OUT, "output", False): "said",
}  # fmt: skip
"""Where a side of a map is, by whether all experts are meant; the rest is input and output of their module."""

LEFT_TO_RIGHT = "this is for models that read from left to right only"


def left_to_right(view: ModelView) -> str | None:
    """Why a method that lives on causality has nothing to say of this model, or None: a method's `refuses`."""
    return None if view.row.causal else f"{view.row.family} reads both ways; {LEFT_TO_RIGHT}"


class ModelView:
    """A model through its row. Build one with `ModelView.open`.

    Args:
        model: a transformers causal or masked language model, put into evaluation mode.
        row: the family's row.
        tokenizer: its tokenizer, or None.
        name: what to call it in reports.

    Raises:
        ModelError: a parameter is quantised, offloaded or not finite.
    """

    __repr__ = method("memloc.notebook:plain")
    _repr_html_ = method("memloc.notebook:html")

    def __init__(self, model: Any, row: Row, tokenizer: Any = None, name: str = "") -> None:
        self.model: Any = model.eval()
        if slices.fully_sharded(model):
            # Also the outermost weights go back into slices after a forward, where they are looked for.
            model.set_reshard_after_forward(True, recurse=False)
        self.engine: Engine = PlainHooks()
        self.row = row
        self.tokenizer = tokenizer
        self.config: Any = self.model.config
        self.name = name or type(model).__name__
        self.layers = int(self.config.num_hidden_layers)
        self.heads = int(self.config.num_attention_heads)
        self.width = int(self.config.hidden_size)
        self.vocab = int(self.config.vocab_size)
        self.context: int | None = getattr(self.config, "max_position_embeddings", None)
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._first: dict[int, str] = {}
        every = model.named_parameters(remove_duplicate=False)
        self._names = {name: self._first.setdefault(id(parameter), name) for name, parameter in every}
        self._check_parameters()
        self.widths = tuple(self._width(layer) for layer in range(self.layers))
        self.head_width = int(self.weight(Site(0, Kind.ATTN_OUT)).shape[1]) // self.heads
        self.kv_heads = self._groups()

    @classmethod
    def open(
        cls,
        model: str | Path | nn.Module | ModelView | Any,
        *,
        engine: str = HOOKS,
        tokenizer: Any = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        prove: bool = True,
        paths: Mapping[str, str] | str | Path | None = None,
    ) -> ModelView:
        """Look at a model in memory, a local checkpoint folder, or a name on the hub; prove its row.

        Args:
            model: a transformers model, an nnsight model or a TransformerBridge around one, a folder, a hub name, or
                a view (returned as it is).
            engine: "hooks", "nnsight" or "transformer-lens": what runs the model and visits places in it.
            tokenizer: given where `model` is in memory and text is to be read.
            dtype: load in this dtype; by default the stored one.
            device: where to put a loaded model; by default the CPU.
            device_map: spread a loaded model over devices, the CPU and disk instead, in transformers' words: "auto",
                "balanced", "sequential", or module to device. Weights that lie elsewhere between calls can be read;
                what needs them all in memory at once says so.
            prove: check the row by arithmetic on one small forward (some milliseconds for small models).
            paths: module paths as editing configurations name them, or a file of them; see `memloc.paths_given`.

        Raises:
            CheckpointError: the folder cannot be read, or holds only pickles.
            ModelError: quantised, offloaded, not finite; the row or the engine fails its proof; or the family has no
                row, and none that passes could be found in the order of the model's calls.
            InputError: no such engine, or its package is missing.
        """
        if isinstance(model, ModelView):
            return model
        name = ""
        if isinstance(model, str | Path):
            name = str(model)
            model, found = load(model, dtype, device_map=device_map)
            tokenizer = tokenizer if tokenizer is not None else found
        if device is not None and device_map is None:
            model = model.to(device)
        given, opened = given_paths(paths), open_engine(model, engine)
        tokenizer = tokenizer if tokenizer is not None else opened.tokenizer
        view = cls._look(opened.model, given, tokenizer, name, prove).running(opened.engine)
        if prove:
            prove_engine(view, opened.bridge)
        return view

    @classmethod
    def _look(cls, model: Any, given: Given, tokenizer: Any, name: str, prove: bool) -> ModelView:
        """A view of a plain model in memory, by plain hooks."""
        row = row_in_table(model.config)
        if row is None or given:
            return cls._found(model, given, tokenizer, name)
        view = cls(model, row, tokenizer, name)
        if prove:
            prove_row(view)
        return view

    @classmethod
    def _found(cls, model: Any, given: Given, tokenizer: Any, name: str) -> ModelView:
        """A view by a row that is not in the table, or with paths of the caller's: always proved."""
        known = row_in_table(model.config)
        if known is not None:
            view = cls(model, given.over(known, model), tokenizer, name)
            prove_row(view)
            return view
        reasons: list[str] = []
        kind, model = getattr(model.config, "model_type", type(model).__name__), model.eval()
        try:
            for row in rows_by_call_order(model, given.hints(model)):
                try:
                    view = cls(model, row, tokenizer, name)
                    prove_row(view)
                except ModelError as error:
                    reasons.append(str(error))
                else:
                    return view
        except ModelError as error:
            reasons.insert(0, str(error))
        raise ModelError(f"no row for the model type {kind!r}, and none that its calls suggest is true: {reasons[0]}; "
                         "name its paths (--paths), or add a row to memloc/architectures.py")  # fmt: skip

    def running(self, engine: Engine | None = None) -> ModelView:
        """The same model and row, run by another engine; by default plain hooks."""
        other = copy.copy(self)
        other.engine = engine or PlainHooks()
        return other

    # -- places -------------------------------------------------------------------------------------------------

    def module(self, site: Site) -> nn.Module:
        """The module that holds `site`.

        Raises:
            InputError: the family has no such site, or the model fewer layers.
        """
        path = self._path(site)
        if path is None:
            held = f"with {self.layers} layers"
            if site.expert != ALL and 0 <= site.layer < self.layers:
                held = f"with {self.experts(site.layer)} experts in layer {site.layer}"
            raise InputError(f"{site}: not in {self.row.family} {held}")
        return self._module(path)

    def path(self, site: Site) -> str | None:
        """Module path of a site inside its block (of all experts together, where it is theirs), or None."""
        if not 0 <= site.layer < self.layers or site.expert >= self.experts(site.layer):
            return None
        experts = self.row.experts
        if experts is not None and self.experts(site.layer):
            if site.kind is Kind.MLP_ROUTER:
                return experts.router
            if site.kind.of_experts:
                return experts.path
        if site.expert != ALL:
            return None
        return self.row.path(site.kind) if site.kind.is_map else self.row.beside(site.kind)

    def experts(self, layer: int) -> int:
        """How many experts block `layer` has; 0 where it is dense."""
        experts = self.row.experts
        module = None if experts is None else self._modules.get(f"{self.row.blocks}.{layer}.{experts.path}")
        return 0 if module is None or experts is None else len(module.get_parameter(experts.out))

    def expert_sites(self, *kinds: Kind) -> tuple[Site, ...]:
        """Every expert's own sites of `kinds`, by layer; none in dense blocks."""
        wanted = [kind for kind in kinds if kind.of_experts]
        found = [(site, number) for site in self.sites(*wanted) for number in range(self.experts(site.layer))]
        return tuple(site.of(number) for site, number in found)

    def units(self, site: Site) -> tuple[Site, ...]:
        """The sites whose weights are stored as matrices: those of the experts that `site` joins, else the site."""
        count = self.experts(site.layer) if site.kind.of_experts and site.expert == ALL else 0
        return tuple(site.of(number) for number in range(count)) or (site,)

    @property
    def neurons(self) -> int:
        """Neurons of a block, of all its experts together.

        Raises:
            ModelError: blocks differ in it; see `widths`.
        """
        if len(set(self.widths)) > 1:
            raise ModelError(f"{self.name} has blocks of {min(self.widths)} to {max(self.widths)} neurons (dense, "
                             "and mixtures of experts); what needs one number for all does not work on it")  # fmt: skip
        return self.widths[0]

    @property
    def told_neurons(self) -> int | str:
        """Neurons of a block, for people: a range where blocks differ."""
        least, most = min(self.widths), max(self.widths)
        return most if least == most else f"{least} to {most}"

    def block(self, layer: int) -> nn.Module:
        """Block `layer`."""
        if not 0 <= layer < self.layers:
            raise InputError(f"layer {layer}: the model has {self.layers}, counted from 0")
        return self._module(f"{self.row.blocks}.{layer}")

    def has(self, site: Site) -> bool:
        """Whether the model has `site` (and, for a bias or a norm's gain, whether that module has one)."""
        path = self._path(site)
        if path is None:
            return False
        if not site.kind.is_map:
            # A family's models differ in these; some norms have no parameters.
            part = "bias" if site.bias else "weight"
            return path in self._modules and isinstance(getattr(self._modules[path], part, None), nn.Parameter)
        return not site.bias or getattr(self.module(site), self._held(site), None) is not None

    def sites(self, *kinds: Kind) -> tuple[Site, ...]:
        """All sites of `kinds` the family has, by layer."""
        wanted = [Site(layer, kind) for layer in range(self.layers) for kind in kinds if kind.in_block]
        outside = [Site(OUTSIDE, kind) for kind in kinds if not kind.in_block]
        return tuple(site for site in (*wanted, *outside) if self.has(site))

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of linear map a block of this family has, whose both sides can be read and replaced.

        Not the router of a mixture: what it puts out is read (`Kind.MLP_ROUTER`), but its module goes on to choose.
        """
        inside = [kind for kind in MAPS if kind.in_block and kind is not Kind.MLP_ROUTER]
        return tuple(kind for kind in inside if any(self.has(Site(layer, kind)) for layer in range(self.layers)))

    def parameter(self, site: Site) -> nn.Parameter:
        """The stored parameter that holds `site`, in its stored layout."""
        found = getattr(self.module(site), self._held(site), None)
        if not isinstance(found, nn.Parameter):
            raise InputError(f"{site}: {type(self.module(site)).__name__} holds no such parameter")
        return found

    def place(self, site: Site) -> Place:
        """Where the weight of `site` lies: parameter name, orientation, rows of a fused matrix."""
        # By path, for an offloaded parameter is another object at every call; a wrapped map shows one that is not its
        # own by name, which only the object tells.
        path, held = f"{self._path(site)}.{self._held(site)}", self.parameter(site)
        name = self._names.get(path) or self._first[id(held)]
        if self._of_experts(site):
            return self._place_of_experts(site, name)
        transposed = self.row.stored_in_out and site.kind.in_block and site.kind.is_map and not site.bias
        fused = self.row.shared(site.kind)
        if fused is None:
            return Place(name, transposed)
        shape = Shape(self.heads, self.kv_heads, self.head_width, self.widths[site.layer])
        return Place(name, transposed, fused.rows(site.kind, shape))

    def weight(self, site: Site) -> Tensor:
        """The weight `[out, in]` (or bias `[out]`): a view on the model's memory.

        It is a copy for interleaved fused maps, for the maps of all experts side by side (those of one are a view),
        where the weight lies in slices (every process must ask then), and where it is offloaded (it is read from there
        each time).
        """
        self.parameter(site)
        place = self.place(site)
        return place.read(self.values(place.parameter))

    def values(self, parameter: str) -> Tensor:
        """All of the parameter of that name, wherever it lies, in its stored layout.

        Raises:
            ModelError: it is on the meta device, and no hook of the model knows its values.
        """
        found = self.model.get_parameter(parameter)
        if not offloading.elsewhere(found):
            return slices.whole(found)
        held = offloading.held(self._modules, parameter)
        if held is None:
            raise ModelError(
                f"{parameter} is offloaded (on the meta device), so it cannot be read; load the model whole, or edit "
                "its checkpoint with `memloc apply`"
            )
        return held

    def need_in_memory(self, what: str) -> None:
        """Refuse work that offloaded models cannot do: their weights come and go with each call.

        Raises:
            ModelError: a parameter is offloaded.
        """
        name = next((name for name, held in self.model.named_parameters() if offloading.elsewhere(held)), None)
        if name is not None:
            raise ModelError(f"{what} needs all weights in memory, and {name} is offloaded; load the model whole")

    def tied(self, parameter: str) -> tuple[str, ...]:
        """Other names of the same parameter ("lm_head.weight" where the unembedding is the embedding)."""
        mine = self.model.get_parameter(parameter)
        names = [name for name, other in self.model.named_parameters(remove_duplicate=False) if other is mine]
        return tuple(name for name in names if name != parameter)

    # -- looking ------------------------------------------------------------------------------------------------

    def record(
        self, sites: Iterable[Site], *, side: hooks.Side = "input", grad: bool = False, stop: bool = False
    ) -> AbstractContextManager[dict[Site, Tensor]]:
        """What flows into (or out of) `sites`: site to `[n, t, width]`; see `hooks.record`.

        The output of a query, key or value site of a fused map is the whole fused output. In a mixture of experts what
        enters `mlp.out` are all experts' neurons, times the router's weights, and 0 where a token is not sent to the
        expert; what enters and leaves the maps of one expert is its part of that.
        """
        sites = tuple(sites)
        if grad and side == "output":
            _refuse_routers(sites)
        return hooks.record(self._points(sites, side), grad=grad, stop=stop and self._stops, by=self.engine.visiting)

    def replace(
        self, sites: Iterable[Site], change: Callable[[Site, Tensor], Tensor], *, side: hooks.Side = "input"
    ) -> AbstractContextManager[None]:
        """Put `change(site, tensor)` in the place of what flows into (or out of) `sites`; see `hooks.replace`."""
        sites = tuple(sites)
        if side == "output":
            _refuse_routers(sites)
        return hooks.replace(self._points(sites, side), change, by=self.engine.visiting)

    def record_blocks(
        self, layers: Iterable[int], *, side: hooks.Side = "output", grad: bool = False, stop: bool = False
    ) -> AbstractContextManager[dict[int, Tensor]]:
        """The residual stream after (or before) blocks: layer to `[n, t, d]`."""
        points = {layer: hooks.Point(self.block(layer), side) for layer in layers}
        return hooks.record(points, grad=grad, stop=stop and self._stops, by=self.engine.visiting)

    def replace_blocks(
        self, layers: Iterable[int], change: Callable[[int, Tensor], Tensor], *, side: hooks.Side = "output"
    ) -> AbstractContextManager[None]:
        """Put `change(layer, tensor)` in the place of the residual stream after (or before) blocks."""
        points = {layer: hooks.Point(self.block(layer), side) for layer in layers}
        return hooks.replace(points, change, by=self.engine.visiting)

    def hidden(self, batch: Batch) -> Tensor:
        """The residual stream after the final norm, `[n, t, d]`; the unembedding is not run."""
        if slices.fully_sharded(self.model):
            # Only the whole may be called; its norm is done here, for its weights are gone when a gradient comes back.
            entering = {"norm": hooks.Point(self._module(self.row.final_norm), "input")}
            with hooks.record(entering, grad=torch.is_grad_enabled()) as seen:
                self.model(**self._inputs(batch))
            return self.final_norm(seen["norm"])
        found: Tensor = self.engine.run(self._base(), self._inputs(batch)).last_hidden_state
        return self.final_norm(found) if self.row.transform else found

    def logits(self, batch: Batch) -> Tensor:
        """All logits `[n, t, v]`, in the model's dtype. Prefer `logits_at` where few positions count."""
        found: Tensor = self.engine.run(self.model, self._inputs(batch)).logits
        return found

    def logits_at(self, batch: Batch, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits `[k, v]`, float32 (float64 stays), at the positions (rows[i], columns[i]) only."""
        if self.mask_token is not None and bool((batch.ids[rows, columns] != self.mask_token).any()):
            raise ModelError(f"{self.row.family} says what a mask token hides, and was asked for what follows others; "
                             f"{LEFT_TO_RIGHT}")  # fmt: skip
        return self.unembed(self.hidden(batch)[rows, columns])

    @property
    def soft_cap(self) -> float | None:
        """The c of logits that are c·tanh(logits / c), so that none is larger than c; None where they are not."""
        cap = getattr(self.config, "final_logit_softcapping", None)
        return None if cap is None else float(cap)

    def unembed(self, hidden: Tensor, *, capped: bool = True) -> Tensor:
        """Logits of normed residual vectors `[..., d]` as `[..., v]`, float32 (float64 stays).

        Args:
            hidden: normed.
            capped: the model's own logits; otherwise without their soft cap, linear in `hidden`.
        """
        logits = slices.call(self.model, self._module(self.row.unembed), hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        cap = self.soft_cap
        return logits if cap is None or not capped else cap * torch.tanh(logits / cap)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm before the unembedding."""
        return slices.call(self.model, self._module(self.row.final_norm), hidden)

    def added(self, site: Site, output: Tensor) -> Tensor:
        """What the block adds to the stream where its map `site` (`attn.out`, `mlp.out`) puts out `output`.

        The same, but in families whose blocks norm what they write; see `joined` for those that norm the sum.
        """
        path = self.row.added.get(site.kind)
        if path is None:
            return output
        normed: Tensor = self._module(f"{self.row.blocks}.{site.layer}.{path}")(output)
        return normed

    def joined(self, site: Site, stream: Tensor, output: Tensor) -> Tensor:
        """The stream behind map `site` (`attn.out`, `mlp.out`): what it puts out added, the sum normed where it is."""
        total = stream + self.added(site, output)
        path = self.row.summed.get(site.kind)
        if path is None:
            return total
        normed: Tensor = self._module(f"{self.row.blocks}.{site.layer}.{path}")(total)
        return normed

    def record_sums(self, kind: Kind) -> AbstractContextManager[dict[int, Tensor]]:
        """The stream with what the maps `kind` put out, before the norm of their sum: layer to `[n, t, d]`.

        Nothing in families that norm no sums.
        """
        path = self.row.summed.get(kind)
        layers = range(self.layers if path is not None else 0)
        return hooks.record({layer: self.point(Site(layer, kind), path, "input") for layer in layers})

    def record_added(self, sites: Iterable[Site]) -> AbstractContextManager[dict[Site, Tensor]]:
        """What the blocks add to the stream for their maps `sites` (`attn.out`, `mlp.out`): site to `[n, t, d]`."""
        paths = {site: self.row.added.get(site.kind) or self.path(site) for site in sites}
        return hooks.record({site: self.point(site, path, "output") for site, path in paths.items()})

    def point(self, site: Site, path: str | None, side: hooks.Side) -> hooks.Point:
        """A side of the module at `path` in the block of `site`; of the site's own module where that is None."""
        if not site.kind.in_block:
            return hooks.Point(self.module(site), side)
        module = self.module(site) if path is None else self._module(f"{self.row.blocks}.{site.layer}.{path}")
        if path is None and self._of_experts(site) and (inside := _INSIDE.get((site.kind, side, site.expert == ALL))):
            return self._inside(site.layer, inside, site.expert)
        return hooks.Point(module, side, self.block(site.layer), side == "output" and self.row.overwrites)

    def tail(self, layer: int, batch: Batch) -> Tail:
        """Everything above block `layer`, ready to be run again and again on changed residuals of `batch`.

        Cost: one forward here; each `Tail.hidden` then costs only the blocks above.
        """
        above = {index: self.block(index) for index in range(layer + 1, self.layers)}
        self.need_causal("what stands above a block is run on rows of other lengths")
        plain = self.running()
        with torch.no_grad(), hooks.record_calls(above) as calls, plain.record_blocks([layer]) as seen:
            plain.hidden(batch)
        return Tail(self, layer, seen[layer], calls)

    def batches(self, passages: Passages, *, size: int = 32) -> Iterator[Batch]:
        """Batches of `passages` on the model's device, checked against vocabulary and context first.

        Raises:
            InputError: a token outside the vocabulary or a row longer than the context (the passage is named).
        """
        passages.check(self.vocab, self.context, behind=not self.row.causal)
        return batches(passages, size=size, device=self.device, cloze=self.mask_token)

    @cached_property
    def mask_token(self) -> int | None:
        """What hides a token from a masked language model; None for models that read from left to right.

        Raises:
            ModelError: neither the tokenizer nor the configuration of a masked language model names one.
        """
        if self.row.causal:
            return None
        found = getattr(self.config, "mask_token_id", None)
        found = getattr(self.tokenizer, "mask_token_id", None) if found is None else found
        if found is None:
            raise ModelError(f"{self.name} is a masked language model, and neither a tokenizer nor its configuration "
                             "(mask_token_id) names its mask token; give its tokenizer")  # fmt: skip
        return int(found)

    def need_causal(self, what: str) -> None:
        """Refuse work that only models that read from left to right can do.

        Raises:
            ModelError: the model reads both ways.
        """
        if not self.row.causal:
            raise ModelError(f"{self.row.family} reads both ways, and {what}; {LEFT_TO_RIGHT}")

    # -- the model as a whole -----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the embedding lies, and so where batches belong."""
        site = Site(OUTSIDE, Kind.EMBED)
        lies = self.parameter(site).device
        return torch.device(offloading.runs_on(self.module(site)) or "cpu") if lies.type == "meta" else lies

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first block's maps."""
        return self.parameter(Site(0, Kind.MLP_OUT)).dtype

    @property
    def digest(self) -> str:
        """Digest of all parameters, by name. Cost: one pass over the weights, each time it is asked."""
        total = hashlib.sha256()
        for name in sorted(name for name, _ in self.model.named_parameters()):
            total.update(f"{name}:{digest_tensor(self.values(name))}\n".encode())
        return total.hexdigest()

    def spell(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The text of each token, so that they join to the text of all (several tokens of one character may not)."""
        return tuple(decode(self.tokenizer, [token]) for token in ids)

    def copy(self) -> ModelView:
        """A view on a deep copy of the model, for work that must change weights; this one is untouched."""
        self.need_in_memory("a copy to train")
        return ModelView(copy.deepcopy(self.model), self.row, self.tokenizer, self.name)

    @contextlib.contextmanager
    def trainable(self, parameters: Sequence[nn.Parameter] = ()) -> Iterator[None]:
        """Gradients for `parameters` only (by default for none: cheaper backward passes), starting from none.

        Flags and gradients are as before afterwards.
        """
        if any(map(offloading.elsewhere, parameters)):
            self.need_in_memory("a gradient by weights")
        before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in self.model.parameters()]
        wanted = {id(parameter) for parameter in parameters}
        try:
            for parameter, _, _ in before:
                parameter.requires_grad_(id(parameter) in wanted)
                parameter.grad = None
            yield
        finally:
            for parameter, flag, gradient in before:
                parameter.requires_grad_(flag)
                parameter.grad = gradient

    def frozen(self) -> AbstractContextManager[None]:
        """No gradients for any parameter inside the block; activations may still have them."""
        return self.trainable()

    def record_routing(self, layers: Iterable[int]) -> AbstractContextManager[dict[int, Tensor]]:
        """The weight with which tokens are sent to experts: layer to `[n, t, experts]`, 0 where one is not sent."""
        points = {layer: self._inside(layer, "weights", ALL) for layer in layers if self.experts(layer)}
        return hooks.record(points, by=self.engine.visiting)

    def _inside(self, layer: int, place: Inner, expert: int) -> hooks.Point:
        """A point inside the module of experts of a block."""
        experts = self.row.experts
        if experts is None:
            raise InputError(f"layer {layer}: no experts")
        module = self._module(f"{self.row.blocks}.{layer}.{experts.path}")
        return hooks.Point(module, "input", self.block(layer), False,
                           hooks.Inside(place, (experts.into, experts.out), expert))  # fmt: skip

    def _of_experts(self, site: Site) -> bool:
        return site.kind.of_experts and bool(self.experts(site.layer))

    def _place_of_experts(self, site: Site, name: str) -> Place:
        """The gate's rows come before those of `mlp.in`, in one parameter."""
        width, rows = self.widths[site.layer] // self.experts(site.layer), None
        if site.kind is not Kind.MLP_OUT:
            rows = slice(0, width) if site.kind is Kind.MLP_GATE else slice(width, 2 * width)
        if site.expert != ALL:
            return Place(name, rows=rows, expert=site.expert)
        return Place(name, rows=rows, joined="columns" if rows is None else "rows")

    def _width(self, layer: int) -> int:
        """How many neurons block `layer` has."""
        site = Site(layer, Kind.MLP_OUT)
        stored = self.parameter(site).shape
        if self._of_experts(site):
            return int(stored[0] * stored[2])
        return int(stored[0 if self.row.stored_in_out else 1])

    def _path(self, site: Site) -> str | None:
        """Whole path of the module of `site`, or None where the family has none or the model fewer layers."""
        if site.kind is Kind.EMBED or site.kind is Kind.UNEMBED:
            return self.row.embed if site.kind is Kind.EMBED else self.row.unembed
        if not site.kind.in_block:
            return self.row.beside(site.kind)
        inner = self.path(site)
        return None if inner is None else f"{self.row.blocks}.{site.layer}.{inner}"

    def _held(self, site: Site) -> str:
        """What the module of `site` calls its parameter."""
        name = "bias" if site.bias else "weight"
        if self._of_experts(site) and self.row.experts is not None:
            name = self.row.experts.parameter(site.kind) + ("_bias" if site.bias else "")
        return name

    def _module(self, path: str) -> nn.Module:
        try:
            found: nn.Module = self._modules[path]
        except KeyError:
            where = f"the row of {self.row.family} names {path}, which {self.name} has not"
            raise ModelError(f"{where}; check memloc/architectures.py") from None
        return found

    @property
    def _stops(self) -> bool:
        """Whether a forward pass may be left midway; a fully sharded model would keep weights it should give back."""
        return not slices.fully_sharded(self.model)

    def _points(self, sites: Iterable[Site], side: hooks.Side) -> dict[Site, hooks.Point]:
        return {site: self.point(site, None, side) for site in sites}

    def _groups(self) -> int:
        """Key-value heads, counted in the weights: the configuration calls them by many names."""
        stored = self.parameter(Site(0, Kind.ATTN_V))
        made = int(stored.shape[1 if self.row.stored_in_out else 0]) // max(1, self.head_width)
        return max(1, made if self.row.shared(Kind.ATTN_V) is None else (made - self.heads) // 2)

    def _base(self) -> Any:
        return getattr(self.model, self.model.base_model_prefix)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        # Padding is on the right, where no real token sees it, so it needs no mask; masked, a padded token under a
        # sliding window would see nothing at all, which some attention makes NaN of. All ones, not none: without a
        # mask, transformers warns of every row that ends in the pad token.
        if self.row.causal:
            return {"input_ids": batch.ids, "attention_mask": torch.ones_like(batch.ids), "use_cache": False}
        if batch.truth is None and bool((batch.prefix < batch.length).any()):
            raise ModelError(f"{self.row.family} reads both ways, and was shown the tokens it is to predict; "
                             f"{LEFT_TO_RIGHT}")  # fmt: skip
        return {"input_ids": batch.ids, "attention_mask": batch.mask.long()}

    @cached_property
    def _quantised(self) -> bool:
        return getattr(self.config, "quantization_config", None) is not None

    def _check_parameters(self) -> None:
        for name, parameter in self.model.named_parameters():
            if self._quantised or not parameter.is_floating_point():
                raise ModelError(f"{name} is quantised ({parameter.dtype}); load the model in its full-precision form")
            held = self.values(name) if offloading.elsewhere(parameter) else slices.here(parameter.detach())
            if held.numel() and not bool(torch.isfinite(held.abs().max())):
                raise ModelError(
                    f"{name} holds values that are not finite (NaN or infinite); the checkpoint is damaged"
                )


def _refuse_routers(sites: Iterable[Site]) -> None:
    for site in sites:
        if site.kind is Kind.MLP_ROUTER:
            why = "what a router puts out can only be read, for its module goes on to choose with it"
            raise InputError(f"{site}: {why}; take what it reads, or its weight")


class Tail:
    """The blocks above one layer, on one batch. Made by `ModelView.tail`.

    Attributes:
        residual: [n, t, d] what block `layer` put out, unchanged.
    """

    def __init__(self, view: ModelView, layer: int, residual: Tensor, calls: Mapping[int, hooks.Call]) -> None:
        self.view, self.layer, self.residual = view, layer, residual
        self._calls = dict(calls)

    def hidden(self, residual: Tensor) -> Tensor:
        """After the final norm, `[n, t, d]`, were the residual after block `layer` this one; differentiable."""
        for layer in range(self.layer + 1, self.view.layers):
            residual = hooks.first(self._calls[layer].again(self.view.block(layer), residual))
        return self.view.final_norm(residual)
