"""Put learnt pieces into a tokenizer: `place` gives each its id, `graft` builds the new files, `write` saves them.

Two places: the base's unused slots (rename the piece; the model keeps its shape) or new ids at the end.
In tokenizer.json the new merges follow all old ones in the order learnt. In tokenizer.model, which has no merge
list, the new pieces score below every old one, falling in the same order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from lingraft.errors import TokenizerError
from lingraft.families import Family
from lingraft.tokenizer.learn import Learnt, NewPiece
from lingraft.tokenizer.load import BaseTokenizer, added_tokens_decoder
from lingraft.tokenizer.sentencepiece_proto import ModelProto, PieceType

Slots = Literal["auto", "unused", "append"]

GRAFT_FILE = "graft.json"


@dataclass(frozen=True)
class Placement:
    """`ids[i]` is the id of `pieces[i]`; `reused` holds the unused piece that stood at each id taken over."""

    pieces: list[NewPiece]
    ids: list[int]
    reused: dict[int, str]

    @property
    def appended(self) -> int:
        """How many ids lie past the base's end."""
        return len(self.ids) - len(self.reused)


@dataclass(frozen=True)
class GraftedPiece:
    """One row of graft.json: a new piece, and how the base spells it (what its embedding rows start from)."""

    id: int
    piece: str
    left: str | None
    right: str | None
    count: int
    kind: str
    base_ids: list[int]
    base_pieces: list[str]


@dataclass(frozen=True)
class GraftedTokenizer:
    """The new tokenizer, ready to use and to write, and its new pieces in merge order."""

    tokenizer: BaseTokenizer
    pieces: list[GraftedPiece]


def unused_slots(base: BaseTokenizer, family: Family, in_use: Collection[int] = ()) -> list[int]:
    """Ids that may be taken over, the longest contiguous block first, ascending within a block.

    Protected pieces are left out, unless this is a miniature vocabulary whose only unused block they are. So are
    pieces that some fine-tune uses: special tokens, those that a chat template or setting names, and the ids `in_use`.
    """
    if family.unused_pattern is None:
        return []
    pattern = re.compile(family.unused_pattern)
    named = {match[0] for match in pattern.finditer(_settings(base))}
    special = {token["id"] for token in base.json["added_tokens"] if token["special"]}
    blocks: list[list[int]] = []
    numbers: dict[int, int] = {}
    for index in sorted(base.piece_of):
        if match := pattern.fullmatch(base.piece_of[index]):
            numbers[index] = int(match[1])
            if index - 1 not in numbers:
                blocks.append([])
            blocks[-1].append(index)
    protect = len(blocks) > 1 or len(base) >= family.full_vocab_size
    protected = family.protected_unused if protect else range(0)
    blocks.sort(key=len, reverse=True)
    return [
        index
        for block in blocks
        for index in block
        if numbers[index] not in protected
        and base.piece_of[index] not in named
        and index not in special
        and index not in in_use
    ]


def _settings(base: BaseTokenizer) -> str:
    """The text of side files and post-processor, less the plain lists of added tokens."""
    config = json.loads(base.files.get("tokenizer_config.json", "{}"))
    config.pop("added_tokens_decoder", None)
    lists = ("tokenizer_config.json", "added_tokens.json")
    others = (text for name, text in base.files.items() if name not in lists)
    return "\n".join([json.dumps(config), json.dumps(base.json["post_processor"]), *others])


def place(
    base: BaseTokenizer, learnt: Learnt, *, family: Family, slots: Slots = "auto", in_use: Collection[int] = ()
) -> Placement:
    """Give each new piece an id.

    "unused" takes unused slots only, "append" new ids only, "auto" fills the slots and appends the rest. The ids
    `in_use` (see `lingraft.model.load.special_ids`) are never taken over.
    Raises TokenizerError when slots do not suffice and nothing may be appended.
    """
    wanted = len(learnt.pieces)
    free = free_slots(base, wanted, family=family, slots=slots, in_use=in_use)
    appended = range(len(base), len(base) + wanted - len(free))
    return Placement(learnt.pieces, [*free, *appended], {index: base.piece_of[index] for index in free})


def free_slots(
    base: BaseTokenizer, wanted: int, *, family: Family, slots: Slots, in_use: Collection[int] = ()
) -> list[int]:
    """The unused slots that `wanted` new pieces would take; see `place` for the rest and the error."""
    usable = unused_slots(base, family, in_use)
    free = [] if slots == "append" else usable[:wanted]
    missing = wanted - len(free)
    if missing and family.slots_only:
        fault = "nothing can be appended" if slots == "append" else f"{len(free):,} usable unused slots"
        raise TokenizerError(
            f"{wanted:,} new tokens but {fault}: a {family.model_type} model cannot take ids past its vocabulary "
            f"({family.slots_only}); ask for at most {len(usable):,} new tokens in unused slots"
        )
    if missing and slots == "unused" and not usable:
        raise TokenizerError(
            f"this tokenizer has no unused slots of a kind known for {family.model_type}; let it append "
            "(slots: auto or append)"
        )
    if missing and slots == "unused":
        raise TokenizerError(
            f"{wanted:,} new tokens but {len(free):,} unused slots; ask for at most {len(free):,} new tokens, or let "
            "the tokenizer append (slots: auto or append)"
        )
    return free


def graft(base: BaseTokenizer, placement: Placement) -> GraftedTokenizer:
    """The base with the placed pieces in both of its forms and in its side files."""
    parsed = _graft_json(base, placement)
    proto = _graft_proto(base, placement) if base.proto is not None else None
    tokenizer = BaseTokenizer(
        json=parsed,
        tokenizer=Tokenizer.from_str(json.dumps(parsed, ensure_ascii=False)),
        kind=base.kind,
        proto=proto,
        files=_graft_files(base, placement, added_tokens_decoder(parsed, proto)),
    )
    return GraftedTokenizer(tokenizer, _describe(base, placement))


def _graft_json(base: BaseTokenizer, placement: Placement) -> dict[str, Any]:
    model = base.json["model"]
    pieces = {index: piece for piece, index in model["vocab"].items()}
    if placement.appended:
        # Added tokens past the model's own vocabulary get their ids by counting: pin them before ids go on.
        pieces |= {token["id"]: token["content"] for token in base.json["added_tokens"]}
    pieces |= {index: new.piece for index, new in zip(placement.ids, placement.pieces, strict=True)}
    merges = [(new.left, new.right) for new in placement.pieces if new.kind == "merge"]
    in_one_string = bool(model["merges"]) and isinstance(model["merges"][0], str)
    return base.json | {
        "added_tokens": [token for token in base.json["added_tokens"] if token["id"] not in placement.reused],
        "model": model
        | {
            "vocab": {pieces[index]: index for index in sorted(pieces)},
            "merges": model["merges"]
            + [f"{left} {right}" if in_one_string else [left, right] for left, right in merges],
        },
    }


def _graft_proto(base: BaseTokenizer, placement: Placement) -> Any:
    assert base.proto is not None
    proto = ModelProto()
    proto.CopyFrom(base.proto)
    if placement.appended:
        _fill_to(proto, len(base), base.json["added_tokens"])
    scores = scores_below((p.score for p in proto.pieces if p.type == PieceType.NORMAL), len(placement.ids))
    for index, new, score in zip(placement.ids, placement.pieces, scores, strict=True):
        slot = proto.pieces[index] if index < len(proto.pieces) else proto.pieces.add()
        slot.piece, slot.score, slot.type = new.piece, score, PieceType.NORMAL
    kept = [s for s in proto.trainer_spec.user_defined_symbols if s not in placement.reused.values()]
    del proto.trainer_spec.user_defined_symbols[:]
    proto.trainer_spec.user_defined_symbols.extend(kept)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto


def _fill_to(proto: Any, end: int, added_tokens: list[dict[str, Any]]) -> None:
    """SentencePiece ids have no gaps: give the added tokens that live past its vocabulary their places in it."""
    by_id = {token["id"]: token for token in added_tokens}
    for index in range(len(proto.pieces), end):
        token = by_id[index]
        kind = PieceType.CONTROL if token["special"] else PieceType.USER_DEFINED
        proto.pieces.add(piece=token["content"], score=0.0, type=kind)


def scores_below(old: Iterable[float], count: int) -> list[float]:
    """`count` scores, falling, all below the old ones and distinct as float32, the precision of the file.

    >>> scores_below([-1.0, -7.0], 2)
    [-8.0, -9.0]
    """
    lowest = min(old)
    # Around −1e9 (Llama 2 has such scores) neighbouring float32 numbers lie 64 apart.
    step = max(1.0, float(np.spacing(np.float32(2 * abs(lowest)))))
    return [float(np.float32(lowest - step * (n + 1))) for n in range(count)]


def _graft_files(base: BaseTokenizer, placement: Placement, added_tokens: dict[str, Any]) -> dict[str, str]:
    """Side files without the reused pieces. The configuration always lists the added tokens."""
    files = dict(base.files)
    config = json.loads(files.get("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}'))
    config["added_tokens_decoder"] = added_tokens
    files["tokenizer_config.json"] = _dump(config)
    if "added_tokens.json" in files:
        added = json.loads(files["added_tokens.json"])
        files["added_tokens.json"] = _dump({t: i for t, i in added.items() if i not in placement.reused})
    return files


def _describe(base: BaseTokenizer, placement: Placement) -> list[GraftedPiece]:
    spelled = base.segment([new.piece for new in placement.pieces])
    return [
        GraftedPiece(index, **asdict(new), base_ids=ids, base_pieces=[base.piece_of[i] for i in ids])
        for index, new, ids in zip(placement.ids, placement.pieces, spelled, strict=True)
    ]


def write(grafted: GraftedTokenizer, folder: Path | str) -> None:
    """Write the tokenizer's files and graft.json into `folder`, which is made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = grafted.tokenizer
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.json, ensure_ascii=False), "utf-8")
    if tokenizer.proto is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer.proto.SerializeToString())
    for name, text in tokenizer.files.items():
        (folder / name).write_text(text, "utf-8")
    rows = {"vocab_size": len(tokenizer), "pieces": [asdict(piece) for piece in grafted.pieces]}
    (folder / GRAFT_FILE).write_text(_dump(rows), "utf-8")


def read_graft(folder: Path | str) -> list[GraftedPiece]:
    """The new pieces of a grafted tokenizer's folder, in merge order.

    Raises TokenizerError if graft.json is missing or damaged.
    """
    path = Path(folder) / GRAFT_FILE
    if not path.is_file():
        raise TokenizerError(
            f"{path}: no such file; this is no folder of a grafted tokenizer (make one: lingraft tokenizer graft)"
        )
    try:
        return [GraftedPiece(**row) for row in json.loads(path.read_text("utf-8"))["pieces"]]
    except (ValueError, KeyError, TypeError) as error:
        raise TokenizerError(f"{path}: damaged ({error}); graft the tokenizer again") from None


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
