"""From files to rows: find the files, decode them, and give each record as a dictionary of columns.

Everything streams except `.json`, which has to be read whole. Every fault becomes one `CorpusError` line
that starts with `where`, the place in the recipe that named the file.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from lingraft.errors import CorpusError

Paths = str | Path | Sequence[str | Path]
Documents = Literal["line", "paragraph", "file"]

DETECTION_BYTES = 1 << 20  # a file is told UTF-8 or CP949 by its first MiB
PARQUET_BATCH_ROWS = 256
NAMES_SHOWN = 20

# Python's own limit (128 KiB) is below real documents; without any, one stray quote swallows a whole file.
# The csv module keeps this limit for the process.
CSV_FIELD_CHARACTERS = 1 << 24
csv.field_size_limit(CSV_FIELD_CHARACTERS)


class Row(NamedTuple):
    """One record as found: its columns, and the file (or data set) and line (or record) it came from."""

    values: dict[str, Any]
    file: str
    number: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"


class _Options(NamedTuple):
    """What `read_rows` was asked for; each reader takes from it what concerns its kind of file."""

    columns: Collection[str] | None
    documents: Documents
    encoding: str | None
    where: str


def read_rows(
    path: Paths,
    *,
    columns: Collection[str] | None = None,
    documents: Documents = "paragraph",
    encoding: str | None = None,
    where: str,
) -> Iterator[Row]:
    """The rows of a file, glob, folder (searched in depth, in order of names) or a list of these.

    `columns` are the only ones wanted, which spares Parquet the others. `documents` says what a document of
    a `.txt` file is; it becomes the column `text`. `encoding` is detected when not named: a byte order mark,
    UTF-8, then CP949. The files are found at once; they are read as the rows are taken.
    """
    files = find_files(path, where)
    options = _Options(columns, documents, encoding, where)
    return (row for file in files for row in _READERS[_suffix(file)](file, options))


def closest(name: str, names: Iterable[str]) -> str:
    """' (did you mean 'x'?)' for the name most like `name`, whatever their case, or nothing."""
    lowered = {each.lower(): each for each in names}
    matches = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f" (did you mean '{lowered[matches[0]]}'?)" if matches else ""


def listed(names: Collection[str]) -> str:
    """The names for an error's line, which has to stay readable where there are hundreds."""
    shown = ", ".join(islice(names, NAMES_SHOWN))
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def find_files(path: Paths, where: str) -> list[Path]:
    """The files that a path, glob, folder or list of these stands for.

    Raises CorpusError when one of them names nothing, or a file of an unknown kind.
    """
    paths = [path] if isinstance(path, str | Path) else path
    try:
        files = [file for each in paths for file in _expand(Path(each), where)]
    except OSError as error:
        raise CorpusError(f"{where}: cannot read '{error.filename}' ({error.strerror})") from error
    for file in files:
        if _suffix(file) not in _READERS:
            raise CorpusError(f"{where}: '{file}' is of an unknown kind; {_KINDS_READ}")
    return files


def _expand(path: Path, where: str) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _is_input(file, path))
        if not found:
            raise CorpusError(f"{where}: no text in the folder '{path}'; {_KINDS_READ}")
        return found
    if glob.has_magic(str(path)):
        found = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
        if not found:
            raise CorpusError(f"{where}: no file matches '{path}'; paths are relative to the recipe")
        return found
    siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = closest(path.name, siblings)
    raise CorpusError(f"{where}: no such file '{path}'{hint}; paths are relative to the recipe")


def _is_input(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return _suffix(file) in _READERS and not hidden


def _open(path: Path) -> BinaryIO:
    """The file's bytes, unpacked when its name ends in `.gz`."""
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


@contextmanager
def _faults_of(path: Path, where: str) -> Iterator[None]:
    """Turn what goes wrong in reading the file's bytes into a CorpusError."""
    try:
        yield
    except gzip.BadGzipFile as error:
        raise CorpusError(f"{where}: '{path}' is not gzip; take '.gz' off its name") from error
    except (EOFError, zlib.error) as error:
        raise CorpusError(f"{where}: '{path}' is cut short or damaged ({error}); fetch it again") from error
    except OSError as error:
        raise CorpusError(f"{where}: cannot read '{path}' ({error.strerror or error})") from error


def detect_encoding(path: Path, where: str) -> str:
    """'utf-16', 'utf-8-sig' (with or without a byte order mark) or 'cp949', told by the first MiB.

    Raises CorpusError when it is none of them.
    """
    with _faults_of(path, where), _open(path) as stream:
        prefix = stream.read(DETECTION_BYTES)
    if prefix.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if _decode_prefix(prefix, "utf-8") is not None:
        return "utf-8-sig"
    korean = _decode_prefix(prefix, "cp949")
    if korean is not None and _is_korean(korean):
        return "cp949"
    raise CorpusError(f"{where}: '{path}' is neither UTF-8 nor CP949; name it, such as `encoding: cp1252`")


def _decode_prefix(prefix: bytes, encoding: str) -> str | None:
    """The prefix as text, or None if it is not in `encoding`; a character cut by its end is no fault."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(prefix, final=len(prefix) < DETECTION_BYTES)
    except UnicodeDecodeError:
        return None


def _is_korean(text: str) -> bool:
    """Whether text decoded as CP949 can be Korean: mostly in KS X 1001, its core.

    A Windows-1252 quotation mark before a letter is a rare syllable in CP949, outside that core.
    """
    wide = "".join(character for character in text if not character.isascii())
    return len(wide.encode("euc-kr", errors="ignore")) > len(wide)  # two bytes each for more than half


def _lines(path: Path, options: _Options) -> Iterator[str]:
    """The decoded lines, each with its line end as a newline."""
    where = options.where
    encoding = _named_encoding(options.encoding, where) or detect_encoding(path, where)
    number = 0
    with _faults_of(path, where), _open(path) as stream:
        try:
            for number, line in enumerate(io.TextIOWrapper(stream, encoding), 1):  # noqa: B007 (used below)
                yield line
        except UnicodeDecodeError as error:
            # The decoder fails on a block that starts inside the line after the last one given.
            line_number = number + 1 + error.object[: error.start].decode(encoding, "ignore").count("\n")
            raise CorpusError(
                f"{where}: {path}:{line_number} is not {encoding.removesuffix('-sig').upper()} "
                f"({error.reason}); name the file's `encoding`, or mend the line"
            ) from error


def _named_encoding(encoding: str | None, where: str) -> str | None:
    """The standard name of the encoding that the user named; a CorpusError if there is no such encoding."""
    if encoding is None:
        return None
    try:
        name = codecs.lookup(encoding).name
    except LookupError as error:
        raise CorpusError(
            f"{where}: unknown encoding '{encoding}'; leave `encoding` out to have it detected, "
            "or name one such as utf-8, utf-16, cp949"
        ) from error
    # A byte order mark would else become part of the first column's name.
    return "utf-8-sig" if name == "utf-8" else name


def _text_rows(path: Path, options: _Options) -> Iterator[Row]:
    lines = _lines(path, options)
    if options.documents == "file":
        yield Row({"text": "".join(lines)}, str(path), 1)
    elif options.documents == "line":
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Row({"text": line}, str(path), number)
    else:
        yield from _paragraphs(lines, str(path))


def _paragraphs(lines: Iterator[str], file: str) -> Iterator[Row]:
    paragraph: list[str] = []
    start = 1
    for number, line in enumerate(lines, 1):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield Row({"text": "".join(paragraph)}, file, start)
            paragraph = []
    if paragraph:
        yield Row({"text": "".join(paragraph)}, file, start)


def _jsonl_rows(path: Path, options: _Options) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, options), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(
                f"{options.where}: {path}:{number} is not JSON ({error.msg} at column {error.colno}); "
                "each line must be one object"
            ) from error
        yield Row(_an_object(values, f"{path}:{number}", options.where), str(path), number)


def _an_object(values: Any, place: str, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise CorpusError(f"{where}: {place} holds a {type(values).__name__}, not an object with columns")
    return values


def _load_json(path: Path, options: _Options) -> Any:
    """The whole of a `.json` file."""
    try:
        return json.loads("".join(_lines(path, options)))
    except json.JSONDecodeError as error:
        cure = "if it holds one object a line, name it '.jsonl'" if error.msg == "Extra data" else "mend it"
        fault = f"{error.msg} at column {error.colno}"
        raise CorpusError(f"{options.where}: {path}:{error.lineno} is not JSON ({fault}); {cure}") from error


def _json_rows(path: Path, options: _Options) -> Iterator[Row]:
    """A list of objects, an object of objects, an object with such a list as `data`, or a single object."""
    document = _load_json(path, options)
    if isinstance(document, dict):
        if document and all(isinstance(value, dict) for value in document.values()):
            document = list(document.values())
        elif isinstance(document.get("data"), list):
            document = document["data"]
        else:
            document = [document]
    if not isinstance(document, list):
        raise CorpusError(f"{options.where}: '{path}' holds a {type(document).__name__}, not a list of objects")
    for number, values in enumerate(document, 1):
        yield Row(_an_object(values, f"{path}:{number}", options.where), str(path), number)


def _separated_rows(path: Path, options: _Options, **dialect: Any) -> Iterator[Row]:
    reader = csv.reader(_lines(path, options), **dialect)
    try:
        header = next(reader, [])
        for fields in reader:
            if not fields:  # a blank line
                continue
            if len(fields) != len(header):
                raise CorpusError(
                    f"{options.where}: {path}:{reader.line_num} has {len(fields)} fields "
                    f"where the first line names {len(header)} columns; mend the line"
                )
            yield Row(dict(zip(header, fields, strict=True)), str(path), reader.line_num)
    except csv.Error as error:
        raise CorpusError(
            f"{options.where}: {path}:{reader.line_num} is not CSV ({error}); look for a quotation mark left open"
        ) from error


def _csv_rows(path: Path, options: _Options) -> Iterator[Row]:
    return _separated_rows(path, options, delimiter=",")


def _tsv_rows(path: Path, options: _Options) -> Iterator[Row]:
    # TSV has no quoting: reading a field that merely starts with a quotation mark as quoted swallows lines.
    return _separated_rows(path, options, delimiter="\t", quoting=csv.QUOTE_NONE)


def _parquet_rows(path: Path, options: _Options) -> Iterator[Row]:
    number = 0
    try:
        with _faults_of(path, options.where), pq.ParquetFile(path) as table:
            complete = set(options.columns or ()) <= set(table.schema_arrow.names)
            columns = list(options.columns) if options.columns and complete else None
            for batch in table.iter_batches(PARQUET_BATCH_ROWS, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, str(path), number)
    except pa.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise CorpusError(f"{options.where}: '{path}' is not Parquet, or damaged ({reason}); fetch it again") from error


_READERS: dict[str, Callable[[Path, _Options], Iterator[Row]]] = {
    ".txt": _text_rows,
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".parquet": _parquet_rows,
}
_KINDS_READ = f"known are {', '.join(_READERS)}, and .gz of the text kinds"
