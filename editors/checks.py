"""The battery every editor must pass; public, for guests too.

Each check takes an editor, a view and a request it can answer, and raises AssertionError with one line that says
which promise was broken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from editors.base import Editor, Request
from editors.edit import Edit
from editors.masks import Masks
from memloc.errors import InputError, MismatchError
from memloc.provenance import digest_tensor
from memloc.view import ModelView


def check_editor(
    editor: Editor, view: ModelView, request: Request, folder: Path, *, masks: Masks | None = None
) -> Edit:
    """All checks, on one edit (computed three times).

    Args:
        editor: what is checked.
        view: a model whose weights it can edit; it is left as it was.
        request: something it can answer.
        folder: where a file may be written.
        masks: the only entries it may change, or None where the editor chooses them itself.

    Returns:
        The edit.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    with hands_off(view):
        edit = editor(view, request)
    check_deterministic(editor, view, request, edit)
    if masks is not None:
        check_inside(edit, masks)
    check_survives_disk(edit, folder / "checked.edit.safetensors")
    check_applies_and_undoes(edit, view)
    check_refuses_nothing(editor, view)
    return edit


@contextlib.contextmanager
def hands_off(view: ModelView) -> Iterator[None]:
    """The model is as it was when the block ends: every bit, what needs gradients, no gradient left, its mode.

    Raises:
        AssertionError: it is not.
    """
    before, flags, generator = state(view), _flags(view), torch.random.get_rng_state()
    yield
    _need(state(view) == before, "the editor changed the model's weights")
    _need(_flags(view) == flags, "the editor left gradients, hooks, or another mode behind")
    _need(torch.equal(generator, torch.random.get_rng_state()), "the editor used the global generator")


def check_deterministic(editor: Editor, view: ModelView, request: Request, edit: Edit) -> None:
    """The same request gives the same edit, to the bit, whatever the global generator's state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        again = editor(view, request)
    _need(again.digest == edit.digest, "two calls with the same seed gave different edits")
    _need(again.provenance == edit.provenance, "two calls gave different provenance")
    _need(dict(again.notes) == dict(edit.notes), "two calls gave different notes")


def check_inside(edit: Edit, masks: Masks) -> None:
    """No entry off `masks` has a change."""
    for site, delta in edit.deltas.items():
        _need(site in masks, f"{site} is changed and not in the selection")
        outside = delta.dense()[~masks[site]]
        _need(not bool(outside.any()), f"{site}: {int((outside != 0).sum())} entries off the mask are changed")


def check_survives_disk(edit: Edit, path: Path) -> None:
    """Saved and loaded, the edit is the same."""
    edit.save(path)
    loaded = Edit.load(path)
    _need(loaded.digest == edit.digest, "the edit read back from its file is another")
    _need(loaded.provenance == edit.provenance, "the provenance read back from its file is another")
    _need(dict(loaded.notes) == dict(edit.notes), "the notes read back from their file are others")


def check_applies_and_undoes(edit: Edit, view: ModelView) -> None:
    """Applied, the weights are old + delta in one cast and no other changed; undone, every bit is back."""
    before = state(view)
    wanted = {site: view.weight(site).detach().cpu().double() + edit.deltas[site].dense() for site in edit.deltas}
    _need(any(bool(delta.dense().any()) for delta in edit.deltas.values()), "the edit changes nothing")
    with edit.apply(view):
        for site, value in wanted.items():
            found = view.weight(site).detach().cpu()
            kind, step = torch.finfo(found.dtype), edit.deltas[site].dense().double().abs()
            # One spacing of the stored dtype, subnormal ones too, and one of float32 where old and delta cancel.
            spacing = kind.eps * value.abs().clamp_min(max(1e-6, kind.tiny)) + 2**-23 * step
            _need(bool(((found - value).abs() <= spacing).all()), f"{site}: what was applied is not old + delta")
        changed = {name for name, digest in state(view).items() if digest != before[name]}
        named = {name for parameter in edit.parameters for name in (parameter, *view.tied(parameter))}
        _need(changed <= named, f"parameters outside the edit changed: {changed - named}")
        with contextlib.suppress(MismatchError):
            edit.apply(view)
            raise AssertionError("the edit could be applied twice")
    _need(state(view) == before, "undoing did not give every bit back")


def check_refuses_nothing(editor: Editor, view: ModelView) -> None:
    """A request that asks for nothing is an InputError, not an empty edit.

    Editors whose settings alone say what to change (another checkpoint, say) declare `settings_suffice`.
    """
    if getattr(editor, "settings_suffice", False):
        return
    with contextlib.suppress(InputError):
        editor(view, Request())
        raise AssertionError("a request with nothing to do was answered")


def state(view: ModelView) -> dict[str, str]:
    """Digest of every parameter and buffer, by name."""
    return {name: digest_tensor(tensor) for name, tensor in view.model.state_dict(keep_vars=True).items()}


def _flags(view: ModelView) -> list[tuple[str, bool, bool]]:
    found = [(name, p.requires_grad, p.grad is None) for name, p in view.model.named_parameters()]
    hooks = [
        (name, module.training, bool(module._forward_hooks or module._forward_pre_hooks))
        for name, module in view.model.named_modules()
    ]
    return found + hooks


def _need(held: bool, broken: str) -> None:
    if not held:
        raise AssertionError(broken)
