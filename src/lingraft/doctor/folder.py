"""A model folder read piece by piece. What is missing or damaged raises `CannotCheck` where it is asked for, so that
one bad file ends only the checks that need it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from lingraft.errors import ModelError
from lingraft.model.load import read_config
from lingraft.tokenizer.load import SIDE_FILES, BaseTokenizer
from lingraft.tokenizer.pieces import Kind, readable
from lingraft.tokenizer.sentencepiece_proto import ModelProto

INDEX_FILE = "model.safetensors.index.json"
INPUT_NAMES = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
OUTPUT_NAMES = ("lm_head.weight", "embed_out.weight")
SLICE_ROWS = 8192
# In units of the median distance of a row from the mean; transformers' mean-resizing draws new rows at 3e-5.
MEAN_DISTANCE = 0.02


class CannotCheck(Exception):
    """A check cannot run on this folder; the message is the reason."""


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError when the text is anything else."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    return value


@dataclass(frozen=True)
class ModelFolder:
    """A folder with any of: config, weights, tokenizer."""

    path: Path

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file's object; empty where the file is missing or damaged (`damaged_json` reports the latter)."""
        try:
            return parse_object((self.path / name).read_text("utf-8"))
        except (OSError, ValueError):
            return {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it is written."""
        return self.json("config.json") or _cannot("no readable config.json")

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of config.json about the language model: `text_config` of multimodal models, else all of it."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @cached_property
    def settings(self) -> Any:
        """The configuration as transformers understands it, with its defaults."""
        try:
            return read_config(self.path)
        except ModelError as error:
            raise CannotCheck(f"transformers cannot read config.json ({error})") from None
        except Exception as error:  # a config of odd types breaks transformers in many ways
            raise CannotCheck(f"transformers cannot read config.json ({type(error).__name__}: {error})") from None

    @cached_property
    def tokenizer(self) -> BaseTokenizer:
        """tokenizer.json and the SentencePiece model, without asking that they agree."""
        path = self.path / "tokenizer.json"
        if not path.is_file():
            raise CannotCheck("no tokenizer.json")
        try:
            text = path.read_text("utf-8")
            parsed, tokenizer = parse_object(text), Tokenizer.from_str(text)
        except Exception as error:  # `tokenizers` raises bare Exception
            raise CannotCheck(f"tokenizer.json is damaged ({error})") from None
        files = {
            name: (self.path / name).read_text("utf-8", errors="replace")
            for name in SIDE_FILES
            if (self.path / name).is_file()
        }
        return BaseTokenizer(parsed, tokenizer, _kind(parsed), self._proto, files)

    @cached_property
    def _proto(self) -> Any | None:
        """The SentencePiece model; None where there is none to read."""
        proto = ModelProto()
        try:
            proto.ParseFromString((self.path / "tokenizer.model").read_bytes())
        except Exception:  # protobuf's DecodeError moved between versions
            return None
        return proto

    @property
    def bpe(self) -> BaseTokenizer:
        """The tokenizer, if it is a BPE."""
        kind = self.tokenizer.json["model"]["type"]
        return self.tokenizer if kind == "BPE" else _cannot(f"a {kind} tokenizer, not BPE")

    @cached_property
    def added(self) -> dict[str, dict[str, Any]]:
        """The tokenizer's added tokens by content."""
        return {token["content"]: token for token in self.tokenizer.json.get("added_tokens", [])}

    @cached_property
    def weights(self) -> Weights:
        """The readable safetensors weights."""
        weights = Weights(self.path)
        return weights if weights.names else _cannot("no readable safetensors weights")

    def name_token(self, index: int) -> str:
        """An id with its token, for people: `265 ('가')`; the bare id where the tokenizer has none."""
        try:
            piece = self.tokenizer.piece_of.get(index)
        except CannotCheck:
            piece = None
        return str(index) if piece is None else f"{index} ({readable(piece, self.tokenizer.kind)!r})"


def _cannot(reason: str) -> Any:
    raise CannotCheck(reason)


def _kind(parsed: dict[str, Any]) -> Kind:
    parts = json.dumps([parsed.get("pre_tokenizer"), parsed.get("decoder")])
    return "byte_level" if '"ByteLevel"' in parts else "sentencepiece"


@dataclass(frozen=True)
class RowStatistics:
    """Of a (V, D) matrix: each row's Euclidean norm (V,), whether it is finite (V,), and the finite rows' mean (D,)."""

    norms: Tensor
    finite: Tensor
    mean: Tensor


class Weights:
    """The tensors of a folder's readable safetensors files, by name; never read whole."""

    def __init__(self, folder: Path) -> None:
        self._open: dict[str, Any] = {}
        self._statistics: dict[str, RowStatistics] = {}
        self._near_mean: dict[str, Tensor] = {}
        for file in shards(folder):
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError):
                continue
            self._open |= dict.fromkeys(opened.keys(), opened)

    @property
    def names(self) -> list[str]:
        return list(self._open)

    @property
    def input(self) -> str:
        """Name of the input embedding matrix."""
        found = self._ending(INPUT_NAMES)
        return found or _cannot("no tensor of the weights has an input embedding's name")

    @property
    def output(self) -> str | None:
        """Name of the output matrix, None where the weights have none (tied models)."""
        return self._ending(OUTPUT_NAMES)

    @property
    def matrices(self) -> dict[str, str]:
        """The vocabulary's matrices: "input" and, where there is one, "output" → tensor name."""
        return {"input": self.input} | ({"output": self.output} if self.output else {})

    def _ending(self, endings: tuple[str, ...]) -> str | None:
        return next((name for name in self._open if f".{name}".endswith(tuple(f".{end}" for end in endings))), None)

    def shape(self, name: str) -> list[int]:
        return self._open[name].get_slice(name).get_shape()

    def dtype(self, name: str) -> str:
        """Safetensors' name of the type, such as "BF16"."""
        return self._open[name].get_slice(name).get_dtype()

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of consecutive blocks of a tensor."""
        shape = self.shape(name)
        if not shape:
            yield 0, self._open[name].get_tensor(name)
            return
        opened = self._open[name].get_slice(name)
        for start in range(0, shape[0], SLICE_ROWS):
            yield start, opened[start : start + SLICE_ROWS]

    def statistics(self, name: str) -> RowStatistics:
        """Row statistics of a matrix, worked out once."""
        if name not in self._statistics:
            norms, total, count = [], torch.zeros(self.shape(name)[1]), 0
            for _, rows in self.slices(name):
                values = rows.float()
                norms.append(values.norm(dim=1))
                good = values[norms[-1].isfinite()]
                total, count = total + good.sum(dim=0), count + len(good)
            joined = torch.cat(norms)
            self._statistics[name] = RowStatistics(joined, joined.isfinite(), total / max(count, 1))
        return self._statistics[name]

    def near_mean(self, name: str) -> Tensor:
        """Which rows (V,) of a matrix are the mean of all rows but for rounding, worked out once."""
        if name not in self._near_mean:
            statistics = self.statistics(name)
            distances = torch.cat([(rows.float() - statistics.mean).norm(dim=1) for _, rows in self.slices(name)])
            self._near_mean[name] = distances <= MEAN_DISTANCE * distances[statistics.finite].median()
        return self._near_mean[name]


def shards(folder: Path) -> list[Path]:
    """The safetensors files that are there: those that the index names, else all that are no adapter's."""
    try:
        names = set(parse_object((folder / INDEX_FILE).read_text("utf-8"))["weight_map"].values())
        files = [folder / str(name) for name in sorted(names)]
    except (OSError, ValueError, KeyError, AttributeError):
        files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter"))
    return [file for file in files if file.is_file()]
