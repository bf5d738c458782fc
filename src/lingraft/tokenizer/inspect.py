"""What a graft gained, in numbers and in pictures of single lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lingraft.tokenizer.load import BaseTokenizer
from lingraft.tokenizer.pieces import readable


def fertility(tokenizer: BaseTokenizer, texts: Sequence[str]) -> dict[str, float]:
    """Totals of tokens, characters, words (split at white space) and UTF-8 bytes, and tokens per each.

    `characters_per_token` says the same the other way round: higher is better.
    """
    tokens = sum(map(len, tokenizer.encode(texts)))
    characters = sum(map(len, texts))
    words = sum(len(text.split()) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    return {
        "tokens": tokens,
        "characters": characters,
        "words": words,
        "bytes": size,
        "tokens_per_character": tokens / max(characters, 1),
        "tokens_per_word": tokens / max(words, 1),
        "tokens_per_byte": tokens / max(size, 1),
        "characters_per_token": characters / max(tokens, 1),
    }


def segmentation(old: BaseTokenizer, new: BaseTokenizer, texts: Sequence[str]) -> list[dict[str, Any]]:
    """For each text, {"text", "before": pieces, "after": pieces, "new": whether each piece after is new}.

    Pieces are readable: spaces as "▁", bytes that are no whole character as "<EA>".
    """
    return [
        {
            "text": text,
            "before": [readable(old.piece_of[i], old.kind) for i in before],
            "after": [readable(new.piece_of[i], new.kind) for i in after],
            "new": [new.piece_of[i] not in old.vocab for i in after],
        }
        for text, before, after in zip(texts, old.encode(texts), new.encode(texts), strict=True)
    ]
