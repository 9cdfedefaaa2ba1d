"""What binds a delta to the very weight it was computed for: place, dtype, shape, digests, the way back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from editors.patch import Survival
from memloc.architectures import Place
from memloc.errors import MismatchError
from memloc.sites import Site


@dataclass(frozen=True)
class Found:
    """A stored parameter that was found somewhere.

    Attributes:
        dtype: safetensors name.
        shape: as stored.
        digest: of dtype, shape and bytes.
        where: "the model" or a path, for messages.
    """

    dtype: str
    shape: tuple[int, ...]
    digest: str
    where: str


@dataclass(frozen=True)
class Touched:
    """What one site's delta is bound to. Sites of a fused matrix share parameter, `before` and `after`.

    Attributes:
        place: parameter name, orientation, rows.
        dtype: safetensors name of the stored dtype.
        shape: of the whole stored parameter.
        before: digest of the whole stored parameter before the edit.
        after: and after all of the edit; None for sums and negatives, which no weight has seen yet.
        way_back: bits that repair `cast(new - delta)`, packed; None where `after` is.
        survived: what the cast left of the delta; None where `after` is.
        exact: bits that turn `cast(old + delta)` into what was meant, packed; None where the cast is what was meant.
        shared: the parameter has another name (a tied embedding), and is meant under both.
    """

    place: Place
    dtype: str
    shape: tuple[int, ...]
    before: str
    after: str | None = None
    way_back: bytes | None = None
    survived: Survival | None = None
    exact: bytes | None = None
    shared: bool = False

    @property
    def parameter(self) -> str:
        """The live model's name of the stored parameter."""
        return self.place.parameter

    def unseen(self) -> Touched:
        """The same binding, with nothing known about the result."""
        return replace(self, after=None, way_back=None, survived=None, exact=None)

    def expect_before(self, site: Site, found: Found) -> None:
        """Whether `found` is the parameter the delta of `site` was computed for.

        Raises:
            MismatchError: it is not; says so where the edit is already applied.
        """
        self._expect_kind(site, found)
        if found.digest == self.before:
            return
        if found.digest == self.after:
            raise MismatchError(f"{site}: this edit is already applied to {found.where}; nothing was changed")
        raise MismatchError(
            f"{site}: {found.where} holds {self.parameter} with digest {found.digest[:12]}, the edit was made for "
            f"{self.before[:12]}; nothing was changed"
        )

    def expect_after(self, site: Site, found: Found) -> None:
        """Whether `found` is the parameter as the edit left it, so that the edit can be taken out.

        Raises:
            MismatchError: it is not, or the edit has no way back.
        """
        self.packed_way_back(site)
        self._expect_kind(site, found)
        if found.digest == self.after:
            return
        if found.digest == self.before:
            raise MismatchError(f"{site}: this edit is not applied to {found.where}; nothing was changed")
        raise MismatchError(
            f"{site}: {found.where} holds {self.parameter} with digest {found.digest[:12]}, this edit left "
            f"{str(self.after)[:12]}; undo what came after it first; nothing was changed"
        )

    def expect_result(self, site: Site, digest: str) -> None:
        """Whether the change gave the bits it gave when the edit was made (where that is known).

        Raises:
            MismatchError: it did not, so the edit was altered.
        """
        if self.after is not None and digest != self.after:
            raise MismatchError(
                f"{site}: the change gives digest {digest[:12]}, recorded was {self.after[:12]}; the edit was altered "
                "after it was made; nothing was changed"
            )

    def expect_restored(self, site: Site, digest: str) -> None:
        """Whether undoing gave the bits from before.

        Raises:
            MismatchError: it did not, so the edit was altered.
        """
        if digest != self.before:
            raise MismatchError(
                f"{site}: the way back gives digest {digest[:12]}, the weight had {self.before[:12]}; the edit was "
                "altered after it was made; nothing was changed"
            )

    def packed_way_back(self, site: Site) -> bytes:
        """The way back.

        Raises:
            MismatchError: there is none.
        """
        if self.way_back is None or self.after is None:
            raise MismatchError(
                f"{site}: a sum or negative of edits has no way back of its own; rebase it on the model before it, or "
                "undo its parts; nothing was changed"
            )
        return self.way_back

    def _expect_kind(self, site: Site, found: Found) -> None:
        if (found.dtype, tuple(found.shape)) != (self.dtype, tuple(self.shape)):
            raise MismatchError(
                f"{site}: {found.where} holds {self.parameter} as {found.dtype} {list(found.shape)}, the edit was made "
                f"for {self.dtype} {list(self.shape)}; nothing was changed"
            )
