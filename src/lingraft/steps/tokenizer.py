"""Step 2: learn new pieces from the corpus and graft them onto the base's tokenizer, with proof of no harm."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lingraft.corpus.build import document_text, read_documents
from lingraft.families import family
from lingraft.model.load import read_config, special_ids
from lingraft.recipe import Recipe, Source
from lingraft.steps.context import Context
from lingraft.tokenizer.check import verify
from lingraft.tokenizer.economics import compare
from lingraft.tokenizer.graft import GraftedTokenizer, Placement, graft, place, write
from lingraft.tokenizer.inspect import fertility, segmentation
from lingraft.tokenizer.learn import balance, learn
from lingraft.tokenizer.load import BaseTokenizer, load

SCRIPTS = {"ko": {"Hangul"}, "ja": {"Hiragana", "Katakana", "Han"}, "zh": {"Han"}}
CHECKED_TEXTS = 500
SHOWN_TEXTS = 4


def run(context: Context, out: Path, work: Path) -> dict[str, Any]:
    """Write the grafted tokenizer into `out`; returns what changed, for the manifest and the report."""
    recipe = context.recipe
    base = load(context.base.folder)
    placement = learn_and_place(context, base)
    grafted = graft(base, placement)
    write(grafted, out)

    target, old = recipe.languages.target, recipe.languages.old
    samples = {lang: list(context.texts("held-out", lang, CHECKED_TEXTS)) for lang in context.languages()}
    old_texts = samples[old] + list(context.texts("train", old, CHECKED_TEXTS)) if old != target else []
    pre_tokenizer = family(read_config(context.base.folder).model_type).llama_cpp_pre_tokenizer
    checked = verify(base, out, old_texts, samples[target], pre_tokenizer)
    before, after = load(context.base.folder), load(out)
    return {
        "new_tokens": len(placement.pieces),
        "characters": sum(piece.kind == "character" for piece in placement.pieces),
        "reused_slots": len(placement.reused),
        "appended": placement.appended,
        "vocabulary_before": len(before),
        "vocabulary_after": len(after),
        # verify raises at the first failure, so what it lets pass has none
        "checks": {
            "old_text_changed": 0,
            "old_text_lines": checked["old_texts"],
            "unreachable": 0,
            "round_trip_failures": 0,
        }
        | checked,
        "fertility": {
            lang: {"before": fertility(before, texts), "after": fertility(after, texts)}
            for lang, texts in samples.items()
            if texts
        },
        "economics": economics(context, base, grafted),
        "segmentation": [
            shown | {"language": lang}
            for lang, texts in samples.items()
            for shown in segmentation(before, after, [_sentence(text) for text in texts[:SHOWN_TEXTS]])
        ],
    }


def learn_and_place(context: Context, base: BaseTokenizer) -> Placement:
    """New pieces from the corpus step's training text, as the recipe asks, each with its id."""
    settings = context.recipe.tokenizer
    assert settings is not None
    learnt = learn(
        base,
        _weighted_texts(context),
        new_tokens=settings.new_tokens,
        min_frequency=settings.min_frequency,
        scripts=scripts(context.recipe),
        max_piece_chars=settings.max_piece_characters,
        max_words=settings.max_words,
        characters_first=settings.characters_first,
        nfc=settings.nfc,
    )
    row = family(read_config(context.base.folder).model_type)
    return place(base, learnt, family=row, slots=settings.slots, in_use=special_ids(context.base.folder))


def economics(context: Context, base: BaseTokenizer, grafted: GraftedTokenizer) -> dict[str, Any] | None:
    """What the new pieces save on the held-out text of each source that they are learnt from; None without any."""
    texts = {
        source.name: [document_text(d) for d in read_documents(context.corpus, "held-out", source.name)]
        for source in learnt_from(context.recipe)
    }
    held_out = {name: lines for name, lines in texts.items() if lines}
    return compare(base, grafted.tokenizer, held_out, grafted.pieces, scripts(context.recipe)) if held_out else None


def learnt_from(recipe: Recipe) -> list[Source]:
    """The sources that new pieces are learnt from: the recipe's choice, else all of the target language."""
    assert recipe.tokenizer is not None
    wanted = recipe.tokenizer.sources or [recipe.languages.target]
    return [source for source in recipe.corpus.sources if source.name in wanted or source.language in wanted]


def scripts(recipe: Recipe) -> frozenset[str] | None:
    """Scripts allowed in new pieces: the recipe's, else the target language's own; None allows any."""
    settings = recipe.tokenizer
    if settings and settings.scripts is not None:
        return frozenset(settings.scripts)
    own = SCRIPTS.get(recipe.languages.target)
    return frozenset(own) if own else None


def _weighted_texts(context: Context) -> Iterator[tuple[str, float]]:
    """The training text, each source with its own weight times the one that balances it against larger sources."""
    assert context.recipe.tokenizer is not None
    sources = learnt_from(context.recipe)
    sizes = {source.name: float(sum(map(len, _texts(context, source)))) for source in sources}
    weights = balance(sizes, context.recipe.tokenizer.balance)
    for source in sources:
        for text in _texts(context, source):
            yield text, source.weight * weights[source.name]


def _texts(context: Context, source: Source) -> Iterator[str]:
    return map(document_text, read_documents(context.corpus, "train", source.name))


def _sentence(text: str) -> str:
    """The beginning of a text, cut at a line or word's end: enough to look at."""
    line = next((line for line in text.splitlines() if len(line) > 20), text)
    words = list(islice(line.split(" "), 14))
    return " ".join(words)[:120]
