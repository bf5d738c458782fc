"""Step 2: learn new pieces from the corpus and graft them onto the base's tokenizer, with proof of no harm."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lingraft.families import family
from lingraft.model.load import read_config
from lingraft.recipe import Recipe, Tokenizer
from lingraft.steps.context import Context
from lingraft.tokenizer.check import verify
from lingraft.tokenizer.graft import graft, place, write
from lingraft.tokenizer.inspect import fertility, segmentation
from lingraft.tokenizer.learn import learn
from lingraft.tokenizer.load import load

SCRIPTS = {"ko": {"Hangul"}, "ja": {"Hiragana", "Katakana", "Han"}, "zh": {"Han"}}
CHECKED_TEXTS = 500
SHOWN_TEXTS = 4


def run(context: Context, out: Path, work: Path) -> dict[str, Any]:
    """Write the grafted tokenizer into `out`; returns what changed, for the manifest and the report."""
    recipe = context.recipe
    settings = recipe.tokenizer
    assert settings is not None
    base = load(context.base.folder)
    learnt = learn(
        base,
        _weighted_texts(context, settings),
        new_tokens=settings.new_tokens,
        min_frequency=settings.min_frequency,
        scripts=scripts(recipe),
        max_piece_chars=settings.max_piece_characters,
    )
    placement = place(base, learnt, family=family(read_config(context.base.folder).model_type), slots=settings.slots)
    grafted = graft(base, placement)
    write(grafted, out)

    target, old = recipe.languages.target, recipe.languages.old
    samples = {lang: list(context.texts("held-out", lang, CHECKED_TEXTS)) for lang in context.languages()}
    old_texts = samples[old] + list(context.texts("train", old, CHECKED_TEXTS)) if old != target else []
    checked = verify(base, out, old_texts=old_texts, new_texts=samples[target])
    before, after = load(context.base.folder), load(out)
    return {
        "new_tokens": len(learnt.pieces),
        "characters": sum(piece.kind == "character" for piece in learnt.pieces),
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
        "segmentation": [
            shown | {"language": lang}
            for lang, texts in samples.items()
            for shown in segmentation(before, after, [_sentence(text) for text in texts[:SHOWN_TEXTS]])
        ],
    }


def scripts(recipe: Recipe) -> frozenset[str] | None:
    """Scripts allowed in new pieces: the recipe's, else the target language's own; None allows any."""
    settings = recipe.tokenizer
    if settings and settings.scripts is not None:
        return frozenset(settings.scripts)
    own = SCRIPTS.get(recipe.languages.target)
    return frozenset(own) if own else None


def _weighted_texts(context: Context, settings: Tokenizer) -> Iterator[tuple[str, float]]:
    from lingraft.corpus.build import document_text, read_documents

    recipe = context.recipe
    wanted = settings.sources or [recipe.languages.target]
    for source in recipe.corpus.sources:
        if source.name in wanted or source.language in wanted:
            for document in read_documents(context.corpus, "train", source.name):
                yield document_text(document), source.weight


def _sentence(text: str) -> str:
    """The beginning of a text, cut at a line or word's end: enough to look at."""
    line = next((line for line in text.splitlines() if len(line) > 20), text)
    words = list(islice(line.split(" "), 14))
    return " ".join(words)[:120]
