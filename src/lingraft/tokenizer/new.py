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
from lingraft.tokenizer.load import BaseTokenizer, added_tokens_decoder, load
from lingraft.tokenizer.sentencepiece_json import TURN_MARKS, tokenizer_json
from lingraft.tokenizer.sentencepiece_proto import ModelProto, PieceType

CONTROLS = ("<pad>", "<eos>", "<bos>", "<unk>")

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
    parsed = tokenizer_json(proto)
    config = _config() | {"added_tokens_decoder": added_tokens_decoder(parsed, proto)}
    _write_json(out_folder / "tokenizer.json", parsed)
    _write_json(out_folder / "tokenizer_config.json", config)
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
