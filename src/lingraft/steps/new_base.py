"""A base from scratch: its own vocabulary learnt from the corpus, random weights. For miniatures and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lingraft.corpus.build import document_text, read_documents
from lingraft.errors import ModelError
from lingraft.model.load import save
from lingraft.recipe import Scratch, did_you_mean
from lingraft.steps.context import Context
from lingraft.tokenizer.new import train_sentencepiece


def run(context: Context, out: Path, work: Path) -> dict[str, Any]:
    """Write tokenizer and randomly initialised model into `out`."""
    scratch = context.recipe.base.scratch
    assert scratch is not None
    texts = (
        document_text(document)
        for source in context.recipe.corpus.sources
        for document in read_documents(context.corpus, "train", source.name)
    )
    tokenizer_folder = work / "tokenizer"
    train_sentencepiece(
        texts,
        scratch.tokenizer.vocabulary,
        scratch.tokenizer.unused,
        tokenizer_folder,
    )
    torch.manual_seed(context.recipe.seed)
    model = AutoModelForCausalLM.from_config(make_config(scratch), dtype=torch.float32)
    save(model, out, companions=tokenizer_folder)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": scratch.tokenizer.vocabulary,
    }


def make_config(scratch: Scratch) -> Any:
    """The transformers configuration of a family, with the recipe's numbers and the vocabulary's size.

    Raises:
        ModelError: an unknown family, or numbers that the family refuses.
    """
    if scratch.family not in CONFIG_MAPPING:
        raise ModelError(
            f"base.scratch.family: unknown family {scratch.family!r}{did_you_mean(scratch.family, CONFIG_MAPPING)}"
        )
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    try:
        return CONFIG_MAPPING[scratch.family](**{"vocab_size": scratch.tokenizer.vocabulary, **ids, **scratch.config})
    except (TypeError, ValueError) as error:
        raise ModelError(f"base.scratch.config: {str(error).splitlines()[0]}") from error
