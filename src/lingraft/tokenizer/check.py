"""Proof that a graft does no harm. Each check returns what fails (nothing, if all is well); `verify` runs them all.

Texts are compared without BOS and EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from lingraft.errors import TokenizerError
from lingraft.tokenizer.graft import GraftedTokenizer, read_graft
from lingraft.tokenizer.load import BaseTokenizer, load

Changed = tuple[str, list[int], list[int]]


def unchanged(old: BaseTokenizer, new: BaseTokenizer, texts: Sequence[str]) -> list[Changed]:
    """(text, old ids, new ids) of each text whose ids differ."""
    rows = zip(texts, old.encode(texts), new.encode(texts), strict=True)
    return [(text, before, after) for text, before, after in rows if before != after]


def round_trip_failures(old: BaseTokenizer, new: BaseTokenizer, texts: Sequence[str]) -> list[tuple[str, str, str]]:
    """(text, what the old tokenizer gives back, what the new one gives back) wherever the two differ.

    The old tokenizer is the measure because some normalise on purpose (Qwen to NFC).
    """
    rows = zip(texts, old.decode(old.encode(texts)), new.decode(new.encode(texts)), strict=True)
    return [(text, before, after) for text, before, after in rows if before != after]


def runtime_mismatches(folder: Path | str, texts: Sequence[str]) -> list[Changed]:
    """(text, Hugging Face's ids, SentencePiece's ids) where a folder's two files cut a text differently."""
    return _mismatches(load(folder), texts)


def _mismatches(tokenizer: BaseTokenizer, texts: Sequence[str]) -> list[Changed]:
    if tokenizer.proto is None:
        return []
    processor = SentencePieceProcessor(model_proto=tokenizer.proto.SerializeToString())
    rows = zip(texts, tokenizer.encode(texts), processor.encode(list(texts), out_type=int), strict=True)
    return [(text, ours, theirs) for text, ours, theirs in rows if ours != theirs]


def unreachable(grafted: GraftedTokenizer) -> list[str]:
    """New pieces that their own spelling does not lead to, so that no text can ever contain them."""
    segmented = grafted.tokenizer.segment([new.piece for new in grafted.pieces])
    return [new.piece for new, ids in zip(grafted.pieces, segmented, strict=True) if ids != [new.id]]


def verify(
    base: BaseTokenizer, folder: Path | str, old_texts: Sequence[str], new_texts: Sequence[str]
) -> dict[str, int]:
    """Check a written graft: old-language texts keep their ids; every text comes back whole; Hugging Face and
    SentencePiece agree wherever they agreed on the base; every new piece can come out.

    Returns how many texts and pieces were checked, and on how many texts the two runtimes disagree as they did
    on the base (Llama: lines that begin with spaces). Raises TokenizerError with the first offending line.
    """
    new = load(folder)
    pieces = read_graft(folder)
    texts = [*old_texts, *new_texts]
    if changed := unchanged(base, new, old_texts):
        text, before, after = changed[0]
        raise TokenizerError(
            f"{folder}: {len(changed):,} of {len(old_texts):,} lines that should stay as they were are cut "
            f"differently, first {_short(text)}: {_cut(base, before)} became {_cut(new, after)}; "
            "restrict the new pieces' scripts to the new language's"
        )
    if failures := round_trip_failures(base, new, texts):
        text, _, restored = failures[0]
        raise TokenizerError(
            f"{folder}: {len(failures):,} of {len(texts):,} lines do not come back whole, first {_short(text)}, "
            f"which became {_short(restored)}; the base tokenizer's decoder does not suit a graft"
        )
    mismatches = _mismatches(new, texts)
    known = {text for text, _, _ in _mismatches(base, [text for text, _, _ in mismatches])}
    if fresh := [row for row in mismatches if row[0] not in known]:
        text, ours, theirs = fresh[0]
        raise TokenizerError(
            f"{folder}: Hugging Face and SentencePiece disagree on {len(fresh):,} of {len(texts):,} lines, first "
            f"{_short(text)}: {_cut(new, ours)} against {_cut(new, theirs)}; delete the base's tokenizer.model "
            "to go on with tokenizer.json alone"
        )
    if dead := unreachable(GraftedTokenizer(new, pieces)):
        raise TokenizerError(
            f"{folder}: {len(dead):,} of {len(pieces):,} new pieces can never come out, first {dead[0]!r}; "
            "the base tokenizer's own merges are inconsistent, choose another base"
        )
    return {
        "old_texts": len(old_texts),
        "new_texts": len(new_texts),
        "new_pieces": len(pieces),
        "runtimes_disagree_as_before": len(mismatches),
    }


def _short(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")


def _cut(tokenizer: BaseTokenizer, ids: list[int]) -> str:
    return _short(" | ".join(tokenizer.piece_of[i] for i in ids))
