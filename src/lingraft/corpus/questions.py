"""Multiple-choice questions: the rows of any source, checked one by one."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lingraft.corpus.files import Paths, Row, read_rows
from lingraft.corpus.records import Template, cell, require_columns
from lingraft.errors import CorpusError


@dataclass(frozen=True)
class Question:
    """`answer` counts from 0 into `choices`."""

    question: str
    choices: tuple[str, ...]
    answer: int


def read_questions(
    path: Paths,
    *,
    question: str = "question",
    choices: str | Sequence[str] = "choices",
    fixed_choices: Sequence[str] | None = None,
    answer: str = "answer",
    answer_base: int = 0,
    encoding: str | None = None,
    where: str,
) -> list[Question]:
    """The questions of a file, glob, folder or list of these: see `to_questions`."""
    rows = read_rows(path, encoding=encoding, where=where)
    return to_questions(
        rows,
        question=question,
        choices=choices,
        fixed_choices=fixed_choices,
        answer=answer,
        answer_base=answer_base,
        where=where,
    )


def to_questions(
    rows: Iterable[Row],
    *,
    question: str = "question",
    choices: str | Sequence[str] = "choices",
    fixed_choices: Sequence[str] | None = None,
    answer: str = "answer",
    answer_base: int = 0,
    where: str,
) -> list[Question]:
    """Turn rows into questions.

    `question` is a column or a format string over several. `choices` is one column that holds a list, or an
    object of letters, or it names a column for each choice; empty columns at the end are choices that the
    question does not have. `fixed_choices` are the choices themselves, in place of `choices`, where all the
    questions have the same (yes, no, maybe). The column `answer` holds a letter, a number that counts from
    `answer_base`, or the right choice's own text. Every column may be a field of an object, as `context.text`.

    Raises CorpusError for a missing column, an empty question, fewer than two choices, an answer outside
    them, and when there is no question at all.
    """
    stem = Template(question, where)
    wanted = [] if fixed_choices else [choices] if isinstance(choices, str) else choices
    columns = [*stem.columns, *wanted, answer]
    questions = []
    for row in rows:
        require_columns(row, columns, where)
        text = stem.fill(row).strip()
        options = tuple(fixed_choices) if fixed_choices else _choices(row, choices, where)
        if not text:
            raise CorpusError(f"{where}: the question at {row.place} is empty; fill it in or take it out")
        if len(options) < 2:
            raise CorpusError(
                f"{where}: the question at {row.place} has {len(options)} choices; at least two are needed"
            )
        questions.append(Question(text, options, _answer(row, answer, options, answer_base, where)))
    if not questions:
        raise CorpusError(f"{where}: no question found; is it the right file?")
    return questions


def _choices(row: Row, choices: str | Sequence[str], where: str) -> tuple[str, ...]:
    if isinstance(choices, str):
        value = cell(row, choices)
        options = [value[key] for key in sorted(value)] if isinstance(value, dict) else value
        if not isinstance(options, list):
            raise CorpusError(
                f"{where}: column '{choices}' at {row.place} is not a list of choices; "
                "name a column for each choice like `choices: [A, B, C, D]`"
            )
    else:
        options = [cell(row, column) for column in choices]
    texts = [str(option).strip() if option is not None else "" for option in options]
    while texts and not texts[-1]:
        texts.pop()
    if not all(texts):
        raise CorpusError(f"{where}: choice {texts.index('') + 1} of the question at {row.place} is empty")
    return tuple(texts)


def _answer(row: Row, column: str, choices: tuple[str, ...], base: int, where: str) -> int:
    value = cell(row, column)
    index = _answer_index(value, choices, base)
    if index is None or not 0 <= index < len(choices):
        raise CorpusError(
            f"{where}: the answer {value!r} at {row.place} is none of its {len(choices)} choices "
            f"counted from {base}; numbers may count from 0 or 1: set `answer_base`"
        )
    return index


def _answer_index(value: Any, choices: tuple[str, ...], base: int) -> int | None:
    if isinstance(value, int):
        return value - base
    text = str(value).strip()
    if text.isdecimal():
        return int(text) - base
    if len(text) == 1 and text.upper() in string.ascii_uppercase:
        return string.ascii_uppercase.index(text.upper())
    return choices.index(text) if text in choices else None
