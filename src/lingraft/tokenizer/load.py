"""Read a tokenizer folder: `load(folder)` gives one `BaseTokenizer`, whichever of the two kinds of BPE it holds.

Files: `tokenizer.json` is required; `tokenizer.model` (SentencePiece) is read where there is one, and must
agree with it id by id; `SIDE_FILES` are carried along.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lingraft.errors import TokenizerError
from lingraft.tokenizer.pieces import Kind
from lingraft.tokenizer.sentencepiece_proto import BPE, ModelProto

SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class BaseTokenizer:
    """A tokenizer in its two forms: `json` is the parsed tokenizer.json that `tokenizer` runs on, `proto` the
    parsed SentencePiece model (None for byte-level BPE). `files` holds the side files' text by file name."""

    json: dict[str, Any]
    tokenizer: Tokenizer
    kind: Kind
    proto: Any | None
    files: dict[str, str]

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Every piece and added token → its id."""
        return self.tokenizer.get_vocab(with_added_tokens=True)

    @cached_property
    def piece_of(self) -> dict[int, str]:
        """Id → piece or added token."""
        return {index: piece for piece, index in self.vocab.items()}

    def __len__(self) -> int:
        """One past the highest id, the first id that an appended piece can take."""
        return max(self.piece_of) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without BOS or EOS."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids, special tokens included."""
        return self.tokenizer.decode_batch([list(row) for row in ids], skip_special_tokens=False)

    def segment(self, spellings: Sequence[str]) -> list[list[int]]:
        """The ids of strings that are already spelled in the tokenizer's alphabet ("▁가", "ìĿ´"): BPE alone,
        with no normalizer and no pre-tokenizer."""
        encodings = self._bare.encode_batch_fast(list(spellings), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    @cached_property
    def _bare(self) -> Tokenizer:
        return Tokenizer(self.tokenizer.model)


def load(folder: Path | str) -> BaseTokenizer:
    """Read the tokenizer of a model folder.

    Raises TokenizerError when files are missing or damaged, when it is not a BPE of a kind that can be
    continued, and when `tokenizer.model` and `tokenizer.json` disagree.
    """
    folder = Path(folder)
    parsed, tokenizer = _read_json(folder / "tokenizer.json")
    kind = _kind(parsed, folder)
    proto = _read_proto(folder / "tokenizer.model") if kind == "sentencepiece" else None
    files = {name: (folder / name).read_text("utf-8") for name in SIDE_FILES if (folder / name).is_file()}
    base = BaseTokenizer(parsed, tokenizer, kind, proto, files)
    _check_agreement(base, folder)
    return base


def _read_json(path: Path) -> tuple[dict[str, Any], Tokenizer]:
    if not path.is_file():
        raise TokenizerError(
            f"{path}: no such file; a tokenizer folder needs tokenizer.json (save it with "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…) where a model has only tokenizer.model)"
        )
    text = path.read_text("utf-8", errors="replace")
    try:
        return json.loads(text), Tokenizer.from_str(text)
    # `tokenizers` raises bare Exception for a file that is JSON but no tokenizer.
    except Exception as error:
        raise TokenizerError(f"{path}: damaged, or no tokenizer ({error}); download it again") from None


def _read_proto(path: Path) -> Any | None:
    if not path.is_file():
        return None
    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError moved between versions
        raise TokenizerError(f"{path}: damaged, or no SentencePiece model ({error}); download it again") from None
    if proto.trainer_spec.model_type != BPE:
        raise TokenizerError(f"{path}: a SentencePiece model of another kind than BPE; only BPE can be continued")
    return proto


def _components(parsed: dict[str, Any]) -> set[str]:
    """The types of the pre-tokenizer's and the decoder's parts."""
    found: set[str] = set()
    for section in ("pre_tokenizer", "decoder"):
        part = parsed.get(section) or {}
        parts = part.get("pretokenizers") or part.get("decoders") or [part]
        found.update(p["type"] for p in parts if "type" in p)
    return found


def _kind(parsed: dict[str, Any], folder: Path) -> Kind:
    model = parsed["model"]
    if model["type"] != "BPE":
        raise TokenizerError(
            f"{folder}: a {model['type']} tokenizer; continued BPE needs a BPE tokenizer, so choose another base "
            "model or leave the tokenizer as it is"
        )
    if "ByteLevel" in _components(parsed):
        return "byte_level"
    if model.get("byte_fallback"):
        return "sentencepiece"
    raise TokenizerError(
        f"{folder}: a BPE tokenizer with neither byte fallback (SentencePiece) nor byte-level pieces; no text can be "
        "promised to survive a graft, so choose another base model"
    )


def _check_agreement(base: BaseTokenizer, folder: Path) -> None:
    """Every SentencePiece id must mean the same in tokenizer.json, whose ids may go on with added tokens."""
    if base.proto is None:
        return
    cure = "one of the files is stale: download both again, or delete tokenizer.model to go on without it"
    for index, piece in enumerate(base.proto.pieces):
        if (other := base.piece_of.get(index)) != piece.piece:
            raise TokenizerError(
                f"{folder}: id {index} is {piece.piece!r} in tokenizer.model but {other!r} in tokenizer.json; {cure}"
            )
    added = {token["id"] for token in base.json["added_tokens"]}
    for index in range(len(base.proto.pieces), len(base)):
        if index not in added:
            raise TokenizerError(
                f"{folder}: tokenizer.model ends at {len(base.proto.pieces):,} pieces but tokenizer.json has "
                f"id {index}, {base.piece_of.get(index)!r}, which is no added token; {cure}"
            )
