"""What checks report, and what they look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lingraft.doctor.folder import ModelFolder

Severity = Literal["fault", "warning", "note"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing found: what it is, where (a number, a name or an example), why it matters, how to mend it.

    A fault is wrong in itself; a warning is wrong unless it was meant; a note is for information.
    """

    severity: Severity
    what: str
    where: str
    why: str
    cure: str


@dataclass(frozen=True, kw_only=True)
class Finding(Problem):
    """A problem with the id of the check that found it."""

    id: str


@dataclass(frozen=True)
class Case:
    """The model to examine, the base it came from if that is known, and lines of text to try."""

    model: ModelFolder
    base: ModelFolder | None
    texts: Sequence[str]


def first(items: Sequence[object], limit: int = 3) -> str:
    """The first few items, and how many more there are.

    >>> first(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    shown = ", ".join(str(item) for item in items[:limit])
    return f"{shown} and {len(items) - limit:,} more" if len(items) > limit else shown


def short(text: str, limit: int = 60) -> str:
    """A text in quotes, cut to `limit` characters."""
    return repr(text if len(text) <= limit else text[:limit] + "…")
