"""Text for people: how a tokenizer cuts it, and which scripts it is written in."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from lingraft.tokenizer.load import BaseTokenizer
from lingraft.tokenizer.pieces import readable

# A script is the new pieces' own if at least this share of them uses it.
SCRIPT_SHARE = 0.05


def cut(tokenizer: BaseTokenizer, ids: Sequence[int]) -> list[str]:
    """Ids as pieces that people can read."""
    return [readable(tokenizer.piece_of.get(index, "?"), tokenizer.kind) for index in ids]


def joined(pieces: Sequence[str], limit: int = 6) -> str:
    """The first pieces in one line: `▁심 | 근 | 경 | …`."""
    return " | ".join(pieces[:limit]) + (" | …" if len(pieces) > limit else "")


def difference(before: Sequence[str], after: Sequence[str], word: str = "became") -> str:
    """Two cuts of one text, from just before the place where they part."""
    parting = next((k for k, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    start = max(parting - 1, 0)
    return f"{joined(before[start:])} {word} {joined(after[start:])}"


def scripts_of(text: str) -> set[str]:
    """The scripts of a text's letters, by their Unicode names: {"HANGUL", "LATIN"}."""
    return {unicodedata.name(char, "").split(" ")[0] for char in set(text) if char.isalpha()}


def common_scripts(pieces: Iterable[str]) -> set[str]:
    """The scripts that a fair share of the pieces use; the odd one out does not count."""
    counts: Counter[str] = Counter()
    total = 0
    for piece in pieces:
        total += 1
        counts.update(scripts_of(piece))
    return {script for script, count in counts.items() if count >= SCRIPT_SHARE * total}
