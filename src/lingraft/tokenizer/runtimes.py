"""What the real runtimes make of a tokenizer: SentencePiece, and llama.cpp on a GGUF file of the vocabulary.

All take text as a model's user gives it, without BOS and EOS, with special tokens read wherever a runtime can read
them. `disagreements` compares like with like:

- SentencePiece never reads control symbols such as `</s>` in text, and in tokenizers that put a space in front of a
  text (Llama 2) it does not put one behind symbols: texts with such tokens are left out there.
- llama.cpp normalises nothing, so it gets text as Qwen's NFC leaves it. (Serve NFC text with llama.cpp.)

llama.cpp runs as the server of the package xllamacpp, which is prebuilt. It takes no vocabulary without a model, so
the file holds the smallest one that loads: one layer of zeros, 32 wide.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from sentencepiece import SentencePieceProcessor

from lingraft.errors import TokenizerError
from lingraft.tokenizer.load import BaseTokenizer, load
from lingraft.tokenizer.pieces import SPACE_MARK
from lingraft.tokenizer.sentencepiece_proto import PieceType

Disagreement = tuple[str, list[int], list[int]]

# The narrowest model: one block of Q4_0, which is 32 numbers in 18 bytes.
WIDTH = 32
ROW_BYTES = 18

# Added tokens that llama.cpp's converter takes for control tokens whatever their entry says.
CONTROL_LOOKS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
ADDED_SCORE = -1000.0

TEXTS_PER_REQUEST = 256
# llama.cpp's "no token".
BETWEEN_TEXTS = -1


def sentencepiece_ids(tokenizer: BaseTokenizer | Path | str, texts: Sequence[str]) -> list[list[int]]:
    """SentencePiece's ids of each text. Raises TokenizerError when there is no tokenizer.model."""
    model = _read(tokenizer).proto
    if model is None:
        raise TokenizerError("no tokenizer.model, so SentencePiece cannot run this tokenizer; compare the others")
    ids: list[list[int]] = SentencePieceProcessor(model_proto=model.SerializeToString()).encode(list(texts))
    return ids


def llama_cpp_available() -> bool:
    """Whether the packages that `llama_cpp_ids` needs are installed."""
    return find_spec("xllamacpp") is not None and find_spec("gguf") is not None


def llama_cpp_ids(
    tokenizer: BaseTokenizer | Path | str, texts: Sequence[str], pre_tokenizer: str = "default"
) -> list[list[int]]:
    """llama.cpp's ids of each text.

    pre_tokenizer: llama.cpp's name of a byte-level tokenizer's pre-tokenizer (see `lingraft.families`); ignored for
        SentencePiece, where it is always "default".

    Raises TokenizerError when the packages are missing, when a SentencePiece tokenizer has no tokenizer.model (then
    llama.cpp's converter fails too), and when llama.cpp does not load the vocabulary.
    """
    if not llama_cpp_available():
        raise TokenizerError('llama.cpp is not installed; pip install "lingraft[gguf]" (prebuilt, no compiler needed)')
    tokenizer = _read(tokenizer)
    with TemporaryDirectory(prefix="lingraft-gguf-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_vocabulary_gguf(tokenizer, path, pre_tokenizer)
        with _server(path) as connection:
            starts = range(0, len(texts), TEXTS_PER_REQUEST)
            return [ids for start in starts for ids in _ask(connection, texts[start : start + TEXTS_PER_REQUEST])]


def disagreements(
    tokenizer: BaseTokenizer, texts: Sequence[str], pre_tokenizer: str = "default"
) -> dict[str, list[Disagreement]]:
    """Runtime → (text, Hugging Face's ids, the runtime's ids) of each text on which they differ.

    "SentencePiece" is among the keys where there is a tokenizer.model, "llama.cpp" where it is installed and can run
    the tokenizer: a SentencePiece one with tokenizer.model, a byte-level one with a known `pre_tokenizer`.
    """
    rows = list(zip(texts, tokenizer.encode(texts), strict=True))
    found = {}
    if tokenizer.proto is not None:
        unread = _unread(tokenizer)
        readable = [row for row in rows if unread.isdisjoint(row[1])]
        found["SentencePiece"] = _differing(readable, sentencepiece_ids(tokenizer, [text for text, _ in readable]))
    known = tokenizer.proto is not None if tokenizer.kind == "sentencepiece" else pre_tokenizer != "default"
    if llama_cpp_available() and known:
        normal = [_composed(tokenizer, text) for text in texts]
        found["llama.cpp"] = _differing(rows, llama_cpp_ids(tokenizer, normal, pre_tokenizer))
    return found


def _differing(rows: Iterable[tuple[str, list[int]]], others: Iterable[list[int]]) -> list[Disagreement]:
    return [(text, ours, theirs) for (text, ours), theirs in zip(rows, others, strict=True) if ours != theirs]


def _unread(tokenizer: BaseTokenizer) -> set[int]:
    """Ids of the tokens in text that SentencePiece does not find, or does not go on behind as the two others do.

    It finds no control symbols, no added tokens past its vocabulary, and none with a space in it. With a space put in
    front or spaces removed, the others do so anew behind each added token, SentencePiece once a text.
    """
    assert tokenizer.proto is not None
    pieces, spec = tokenizer.proto.pieces, tokenizer.proto.normalizer_spec
    hidden = [PieceType.CONTROL, PieceType.UNKNOWN]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        hidden.append(PieceType.USER_DEFINED)
    inside = {i for i, piece in enumerate(pieces) if piece.type in hidden or " " in piece.piece}
    return inside | set(range(len(pieces), len(tokenizer)))


def _composed(tokenizer: BaseTokenizer, text: str) -> str:
    normalizer = tokenizer.tokenizer.normalizer if tokenizer.kind == "byte_level" else None
    return normalizer.normalize_str(text) if normalizer else text


def write_vocabulary_gguf(tokenizer: BaseTokenizer, path: Path, pre_tokenizer: str = "default") -> None:
    """Write a GGUF file with the vocabulary as llama.cpp's `convert_hf_to_gguf.py` writes it, and the least model.

    One deviation: whether text gets a space in front is read from the SentencePiece model. The converter goes by the
    architecture, which a tokenizer's folder does not tell, or by `add_prefix_space` in tokenizer_config.json.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    if tokenizer.kind == "sentencepiece":
        size = _add_sentencepiece(writer, tokenizer)
    else:
        size = _add_byte_level(writer, tokenizer, pre_tokenizer)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    _add_least_model(writer, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read(tokenizer: BaseTokenizer | Path | str) -> BaseTokenizer:
    return tokenizer if isinstance(tokenizer, BaseTokenizer) else load(tokenizer)


def _add_sentencepiece(writer: Any, tokenizer: BaseTokenizer) -> int:
    """Returns the number of tokens. Types come from the model, but added tokens only from the two side files."""
    from gguf import TokenType

    if tokenizer.proto is None:
        raise TokenizerError("no tokenizer.model, which llama.cpp's converter needs; take the base's, or go on without")
    kept = (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.UNUSED, PieceType.BYTE)
    pieces = tokenizer.proto.pieces
    tokens = [piece.piece for piece in pieces]
    scores = [piece.score for piece in pieces]
    # The converter has no case for user-defined symbols.
    types = [piece.type if piece.type in kept else int(TokenType.NORMAL) for piece in pieces]
    added = _listed_tokens(tokenizer.files)
    for missing in range(len(tokens), max(added, default=0) + 1):
        tokens.append(f"[PAD{missing}]")
        scores.append(-10_000.0)
        types.append(int(TokenType.UNUSED))
    for index, (content, special) in added.items():
        tokens[index], types[index] = _added(content, special)
        scores[index] = ADDED_SCORE
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(tokenizer.proto.normalizer_spec.add_dummy_prefix)
    return len(tokens)


def _listed_tokens(files: dict[str, str]) -> dict[int, tuple[str, bool]]:
    """Id → (content, special) of the added tokens in added_tokens.json and tokenizer_config.json."""
    listed = {index: (content, False) for content, index in json.loads(files.get("added_tokens.json", "{}")).items()}
    decoder = json.loads(files.get("tokenizer_config.json", "{}")).get("added_tokens_decoder", {})
    return listed | {int(index): (token["content"], token.get("special", False)) for index, token in decoder.items()}


def _add_byte_level(writer: Any, tokenizer: BaseTokenizer, pre_tokenizer: str) -> int:
    """Returns the number of tokens. Gaps between ids are filled with unused tokens."""
    from gguf import TokenType

    added = {token["id"]: token for token in tokenizer.json["added_tokens"]}
    tokens, types = [], []
    for index in range(len(tokenizer)):
        token, kind = tokenizer.piece_of.get(index, f"[PAD{index}]"), int(TokenType.NORMAL)
        if index in added:
            token, kind = _added(token, added[index]["special"])
        elif index not in tokenizer.piece_of:
            kind = int(TokenType.UNUSED)
        tokens.append(token)
        types.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = tokenizer.json["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    return len(tokens)


def _added(content: str, special: bool) -> tuple[str, int]:
    """An added token's spelling and type. User-defined tokens are matched in raw text, where "▁" is a space."""
    from gguf import TokenType

    looks = content in CONTROL_LOOKS or any(
        content.startswith(start) and content.endswith(end)
        for start, end in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    )
    if special or looks:
        return content, int(TokenType.CONTROL)
    return content.replace(SPACE_MARK, " "), int(TokenType.USER_DEFINED)


def _add_least_model(writer: Any, vocab_size: int) -> None:
    from gguf import GGMLQuantizationType

    writer.add_vocab_size(vocab_size)
    writer.add_context_length(WIDTH)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    rows = np.zeros((vocab_size, ROW_BYTES), np.uint8)
    writer.add_tensor("token_embd.weight", rows, raw_dtype=GGMLQuantizationType.Q4_0)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((WIDTH, WIDTH), np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(WIDTH, np.float32))


@contextmanager
def _server(path: Path) -> Iterator[HTTPConnection]:
    """A connection to a llama.cpp server on this machine, which ends with it."""
    # -P, or this folder's inspect.py would stand in for the standard library's.
    command = [sys.executable, "-P", str(Path(__file__).with_name("llama_cpp_server.py")), str(path)]
    log = path.with_suffix(".log")
    # where it aborts, a debugger's backtrace would come instead of the address
    quiet = os.environ | {"GGML_NO_BACKTRACE": "1"}
    with (
        log.open("w") as errors,
        Popen(command, stdin=PIPE, stdout=PIPE, stderr=errors, text=True, env=quiet) as server,
    ):
        assert server.stdin is not None
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        if not address:
            server.wait()
            raise TokenizerError(
                f"llama.cpp cannot load this vocabulary ({_last_line(log)}); compare it with the base's, or go on "
                "without GGUF"
            )
        connection = HTTPConnection(urlsplit(address).netloc)
        try:
            yield connection
        finally:
            connection.close()
            server.stdin.close()


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _ask(connection: HTTPConnection, texts: Sequence[str]) -> list[list[int]]:
    """The ids of a few texts in one request: the server takes texts and ids mixed and cuts each text on its own."""
    mixed = [part for text in texts for part in (text, BETWEEN_TEXTS)]
    request = {"content": mixed, "add_special": False, "parse_special": True}
    connection.request("POST", "/tokenize", json.dumps(request), {"Content-Type": "application/json"})
    response = json.loads(connection.getresponse().read())
    if "tokens" not in response:
        raise TokenizerError(f"llama.cpp cannot cut these texts ({response}), first {texts[0][:80]!r}; shorten them")
    ids: list[list[int]] = [[]]
    for index in response["tokens"]:
        if index == BETWEEN_TEXTS:
            ids.append([])
        else:
            ids[-1].append(index)
    return ids[:-1]
