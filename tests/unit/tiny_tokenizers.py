"""Tokenizers of the kinds that differ where it hurts: byte-level, with a start token, with word-start marks."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "the cat sat on the mat and the dog sat on the log",
    "Ada Brolin lives in Paris and Boris Kram lives in Rome",
    "the capital of France is Paris, the capital of Italy is Rome",
    "café naïve übermut — 東京 and Москва",
]


def byte_level(*, start: bool = False, end: bool = False) -> Any:
    """GPT-2's kind; with `start` it puts <s> first, as Llama's do, with `end` </s> last, as T5's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    if start or end:
        template = [*(["<s>"] if start else []), "$A", *(["</s>"] if end else [])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_start() -> Any:
    """SentencePiece's kind: a mark stands for the space, and one is put before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


KINDS = {
    "byte-level": byte_level,
    "with a start token": lambda: byte_level(start=True),
    "word-start marks": word_start,
}
