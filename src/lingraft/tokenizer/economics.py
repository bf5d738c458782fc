"""Token economics: what new tokens save on held-out text, what their rows cost, and whether that pays.

The curve of tokens saved against slots spent is exact, and one segmentation gives all of it. New merges rank below
every base merge, and a new piece only comes about from its own pair; so text cut with the first n new pieces is text
cut with all of them, each piece past the n-th split back into its pair. A merge therefore saves one token wherever it
stands in the merge tree of a piece that comes out, a new character saves the bytes that it replaces less one, and the
curve is the running sum of what each piece saves. (Characters come first in merge order but last in worth; nothing
else joins their bytes, so each may take its slot when its turn by worth comes: `slot_order`.)

    compare(base, grafted, {"law": […], "reviews": […]}, pieces)   numbers of the tokenizers alone
    assess(compared, shape)                                        … and of the model: row costs, speed, verdict
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingraft.errors import TokenizerError
from lingraft.tokenizer.graft import GraftedPiece
from lingraft.tokenizer.inspect import TextSize, rates
from lingraft.tokenizer.load import BaseTokenizer
from lingraft.tokenizer.pieces import to_bytes, wanted_characters

Counts = NDArray[np.int64]  # one number for each new piece, in merge order
Curve = list[tuple[int, float]]  # (slots spent, share of the base's tokens saved)

MIN_SAVING = 0.10  # less than a tenth fewer tokens does not repay training rows
# Where so many words are one token already, what is left to join is mostly phrases of this very text. A judgement, as
# are the two shares below: English on Gemma 3 has 92 to 99 %, Korean 25 %.
KNOWN_WORDS = 0.90
ENOUGH = 0.80  # fewer slots are enough where the knee already holds this share of the gain
SLOWED = 0.01  # … or where the last slots make decoding this much slower than it was with fewer
CURVE_POINTS = 100
GAIN_SHARES = (0.5, 0.9)
SHOWN_WORDS = 12
SHOWN_PIECES = 20
PREFILL_CHARACTERS = 1000
ENCODE_BATCH = 1000  # enough texts for the tokenizer's threads, few enough to keep their ids small

ASSUMPTIONS = (
    "decoding reads every layer and head row once a token; prefill computes the layers for every token and the head "
    f"for the last one of {PREFILL_CHARACTERS:,} characters; attention over the context, which gains too, is left out"
)

_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a dense decoder that decide what rows cost, before the graft.

    `body` counts the parameters of layers and norms, `rows` the rows of each vocabulary matrix. A tied model has one
    such matrix; `untied` says that the graft parts it into two.
    """

    body: int
    width: int
    rows: int
    tied: bool
    untied: bool = False
    bytes_per_parameter: int = 2

    @property
    def parameters(self) -> int:
        return self.body + self.rows * self.width * (1 if self.tied else 2)


# ------------------------------------------------------------------------------------------------ what text says


@dataclass(frozen=True)
class _Tally:
    """Token counts of one body of text; `emitted` counts each new token."""

    size: TextSize
    before: int
    after: int
    emitted: Counts

    def __add__(self, other: _Tally) -> _Tally:
        return _Tally(
            self.size + other.size, self.before + other.before, self.after + other.after, self.emitted + other.emitted
        )


def compare(
    base: BaseTokenizer,
    grafted: BaseTokenizer,
    texts: Mapping[str, Sequence[str]],
    pieces: list[GraftedPiece] | None = None,
    scripts: frozenset[str] | None = None,
) -> dict[str, Any]:
    """How `grafted` cuts the texts of each source against `base`, as plain data.

    `pieces` are the rows of graft.json; without them (a tokenizer made elsewhere) there are no curves. Keys:
    "new_tokens", "vocabulary_after", "unreachable" (a count) and "unreachable_pieces" (the first few); "words", see
    `single_token_words`; "sources" and "together", whose entries hold `rates` "before" and "after", "saved" (share of
    the base's tokens), "new_tokens_used" and "new_tokens_used_share", "share_of_tokens_new", and "curve", see
    `curve_of`, or None.

    Raises TokenizerError when a source has no text, and when `pieces` don't lead from one tokenizer to the other.
    """
    ids = [p.id for p in pieces] if pieces is not None else new_ids(base, grafted)
    tallies = {name: _tally(base, grafted, lines, ids) for name, lines in texts.items()}
    for name, tally in tallies.items():
        if not tally.before:
            raise TokenizerError(f"{name}: there is no text in it; give text to count tokens on")
    together = sum(tallies.values(), start=_Tally(TextSize(0, 0, 0), 0, 0, np.zeros(len(ids), np.int64)))
    dead = unreachable(grafted, ids)
    return {
        "new_tokens": len(ids),
        "vocabulary_after": len(grafted),
        "unreachable": len(dead),
        "unreachable_pieces": dead[:SHOWN_PIECES],
        "words": single_token_words(base, (line for lines in texts.values() for line in lines), scripts),
        "sources": {name: _entry(name, tally, pieces) for name, tally in tallies.items()},
        "together": _entry("texts", together, pieces),
    }


def new_ids(base: BaseTokenizer, grafted: BaseTokenizer) -> list[int]:
    """Ids, ascending, of the pieces and added tokens that the base doesn't have."""
    return sorted(index for piece, index in grafted.vocab.items() if piece not in base.vocab)


def unreachable(grafted: BaseTokenizer, ids: Sequence[int]) -> list[str]:
    """The new pieces that their own spelling doesn't lead to. Added tokens are matched before BPE: always reachable."""
    added = {token["id"] for token in grafted.json["added_tokens"]}
    learnt = [i for i in ids if i not in added]
    spelled = grafted.segment([grafted.piece_of[i] for i in learnt])
    return [grafted.piece_of[i] for i, cut in zip(learnt, spelled, strict=True) if cut != [i]]


def _tally(base: BaseTokenizer, grafted: BaseTokenizer, texts: Sequence[str], ids: list[int]) -> _Tally:
    before = 0
    emitted = np.zeros(len(grafted), np.int64)
    for start in range(0, len(texts), ENCODE_BATCH):
        batch = texts[start : start + ENCODE_BATCH]
        before += sum(map(len, base.encode(batch)))
        after = np.fromiter(chain.from_iterable(grafted.encode(batch)), np.int64)
        emitted += np.bincount(after, minlength=len(emitted))
    return _Tally(TextSize.of(texts), before, int(emitted.sum()), emitted[ids])


def _entry(name: str, tally: _Tally, pieces: list[GraftedPiece] | None) -> dict[str, Any]:
    used = int(np.count_nonzero(tally.emitted))
    return {
        "before": rates(tally.before, tally.size),
        "after": rates(tally.after, tally.size),
        "saved": 1 - tally.after / tally.before,
        "new_tokens_used": used,
        "new_tokens_used_share": used / max(len(tally.emitted), 1),
        "share_of_tokens_new": int(tally.emitted.sum()) / tally.after,
        "curve": curve_of(_savings(name, tally, pieces)[slot_order(pieces)], tally.before) if pieces else None,
    }


def _savings(name: str, tally: _Tally, pieces: list[GraftedPiece]) -> Counts:
    saved = savings(pieces, tally.emitted)
    if saved.sum() != tally.before - tally.after:
        raise TokenizerError(
            f"{name}: the new tokens save {tally.before - tally.after:,} tokens, but by graft.json {saved.sum():,}; "
            "give the very base that the tokenizer was grafted on"
        )
    return saved


def savings(pieces: Sequence[GraftedPiece], emitted: Counts) -> Counts:
    """Tokens that each piece saves, given how often each comes out of the segmentation with all of them.

    A piece comes about wherever it comes out and wherever a later piece that holds it does.
    """
    number = {new.piece: index for index, new in enumerate(pieces)}
    made = emitted.copy()
    for index in range(len(pieces) - 1, -1, -1):
        for part in (pieces[index].left, pieces[index].right):
            if part in number:
                made[number[part]] += made[index]
    return made * np.array([_tokens_joined(new) for new in pieces], np.int64)


def slot_order(pieces: Sequence[GraftedPiece]) -> Counts:
    """Indices of the pieces in the order in which slots are best spent: by the tokens that each saved in training.

    Merges keep their order, and characters come before the merges that hold them, which are no more frequent.
    """
    worth = np.array([new.count * _tokens_joined(new) for new in pieces], float)
    merges = np.array([new.kind == "merge" for new in pieces], bool)
    worth[merges] = np.minimum.accumulate(worth[merges])
    return np.argsort(-worth, kind="stable")


def _tokens_joined(new: GraftedPiece) -> int:
    """Tokens that one making of the piece saves: a merge joins two tokens, a character all of its bytes."""
    return 1 if new.kind == "merge" else len(new.base_ids) - 1


# ------------------------------------------------------------------------------------------------ the curve


def curve_of(saved: Counts, before: int) -> dict[str, Any]:
    """The curve of what the first n pieces save, from the savings of each and the tokens before.

    "points" are [slots, share of the tokens saved], thinned; "knee" is {"slots", "saved", "share_of_gain"}, or None
    where nothing is saved; "reached" holds {"share_of_gain", "slots"} for `GAIN_SHARES`.
    """
    running = np.concatenate([[0], np.cumsum(saved)])
    last = len(saved)
    shown = np.unique(np.linspace(0, last, min(last, CURVE_POINTS) + 1).round().astype(int))
    at = knee(running)
    gain = int(running[-1])
    return {
        "points": [[int(n), round(float(running[n] / before), 5)] for n in shown],
        "knee": at and {"slots": at, "saved": float(running[at] / before), "share_of_gain": float(running[at] / gain)},
        "reached": [
            {"share_of_gain": share, "slots": int(np.searchsorted(running, share * gain))}
            for share in GAIN_SHARES
            if gain
        ],
    }


def knee(running: NDArray[Any]) -> int | None:
    """Where a rising curve bends: the point farthest above the chord from its first to its last point.

    This is Kneedle (Satopaa et al. 2011) on the whole curve: both axes scaled to [0, 1], the maximum of y − x. None
    where the curve is flat. It depends on where the curve ends, that is on how many pieces were learnt.
    """
    if running[-1] == running[0]:
        return None
    slots = np.linspace(0, 1, len(running))
    gained = (running - running[0]) / (running[-1] - running[0])
    return int(np.argmax(gained - slots))


def single_token_words(
    base: BaseTokenizer, texts: Iterable[str], scripts: frozenset[str] | None = None
) -> dict[str, Any]:
    """Which words of the texts the base has as one token already: they need no slot.

    A word is a run of two letters or more, all of `scripts` if given. It counts as one token if the base cuts it so at
    a line's start or behind a space. Returns the "share" of words that are (each as often as it comes), None without
    words, and under "most_frequent" [word, count] of the most frequent that are.
    """
    wanted = wanted_characters(scripts)
    found = Counter(word for text in texts for word in _WORD.findall(text))
    words = [word for word, _ in found.most_common() if all(map(wanted, word))]
    spelled = {to_bytes(piece, base.kind).strip() for piece in base.vocab}
    pieces = [word for word in words if word.encode() in spelled]
    cuts = zip(base.encode(pieces), base.encode([f" {word}" for word in pieces]), strict=True)
    single = [word for word, (alone, spaced) in zip(pieces, cuts, strict=True) if 1 in (len(alone), len(spaced))]
    total = sum(found[word] for word in words)
    return {
        "share": sum(found[word] for word in single) / total if total else None,
        "most_frequent": [[word, found[word]] for word in single[:SHOWN_WORDS]],
    }


# ------------------------------------------------------------------------------------------------ what it is worth


def assess(compared: dict[str, Any], shape: ModelShape | None) -> dict[str, Any]:
    """What `compare` found, for the model of `shape`: "rows", "speed" and "verdict"; the first two are None without."""
    added = _added_rows(compared, shape)
    return {
        "rows": row_costs(shape, compared["new_tokens"], added) if shape else None,
        "speed": speed(shape, compared["together"], added) if shape else None,
        "verdict": verdict(compared, shape),
    }


def _added_rows(compared: dict[str, Any], shape: ModelShape | None) -> int:
    """New ids within the rows that the model has (slots, pad rows) add none."""
    return max(0, compared["vocabulary_after"] - shape.rows) if shape else 0


def row_costs(shape: ModelShape, new_tokens: int, added_rows: int) -> dict[str, Any]:
    """What the new tokens' rows cost: rows taken over are free, an added one costs its width in each matrix.

    "untying" is what parting tied matrices adds, whatever the number of new tokens; "share" is of the model before.
    """
    matrices = 1 if shape.tied and not shape.untied else 2
    rows = added_rows * shape.width * matrices
    untying = shape.rows * shape.width if shape.untied else 0
    return {
        "reused_rows": new_tokens - added_rows,
        "added_rows": added_rows,
        "matrices": matrices,
        "parameters": rows,
        "untying": untying,
        "bytes": (rows + untying) * shape.bytes_per_parameter,
        "share": (rows + untying) / shape.parameters,
    }


def speed(shape: ModelShape, entry: Mapping[str, Any], added_rows: int) -> dict[str, Any]:
    """How many times as fast a character is decoded and prefilled after the graft; see `ASSUMPTIONS`."""
    per_character = (entry["before"]["tokens_per_character"], entry["after"]["tokens_per_character"])
    rows = (shape.rows, shape.rows + added_rows)
    before, after = (
        PREFILL_CHARACTERS * tokens * shape.body + rows_ * shape.width
        for tokens, rows_ in zip(per_character, rows, strict=True)
    )
    return {
        "decode": decode_speed(entry["saved"], shape, added_rows),
        "prefill": before / after,
        "characters": PREFILL_CHARACTERS,
        "assumptions": ASSUMPTIONS,
    }


def decode_speed(saved: float, shape: ModelShape | None, added_rows: int) -> float:
    """How many times as fast a character is decoded when a share of the tokens is saved and each reads more rows."""
    fewer_tokens = 1 / (1 - saved)
    if shape is None:
        return fewer_tokens
    read = shape.body + shape.rows * shape.width
    return fewer_tokens * read / (read + added_rows * shape.width)


def verdict(compared: dict[str, Any], shape: ModelShape | None) -> dict[str, Any]:
    """One of "expand", "fewer" and "don't expand" as "answer", the "slots" that pay, and the "reason" in a sentence.

    Expansion pays where it saves at least `MIN_SAVING` of the tokens, fewer than `KNOWN_WORDS` of the words are single
    tokens already, and decoding a character gets faster. Fewer slots are enough where more make decoding slower again
    (by over `SLOWED`), or where the knee holds `ENOUGH` of the gain and pays by itself. Without a shape decoding is
    taken to be faster by the tokens saved, as it is where no row is added.
    """
    every, together = compared["new_tokens"], compared["together"]
    curve = together["curve"]
    points: Curve = [(every, together["saved"])]
    if curve:
        points = [(slots, saved) for slots, saved in curve["points"] if slots]
    added = _added_rows(compared, shape)
    # Slots and pad rows are filled first: the pieces that fewer slots leave out would have been added rows.
    speeds = [decode_speed(saved, shape, max(0, added - (every - slots))) for slots, saved in points]
    best = int(np.argmax(speeds))
    slowed = speeds[best] > speeds[-1] * (1 + SLOWED)
    (slots, saved), faster = (points[best], speeds[best]) if slowed else (points[-1], speeds[-1])
    numbers = f"{slots:,} new tokens save {saved:.1%} of the tokens of this text"
    known = compared["words"]["share"] or 0
    words = f"{known:.0%} of its words are single tokens already"
    if saved < MIN_SAVING:
        return _verdict("don't expand", 0, f"{numbers}, less than {MIN_SAVING:.0%}; {words}")
    if known >= KNOWN_WORDS:
        return _verdict("don't expand", 0, f"{words}; {numbers} by joining its phrases")
    if faster <= 1:
        return _verdict("don't expand", 0, f"{numbers}, but their rows slow each token more: ×{faster:.2f} a character")
    gain = f"{numbers} and decode a character {faster:.2f} times as fast"
    if slowed:
        return _verdict("fewer", slots, f"{gain}; all {every:,} only {speeds[-1]:.2f} times")
    bend = curve and curve["knee"]
    if not bend:
        return _verdict("expand", slots, gain)
    at_knee = f"the knee is at {bend['slots']:,} with {bend['share_of_gain']:.0%} of the gain"
    if bend["share_of_gain"] >= ENOUGH and bend["saved"] >= MIN_SAVING:
        return _verdict("fewer", bend["slots"], f"{gain}, but {at_knee}")
    return _verdict("expand", slots, f"{gain}; {at_knee}")


def _verdict(answer: str, slots: int, reason: str) -> dict[str, Any]:
    return {"answer": answer, "slots": slots, "reason": reason}
