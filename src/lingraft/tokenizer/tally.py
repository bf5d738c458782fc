"""Count the units of a stream of texts of any length: on all cores, in bounded memory, to the same result always.

1. Batches of texts go to processes, each with its own table. (A short stream never leaves this process.)
2. A table that outgrows its bound is written to disk in `PARTITIONS` parts, by its units' endings, and begun anew.
3. At the end part after part is read from all files and summed, and only the most frequent units stay in memory.

Tables are Arrow's: they take a tenth of a dictionary's memory, and equal strings are counted without making Python
objects. Counts are whole multiples of 2**-24, so sums are exact and do not depend on who counted what in which order.
"""

from __future__ import annotations

import multiprocessing
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lingraft.errors import TokenizerError
from lingraft.progress import bar, say
from lingraft.tokenizer.cut import Cutter

Batch = list[tuple[str, float]]

ONE = 1 << 24  # a count of 1.0
SCHEMA = pa.schema([("unit", pa.large_binary()), ("count", pa.int64())])
_EMPTY = pa.Table.from_batches([], SCHEMA)

# The larger, the fewer words come back in another batch and are counted again; a few must lie in memory.
BATCH_CHARACTERS = 4_000_000
# So many (a second of work) are counted before processes start, which would not pay for less.
ALONE_BATCHES = 5
# One process reads and hands out the texts; it has no work for more than this many.
MAX_WORKERS = 8
# A hundredth of all units lies in memory at once when files are summed.
PARTITIONS = 101


@dataclass(frozen=True)
class Counting:
    """What decides a count: how to cut, and NFC first or not."""

    cutter: Cutter
    nfc: bool


def available_cores() -> int:
    """Cores that this process may use, which in a container or under `taskset` are not all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tally(
    texts: Iterable[tuple[str, float]],
    counting: Counting,
    *,
    max_units: int,
    workers: int | None = None,
    folder: Path | None = None,
) -> dict[str, float]:
    """Units → weighted counts, the same (their order, too) for any number of workers.

    At most the `max_units` most frequent are kept; a line says what share of the text was left out. No tables
    together hold more than that either: the rest waits in a temporary folder inside `folder` (default: the
    system's), which is removed at the end and on failure. `workers` defaults to the available cores, at most 8.

    Raises TokenizerError when a process was killed, OSError when the disk is full.
    """
    workers = workers or min(available_cores(), MAX_WORKERS)
    with TemporaryDirectory(prefix="lingraft-counts-", dir=folder) as temporary:
        files = Path(temporary)
        table = Table(counting, max_units, files / "0")
        batches = _shown(_batches(texts))
        for batch in islice(batches, ALONE_BATCHES):
            table.add(batch)
        rest = next(batches, None)
        if rest is None and not table.files:
            return _as_dict(_most_frequent([table.take()], max_units))
        table.spill()
        if rest is not None:
            batches = chain([rest], batches)
            if workers > 1:
                table.files += _tally_in_processes(batches, counting, workers, max_units // workers, files)
            for batch in batches:
                table.add(batch)
            table.spill()
        return _as_dict(_most_frequent(_partitions(table.files), max_units).sort_by("unit"))


class Table:
    """Partial counts in memory, written to `<path>-<n>` whenever there are more than `max_units`."""

    def __init__(self, counting: Counting, max_units: int, path: Path) -> None:
        self.counting, self.max_units, self.path = counting, max_units, path
        self.files: list[Path] = []
        # Of chunks, which become units when they leave.
        self._rows = _EMPTY

    def add(self, batch: Batch) -> None:
        """Count a batch of weighted texts."""
        for weight, group in groupby(batch, key=itemgetter(1)):
            texts = [text for text, _ in group]
            if self.counting.nfc:
                texts = [unicodedata.normalize("NFC", text) for text in texts]
            self._rows = pa.concat_tables([self._rows, self._counted(texts, weight)])
        if len(self._rows) > self.max_units:
            self._rows = _summed(self._rows)
            # A table that stays more than half full would be summed over and over.
            if len(self._rows) > self.max_units / 2:
                self.spill()

    def _counted(self, texts: Sequence[str], weight: float) -> pa.Table:
        counted = pc.value_counts(self.counting.cutter.cut(texts))
        counts = pc.multiply_checked(counted.field("counts"), round(weight * ONE))
        return pa.table([counted.field("values"), counts], SCHEMA)

    def take(self) -> pa.Table:
        """The counts of distinct units; this table is empty afterwards."""
        rows, self._rows = _summed(self._rows), _EMPTY
        if not self.counting.cutter.cuts_units:
            chunks = dict(zip(_strings(rows), rows["count"].to_pylist(), strict=True))
            rows = _as_table(self.counting.cutter.units(chunks))
        return rows.filter(pc.not_equal(rows["unit"], b""))

    def spill(self) -> None:
        """Write the counts to a new file, a record batch for each partition, and begin anew."""
        rows = self.take().combine_chunks()
        path = self.path.with_name(f"{self.path.name}-{len(self.files)}")
        self.files.append(path)
        partition = _partition_of(rows["unit"])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for number in range(PARTITIONS):
                part = rows.take(np.flatnonzero(partition == number)).combine_chunks()
                writer.write_batch(pa.record_batch([column.combine_chunks() for column in part.columns], SCHEMA))


def _partition_of(units: pa.ChunkedArray) -> NDArray[np.int64]:
    """A number below `PARTITIONS` for each unit: its length and its last three bytes, hashed.

    Of a shorter unit some bytes count twice: those before it belong to its neighbour.
    """
    array = pa.concat_arrays(units.chunks) if units.num_chunks else pa.array([], pa.large_binary())
    _, offsets, content = array.buffers()
    bounds = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    letters = np.frombuffer(content or b"", np.uint8)
    lengths = np.diff(bounds)
    hashed = lengths.copy()
    for back, factor in ((1, 1), (2, 257), (3, 65_537)):
        hashed += factor * letters[bounds[1:] - np.minimum(back, lengths)].astype(np.int64)
    return hashed % PARTITIONS


def _summed(rows: pa.Table) -> pa.Table:
    """One row for each distinct string, in the order in which they first came."""
    if rows["unit"].num_chunks <= 1:
        return rows
    # Twice as fast as Arrow's own group_by.
    units = rows["unit"].combine_chunks().dictionary_encode()
    counts = np.zeros(len(units.dictionary), np.int64)
    np.add.at(counts, units.indices.to_numpy(), rows["count"].to_numpy())
    return pa.table([units.dictionary, counts], SCHEMA)


def _strings(rows: pa.Table) -> list[str]:
    return rows["unit"].cast(pa.large_string()).to_pylist()


def _as_table(units: Mapping[str, int]) -> pa.Table:
    columns = pa.array([unit.encode() for unit in units], pa.large_binary()), pa.array(units.values(), pa.int64())
    return pa.table(list(columns), SCHEMA)


def _as_dict(rows: pa.Table) -> dict[str, float]:
    return dict(zip(_strings(rows), (rows["count"].to_numpy() / ONE).tolist(), strict=True))


def _batches(texts: Iterable[tuple[str, float]]) -> Iterator[Batch]:
    batch: Batch = []
    characters = 0
    for text, weight in texts:
        batch.append((text, weight))
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _shown(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, with a bar that counts characters: a text each would cost more than counting it."""
    with bar("counting text", unit="characters") as tick:
        for batch in batches:
            yield batch
            tick(sum(len(text) for text, _ in batch))


# --- Processes: each has one table, which lives as long as it does.

_table: Table


def _start(counting: Counting, max_units: int, path: Path) -> None:
    global _table
    _table = Table(counting, max_units, path)


def _add(batch: Batch) -> None:
    _table.add(batch)


def _finish() -> list[Path]:
    _table.spill()
    return _table.files


def _tally_in_processes(
    batches: Iterator[Batch], counting: Counting, workers: int, max_units: int, folder: Path
) -> list[Path]:
    """Count the batches in `workers` processes; returns their files of partial counts."""
    # Forking would copy the locks of threads that tokenizers and torch may have started.
    context = multiprocessing.get_context("spawn")
    try:
        with ExitStack() as stack:
            # One executor a process, since only so can its table be asked for at the end.
            processes = [
                stack.enter_context(
                    ProcessPoolExecutor(1, context, _start, (counting, max_units, folder / str(number)))
                )
                for number in range(1, workers + 1)
            ]
            free = list(processes)
            busy: dict[Future[None], ProcessPoolExecutor] = {}
            for batch in batches:
                if not free:
                    for done in wait(busy, return_when=FIRST_COMPLETED).done:
                        done.result()
                        free.append(busy.pop(done))
                process = free.pop()
                busy[process.submit(_add, batch)] = process
            for future in busy:
                future.result()
            finishing = [process.submit(_finish) for process in processes]
            return [path for future in finishing for path in future.result()]
    except BrokenProcessPool as error:
        raise TokenizerError(
            "counting text: a worker process ended early; free some memory, count with one worker, and in a script of "
            'your own call lingraft under `if __name__ == "__main__":`'
        ) from error


# --- From files to the result


def _partitions(files: Sequence[Path]) -> Iterator[pa.Table]:
    """The counts of distinct units, a hundredth at a time."""
    for number in range(PARTITIONS):
        batches = [_read_batch(path, number) for path in files]
        yield _summed(pa.Table.from_batches(batches, SCHEMA))


def _read_batch(path: Path, number: int) -> pa.RecordBatch:
    with pa.OSFile(str(path), "rb") as source:
        return pa.ipc.open_file(source).get_batch(number)


def _most_frequent(tables: Iterable[pa.Table], limit: int) -> pa.Table:
    """The `limit` most frequent of all tables' units, fewer where more are equally frequent at the limit.

    The threshold, the count of the most frequent unit left out, only rises from table to table.
    """
    kept = _EMPTY
    threshold = number = 0
    size = 0.0
    for rows in tables:
        number += len(rows)
        size += _size(rows)
        kept = pa.concat_tables([kept, rows.filter(pc.greater(rows["count"], threshold))])
        if len(kept) > limit:
            threshold = int(np.partition(kept["count"].to_numpy(), -limit - 1)[-limit - 1])
            kept = kept.filter(pc.greater(kept["count"], threshold)).combine_chunks()
    if threshold:
        say(
            f"counted {number:,} different words; the {len(kept):,} that come over {threshold / ONE:,.6g} times stay, "
            f"the others, {1 - _size(kept) / size:.1%} of the text, are left out"
        )
    return kept


def _size(rows: pa.Table) -> float:
    """Weighted bytes of the text that the units make up."""
    return float(np.dot(pc.binary_length(rows["unit"]).to_numpy(), rows["count"].to_numpy() / ONE))
