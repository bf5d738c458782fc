"""Token economics of a run: what its tokenizer step found, or would find on a sample, and what that is worth."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingraft.corpus import build as corpus_build
from lingraft.corpus.records import Record
from lingraft.errors import CorpusError, LingraftError
from lingraft.recipe import Recipe
from lingraft.steps import corpus, tokenizer
from lingraft.steps.base import Base
from lingraft.steps.context import Context
from lingraft.steps.shape import Shape
from lingraft.tokenizer.economics import assess
from lingraft.tokenizer.graft import graft
from lingraft.tokenizer.load import load

if TYPE_CHECKING:
    from lingraft.layout import Plan

SAMPLE_CHARACTERS = 1_000_000  # of all sources together: enough for a curve, read and learnt from in seconds
SAMPLE_HELD_OUT = 0.1  # at least, so that what is measured on is not too little
SAMPLE_MIN_FREQUENCY = 2  # a part of the corpus can't reach a frequency that is meant for all of it


def economics(plan: Plan, shape: Shape | None) -> dict[str, Any] | None:
    """The tokenizer step's findings where it is done, else a sample's; None where nothing is grafted.

    {"from", "compared", "rows", "speed", "verdict"}, see `lingraft.tokenizer.economics`, or {"unknown": why}.
    """
    if plan.recipe.tokenizer is None:
        return None
    if found := published(plan, shape):
        return found
    later = "known after step 02-tokenizer"
    if not (plan.base.folder / "tokenizer.json").is_file():
        return {"unknown": f"{later}: the base is not at hand yet"}
    try:
        compared, sample = preview(plan.recipe, plan.base)
    except LingraftError as error:
        return {"unknown": f"{later}; on a sample: {error}"}
    return _assessed(compared, sample, shape)


def published(plan: Plan, shape: Shape | None) -> dict[str, Any] | None:
    """The tokenizer step's findings; None where it is not done or had nothing held out to measure on."""
    step = next((s for s in plan.steps if s.name == "02-tokenizer"), None)
    manifest = plan.manifest(step.name) if step and plan.state(step) == "done" else None
    compared = manifest and manifest["results"].get("economics")
    if not compared:
        return None
    return _assessed(compared, "the run's held-out text", shape)


def _assessed(compared: dict[str, Any], origin: str, shape: Shape | None) -> dict[str, Any]:
    return {"from": origin, "compared": compared} | assess(compared, shape.for_economics() if shape else None)


def preview(recipe: Recipe, base: Base) -> tuple[dict[str, Any], str]:
    """What the tokenizer step finds on a sample of the recipe's local sources, and what the sample is.

    Raises:
        LingraftError: no source is at hand, or what the sample shows is wrong already (too few slots, no new piece).
    """
    wanted = [source for source in tokenizer.learnt_from(recipe) if not (source.hub or source.replay)]
    if not wanted:
        raise CorpusError("the sources of new tokens are not at hand")
    sampled = recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"sources": wanted})})
    cut: list[str] = []
    # Progress goes to standard error, since standard output may be read as JSON.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        context = Context(sampled, Path(folder), base)
        counts = _build_sample(context, SAMPLE_CHARACTERS // len(wanted), cut.append)
        if cut and recipe.tokenizer:
            settings = recipe.tokenizer.model_copy(update={"min_frequency": SAMPLE_MIN_FREQUENCY})
            context = replace(context, recipe=sampled.model_copy(update={"tokenizer": settings}))
        tokens = load(base.folder)
        found = tokenizer.economics(context, tokens, graft(tokens, tokenizer.learn_and_place(context, tokens)))
    if found is None:
        raise CorpusError("no text of the sources of new tokens is held out")
    learnt, held = (sum(count[part]["characters"] for count in counts.values()) for part in ("train", "held_out"))
    left_out = [s.name for s in tokenizer.learnt_from(recipe) if s not in wanted]
    notes = [f"a sample: learnt from {learnt:,} characters, measured on {held:,} others"]
    if cut:
        notes.append(f"from the beginning of {', '.join(cut)}")
    if left_out:
        notes.append(f"without {', '.join(left_out)}")
    return found, "; ".join(notes)


def _build_sample(context: Context, characters: int, on_cut: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """The corpus step's work on the first `characters` of each source."""
    sources = [
        replace(
            source,
            records=_beginning(source, characters, on_cut),
            held_out=max(source.held_out, SAMPLE_HELD_OUT) if source.held_out else 0,
        )
        for source in corpus.sources(context)
    ]
    settings = context.recipe.corpus
    return corpus_build.build(
        sources,
        context.corpus,
        seed=context.recipe.seed,
        held_out_documents=settings.max_held_out_documents,
        overlap_words=13 if settings.decontaminate else None,
    )


def _beginning(
    source: corpus_build.Source, characters: int, on_cut: Callable[[str], None]
) -> Callable[[], Iterable[Record]]:
    def records() -> Iterator[Record]:
        left = characters
        for record in source.records():
            if left <= 0:
                on_cut(source.name)
                return
            left -= len(corpus_build.document_text(record))
            yield record

    return records
