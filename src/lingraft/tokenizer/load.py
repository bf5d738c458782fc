"""Read a tokenizer folder: `load(folder)` gives one `BaseTokenizer`, whichever of the two kinds of BPE it holds.

Files: `tokenizer.json`, and for SentencePiece `tokenizer.model`, which must agree with it id by id. Where there is
`tokenizer.model` alone its twin is made (sentencepiece_json.py). `SIDE_FILES` are carried along.
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
from lingraft.tokenizer.sentencepiece_json import added_token, special_tokens, tokenizer_json
from lingraft.tokenizer.sentencepiece_proto import BPE, ModelProto, PieceType, TrainerSpec

SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True, eq=False)
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
    files = {name: _read_side_file(folder / name) for name in SIDE_FILES if (folder / name).is_file()}
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        return _load_sentencepiece(folder, files)
    parsed, tokenizer = _read_json(folder / "tokenizer.json")
    kind = _kind(parsed, folder)
    model = folder / "tokenizer.model"
    proto = _read_proto(model) if kind == "sentencepiece" and model.is_file() else None
    base = BaseTokenizer(parsed, tokenizer, kind, proto, files)
    _check_agreement(base, folder)
    return base


def _load_sentencepiece(folder: Path, files: dict[str, str]) -> BaseTokenizer:
    """A folder without tokenizer.json: its twin, and a tokenizer_config.json that lets no reader build another."""
    proto = _read_proto(folder / "tokenizer.model")
    try:
        parsed = tokenizer_json(proto)
    except TokenizerError as error:
        raise TokenizerError(f"{folder / 'tokenizer.model'}: {error}") from None
    config = json.loads(files.get("tokenizer_config.json", "{}"))
    parsed["added_tokens"] += _added_past(len(proto.pieces), config, files)
    # transformers' own classes for Llama and Gemma take no more than vocabulary and merges from tokenizer.json.
    config = special_tokens(proto) | config | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config["added_tokens_decoder"] = added_tokens_decoder(parsed, proto)
    files = files | {"tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n"}
    tokenizer = Tokenizer.from_str(json.dumps(parsed, ensure_ascii=False))
    base = BaseTokenizer(parsed, tokenizer, _kind(parsed, folder), proto, files)
    _check_agreement(base, folder)
    return base


def added_tokens_decoder(parsed: dict[str, Any], proto: Any | None) -> dict[str, Any]:
    """The list of added tokens for tokenizer_config.json: those of tokenizer.json and all user-defined symbols.

    llama.cpp's converter takes token types from there alone, and transformers 5 no longer writes them. Symbols that
    Hugging Face gets by merging (Gemma's runs of spaces) are listed too: it then finds them as SentencePiece does.
    """
    tokens = {token["id"]: token for token in parsed["added_tokens"]}
    for index, piece in enumerate(proto.pieces if proto is not None else ()):
        if piece.type == PieceType.USER_DEFINED:
            tokens.setdefault(index, added_token(index, piece.piece, special=False))
    return {str(index): {key: value for key, value in tokens[index].items() if key != "id"} for index in sorted(tokens)}


def _added_past(end: int, config: dict[str, Any], files: dict[str, str]) -> list[dict[str, Any]]:
    """The added tokens that side files list past a SentencePiece model's end."""
    added = {
        index: added_token(index, content, special=False)
        for content, index in json.loads(files.get("added_tokens.json", "{}")).items()
    }
    added |= {
        int(index): {"id": int(index), **token} for index, token in config.get("added_tokens_decoder", {}).items()
    }
    return [added[index] for index in sorted(added) if index >= end]


def _read_side_file(path: Path) -> str:
    """The text of a side file, known to parse where it is JSON."""
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".json" and not isinstance(json.loads(text), dict):
            raise ValueError("it holds no JSON object")
    except ValueError as error:  # no UTF-8, no JSON
        raise TokenizerError(f"{path}: damaged ({error}); download it again") from None
    return text


def _read_json(path: Path) -> tuple[dict[str, Any], Tokenizer]:
    if path.parent.is_file():
        raise TokenizerError(f"{path.parent}: a file; give the folder that holds the model's tokenizer files")
    if not path.is_file():
        raise TokenizerError(
            f"{path}: no such file, nor a tokenizer.model (SentencePiece) beside it; download the model's tokenizer "
            "files, or save them with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    text = path.read_text("utf-8", errors="replace")
    try:
        return json.loads(text), Tokenizer.from_str(text)
    # `tokenizers` raises bare Exception for a file that is JSON but no tokenizer.
    except Exception as error:
        raise TokenizerError(f"{path}: damaged, or no tokenizer ({error}); download it again") from None


def _read_proto(path: Path) -> Any:
    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError moved between versions
        raise TokenizerError(f"{path}: damaged, or no SentencePiece model ({error}); download it again") from None
    if not proto.pieces:
        raise TokenizerError(f"{path}: damaged, or no SentencePiece model (no pieces in it); download it again")
    if proto.trainer_spec.model_type != BPE:
        kind = TrainerSpec.ModelType.Name(proto.trainer_spec.model_type).capitalize()
        raise TokenizerError(
            f"{path}: a SentencePiece model of the kind {kind}; continued BPE needs a BPE tokenizer, so choose another "
            "base model or leave the tokenizer as it is"
        )
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
