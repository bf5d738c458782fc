"""Train a small tokenizer from nothing, in the layout of Gemma 3: the base of miniature models.

Layout: `<pad>` `<eos>` `<bos>` `<unk>` `<mask>` `<start_of_turn>` `<end_of_turn>` "\\n", 256 byte pieces, the learnt
pieces, and a block of `<unusedN>` slots at the end. Spaces are kept as they are, digits stand alone. The same
texts and sizes give the same files, byte for byte.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from lingraft.errors import TokenizerError
from lingraft.tokenizer.load import BaseTokenizer, load
from lingraft.tokenizer.pieces import SPACE_MARK
from lingraft.tokenizer.sentencepiece_proto import ModelProto, PieceType

CONTROLS = ("<pad>", "<eos>", "<bos>", "<unk>")
TURN_MARKS = ("<start_of_turn>", "<end_of_turn>")

# SentencePiece silently drops longer lines; this many bytes is longer than any line of text.
MAX_LINE_BYTES = 1 << 20

GEMMA_CHAT_TEMPLATE = """\
{{ bos_token }}
{%- set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Turns must alternate: user, assistant, user, …') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {{- (ns.system if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    unused: int,
    out_folder: Path | str,
    *,
    chat_template: str = GEMMA_CHAT_TEMPLATE,
    character_coverage: float = 0.9995,
) -> BaseTokenizer:
    """Train a BPE tokenizer of `vocab_size` pieces, `unused` of them free slots, and write it to `out_folder`.

    The rarest characters of the texts, up to a share of 1 − `character_coverage`, and all characters that the
    texts lack are spelled in bytes. Writes tokenizer.model, an equivalent tokenizer.json, tokenizer_config.json
    and chat_template.jinja. Raises TokenizerError when the texts are too few for the vocabulary.
    """
    proto = _train(texts, vocab_size - unused, character_coverage)
    lowest = min(piece.score for piece in proto.pieces)
    for number in range(unused):
        proto.pieces.add(piece=f"<unused{number}>", score=lowest - 1 - number, type=PieceType.USER_DEFINED)
    proto.trainer_spec.vocab_size = len(proto.pieces)

    out_folder = Path(out_folder)
    out_folder.mkdir(parents=True, exist_ok=True)
    (out_folder / "tokenizer.model").write_bytes(proto.SerializeToString(deterministic=True))
    _write_json(out_folder / "tokenizer.json", tokenizer_json(proto))
    _write_json(out_folder / "tokenizer_config.json", _config())
    (out_folder / "chat_template.jinja").write_text(chat_template, "utf-8")
    return load(out_folder)


def _train(texts: Iterable[str], vocab_size: int, character_coverage: float) -> Any:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n") if line),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece=CONTROLS[0],
            eos_piece=CONTROLS[1],
            bos_piece=CONTROLS[2],
            unk_piece=CONTROLS[3],
            user_defined_symbols=["<mask>", *TURN_MARKS, "\n"],
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(
            f"cannot train {vocab_size:,} pieces from these texts ({error}); give more text or ask for fewer pieces"
        ) from None
    proto = ModelProto()
    proto.ParseFromString(model.getvalue())
    return proto


def tokenizer_json(proto: Any) -> dict[str, Any]:
    """The Hugging Face twin, as in Gemma 3's tokenizer.json, of a SentencePiece BPE model without dummy prefix."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": piece.piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": piece.type != PieceType.USER_DEFINED or piece.piece in TURN_MARKS,
            }
            for index, piece in enumerate(proto.pieces)
            if piece.type not in (PieceType.NORMAL, PieceType.BYTE) and piece.piece != "\n"
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": _prepend_bos(proto),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": CONTROLS[3],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: index for index, piece in enumerate(proto.pieces)},
            "merges": _merges(proto),
        },
    }


def _merges(proto: Any) -> list[list[str]]:
    """Every way to put two pieces together into a third, best score first: SentencePiece merges any of them."""
    normal = [piece for piece in proto.pieces if piece.type == PieceType.NORMAL]
    known = {piece.piece for piece in normal}
    return [
        [text[:cut], text[cut:]]
        for text in (piece.piece for piece in sorted(normal, key=lambda piece: -piece.score))
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    ]


def _prepend_bos(proto: Any) -> dict[str, Any]:
    bos = CONTROLS[2]
    index = next(i for i, piece in enumerate(proto.pieces) if piece.piece == bos)

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


def _config() -> dict[str, Any]:
    pad, eos, bos, unk = CONTROLS
    return {
        "tokenizer_class": "GemmaTokenizer",
        "pad_token": pad,
        "eos_token": eos,
        "bos_token": bos,
        "unk_token": unk,
        "mask_token": "<mask>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")
