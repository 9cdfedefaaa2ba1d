"""Edit: deltas of sites, bound to the very weights they were computed for; apply, undo, add, save, load.

This is the only file that writes a live weight. An edit carries a digest of every parameter it touches, so it cannot
be applied twice, or to another model; and the way back to the bit, so that the edit file alone undoes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editors import deltas as forms
from editors.binding import Found, Touched
from editors.deltas import Delta, LowRank
from editors.disk.adapters import Adapter
from editors.edit_file import from_file, to_file
from editors.packing import pack_repair
from editors.patch import DTYPES, Survival, add_to, bits_short_of, dtype_name, empty_repair, take_from, weight_shape
from editors.rounding import Rounding
from memloc import offloading, slices, store
from memloc.errors import ArtifactError, InputError, MismatchError, ModelError
from memloc.lazy import method
from memloc.provenance import Provenance, digest_bytes, digest_json, digest_tensor
from memloc.sites import Site

if TYPE_CHECKING:
    from memloc.view import ModelView


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of some weights. Make one with `Edit.of`.

    Attributes:
        deltas: site to what is added, `[out, in]` float32 (`[out]` for a bias).
        touched: site to the stored weight it belongs to.
        provenance: who made it, from what.
        rounding: "nearest" or "stochastic".
        rounding_seed: of stochastic rounding.
        notes: what the editor reports beside, JSON values.

    Raises:
        InputError: no delta, a delta without its binding, or shapes that do not agree.
    """

    deltas: Mapping[Site, Delta]
    touched: Mapping[Site, Touched]
    provenance: Provenance
    rounding: Rounding = "nearest"
    rounding_seed: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)

    __repr__ = method("memloc.notebook:plain")
    _repr_html_ = method("memloc.notebook:html")

    def __post_init__(self) -> None:
        if not self.deltas or set(self.deltas) != set(self.touched):
            raise InputError(f"an edit of {len(self.deltas)} deltas bound to {len(self.touched)} weights")
        object.__setattr__(self, "deltas", dict(sorted(self.deltas.items())))
        object.__setattr__(self, "touched", dict(sorted(self.touched.items())))
        for site, delta in self.deltas.items():
            _check_delta(site, delta, weight_shape(self.touched[site].shape, self.touched[site].place))
        for parameter, sites in self.parameters.items():
            _check_apart(parameter, {site: self.touched[site] for site in sites})

    @classmethod
    def of(
        cls,
        view: ModelView,
        deltas: Mapping[Site, Delta],
        provenance: Provenance,
        *,
        rounding: Rounding = "nearest",
        rounding_seed: int = 0,
        notes: Mapping[str, Any] | None = None,
        exact: Mapping[Site, Tensor] | None = None,
        shared: bool = False,
    ) -> Edit:
        """Bind `deltas` to the weights of `view`, which are read and not changed.

        A delta of all experts' maps side by side becomes one of each expert's map that it changes.

        Cost: one copy of each touched parameter, two digests of it, and the way back.

        Args:
            view: the model as it is before the edit.
            deltas: site to delta.
            provenance: who made them.
            rounding: "nearest", or "stochastic" where small changes of bfloat16 or float16 weights must survive.
            rounding_seed: of stochastic rounding.
            notes: JSON values.
            exact: site to the weight it is to be where its delta touches it, bit for bit, in the stored dtype; the
                delta is this less the old weight, and the bits that adding it cannot reach are kept beside it.
            shared: an edit of a tied embedding is meant under both its names; by default it is refused.

        Raises:
            InputError: no delta, another shape, or two sites that overlap.
            ModelError: a touched weight is quantised, offloaded, tied, or not finite, or would not be finite.
        """
        deltas, meant_by = _by_unit(view, deltas), _exact_by_unit(view, exact or {})
        bound = {site: _bind(view, site, shared=shared) for site in deltas}
        for site, meant in meant_by.items():
            if site not in bound:
                continue
            stored = _copy(view, site, shared=shared)
            short = bits_short_of(stored, bound[site].place, deltas[site], meant.detach().cpu(), name=str(site))
            bound[site] = replace(bound[site], exact=short or None)
        return cls._tried(view, deltas, bound, provenance, rounding, rounding_seed, dict(notes or {}))

    @classmethod
    def _tried(
        cls,
        view: ModelView,
        deltas: Mapping[Site, Delta],
        bound: Mapping[Site, Touched],
        provenance: Provenance,
        rounding: Rounding,
        rounding_seed: int,
        notes: Mapping[str, Any],
    ) -> Edit:
        """The edit with its digests, its way back and what survives, found on copies of the weights."""
        edit = cls(deltas, bound, provenance, rounding, rounding_seed, notes)
        touched = dict(bound)
        for sites in edit.parameters.values():
            stored = _copy(view, sites[0], shared=bound[sites[0]].shared)
            before = digest_tensor(stored)
            repairs = {site: empty_repair(stored, deltas[site]) for site in sites}
            found = edit.change(stored, sites, repairs)
            after = digest_tensor(stored)
            for site in sites:
                back = pack_repair(repairs.pop(site))
                touched[site] = replace(bound[site], before=before, after=after, way_back=back, survived=found[site])
        return replace(edit, touched=touched)

    @classmethod
    def from_adapter(
        cls, view: ModelView, folder: str | Path, *, any_base: bool = False, rounding: Rounding = "nearest"
    ) -> Edit:
        """A PEFT LoRA adapter's change as an edit of `view`; exact factors, so no SVD and no loss.

        Args:
            view: the adapter's base, without the adapter.
            folder: with adapter_config.json and adapter_model.safetensors.
            any_base: take a model of another name where nothing but names can be compared (the base's folder is not
                at hand, and memloc did not write the adapter).
            rounding: as for `of`.

        Raises:
            CheckpointError: the folder holds no LoRA adapter, or more than low-rank changes of weights.
            MismatchError: an adapter of another base, or one that is merged into these weights already.
            InputError, ModelError: as for `of`.
        """
        adapter = Adapter.read(folder)
        inputs = {"adapter": adapter.digest, "model": view.digest}
        made = [dict(edit["provenance"]) for edit in adapter.edits]
        by = Provenance("peft-adapter", {"base": adapter.base}, None, inputs)
        deltas = adapter.deltas(view, any_base=any_base)
        return cls.of(view, deltas, by, rounding=rounding, notes={"made by": made} if made else {})

    # -- what it is ---------------------------------------------------------------------------------------------

    @cached_property
    def parameters(self) -> dict[str, list[Site]]:
        """Stored parameter to the sites in it."""
        found: dict[str, list[Site]] = {}
        for site, touched in self.touched.items():
            found.setdefault(touched.parameter, []).append(site)
        return found

    @property
    def norms(self) -> dict[Site, float]:
        """Frobenius norm of each delta."""
        return {site: delta.norm() for site, delta in self.deltas.items()}

    @property
    def count(self) -> int:
        """Entries the deltas may change."""
        return sum(delta.touched for delta in self.deltas.values())

    @property
    def share(self) -> float:
        """`count` over all entries of the touched weights."""
        return self.count / sum(math.prod(delta.shape) for delta in self.deltas.values())

    @property
    def survived(self) -> dict[Site, Survival]:
        """What the cast left of each delta, where that is known."""
        return {site: entry.survived for site, entry in self.touched.items() if entry.survived is not None}

    @property
    def reversible(self) -> bool:
        """Whether the edit alone can undo itself (sums and negatives cannot until `rebased`)."""
        return all(entry.way_back is not None and entry.after is not None for entry in self.touched.values())

    @cached_property
    def digest(self) -> str:
        """Digest of what it changes and how: deltas, places, base digests, rounding. Not of who made it."""
        content = {
            str(site): {
                "delta": {name: digest_tensor(entry) for name, entry in self.deltas[site].tensors().items()},
                "shape": list(self.deltas[site].shape),
                "place": touched.place.to_json(),
                "base": [touched.dtype, list(touched.shape), touched.before],
                **({} if touched.exact is None else {"exact": digest_bytes(touched.exact)}),
                **({"shared": True} if touched.shared else {}),
            }
            for site, touched in self.touched.items()
        }
        return digest_json({"sites": content, "rounding": self.rounding, "seed": self.rounding_seed})

    def summary(self) -> dict[str, Any]:
        """What it is, as JSON values; an entry a site with its norm and what survived the cast."""
        sites = {
            str(site): {"norm": norm, **(left.to_json() if (left := self.survived.get(site)) else {})}
            for site, norm in self.norms.items()
        }
        return {
            "digest": self.digest, "entries": self.count, "share": self.share, "reversible": self.reversible,
            "rounding": self.rounding, "sites": sites, "notes": dict(self.notes),
            "provenance": self.provenance.to_json(),
        }  # fmt: skip

    # -- into weights and back ----------------------------------------------------------------------------------

    def apply(self, view: ModelView) -> Applied:
        """Write the edit into a live model, in place; tied names and other holders of the tensors see it.

        All is computed and checked before the first write. Memory: one copy of every touched parameter, until the
        writing is done.

        Returns:
            A handle that undoes it: `with edit.apply(view): ...`, or `.undo()`.

        Raises:
            MismatchError: the weights are not those the edit was made for; the message names the site.
            ModelError: quantised, offloaded, in slices, tied, or not finite.
        """
        for site in self.touched:
            if slices.sliced(view.parameter(site)):
                raise ModelError(f"{site} lies in slices on several processes; save the edit, then use `memloc apply`")
            if offloading.elsewhere(view.parameter(site)):
                raise ModelError(f"{site}: the weight is offloaded; edit the checkpoint folder instead (memloc apply)")
        edit = self if self.reversible else self.rebased(view)
        results: dict[str, Tensor] = {}
        for parameter, sites in edit.parameters.items():
            stored = _copy(view, sites[0], shared=edit.touched[sites[0]].shared)
            edit._expect_before(view, sites, stored)
            edit.change(stored, sites)
            edit.touched[sites[0]].expect_result(sites[0], digest_tensor(stored))
            results[parameter] = stored
        _exchange({name: _live(view, edit.touched[edit.parameters[name][0]]) for name in results}, results)
        return Applied(edit, view)

    def rebased(self, view: ModelView) -> Edit:
        """The same edit with its way back and what survives worked out on `view`, which holds the weights before it.

        Raises:
            MismatchError: the weights are not those the edit was made for.
        """
        for sites in self.parameters.values():
            self._expect_before(view, sites, _copy(view, sites[0], shared=self.touched[sites[0]].shared))
        bound = {
            site: replace(_bind(view, site, shared=entry.shared), exact=entry.exact)
            for site, entry in self.touched.items()
        }
        how = (self.provenance, self.rounding, self.rounding_seed, self.notes)
        return Edit._tried(view, self.deltas, bound, *how)

    def change(
        self, stored: Tensor, sites: Iterable[Site], repairs: Mapping[Site, Tensor] | None = None
    ) -> dict[Site, Survival]:
        """Add the deltas of `sites` into `stored`, the caller's own copy of their parameter; see `patch.add_to`.

        Returns:
            What survived: as recorded where it is (the digest of the result tells that the bits are the same).
        """
        how: dict[str, Any] = {"rounding": self.rounding, "seed": self.rounding_seed}
        found = {}
        for site in sites:
            touched, repair = self.touched[site], None if repairs is None else repairs[site]
            how |= {"name": str(site), "repair": repair, "measure": touched.survived is None, "exact": touched.exact}
            found[site] = add_to(stored, touched.place, self.deltas[site], **how) or touched.survived
        return {site: entry for site, entry in found.items() if entry is not None}

    def change_back(self, stored: Tensor, sites: Iterable[Site]) -> None:
        """Undo `change` in `stored`, to the bit.

        Raises:
            MismatchError: this edit has no way back.
            ArtifactError: the way back is damaged.
        """
        for site in sites:
            touched = self.touched[site]
            take_from(stored, touched.place, self.deltas[site], touched.packed_way_back(site), name=str(site))

    def _expect_before(self, view: ModelView, sites: list[Site], stored: Tensor) -> None:
        for site in sites:
            if view.place(site) != self.touched[site].place:
                raise MismatchError(f"{site}: lies elsewhere in {view.name}, a model of another family")
        self.touched[sites[0]].expect_before(sites[0], _found(stored))

    # -- algebra ------------------------------------------------------------------------------------------------

    def __add__(self, other: Edit) -> Edit:
        """Both changes at once, on the base both were made for.

        Raises:
            MismatchError: they were made for different weights (`other` after `self`, say: apply one, then the other).
            InputError: they round in different ways.
        """
        if self.rounding != other.rounding:
            raise InputError(f"cannot add an edit rounded {self.rounding} and one rounded {other.rounding}")
        shared = self.parameters.keys() & other.parameters.keys()
        for parameter in sorted(shared):
            mine, theirs = self.touched[self.parameters[parameter][0]], other.touched[other.parameters[parameter][0]]
            if mine.before != theirs.before:
                raise MismatchError(
                    f"{self.parameters[parameter][0]}: the edits were made for different weights, {mine.before[:12]} "
                    f"and {theirs.before[:12]}; apply one after the other"
                )
        touched = {**self.touched, **other.touched}
        touched = {site: entry.unseen() if entry.parameter in shared else entry for site, entry in touched.items()}
        both = self.deltas.keys() & other.deltas.keys()
        sums = {site: forms.add(self.deltas[site], other.deltas[site]) for site in both}
        inputs = {**self.provenance.inputs, **other.provenance.inputs}
        parts = {"parts": [self.provenance.to_json(), other.provenance.to_json()]}
        return Edit(
            {**self.deltas, **other.deltas, **sums},
            touched,
            Provenance("sum", parts, None, inputs),
            self.rounding,
            self.rounding_seed,
        )

    def __neg__(self) -> Edit:
        """The opposite change, of the same base: what `edit + -edit` cancels. To take an edit back, `undo` it."""
        return Edit(
            {site: -delta for site, delta in self.deltas.items()},
            {site: touched.unseen() for site, touched in self.touched.items()},
            Provenance("negative", {"of": self.provenance.to_json()}, None, self.provenance.inputs),
            self.rounding,
            self.rounding_seed,
        )

    # -- on disk ------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write `edit.safetensors`, atomically; the same edit gives the same bytes.

        Raises:
            TargetError: it cannot be written.
        """
        tensors, sites = to_file(self.deltas, self.touched)
        header = {
            "sites": sites,
            "rounding": self.rounding,
            "rounding_seed": self.rounding_seed,
            "digest": self.digest,
            "provenance": self.provenance.to_json(),
            "notes": dict(self.notes),
        }
        store.save(path, "edit", tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read what `save` wrote.

        Raises:
            ArtifactError: missing, cut, of another kind, or altered.
        """
        tensors, header = store.load(path, "edit")
        try:
            deltas, touched = from_file(tensors, header["sites"])
            provenance = Provenance.from_json(header["provenance"])
            edit = cls(deltas, touched, provenance, header["rounding"], header["rounding_seed"], header["notes"])
            if edit.digest != header["digest"]:
                raise ArtifactError("its content does not have the digest it was written with")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, InputError, ArtifactError) as error:
            raise ArtifactError(f"{path} is not a whole edit: {error}") from error
        return edit


class Applied:
    """An edit that is in a live model now. Leaving the `with` block, or `undo`, takes it out to the bit."""

    def __init__(self, edit: Edit, view: ModelView) -> None:
        self.edit, self.view, self.active = edit, view, True

    @property
    def survived(self) -> Mapping[Site, Survival]:
        """What the cast left of each delta."""
        return self.edit.survived

    def undo(self) -> None:
        """Give the weights back every bit they had; nothing happens the second time.

        Raises:
            MismatchError: a touched weight was changed since; nothing is written then.
        """
        if not self.active:
            return
        results: dict[str, Tensor] = {}
        for parameter, sites in self.edit.parameters.items():
            touched = self.edit.touched[sites[0]]
            stored = _copy(self.view, sites[0], shared=touched.shared)
            touched.expect_after(sites[0], _found(stored))
            self.edit.change_back(stored, sites)
            touched.expect_restored(sites[0], digest_tensor(stored))
            results[parameter] = stored
        own = {name: self.edit.touched[self.edit.parameters[name][0]] for name in results}
        _exchange({name: _live(self.view, touched) for name, touched in own.items()}, results)
        self.active = False

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _by_unit(view: ModelView, deltas: Mapping[Site, Delta]) -> dict[Site, Delta]:
    """Deltas of maps as they are stored: those of all experts side by side, expert by expert."""
    found: dict[Site, Delta] = {}
    for site, delta in deltas.items():
        units, place = view.units(site), view.place(site)
        if units == (site,):
            parts: dict[Site, Delta] = {site: delta}
        else:
            _check_delta(site, delta, tuple(view.weight(site).shape))
            split = forms.by_expert(delta, len(units), columns=place.joined == "columns")
            parts = {unit: part for unit, part in zip(units, split, strict=True) if part.norm()} or {units[0]: split[0]}
        for unit, part in parts.items():
            found[unit] = forms.add(found[unit], part) if unit in found else part
    return found


def _exact_by_unit(view: ModelView, exact: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    """Whole weights meant, of maps as they are stored."""
    found: dict[Site, Tensor] = {}
    for site, meant in exact.items():
        units = view.units(site)
        axis = 1 if view.place(site).joined == "columns" else 0
        found |= dict(zip(units, meant.chunk(len(units), axis), strict=True))
    return found


def _live(view: ModelView, touched: Touched) -> Tensor:
    """The stored matrix in the live model, on its own memory."""
    return touched.place.matrix(view.model.get_parameter(touched.place.parameter).detach())


def _exchange(live: Mapping[str, Tensor], results: dict[str, Tensor]) -> None:
    """Write `results` into the live matrices; `results` holds the old values afterwards. All or none."""
    started: list[str] = []
    try:
        for parameter in results:
            new, results[parameter] = results[parameter], live[parameter].to("cpu", copy=True)
            started.append(parameter)
            with torch.no_grad():
                live[parameter].copy_(new)
    except BaseException:
        for parameter in started:
            with torch.no_grad():
                live[parameter].copy_(results[parameter])
        raise


def _bind(view: ModelView, site: Site, *, shared: bool) -> Touched:
    live, place = view.parameter(site), view.place(site)
    dtype = dtype_name(live)
    if dtype not in DTYPES or hasattr(live, "quant_state"):
        raise ModelError(f"{site}: the weight is quantised ({dtype}); edit the full-precision checkpoint")
    others = view.tied(place.parameter)
    if others and not shared:
        names = " and ".join([place.parameter, *others])
        raise ModelError(f"{site}: {names} are one tensor, tied; an edit of one would be an edit of both")
    return Touched(place, dtype, tuple(place.matrix(live).shape), "", shared=bool(others))


def _copy(view: ModelView, site: Site, *, shared: bool) -> Tensor:
    """The stored parameter of `site`, copied to the CPU; checked to be one that can be edited."""
    _bind(view, site, shared=shared)
    place = view.place(site)
    return place.matrix(view.values(place.parameter).detach()).to("cpu", copy=True).contiguous()


def _found(stored: Tensor) -> Found:
    return Found(dtype_name(stored), tuple(stored.shape), digest_tensor(stored), "the model")


def _check_delta(site: Site, delta: Delta, shape: tuple[int, ...]) -> None:
    if site.bias and isinstance(delta, LowRank):
        raise InputError(f"{site}: a bias takes a dense or sparse delta [out]")
    if delta.shape != shape:
        raise InputError(f"{site}: delta {list(delta.shape)}, expected the weight's {list(shape)}")


def _check_apart(parameter: str, touched: Mapping[Site, Touched]) -> None:
    """Sites of one parameter must not share rows: the order of applying would count."""
    seen: dict[int, Site] = {}
    if len(touched) == 1:
        return
    for site, entry in touched.items():
        size = entry.shape[-1] if entry.place.transposed else entry.shape[0]
        rows = entry.place.rows
        table = range(size)[rows] if isinstance(rows, slice) else range(size) if rows is None else rows
        for row in table:
            if row in seen:
                raise InputError(f"{seen[row]} and {site} are the same rows of {parameter}; edit one of them")
            seen[row] = site
