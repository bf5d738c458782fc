"""The Hugging Face twin of a SentencePiece BPE model: a tokenizer.json that cuts text into the same ids.

transformers' own conversion differs in two places. It adds Llama's space in front only where a text does not begin
with one, SentencePiece always. And it breaks ties between pieces of equal score by their ids, SentencePiece by
their place in the text, which matters for runs of spaces.

What has no twin: SentencePiece never reads control symbols (`</s>`) in text, which a chat template needs, and it puts
the space in front once a text, where Hugging Face and llama.cpp put one behind each added token too.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any

from lingraft.errors import TokenizerError
from lingraft.tokenizer.pieces import SPACE_MARK
from lingraft.tokenizer.sentencepiece_proto import PieceType

# Symbols of text to SentencePiece, but marks that decoding may skip.
TURN_MARKS = ("<start_of_turn>", "<end_of_turn>")

Merges = list[list[str]]


def tokenizer_json(proto: Any) -> dict[str, Any]:
    """The content of tokenizer.json, in the layout that Gemma 3 and Llama 2 were published with.

    Raises TokenizerError for a model that marks spaces in another way than "▁" in front.
    """
    if proto.trainer_spec.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        raise TokenizerError(
            "a SentencePiece model that does not mark spaces by '▁' in front of words, which has no equal "
            "tokenizer.json; choose another base model"
        )
    runs = _runs(proto.pieces)
    unknown = next(piece.piece for piece in proto.pieces if piece.type == PieceType.UNKNOWN)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(index, piece.piece, special=piece.type != PieceType.USER_DEFINED or piece.piece in TURN_MARKS)
            for index, piece in enumerate(proto.pieces)
            if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN)
            or (piece.type == PieceType.USER_DEFINED and piece.piece not in runs)
        ],
        "normalizer": _normalizer(proto.normalizer_spec),
        "pre_tokenizer": _never_splits() if _is_plain(proto.normalizer_spec) else None,
        "post_processor": _prepend_bos(proto),
        "decoder": _decoder(proto.normalizer_spec),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.type == PieceType.BYTE for piece in proto.pieces),
            "ignore_merges": False,
            "vocab": {piece.piece: index for index, piece in enumerate(proto.pieces)},
            "merges": _merges(proto.pieces, runs),
        },
    }


def added_token(index: int, content: str, *, special: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's `added_tokens` that is found anywhere in the text, spaces around it kept."""
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def special_tokens(proto: Any) -> dict[str, str]:
    """`bos_token`, `eos_token`, `pad_token` and `unk_token`, as far as the model has them."""
    spec = proto.trainer_spec
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id, "unk_token": spec.unk_id}
    return {name: proto.pieces[index].piece for name, index in ids.items() if index >= 0}


def _is_space(piece: str) -> bool:
    return piece.replace(SPACE_MARK, " ").isspace()


def _runs(pieces: Sequence[Any]) -> frozenset[str]:
    """User-defined runs of spaces or line breaks that merges can build.

    As added tokens they would be looked for before spaces become "▁", and text that is spelled already would be cut
    otherwise. (Gemma 2's runs of tabs are added tokens, since it has no single tab.)
    """
    known = {piece.piece for piece in pieces}
    user_defined = (piece.piece for piece in pieces if piece.type == PieceType.USER_DEFINED)
    return frozenset(piece for piece in user_defined if _is_space(piece) and set(piece) <= known)


def _is_plain(spec: Any) -> bool:
    """True where normalisation is nothing but writing spaces as "▁"."""
    return not (spec.precompiled_charsmap or spec.remove_extra_whitespaces or spec.add_dummy_prefix)


def _normalizer(spec: Any) -> dict[str, Any]:
    """SentencePiece's steps in its order: character map, spaces, the space in front, "▁"."""
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        # Only spaces: SentencePiece keeps line breaks, unless the character map has made them spaces already.
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z| +(?= )"}, "content": ""})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE_MARK})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK})
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "normalizers": steps}


def _never_splits() -> dict[str, Any]:
    """As in Gemma: a split at spaces, of which the normalizer has left none."""
    return {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def _decoder(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _merges(pieces: Sequence[Any], runs: frozenset[str]) -> Merges:
    """Every way to put two pieces together into a third, the best score first: SentencePiece merges any of them.

    Ahead of all come the runs, which SentencePiece finds before it merges anything. Among equals the longest goes
    first: so a run grows from the left as far as it can before the next begins, which is what both longest match and
    "leftmost of equal scores" (Llama 2's runs) give.
    """
    normal = {piece.piece: piece.score for piece in pieces if piece.type == PieceType.NORMAL}
    return [
        *_ways(sorted(runs, key=lambda run: (-len(run), run)), runs | set("".join(runs))),
        *_ways(sorted(normal, key=lambda piece: (-normal[piece], -len(piece))), normal.keys()),
    ]


def _ways(made: Iterable[str], parts: Iterable[str]) -> Merges:
    known = frozenset(parts)
    return [
        [piece[:cut], piece[cut:]]
        for piece in made
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def _prepend_bos(proto: Any) -> dict[str, Any] | None:
    index = proto.trainer_spec.bos_id
    if index < 0:
        return None
    bos = proto.pieces[index].piece

    def part(sequence: str, segment: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": bos, "type_id": segment}},
            {"Sequence": {"id": sequence, "type_id": segment}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": part("A", 0) + part("B", 1),
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }
