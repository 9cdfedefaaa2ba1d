"""The second moments an editor works with: those it was given, if they are of this model, or those of the text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from editors.base import Request
from memloc.errors import InputError, MismatchError
from memloc.moments import Moments, second_moments
from memloc.sites import Site
from memloc.view import ModelView

Given = Moments | Path | str | None


def moments_of(
    name: str, given: Given, view: ModelView, request: Request, sites: Sequence[Site], *, model: str | None = None
) -> Moments:
    """Second moments of `sites`.

    Args:
        name: of the editor, for errors.
        given: moments, the file of saved ones, or None to collect them from the request's text.
        view: the model.
        request: its text, and the edits the model already holds.
        sites: where they are needed.
        model: the model's digest, where it is known (it takes a pass over the weights).

    Raises:
        InputError: neither text nor moments.
        ArtifactError: a file that is missing, cut or of another kind.
        MismatchError: moments of another model (see `refuse_foreign`).
    """
    if given is None:
        if not request.text:
            needs = "needs ordinary text, to know what to leave alone, or second moments; found neither"
            raise InputError(f"{name} {needs}")
        return second_moments(view, request.text, sites)
    found = given if isinstance(given, Moments) else Moments.load(given)
    refuse_foreign(name, found, view.digest if model is None else model, request, shown=_shown(given))
    return found


def refuse_foreign(name: str, moments: Moments, model: str, request: Request, *, shown: str) -> None:
    """Refuse moments of a model that is neither this one nor this one before the edits it holds (`request.past`).

    Whoever wants those of another model gives `Moments` whose provenance names none.

    Raises:
        MismatchError: says whose they are.
    """
    theirs = moments.provenance.inputs.get("model")
    known = {model, *(edit.provenance.inputs.get("model") for edit in request.past)}
    if theirs and theirs not in known:
        said = f"{shown} was collected on another model ({theirs[:12]}, this one is {model[:12]})"
        raise MismatchError(f"{name}: {said}; collect second moments on this one")


def _shown(given: Moments | Path | str) -> str:
    return "the second moment given" if isinstance(given, Moments) else str(given)
