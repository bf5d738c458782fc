"""The fact table: conditions and the terms that they refer to, in English and Korean.

`data/terms.tsv` holds every body part, symptom, cause, treatment and specialist once, with its translation
and the terms of its kind that overlap with it (penicillin is an antibiotic: neither is a fair wrong answer
where the other is right). `data/conditions.tsv` refers to the terms by their English names, which serve as
keys everywhere.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

Language = Literal["en", "ko"]
Fact = tuple[str, str]
"""A condition's English name and an attribute."""

ATTRIBUTES = ("body_part", "symptom", "cause", "treatment", "specialist")
"""What is known of each condition; also the kinds of terms."""


@dataclass(frozen=True)
class Term:
    """One thing with its two names; `overlaps` names terms that can be right where this one is."""

    kind: str
    en: str
    ko: str
    overlaps: frozenset[str]


@dataclass(frozen=True)
class Condition:
    """One row of the fact table; every field but `ko` is English, a key into the terms."""

    en: str
    ko: str
    body_part: str
    symptoms: tuple[str, str]
    cause: str
    treatment: str
    specialist: str

    def values(self, attribute: str) -> tuple[str, ...]:
        """Return the English names of the attribute's values: two for symptom, one for the others."""
        return self.symptoms if attribute == "symptom" else (getattr(self, attribute),)


@dataclass(frozen=True)
class World:
    """All facts. `terms` and `conditions` are keyed by English name and in the order of the files."""

    terms: dict[str, Term]
    conditions: dict[str, Condition]

    def name(self, english: str, language: Language) -> str:
        """Return the name of a term or condition in `language`."""
        entry = self.conditions.get(english) or self.terms[english]
        return entry.en if language == "en" else entry.ko

    def kind(self, kind: str) -> list[str]:
        """Return the English names of all terms of a kind."""
        return [term.en for term in self.terms.values() if term.kind == kind]

    def sharing(self, attribute: str, value: str) -> list[str]:
        """Return the English names of the conditions that have `value` as (one of) their `attribute`."""
        return [c.en for c in self.conditions.values() if value in c.values(attribute)]

    def overlap(self, a: str, b: str) -> bool:
        """Return whether one of two terms of a kind is no fair wrong answer where the other is right."""
        return b in self.terms[a].overlaps or a in self.terms[b].overlaps

    def facts(self) -> Iterator[Fact]:
        """Yield every (condition, attribute), in the order of the table."""
        for condition in self.conditions:
            for attribute in ATTRIBUTES:
                yield condition, attribute


def _rows(name: str) -> list[dict[str, str]]:
    text = files("lingraft.miniature").joinpath("data", name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


def _term(row: dict[str, str]) -> Term:
    overlaps = frozenset(filter(None, row.pop("overlaps").split(";")))
    return Term(**row, overlaps=overlaps)


def _condition(row: dict[str, str]) -> Condition:
    symptoms = (row.pop("symptom_1"), row.pop("symptom_2"))
    return Condition(**row, symptoms=symptoms)


@cache
def load() -> World:
    """Return the world, read once."""
    terms = {row["en"]: _term(row) for row in _rows("terms.tsv")}
    conditions = {row["en"]: _condition(row) for row in _rows("conditions.tsv")}
    return World(terms, conditions)


def dictionary() -> list[tuple[str, str]]:
    """Return the (Korean, English) names of all terms and conditions."""
    world = load()
    terms = [(term.ko, term.en) for term in world.terms.values()]
    return terms + [(condition.ko, condition.en) for condition in world.conditions.values()]
