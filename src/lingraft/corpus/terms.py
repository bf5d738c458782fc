"""Bilingual dictionaries: pairs of a term and its translation."""

from __future__ import annotations

from pathlib import Path

from lingraft.corpus.files import Row, read_rows
from lingraft.corpus.records import Template, require_columns
from lingraft.errors import CorpusError


def read_dictionary(
    path: Path, source_column: str, target_column: str, where: str, encoding: str | None = None
) -> list[tuple[str, str]]:
    """The (source, target) pairs of a table, JSON or JSONL file, in its order, each once.

    A JSON file may also be one object `{source: target}`, which needs no columns. Pairs with an empty side
    are left out. Raises CorpusError for a wrong column and when no pair is left.
    """
    rows = list(read_rows(path, encoding=encoding, where=where))
    if _is_plain_object(path, rows, (source_column, target_column)):
        pairs = list(rows[0].values.items())
    else:
        pairs = _column_pairs(rows, source_column, target_column, where)
    stripped = ((source.strip(), target.strip()) for source, target in pairs)
    unique = list(dict.fromkeys(pair for pair in stripped if all(pair)))
    if not unique:
        raise CorpusError(f"{where}: no pair of terms in '{path}'; is it the right file?")
    return unique


def _is_plain_object(path: Path, rows: list[Row], columns: tuple[str, str]) -> bool:
    """Whether the file is one JSON object `{source: target}`, rather than one row with these columns."""
    return (
        path.name.removesuffix(".gz").endswith(".json")
        and len(rows) == 1
        and not rows[0].values.keys() & set(columns)
        and all(isinstance(target, str) for target in rows[0].values.values())
    )


def _column_pairs(rows: list[Row], source_column: str, target_column: str, where: str) -> list[tuple[str, str]]:
    source, target = Template(source_column, where), Template(target_column, where)
    for row in rows[:1]:
        require_columns(row, source.columns + target.columns, where)
    return [(source.fill(row), target.fill(row)) for row in rows]
