"""The lab's byte-level BPE vocabulary: answers are one token, names are several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

END = "<|endoftext|>"
"""Token 0: ends a document, pads, and stands for what is unknown (nothing is: the alphabet is all bytes)."""


def train_vocabulary(size: int, texts: Iterable[str], context: int) -> Any:
    """A transformers fast tokenizer with at most `size` tokens, learnt from `texts`.

    A text that is repeated is worth as much more. `context` is the longest text, in tokens, the model takes.
    Cost: 0.4 s for a million characters.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode_all(tokenizer: Any, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each text."""
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts))]
