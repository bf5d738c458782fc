"""Proof that a graft does no harm. Each check returns what fails (nothing, if all is well); `verify` runs them all.

Texts are compared without BOS and EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lingraft.errors import TokenizerError
from lingraft.tokenizer.graft import GraftedTokenizer, read_graft
from lingraft.tokenizer.load import BaseTokenizer, load
from lingraft.tokenizer.runtimes import disagreements

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


def runtime_mismatches(
    folder: Path | str, texts: Sequence[str], pre_tokenizer: str = "default"
) -> list[tuple[str, str, list[int], list[int]]]:
    """(runtime, text, Hugging Face's ids, the runtime's ids) wherever SentencePiece or llama.cpp cuts differently.

    See `lingraft.tokenizer.runtimes.disagreements` for what can be compared, and for `pre_tokenizer`.
    """
    found = disagreements(load(folder), texts, pre_tokenizer)
    return [(runtime, *row) for runtime, rows in found.items() for row in rows]


def unreachable(grafted: GraftedTokenizer) -> list[str]:
    """New pieces that their own spelling does not lead to, so that no text can ever contain them."""
    segmented = grafted.tokenizer.segment([new.piece for new in grafted.pieces])
    return [new.piece for new, ids in zip(grafted.pieces, segmented, strict=True) if ids != [new.id]]


def verify(
    base: BaseTokenizer,
    folder: Path | str,
    old_texts: Sequence[str],
    new_texts: Sequence[str],
    pre_tokenizer: str = "default",
) -> dict[str, int]:
    """Check a written graft: old-language texts keep their ids; every text comes back whole; Hugging Face,
    SentencePiece and (where installed) llama.cpp agree wherever they agreed on the base; every new piece can come out.

    pre_tokenizer: llama.cpp's name of a byte-level base's pre-tokenizer; "default" leaves llama.cpp out for those.

    Returns how many texts and pieces were checked, with how many runtimes Hugging Face was compared, and on how many
    texts they disagree as they did on the base. Raises TokenizerError with the first offending line.
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
    runtimes = disagreements(new, texts, pre_tokenizer)
    inherited = _inherited(base, runtimes, pre_tokenizer)
    for runtime, rows in runtimes.items():
        if fresh := [row for row in rows if row[0] not in inherited[runtime]]:
            text, ours, theirs = fresh[0]
            raise TokenizerError(
                f"{folder}: Hugging Face and {runtime} disagree on {len(fresh):,} of {len(texts):,} lines where they "
                f"agreed before, first {_short(text)}: {_cut(new, ours)} against {_cut(new, theirs)}; delete the "
                "base's tokenizer.model to go on with tokenizer.json alone"
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
        "runtimes_compared": len(runtimes),
        "runtimes_disagree_as_before": len(set().union(*inherited.values())),
    }


def _inherited(base: BaseTokenizer, runtimes: dict[str, list[Changed]], pre_tokenizer: str) -> dict[str, set[str]]:
    """Runtime → those of the texts in question on which the base's own runtimes disagree already."""
    suspects = list(dict.fromkeys(text for rows in runtimes.values() for text, _, _ in rows))
    before = disagreements(base, suspects, pre_tokenizer) if suspects else {}
    return {runtime: {text for text, _, _ in before.get(runtime, [])} for runtime in runtimes}


def _short(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")


def _cut(tokenizer: BaseTokenizer, ids: list[int]) -> str:
    return _short(" | ".join(tokenizer.piece_of[i] for i in ids))
