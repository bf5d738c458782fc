"""The initial rows of the new tokens, as a recipe asks for them.

The rules are pure functions (`embeddings/rules.py`); here is what they are given: the parts in the old vocabulary,
and where a rule needs it a second space of vectors, from word vectors, the corpus or a donor model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingraft.embeddings.calibrate import calibrate_norm, calibrate_share, target_norms
from lingraft.embeddings.mixtures import Space
from lingraft.embeddings.parts import Parts, find_parts, first_translation
from lingraft.embeddings.rules import NEEDS, RULES, Material
from lingraft.embeddings.word_vectors import align, read_vectors, train_token_vectors, vectors_of_tokens
from lingraft.errors import RecipeError
from lingraft.evaluation.forward import context_id, hidden_states
from lingraft.model import load as models
from lingraft.progress import say
from lingraft.recipe import Dictionary, Embeddings, Recipe, Vectors
from lingraft.steps.context import Context
from lingraft.steps.donor import donor_folder, donor_spaces
from lingraft.tokenizer.graft import GraftedPiece
from lingraft.tokenizer.load import BaseTokenizer
from lingraft.tokenizer.load import load as load_tokenizer
from lingraft.tokenizer.pieces import to_bytes

ENCODE_BATCH = 1000
# FOCUS's static vectors hardly gain from more, and counting pairs takes seconds up to here.
CORPUS_CHARACTERS = 20_000_000
# Positions of old text whose final hidden states set the output rows' share.
SHARE_POSITIONS, SHARE_TEXT_TOKENS = 2048, 256


@dataclass(frozen=True)
class NewRows:
    """Rows (N, D) in float32 for the new tokens; `output` is None where one matrix serves both ends.

    The methods count the tokens by how their rows were made.
    """

    input: Tensor
    output: Tensor | None
    input_methods: dict[str, int]
    output_methods: dict[str, int]


def initial_rows(
    recipe: Recipe,
    base_folder: Path,
    tokens: list[GraftedPiece],
    input_VD: Tensor,
    output_VD: Tensor | None,
    context: Context | None = None,
) -> NewRows:
    """The new tokens' rows by the recipe's rules, from the base's own rows (V, D); output_VD is None if tied.

    The run's `context` is needed by what reads the corpus or the new tokenizer: `focus`, `wechsel`, `calibrate_output`.
    """
    settings = recipe.embeddings
    base = load_tokenizer(base_folder)
    pairs = dictionary_pairs(recipe, settings.dictionary) if settings.dictionary else []
    parts = _parts(base, tokens, pairs)
    if pairs and not any(part.origin == "dictionary" for part in parts):
        say(f"  none of the dictionary's {len(pairs):,} terms is a new token: it changes nothing", style="yellow")
    rules = {settings.input} if output_VD is None else {settings.input, settings.output}
    material = Material(parts, recipe.seed)
    if "wechsel" in rules:
        material = replace(material, words=_word_space(recipe, base, tokens, pairs, _required(context, "wechsel")))
    if "focus" in rules:
        material = replace(material, corpus=_corpus_space(base, tokens, _required(context, "focus")))
    of_output = material
    if "omp" in rules:
        of_input, of_head = donor_spaces(donor_folder(recipe), base, _spellings(base, tokens))
        material, of_output = replace(material, donor=of_input), replace(of_output, donor=of_head)
    new = _rows(settings, base, tokens, material, of_output, input_VD, output_VD)
    if settings.calibrate_output is None:
        return new
    if new.output is None or output_VD is None:
        raise RecipeError(
            "embeddings.calibrate_output: input and output rows are one matrix here; set embeddings.tie: untie, or "
            "remove calibrate_output"
        )
    hidden_TD = old_text_states(_required(context, "calibrate_output"), base_folder)
    left_out = [token.id for token in tokens if token.id < len(output_VD)]
    return replace(new, output=calibrate_share(new.output, output_VD, hidden_TD, settings.calibrate_output, left_out))


def plain_rows(
    settings: Embeddings, base_folder: Path, tokens: list[GraftedPiece], input_VD: Tensor, output_VD: Tensor | None
) -> NewRows:
    """As `initial_rows` but without a recipe or a run: rules that need nothing beside the base."""
    base = load_tokenizer(base_folder)
    material = Material(_parts(base, tokens, []))
    return _rows(settings, base, tokens, material, material, input_VD, output_VD)


def parts_of(recipe: Recipe, base_folder: Path, tokens: list[GraftedPiece]) -> list[Parts]:
    """What each new token is made of in the old vocabulary, dictionary included."""
    pairs = dictionary_pairs(recipe, recipe.embeddings.dictionary) if recipe.embeddings.dictionary else []
    return _parts(load_tokenizer(base_folder), tokens, pairs)


def dictionary_pairs(recipe: Recipe, dictionary: Dictionary) -> list[tuple[str, str]]:
    """(target term, old-language term) pairs of the recipe's bilingual dictionary."""
    if dictionary.miniature:
        from lingraft.miniature import dictionary as miniature_dictionary

        return miniature_dictionary()
    from lingraft.corpus.terms import read_dictionary

    target, old = recipe.languages.target, recipe.languages.old
    return read_dictionary(
        recipe.path(dictionary.path or ""),
        dictionary.target_column or target,
        dictionary.old_column or old,
        "embeddings.dictionary",
    )


def _rows(
    settings: Embeddings,
    base: BaseTokenizer,
    tokens: list[GraftedPiece],
    of_input: Material,
    of_output: Material,
    input_VD: Tensor,
    output_VD: Tensor | None,
) -> NewRows:
    new_input, input_methods = RULES[settings.input](input_VD, of_input)
    if settings.calibrate_norm:
        new_ids = {token.id for token in tokens}
        old_texts = {i: _text(p, base) for i, p in base.piece_of.items() if i not in new_ids}
        new_texts = [_text(token.piece, base) for token in tokens]
        norms_N = target_norms(input_VD, old_texts, new_texts, [part.ids for part in of_input.parts])
        new_input = calibrate_norm(new_input, norms_N)
    if output_VD is None:
        return NewRows(new_input, None, dict(Counter(input_methods)), {"as input (tied)": len(tokens)})
    new_output, output_methods = RULES[settings.output](output_VD, of_output)
    return NewRows(new_input, new_output, dict(Counter(input_methods)), dict(Counter(output_methods)))


def _text(piece: str, base: BaseTokenizer) -> str:
    return to_bytes(piece, base.kind).decode(errors="replace")


def _spellings(base: BaseTokenizer, tokens: list[GraftedPiece]) -> list[bytes]:
    return [to_bytes(token.piece, base.kind) for token in tokens]


def _parts(base: BaseTokenizer, tokens: list[GraftedPiece], pairs: list[tuple[str, str]]) -> list[Parts]:
    return find_parts(
        [_text(token.piece, base) for token in tokens],
        [token.base_ids for token in tokens],
        first_translation(pairs),
        partial(_inside_a_sentence, base),
        lambda token_id: to_bytes(base.piece_of[token_id], base.kind),
    )


def _inside_a_sentence(base: BaseTokenizer, text: str) -> list[int]:
    if base.kind == "sentencepiece":  # as a spelling: some normalisers would put a second space before it
        return base.segment(["▁" + text.replace(" ", "▁")])[0]
    return base.encode([f" {text}"])[0]


def _required(context: Context | None, what: str) -> Context:
    if context is None:
        needed = NEEDS.get(what, "old-language text of a corpus")
        raise RecipeError(f"embeddings: {what} needs {needed}: use it in a recipe, or choose another")
    return context


def _space(tokens: list[GraftedPiece], new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]) -> Space:
    """A space from ids (U,) with vectors (U, E) in the new tokenizer, and the same of old tokens."""
    position_of = {token.id: position for position, token in enumerate(tokens)}
    ids_U, vectors_UE = new
    is_new_U = torch.isin(ids_U, torch.tensor(list(position_of)))
    tokens_N = torch.tensor([position_of[i] for i in ids_U[is_new_U].tolist()], dtype=torch.long)
    return Space(tokens_N, vectors_UE[is_new_U], *old)


def _word_space(
    recipe: Recipe, base: BaseTokenizer, tokens: list[GraftedPiece], pairs: list[tuple[str, str]], context: Context
) -> Space:
    """WECHSEL's space: tokens by the words that they occur in, in aligned word vectors of both languages."""
    vectors: Vectors | None = recipe.embeddings.vectors
    if vectors is None or not pairs:
        raise RecipeError(f"embeddings: the rule wechsel needs {NEEDS['wechsel']}; give both or choose another rule")
    target = read_vectors(recipe.path(vectors.target), "embeddings.vectors.target")
    old = read_vectors(recipe.path(vectors.old), "embeddings.vectors.old")
    target_WE, old_WE = align(target, old, first_translation(pairs), "embeddings.vectors")
    grafted = load_tokenizer(context.tokenizer)
    return _space(
        tokens,
        vectors_of_tokens(target_WE, _tokens_of_words(grafted, target.words)),
        vectors_of_tokens(old_WE, _tokens_of_words(base, old.words)),
    )


def _tokens_of_words(tokenizer: BaseTokenizer, words: list[str]) -> list[list[int]]:
    """Tokens of each word, as it begins a text and as it stands inside a sentence."""
    alone, inside = tokenizer.encode(words), tokenizer.encode([f" {word}" for word in words])
    return [[*one, *two] for one, two in zip(alone, inside, strict=True)]


def _corpus_space(base: BaseTokenizer, tokens: list[GraftedPiece], context: Context) -> Space:
    """FOCUS's space: static vectors of the new tokenizer's tokens, trained on the corpus of both languages."""
    grafted = load_tokenizer(context.tokenizer)
    ids_U, vectors_UE = train_token_vectors(_encoded(grafted, context), seed=context.recipe.seed)
    new_ids = torch.tensor([token.id for token in tokens])
    is_old_U = ~torch.isin(ids_U, new_ids)
    return _space(tokens, (ids_U, vectors_UE), (ids_U[is_old_U], vectors_UE[is_old_U]))


def _encoded(tokenizer: BaseTokenizer, context: Context) -> Iterator[list[int]]:
    """The training texts as ids, up to CORPUS_CHARACTERS of each language."""
    for language in context.languages():
        texts = _up_to(context.texts("train", language), CORPUS_CHARACTERS)
        while batch := list(islice(texts, ENCODE_BATCH)):
            yield from tokenizer.encode(batch)


def _up_to(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        yield text
        characters -= len(text)


@torch.inference_mode()
def old_text_states(context: Context, base_folder: Path) -> Tensor:
    """Final hidden states (T, D) of the base on old-language training text, about SHARE_POSITIONS of them."""
    language = context.recipe.languages.old
    tokenizer = models.load_tokenizer(base_folder)
    model: Any = models.load(base_folder)
    states: list[Tensor] = []
    for text in context.texts("train", language):
        ids = [context_id(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]][:SHARE_TEXT_TOKENS]
        ids_1T = torch.tensor([ids])
        states.append(hidden_states(model, ids_1T, torch.ones_like(ids_1T))[0].float())
        if sum(map(len, states)) >= SHARE_POSITIONS:
            break
    if not states:
        raise RecipeError(
            f"embeddings.calibrate_output: the corpus has no text in the old language ({language}) to measure on; add "
            "some, or remove calibrate_output"
        )
    return torch.cat(states)
