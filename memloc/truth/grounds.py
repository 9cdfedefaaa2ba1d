"""Grounds from folders: a trained checkpoint, and the texts it knows and does not know, as a lab keeps them."""

from __future__ import annotations

from pathlib import Path

from memloc.errors import InputError
from memloc.passages import Passage, Passages, read_jsonl
from memloc.truth.worlds import Ground
from memloc.view import ModelView

WINDOW = 64
"""Tokens of a window of ordinary text, where the model's context is not shorter."""


def ground_of(
    model: str | Path,
    *,
    seed: int = 0,
    memorized: Passages | None = None,
    unknown: Passages | None = None,
    text: Passages | None = None,
) -> Ground:
    """A ground from a checkpoint; what is not given is read from a lab's files beside it, where they are.

    Args:
        model: checkpoint folder, or a name on the hub.
        seed: of every draw.
        memorized: passages it recites; by default `passages.jsonl`.
        unknown: passages it was never trained on; by default `controls.jsonl`, or else the ordinary text.
        text: ordinary text it was not trained on; by default what `corpus.jsonl` calls held-out.

    Raises:
        CheckpointError: the folder holds no model.
        InputError: a file that is there cannot be read.
    """
    folder = Path(model)
    view = ModelView.open(model)
    if text is None and (folder / "corpus.jsonl").is_file():
        text = _held_out(folder / "corpus.jsonl", view)
    memorized = memorized or _passages(folder / "passages.jsonl", view)
    unknown = unknown or _passages(folder / "controls.jsonl", view) or _halved(text)
    return Ground(folder.name, view, memorized, unknown, text, seed)


def _passages(file: Path, view: ModelView) -> Passages | None:
    return Passages.read(file, view.tokenizer) if file.is_file() else None


def _held_out(file: Path, view: ModelView) -> Passages:
    texts = [record["text"] for _, record in read_jsonl(file) if record.get("split") == "held-out"]
    if not texts:
        raise InputError(f"{file}: no record with split held-out; name ordinary text with --text FILE")
    return Passages.from_texts(texts, view.tokenizer, window=min(view.context or WINDOW, WINDOW), origin="held-out")


def _halved(text: Passages | None) -> Passages | None:
    """Windows of ordinary text as passages: their first half as prefix."""
    if text is None:
        return None
    items = [Passage(item.id, item.ids[: len(item.ids) // 2], item.ids[len(item.ids) // 2 :]) for item in text]
    return Passages(tuple(items), text.origin)
