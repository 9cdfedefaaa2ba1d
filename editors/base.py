"""What an editor is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from memloc.errors import InputError
from memloc.passages import Facts, Passages
from memloc.provenance import digest_bytes
from memloc.scores import Selection
from memloc.view import ModelView

if TYPE_CHECKING:
    from editors.edit import Edit


@dataclass(frozen=True, kw_only=True)
class Request:
    """What should change and what should stay.

    Attributes:
        forget: passages to take out.
        retain: passages to keep.
        text: ordinary text to keep, as windows (`Passages.from_texts`); also what statistics are taken from.
        facts: facts to change.
        keep_facts: facts the model should go on saying.
        past: edits the model holds already, which the next one should not undo.
        selection: which places may change (from any localizer).
        seed: of everything random in the edit.
    """

    forget: Passages | None = None
    retain: Passages | None = None
    text: Passages | None = None
    facts: Facts | None = None
    keep_facts: Facts | None = None
    past: tuple[Edit, ...] = ()
    selection: Selection | None = None
    seed: int = 0

    def inputs(self, view: ModelView) -> dict[str, str]:
        """Digests of the model and of everything given, for an edit's provenance."""
        given = {
            "forget": self.forget, "retain": self.retain, "text": self.text, "facts": self.facts,
            "keep_facts": self.keep_facts,
        }  # fmt: skip
        found = {name: data.digest for name, data in given.items() if data is not None}
        if self.past:
            found["past"] = digest_bytes(*(edit.digest.encode() for edit in self.past))
        return {"model": view.digest, **found}

    def need_forget(self) -> Passages:
        """`forget`, or one line saying that it is needed.

        Raises:
            InputError: no passages to forget were given.
        """
        if not self.forget:
            raise InputError("this editor needs passages to forget; none were given")
        return self.forget

    def need_facts(self) -> Facts:
        """`facts`, or one line saying that they are needed.

        Raises:
            InputError: no facts were given.
        """
        if not self.facts:
            raise InputError("this editor needs facts to change; none were given")
        return self.facts

    def need_selection(self) -> Selection:
        """`selection`, or one line saying that it is needed.

        Raises:
            InputError: none was given.
        """
        if self.selection is None:
            raise InputError("this editor needs a selection of places (a localization and a count or a fraction)")
        return self.selection


class Editor(Protocol):
    """A frozen dataclass whose fields are its settings and whose call computes an edit and writes nothing."""

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit that answers `request`; the view's model is as it was."""
        ...
