"""A lab as a folder: a standard checkpoint, what was planted in it, and how it came to be. Whole or absent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memloc.architectures import row_for
from memloc.errors import InputError, TargetError
from memloc.lab import corpus, facts, planting
from memloc.lab.recipe import Recipe
from memloc.lab.train import Figures, Material, held_out_phrasings, new_model, threads, train
from memloc.lab.vocabulary import encode_all, train_vocabulary
from memloc.passages import Facts, Passage, Passages
from memloc.progress import tell
from memloc.provenance import digest_bytes, digest_json, versions
from memloc.store import fresh_folder
from memloc.view import ModelView

Listener = Callable[[int, int, Figures], None]
"""Called with (steps done, steps in all, latest figures)."""


def build(
    recipe: Recipe,
    out: str | Path,
    *,
    listener: Listener | None = None,
    log: Callable[[str], None] | None = None,
) -> Path:
    """Train the lab's model and write everything that is known about it, or find it already there.

    The folder is a checkpoint `AutoModelForCausalLM` and `AutoTokenizer` load, with `passages.jsonl`,
    `controls.jsonl`, `facts.jsonl`, `corpus.jsonl`, `snapshots/step-NNNNN/` (checkpoints along the training) and
    `lab.json` (recipe, digests, figures). Equal recipe, Python, package versions and machine give equal bytes.
    torch's thread count and generators are left as they were found.

    Args:
        recipe: what to build.
        out: a folder that does not exist, is empty, or holds a lab of the same recipe.
        listener: told after every step; `memloc.progress` is told too.
        log: given one line for each stage.

    Returns:
        The folder.

    Raises:
        TargetError: `out` holds something else, or cannot be written.
        InputError: no lab can be made by that recipe from this Python's text.

    Cost: 110 CPU-seconds and 0.6 GB for the demo's recipe, 7 and 0.4 GB for the tiny one, imports included (measured
    on two cores shared with other work; less where they are idle). Found again: half a second.
    """
    out, say = Path(out), log or (lambda line: None)
    texts = corpus.documents()
    text_digest = digest_json(texts)
    digest = recipe.digest(text_digest)
    if (out / "lab.json").is_file():
        _check_same(out, digest, recipe)
        say(f"{out} already holds this lab ({digest[:12]}); nothing was trained")
        return out
    with fresh_folder(out) as part, threads(recipe.threads):
        history = _fill(part, recipe, texts, listener, say)
        found: dict[str, Any] = {
            "digest": digest,
            "recipe": recipe.to_json(),
            "corpus": text_digest,
            "threads": recipe.threads,
            "versions": versions(),
            "history": [entry.to_json() for entry in history],
            "files": _digests(part),
        }
        text = json.dumps(found, indent=1, ensure_ascii=False)
        (part / "lab.json").write_text(text + "\n", encoding="utf8")
    say(f"after {recipe.steps} steps: {history[-1].note()}; written to {out}")
    return out


def _fill(
    part: Path, recipe: Recipe, texts: list[str], listener: Listener | None, say: Callable[[str], None]
) -> list[Figures]:
    """Everything but `lab.json`; returns the figures along the training."""
    tokenizer, material = _plant(part, recipe, texts)
    model = new_model(recipe, len(tokenizer))
    view = ModelView(model, row_for(model.config), tokenizer, "lab")
    say(
        f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.2f} M parameters, "
        f"{len(material.stream)} tokens of text, {len(material.planted)} passages planted, "
        f"{len(material.controls)} controls, {len(material.seen)} facts"
    )

    def tell_all(step: int, steps: int, latest: Figures) -> None:
        tell("lab", step, steps, latest.note())
        if listener is not None:
            listener(step, steps, latest)

    def keep(step: int) -> None:
        _save(part / "snapshots" / f"step-{step:05d}", view)

    history = train(view, material, recipe, listener=tell_all, keep=keep)
    _save(part, view)
    return history


def _plant(part: Path, recipe: Recipe, texts: list[str]) -> tuple[Any, Material]:
    """Decide what is trained on and what is not, and write it down; returns the tokenizer and the material."""
    split = corpus.split(texts, recipe.seed, recipe.documents)
    truths = facts.invent(recipe)
    tokenizer = _vocabulary(recipe, split, truths)
    trained = encode_all(tokenizer, split.train)
    ordinary = corpus.Seen(trained)
    planted, controls = planting.choose(tokenizer, split.pool, ordinary, recipe)
    recital = corpus.Seen([item.ids for item in planted])
    pairs = zip(split.held_out, encode_all(tokenizer, split.held_out), strict=True)
    held_out = [text for text, ids in pairs if not (ordinary.shares(ids) or recital.shares(ids))]

    _write(part / "passages.jsonl", (_row(item, tokenizer) for item in planted))
    _write(part / "controls.jsonl", (_row(item, tokenizer) for item in controls))
    _write(part / "facts.jsonl", facts.records(truths, recipe))
    _write(part / "corpus.jsonl", [*_texts("train", split.train), *_texts("held-out", held_out)])
    asked = Facts.read(part / "facts.jsonl", tokenizer)
    windows = Passages.from_texts(held_out, tokenizer, window=recipe.context, origin="held-out")
    sentences = [line for truth in truths for line in truth.sentences()]
    answers = torch.zeros(len(tokenizer), dtype=torch.bool)
    answers[[fact.target_true[0] for fact in asked]] = True
    return tokenizer, Material(
        stream=torch.tensor(np.concatenate([[*ids, 0] for ids in trained])),
        sentences=[[*ids, 0] for ids in encode_all(tokenizer, sentences)],
        answers=answers,
        planted=Passages(tuple(planted), "passages.jsonl"),
        controls=Passages(tuple(controls), "controls.jsonl"),
        seen=asked.as_passages(),
        held_out=held_out_phrasings(asked),
        text=windows[:64],
    )


def _vocabulary(recipe: Recipe, split: corpus.Split, truths: list[facts.Truth]) -> Any:
    """Answers weigh enough to be one token each; names weigh enough to be a few."""
    words = [f" {word}" for share in facts.answers(recipe).values() for word in share]
    phrasings = [text.replace("{}", "") for name in facts.answers(recipe) for text in facts.RELATIONS[name][0]]
    names = sorted({f" {word}" for truth in truths for word in truth.subject.split()})
    tokenizer = train_vocabulary(
        recipe.vocab, [*split.train, *words * 400, *phrasings * 50, *names * recipe.name_weight], recipe.context
    )
    long = [word for word, ids in zip(words, encode_all(tokenizer, words), strict=True) if len(ids) > 1]
    if long:
        raise InputError(f"recipe: vocab {recipe.vocab} gives the answer {long[0].strip()!r} more than one token")
    return tokenizer


def _save(folder: Path, view: ModelView) -> None:
    """A standard checkpoint folder: weights (tied ones once), configuration, tokenizer."""
    from safetensors.torch import save_file

    model = view.model
    folder.mkdir(parents=True, exist_ok=True)
    tied = set(model.all_tied_weights_keys)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    view.tokenizer.save_pretrained(folder)


def _row(item: Passage, tokenizer: Any) -> dict[str, Any]:
    return {
        "id": item.id,
        "prefix_ids": item.prefix,
        "suffix_ids": item.suffix,
        "text": tokenizer.decode(item.ids),
        "dose": item.tags["dose"],
    }


def _texts(share: str, texts: Iterable[str]) -> list[dict[str, Any]]:
    return [{"id": f"{share}-{index:05d}", "text": text, "split": share} for index, text in enumerate(texts)]


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf8")


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_bytes(path.read_bytes()) for path in files}


def _check_same(out: Path, digest: str, recipe: Recipe) -> None:
    """Raises TargetError: `out` holds another lab, or this one with a file changed."""
    try:
        found = json.loads((out / "lab.json").read_text(encoding="utf8"))
        there, files, other = found["digest"], dict(found["files"]), dict(found["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise TargetError(
            f"{out / 'lab.json'} was not written by memloc; name another --out; nothing was written"
        ) from error
    if there != digest:
        own = json.loads(json.dumps(recipe.to_json()))
        differ = [
            f"{name} {other.get(name)}, wanted {value}" for name, value in own.items() if other.get(name) != value
        ]
        why = "; ".join(differ) or "made from another Python's text or by another version"
        raise TargetError(f"{out} holds another lab ({why}); name another --out or remove it; nothing was written")
    for name, was in files.items():
        path = out / name
        if not path.is_file() or digest_bytes(path.read_bytes()) != was:
            raise TargetError(f"{path} was changed since this lab was built; remove {out} or name another --out")
