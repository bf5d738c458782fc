"""Read local sources: any file, glob or folder that `files` knows, as the records of `records`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lingraft.corpus.files import Documents, Paths, read_rows
from lingraft.corpus.records import Format, Record, columns_of, to_records


def read(
    path: Paths,
    *,
    column: str | Mapping[str, str] | None = None,
    format: Format | None = None,
    documents: Documents = "paragraph",
    encoding: str | None = None,
    where: str,
) -> Iterator[Record]:
    """The records of a file, glob, folder or list of these: see `files.read_rows` and `records.to_records`.

    Raises CorpusError for what is missing, unreadable or of another shape: at once when a path names nothing,
    else as the records are taken.
    """
    rows = read_rows(path, columns=columns_of(column, where), documents=documents, encoding=encoding, where=where)
    return to_records(rows, column=column, format=format, where=where)
