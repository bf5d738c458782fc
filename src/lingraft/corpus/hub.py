"""Read data sets of the Hugging Face Hub as a stream, through `datasets`: no code of theirs is ever run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import httpx
from datasets import IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from lingraft.corpus.files import Row
from lingraft.corpus.records import Format, Record, columns_of, to_records
from lingraft.errors import CorpusError

# What `datasets` raises for names, splits, access, networks and damaged files (Arrow's are ValueErrors).
FAULTS = (DatasetsError, httpx.HTTPError, OSError, ValueError, RuntimeError)


def read_hub(
    dataset: str,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    column: str | Mapping[str, str] | None = None,
    format: Format | None = None,
    where: str,
) -> Iterator[Record]:
    """The records of a data set, in its order: see `hub_rows` and `records.to_records`."""
    columns = columns_of(column, where)
    rows = hub_rows(dataset, config=config, split=split, revision=revision, columns=columns, where=where)
    return to_records(rows, column=column, format=format, where=where)


def hub_rows(
    dataset: str,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    columns: Collection[str] | None = None,
    where: str,
) -> Iterator[Row]:
    """The rows of a data set of the Hub, or of a local folder in a form that `datasets` knows.

    `columns` are the only ones wanted, if known. Raises CorpusError when the data set is missing, gated or
    out of reach.
    """
    try:
        stream: IterableDataset = load_dataset(dataset, name=config, split=split, revision=revision, streaming=True)
        if columns and set(columns) <= set(stream.column_names or ()):
            stream = stream.select_columns(list(columns))
        for number, values in enumerate(stream, 1):
            yield Row(values, dataset, number)
    except FAULTS as error:
        raise CorpusError(_explanation(error, dataset, where)) from error


def _explanation(error: Exception, dataset: str, where: str) -> str:
    """One line: what went wrong, in the words of `datasets`, and the cure."""
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    if "gated" in reason:
        cure = f"accept its terms at https://huggingface.co/datasets/{dataset}, then run `hf auth login`"
    elif isinstance(error, DatasetNotFoundError):
        cure = "check the name and the revision; a private one needs `hf auth login`"
    elif isinstance(error, ConnectionError):
        cure = "connect to the network, or fetch it with `hf download` and name that folder as the path"
    elif "split" in reason or "onfig" in reason:
        cure = "name one of these"
    elif "scripts" in reason:
        cure = "lingraft runs no code of a data set: look for a Parquet copy of it, or convert it yourself"
    else:
        cure = "check the name, config, split and revision"
    return f"{where}: {dataset}: {reason}; {cure}"
