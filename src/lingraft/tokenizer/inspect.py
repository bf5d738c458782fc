"""What a graft gained, in numbers and in pictures of single lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lingraft.tokenizer.load import BaseTokenizer
from lingraft.tokenizer.pieces import readable


@dataclass(frozen=True)
class TextSize:
    """How much text: characters, words (split at white space) and UTF-8 bytes."""

    characters: int
    words: int
    bytes: int

    @classmethod
    def of(cls, texts: Iterable[str]) -> TextSize:
        rows = [(len(text), len(text.split()), len(text.encode())) for text in texts]
        return cls(*(sum(column) for column in zip(*rows, strict=True))) if rows else cls(0, 0, 0)

    def __add__(self, other: TextSize) -> TextSize:
        return TextSize(self.characters + other.characters, self.words + other.words, self.bytes + other.bytes)


def rates(tokens: int, size: TextSize) -> dict[str, float]:
    """Totals of tokens, characters, words and bytes, and tokens per each.

    `characters_per_token` says the same the other way round: higher is better.
    """
    return {
        "tokens": tokens,
        "characters": size.characters,
        "words": size.words,
        "bytes": size.bytes,
        "tokens_per_character": tokens / max(size.characters, 1),
        "tokens_per_word": tokens / max(size.words, 1),
        "tokens_per_byte": tokens / max(size.bytes, 1),
        "characters_per_token": size.characters / max(tokens, 1),
    }


def fertility(tokenizer: BaseTokenizer, texts: Sequence[str]) -> dict[str, float]:
    """The `rates` of a tokenizer on texts."""
    return rates(sum(map(len, tokenizer.encode(texts))), TextSize.of(texts))


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
