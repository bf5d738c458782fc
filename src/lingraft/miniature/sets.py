"""The miniature world as named sets of records: what a recipe means by `miniature: ko-text`.

English is the old language and holds every fact. Korean leaves a fifth of the facts out of all training text and
questions (`HIDDEN_SHARE`), so that questions on them in Korean measure what crossed over from English.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from lingraft.errors import CorpusError
from lingraft.miniature.questions import open_questions, questions
from lingraft.miniature.text import hidden_facts, paragraphs
from lingraft.miniature.world import load

HIDDEN_SHARE = 0.2
PARAGRAPHS_PER_CONDITION = 60
TRAIN_QUESTIONS = 6_000
OPEN_QUESTIONS = 4_000
EXAM_QUESTIONS = 300

Record = dict[str, Any]


def hidden() -> frozenset[tuple[str, str]]:
    """Facts that no Korean training record states."""
    return hidden_facts(HIDDEN_SHARE, seed=0)


def shown() -> list[tuple[str, str]]:
    """Facts that Korean training records state."""
    return sorted(set(load().facts()) - hidden())


SETS: dict[str, Callable[[int], Iterable[Record]]] = {
    "en-text": lambda seed: paragraphs("en", seed=seed, per_condition=PARAGRAPHS_PER_CONDITION),
    "ko-text": lambda seed: paragraphs("ko", seed=seed, per_condition=PARAGRAPHS_PER_CONDITION, hidden=hidden()),
    "en-questions": lambda seed: questions("en", seed=seed, count=TRAIN_QUESTIONS, part="train"),
    "ko-questions": lambda seed: questions("ko", seed=seed, count=TRAIN_QUESTIONS, part="train", facts=shown()),
    "en-open-questions": lambda seed: open_questions("en", seed=seed, count=OPEN_QUESTIONS),
    "ko-open-questions": lambda seed: open_questions("ko", seed=seed, count=OPEN_QUESTIONS, hidden=hidden()),
    "en-exam": lambda seed: questions("en", seed=seed, count=EXAM_QUESTIONS, part="test"),
    "ko-exam": lambda seed: questions("ko", seed=seed, count=EXAM_QUESTIONS, part="test"),
    "ko-exam-hidden-facts": lambda seed: questions(
        "ko", seed=seed, count=EXAM_QUESTIONS // 2, part="test", facts=sorted(hidden())
    ),
}


def records(name: str, seed: int, where: str) -> Iterator[Record]:
    """The records of the set `name`, the same for the same seed.

    Raises:
        CorpusError: an unknown set.
    """
    if name not in SETS:
        close = difflib.get_close_matches(name, SETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(SETS)}"
        raise CorpusError(f"{where}.miniature: unknown set {name!r}; {hint}")
    yield from SETS[name](seed)


def source_files() -> list[Path]:
    """The files that decide what the sets hold: their hashes stand for the sets in a run's manifests."""
    folder = Path(str(files("lingraft.miniature")))
    return sorted([*folder.glob("*.py"), *folder.glob("data/*.tsv")])
