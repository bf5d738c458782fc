"""Build the corpus: read every source, keep what its filters keep, split, decontaminate, write.

    train/<source>.jsonl      {"text": …, "id": "<source>#<n>"} or {"messages": …, "id": …}, one a line
    held-out/<source>.jsonl   the same; none of it is in `train`
    rejects/<source>.jsonl    what was dropped, with its `reason` (if asked for)

`n` counts the source's records from 1. Two passes: the first cleans, drops duplicates (also between sources)
and chooses the held-out documents, writing what it keeps to a spool; the second deals the spool out, without
the training documents that hold a part of any source's held-out ones.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from lingraft.corpus import clean
from lingraft.corpus.records import Record
from lingraft.corpus.split import HeldOutChoice, Overlap
from lingraft.errors import CorpusError
from lingraft.progress import track

Part = Literal["train", "held-out", "rejects"]

NOT_THE_LANGUAGE = "not the language"
OVERLAP = "overlaps held-out"
NO_ANSWER = "no answer"
CURES = {
    "empty": "is `column` the right one?",
    "too short": "lower `min_characters`",
    "too long": "raise `max_characters`",
    NOT_THE_LANGUAGE: "is `language` right? else lower `min_script_share`",
    "no keyword": "check `keywords`",
    "duplicate": "another source holds the same documents: take one of the two out",
    NO_ANSWER: "a chat needs an assistant's message",
    OVERLAP: "set `corpus.decontaminate: false`, or lower `held_out`",
}


@dataclass(frozen=True)
class Source:
    """One source and what to keep of it. `records` is called once, to start reading."""

    name: str
    records: Callable[[], Iterable[Record]]
    language: str | None = None  # a two-letter code; None for any
    min_script_share: float = 0.2  # low, since technical Korean is full of English names and code
    min_characters: int = 1
    max_characters: int | None = None
    keywords: tuple[str, ...] = ()
    held_out: float = 0.01
    limit_documents: int | None = None
    limit_bytes: int | None = None

    def filters(self) -> list[clean.Filter]:
        """In the order of their cost."""
        filters = [clean.shorter_than(self.min_characters)]
        if self.max_characters is not None:
            filters.append(clean.longer_than(self.max_characters))
        if self.language is not None:
            filters.append(clean.other_language_than(self.language, self.min_script_share))
        if self.keywords:
            filters.append(clean.without_keywords(self.keywords))
        return filters


@dataclass
class Size:
    """How much text: `bytes` is UTF-8."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0

    def add(self, text: str) -> None:
        self.documents += 1
        self.characters += len(text)
        self.bytes += len(text.encode())


@dataclass
class Counts:
    """What became of one source's records."""

    language: str | None
    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    train: Size = field(default_factory=Size)
    held_out: Size = field(default_factory=Size)


def document_text(record: Record) -> str:
    """All the text of a record; a chat's messages are joined by newlines."""
    if "messages" in record:
        return "\n".join(message["content"] for message in record["messages"])
    return record["text"]


def read_documents(folder: Path, part: Part, source: str) -> Iterator[Record]:
    """The documents that `build` wrote to `folder` for one part of one source."""
    with (folder / part / f"{source}.jsonl").open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def build(
    sources: Sequence[Source],
    out: Path,
    *,
    seed: int,
    held_out_documents: int = 500,
    held_out_bytes: int = 1_000_000,
    overlap_words: int | None = 13,
    overlap_share: float = 0.5,
    save_rejects: bool = False,
) -> dict[str, dict[str, Any]]:
    """Write the corpus into the folder `out`; return each source's counts, for the manifest.

    The held-out part of a source has at most `held_out_documents` and `held_out_bytes`. A training document
    that shares at least `overlap_share` of its runs of `overlap_words` words with a held-out document of any
    source is dropped, see `split.Overlap`; with None for `overlap_words` it stays.

    Raises CorpusError when a source has nothing to read, or nothing left for training.
    """
    _check_names(sources)
    for part in ("train", "held-out", *(["rejects"] if save_rejects else [])):
        (out / part).mkdir(parents=True, exist_ok=True)
    duplicates = clean.Duplicates()
    works = [_Work(source, out, save_rejects) for source in sources]
    for work in works:
        work.gather(duplicates, HeldOutChoice(seed, work.source.held_out, held_out_documents, held_out_bytes))
    overlap = None
    if overlap_words is not None:
        overlap = Overlap((text for work in works for text in work.held_out_texts()), overlap_words, overlap_share)
    for work in works:
        work.deal_out(overlap)
    return {work.source.name: asdict(work.counts) for work in works}


def _check_names(sources: Sequence[Source]) -> None:
    for name, number in Counter(source.name for source in sources).items():
        if number > 1 or not re.fullmatch(r"[\w.-]+", name):
            raise CorpusError(
                f"corpus source '{name}': names become file names; each must be its own, "
                "of letters, digits, '.', '-' and '_'"
            )


class _Work:
    """One source on its way through the two passes."""

    def __init__(self, source: Source, out: Path, save_rejects: bool) -> None:
        self.source = source
        self.counts = Counts(source.language)
        self._filters = source.filters()
        self._out = out
        self._spool = out / "train" / f"{source.name}.spool"
        self._held_out: set[int] = set()
        self._rejects = self._path("rejects") if save_rejects else Path(os.devnull)

    def _path(self, part: Part) -> Path:
        return self._out / part / f"{self.source.name}.jsonl"

    def gather(self, duplicates: clean.Duplicates, choice: HeldOutChoice) -> None:
        """First pass: spool what the filters keep, and choose what to hold out."""
        filters: list[clean.Filter] = [*self._filters, duplicates]
        kept = Size()
        with _writing(self._spool) as spool, _writing(self._rejects) as rejects:
            for raw in track(self.source.records(), f"reading {self.source.name}"):
                self.counts.read += 1
                record = _normalised(raw) | {"id": f"{self.source.name}#{self.counts.read}"}
                text = document_text(record)
                if reason := _fault(record) or clean.reason_to_drop(text, filters):
                    self._drop(record, reason, rejects)
                    continue
                choice.offer(kept.documents, text)
                kept.add(text)
                _write(record, spool)
                if self._enough(kept):
                    break
        self._held_out = choice.indices()
        self._require(kept)

    def _enough(self, kept: Size) -> bool:
        documents, size = self.source.limit_documents, self.source.limit_bytes
        return (documents is not None and kept.documents >= documents) or (size is not None and kept.bytes >= size)

    def held_out_texts(self) -> Iterator[str]:
        with self._spool.open(encoding="utf-8") as spool:
            for index, line in enumerate(spool):
                if index in self._held_out:
                    yield document_text(json.loads(line))

    def deal_out(self, overlap: Overlap | None) -> None:
        """Second pass: the spool becomes the held-out and the training documents."""
        with (
            self._spool.open(encoding="utf-8") as spool,
            _writing(self._path("train")) as train,
            _writing(self._path("held-out")) as held_out,
            self._rejects.open("a", encoding="utf-8") as rejects,
        ):
            for index, line in enumerate(track(spool, f"writing {self.source.name}")):
                record = json.loads(line)
                text = document_text(record)
                if index in self._held_out:
                    held_out.write(line)
                    self.counts.held_out.add(text)
                elif overlap is not None and overlap.found_in(text):
                    self._drop(record, OVERLAP, rejects)
                else:
                    train.write(line)
                    self.counts.train.add(text)
        self._spool.unlink()
        self._require(self.counts.train)

    def _drop(self, record: Record, reason: str, rejects: TextIO) -> None:
        self.counts.dropped[reason] = self.counts.dropped.get(reason, 0) + 1
        _write(record | {"reason": reason}, rejects)

    def _require(self, kept: Size) -> None:
        """Raise a CorpusError if nothing is left."""
        if kept.documents:
            return
        name, dropped = self.source.name, Counter(self.counts.dropped)
        if not dropped:
            raise CorpusError(f"corpus source '{name}': there is nothing in it; is it the right file?")
        top = dropped.most_common(1)[0][0]
        what = f"no text in '{self.source.language}'" if top == NOT_THE_LANGUAGE else "no text"
        counts = ", ".join(f"{number:,} {reason}" for reason, number in dropped.most_common())
        raise CorpusError(
            f"corpus source '{name}': {what} left of {self.counts.read:,} documents ({counts}); {CURES[top]}"
        )


def _normalised(record: Record) -> Record:
    if "messages" in record:
        messages = [
            {"role": message["role"], "content": clean.normalise(message["content"])} for message in record["messages"]
        ]
        return {"messages": messages}
    return {"text": clean.normalise(record["text"])}


def _fault(record: Record) -> str | None:
    """The reason why a record cannot be learnt from, whatever the filters."""
    if "messages" not in record:
        return clean.is_empty(record["text"])
    if not any(message["role"] == "assistant" for message in record["messages"]):
        return NO_ANSWER
    return next(filter(None, (clean.is_empty(message["content"]) for message in record["messages"])), None)


def _writing(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", newline="\n")


def _write(record: Record, file: TextIO) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
