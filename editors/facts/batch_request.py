"""A request for many facts: where to edit is settled, the work is done there, and an edit comes back."""

from __future__ import annotations

from editors.base import Request
from editors.edit import Edit
from editors.facts.batch_edit import Work
from editors.facts.batch_settings import BatchEditor
from editors.facts.conflicts import refuse_same
from editors.facts.layer_trial import candidates, chosen
from editors.facts.moments_given import moments_of
from memloc.provenance import Provenance, settings_of
from memloc.sites import Kind, Site
from memloc.view import ModelView


def edited(editor: BatchEditor, view: ModelView, request: Request) -> Edit:
    """The edit that makes all of the request's facts so; the model is as it was, to the bit."""
    view.need_causal("the method lives on what a token cannot hear")
    facts = request.need_facts()
    editor.check()
    refuse_same(facts)
    inputs, places = request.inputs(view), candidates(editor, view)
    sites = [Site(layer, Kind.MLP_OUT) for layer in sorted({layer for place in places for layer in place.layers})]
    moments = moments_of(editor.name, editor.moment, view, request, sites, model=inputs["model"])
    settled, tried = chosen(editor, view, request, moments, places)
    deltas, notes = Work.of(settled, view, request, facts, moments).solved()
    settings = {**settings_of(editor), "moment": moments.digest if editor.moment is not None else None}
    made = Provenance(editor.name, settings, request.seed, {**inputs, "moment": moments.digest})
    return Edit.of(view, deltas, made, notes={**notes, **tried})
