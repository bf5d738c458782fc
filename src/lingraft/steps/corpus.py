"""Step 1: read every source, clean, split off the held-out part, write the corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from lingraft.artifact import Hashes
from lingraft.corpus import build as corpus_build
from lingraft.corpus.files import Row, find_files, read_rows
from lingraft.corpus.hub import hub_rows, read_hub
from lingraft.corpus.questions import Question, to_questions
from lingraft.corpus.read import read
from lingraft.corpus.records import to_records
from lingraft.errors import CorpusError
from lingraft.languages import LANGUAGE_NAMES
from lingraft.miniature import sets as miniature
from lingraft.progress import say
from lingraft.prompts import LETTERS, multiple_choice_prompt
from lingraft.recipe import Origin, Recipe, Replay, Source
from lingraft.steps.context import Context


def run(context: Context, out: Path, work: Path) -> dict[str, Any]:
    """Write the corpus into `out`; returns each source's counts for the manifest."""
    recipe = context.recipe
    counts = corpus_build.build(
        sources(context),
        out,
        seed=recipe.seed,
        held_out_documents=recipe.corpus.max_held_out_documents,
        overlap_words=13 if recipe.corpus.decontaminate else None,
        save_rejects=recipe.corpus.save_rejects,
    )
    for language in context.languages():
        _require_held_out(recipe, counts, language)
    replayed = [source.name for source in recipe.corpus.sources if source.replay]
    return {"sources": counts, "replayed_from_base": replayed}


def sources(context: Context) -> list[corpus_build.Source]:
    """The recipe's sources, each with its reader and its filters."""
    recipe = context.recipe
    return [
        corpus_build.Source(
            name=source.name,
            records=_records(context, source, f"corpus.sources[{i}]"),
            language=None if source.replay else source.language,
            min_script_share=source.min_script_share,
            min_characters=source.min_characters,
            max_characters=source.max_characters,
            keywords=tuple(source.keywords),
            held_out=recipe.corpus.held_out if source.held_out is None else source.held_out,
            limit_documents=source.limit_documents,
            limit_bytes=source.limit_bytes,
        )
        for i, source in enumerate(recipe.corpus.sources)
    ]


def _require_held_out(recipe: Recipe, counts: dict[str, dict[str, Any]], language: str) -> None:
    """Nothing can be measured in a language without held-out text: an error for the target, else a line."""
    texts = [s for s in recipe.corpus.sources if s.language == language and s.format == "text"]
    if any(counts[s.name]["held_out"]["documents"] for s in texts):
        return
    name = LANGUAGE_NAMES.get(language, language)
    if language == recipe.languages.target and texts:
        raise CorpusError(
            f"corpus: no {name} text is held out, so nothing could be measured on it; raise corpus.held_out, or split "
            "the text into more documents"
        )
    say(f"  no {name} text is held out: what it costs or gains in {name} text is not measured", style="yellow")


def _records(context: Context, source: Source, where: str) -> Callable[[], Iterable[dict[str, Any]]]:
    if source.replay:
        return partial(_replay, context, source)
    if source.format == "questions":
        return lambda: (_as_chat(question, source) for question in questions(context.recipe, source, where))
    if source.miniature:
        rows = partial(miniature_rows, source.miniature, context.recipe.seed, where)
        return lambda: to_records(rows(), where=where)
    if source.hub:
        return partial(
            read_hub,
            source.hub,
            config=source.config,
            split=source.split,
            revision=source.revision,
            column=source.column,
            format=source.format,
            where=where,
        )
    return partial(
        read,
        local_paths(context.recipe, source),
        column=source.column,
        format=source.format,
        documents=source.documents,
        encoding=source.encoding,
        where=where,
    )


def local_paths(recipe: Recipe, origin: Origin) -> list[Path]:
    """The source's files or globs as absolute paths."""
    paths = origin.path if isinstance(origin.path, list) else [origin.path or ""]
    return [recipe.path(path) for path in paths]


def questions(recipe: Recipe, origin: Origin, where: str) -> list[Question]:
    """Multiple-choice questions of a source or of an evaluation set."""
    rows: Iterable[Row]
    if origin.miniature:
        rows = miniature_rows(origin.miniature, recipe.seed, where)
    elif origin.hub:
        rows = hub_rows(origin.hub, config=origin.config, split=origin.split, revision=origin.revision, where=where)
    else:
        rows = read_rows(local_paths(recipe, origin), encoding=origin.encoding, where=where)
    columns = origin.columns
    found = to_questions(
        rows,
        question=columns.question,
        choices=columns.choices,
        fixed_choices=columns.fixed_choices,
        answer=columns.answer,
        answer_base=columns.answer_base,
        where=where,
    )
    return found[: origin.limit_documents]


def _as_chat(question: Question, source: Source) -> dict[str, Any]:
    """A question as the conversation that the evaluation's scoring of the same name asks about."""
    if source.scoring == "letter":
        prompt = multiple_choice_prompt(question.question, question.choices, source.language)
        answer = LETTERS[question.answer]
    else:
        prompt, answer = question.question, question.choices[question.answer]
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def miniature_rows(name: str, seed: int, where: str) -> Iterable[Row]:
    """Rows of the miniature world's set `name`."""
    return (Row(values, name, number) for number, values in enumerate(miniature.records(name, seed, where), 1))


def _replay(context: Context, source: Source) -> Iterable[dict[str, Any]]:
    from lingraft.model.load import load, load_tokenizer
    from lingraft.model.replay import sample_texts

    settings = source.replay if isinstance(source.replay, Replay) else Replay()
    folder = context.base.folder
    texts = sample_texts(
        load(folder),
        load_tokenizer(folder),
        documents=settings.documents,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seed=context.recipe.seed,
    )
    return ({"text": text} for text in texts)


def inputs(recipe: Recipe, hashes: Hashes, base_key: str) -> dict[str, str]:
    """Hashes of everything the corpus is read from."""
    found: dict[str, str] = {}
    for i, source in enumerate(recipe.corpus.sources):
        found |= origin_inputs(recipe, source, f"corpus.sources[{i}]", hashes)
        if source.replay:
            found["base"] = base_key
    return found


def origin_inputs(recipe: Recipe, origin: Origin, where: str, hashes: Hashes) -> dict[str, str]:
    """Hashes of one origin's local files, or of the miniature world; the hub is named by revision in the recipe.

    Raises:
        CorpusError: a path that names no file.
    """
    if origin.miniature:
        return hashes.files(miniature.source_files())
    if origin.path is None:
        return {}
    files = find_files(local_paths(recipe, origin), where)
    return {f"{where}/{name}": digest for name, digest in hashes.files(files).items()}
