"""Checks that Hugging Face, SentencePiece and llama.cpp give text the same ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from lingraft.doctor.cuts import cut, difference
from lingraft.doctor.findings import Case, Problem, short
from lingraft.doctor.folder import CannotCheck
from lingraft.doctor.tokenizers import base_vocab, stale_ids
from lingraft.families import family
from lingraft.tokenizer import runtimes
from lingraft.tokenizer.load import BaseTokenizer

# (tokenizer, texts) → the texts on which Hugging Face and a runtime differ
Comparison = Callable[[BaseTokenizer, Sequence[str]], list[runtimes.Disagreement]]


def sentencepiece_ids(case: Case) -> list[Problem]:
    """Hugging Face's ids against SentencePiece's, which never reads special tokens in text."""
    if case.model.bpe.proto is None:
        raise CannotCheck("no tokenizer.model")
    special = {token["id"] for token in case.model.added.values() if token["special"]}
    ids = case.model.tokenizer.encode(case.texts)
    texts = [text for text, row in zip(case.texts, ids, strict=True) if special.isdisjoint(row)]
    return _runtime_problem(case, "SentencePiece", _sentencepiece, texts)


def llama_cpp_ids(case: Case) -> list[Problem]:
    """Hugging Face's ids against llama.cpp's."""
    if not runtimes.llama_cpp_available():
        raise CannotCheck('llama.cpp is not installed (pip install "lingraft[gguf]")')
    tokenizer = case.model.bpe
    pre_tokenizer = "default"
    if tokenizer.kind == "byte_level":
        model_type = str(case.model.json("config.json").get("model_type", ""))
        pre_tokenizer = family(model_type).llama_cpp_pre_tokenizer
        if pre_tokenizer == "default":
            raise CannotCheck(f"llama.cpp's pre-tokenizer for {model_type or 'this tokenizer'!r} is not known")
    elif tokenizer.proto is None:
        raise CannotCheck("no tokenizer.model")
    return _runtime_problem(case, "llama.cpp", partial(_llama_cpp, pre_tokenizer), case.texts)


def _sentencepiece(tokenizer: BaseTokenizer, texts: Sequence[str]) -> list[runtimes.Disagreement]:
    """With the lines that have added words, which `runtimes.disagreements` leaves out: they are a fault here."""
    rows = zip(texts, tokenizer.encode(texts), runtimes.sentencepiece_ids(tokenizer, texts), strict=True)
    return [row for row in rows if row[1] != row[2]]


def _llama_cpp(pre_tokenizer: str, tokenizer: BaseTokenizer, texts: Sequence[str]) -> list[runtimes.Disagreement]:
    return runtimes.disagreements(tokenizer, texts, pre_tokenizer)["llama.cpp"]


def _runtime_problem(case: Case, name: str, compare: Comparison, texts: Sequence[str]) -> list[Problem]:
    """Lines that a runtime cuts differently, less those on which it disagrees about the base as well."""
    if stale_ids(case.model):
        raise CannotCheck("tokenizer.model is stale (see sentencepiece-model)")
    try:
        differing = compare(case.model.tokenizer, texts)
    except Exception as error:  # each runtime refuses an odd tokenizer in its own way
        return [
            Problem(
                severity="warning",
                what=f"{name} cannot run this tokenizer",
                where=_one_line(error),
                why=f"tools that use {name} cannot serve the model",
                cure="mend what the other checks find in the tokenizer's files first",
            )
        ]
    inherited = 0
    if differing and case.base and base_vocab(case):
        known = {text for text, _, _ in compare(case.base.tokenizer, [text for text, _, _ in differing])}
        inherited = len(known)
        differing = [row for row in differing if row[0] not in known]
    if inherited and not differing:
        raise CannotCheck(f"{name} disagrees on {inherited:,} of {len(texts):,} lines, as it does about the base")
    if not differing:
        return []
    text, ours, theirs = differing[0]
    tokenizer = case.model.tokenizer
    return [
        Problem(
            severity="fault",
            what=f"Hugging Face and {name} give different ids",
            where=f"{len(differing):,} of {len(texts):,} lines, first {short(text)}: "
            f"{difference(cut(tokenizer, ours), cut(tokenizer, theirs), 'against')}",
            why=f"the model was trained on the one and would be served the other by tools that use {name}",
            cure="new merges must follow all old ones and score below them (lingraft tokenizer graft does that); "
            "words of add_tokens and regenerated merge lists do not agree",
        )
    ]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
