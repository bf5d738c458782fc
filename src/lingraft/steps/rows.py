"""The initial rows of the new tokens, as a recipe asks for them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lingraft.embeddings.parts import Parts, find_parts, first_translation
from lingraft.embeddings.rules import RULES, calibrate_norm, median_norm
from lingraft.progress import say
from lingraft.recipe import Dictionary, Recipe
from lingraft.tokenizer.graft import GraftedPiece
from lingraft.tokenizer.load import load as load_tokenizer
from lingraft.tokenizer.pieces import to_bytes


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
    recipe: Recipe, base_folder: Path, tokens: list[GraftedPiece], input_VD: Tensor, output_VD: Tensor | None
) -> NewRows:
    """The new tokens' rows by the recipe's rules, from the base's own rows (V, D); output_VD is None if tied."""
    settings = recipe.embeddings
    parts = parts_of(recipe, base_folder, tokens)
    part_ids, lengths = [p.ids for p in parts], [p.lengths for p in parts]
    new_input = RULES[settings.input](input_VD, part_ids, lengths)
    if settings.calibrate_norm:
        used = sorted({i for p in parts for i in p.ids})
        new_input = calibrate_norm(new_input, median_norm(input_VD, used))
    new_output = None if output_VD is None else RULES[settings.output](output_VD, part_ids, lengths)
    origins = Counter(part.origin for part in parts)
    output_rule = "as input (tied)" if output_VD is None else settings.output
    return NewRows(
        new_input,
        new_output,
        {_method(settings.input, origin): count for origin, count in origins.items()},
        {_method(output_rule, origin): count for origin, count in origins.items()},
    )


def parts_of(recipe: Recipe, base_folder: Path, tokens: list[GraftedPiece]) -> list[Parts]:
    """What each new token is made of in the old vocabulary, dictionary included."""
    base = load_tokenizer(base_folder)
    pairs = dictionary_pairs(recipe, recipe.embeddings.dictionary) if recipe.embeddings.dictionary else []

    def inside_a_sentence(text: str) -> list[int]:
        if base.kind == "sentencepiece":  # as a spelling: some normalisers would put a second space before it
            return base.segment(["▁" + text.replace(" ", "▁")])[0]
        return base.encode([f" {text}"])[0]

    parts = find_parts(
        [to_bytes(token.piece, base.kind).decode(errors="replace") for token in tokens],
        [token.base_ids for token in tokens],
        first_translation(pairs),
        inside_a_sentence,
        lambda token_id: len(to_bytes(base.piece_of[token_id], base.kind)),
    )
    if pairs and not any(part.origin == "dictionary" for part in parts):
        say(f"  none of the dictionary's {len(pairs):,} terms is a new token: it changes nothing", style="yellow")
    return parts


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


def _method(rule: str, origin: str) -> str:
    return f"{rule} of the translation" if origin == "dictionary" else rule
