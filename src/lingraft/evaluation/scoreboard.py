"""The scoreboard: one entry a stage, gates that compare it with the base, alarms about the evaluation itself.

Pure data, ready for JSON. An entry:

    {"step": "base", "title": "Base", "tokens_trained": 0,
     "languages": {"ko": {bits_per_byte's result, "unigram_bits_per_byte": …}, …},
     "questions": {"<set name>": multiple_choice's result without "answers", …},
     "generations": {"ko": generate_checks's result, …},
     "gate": null or {"passed": true, "checks": gate_checks's result},
     "seconds": 3.2}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lingraft.errors import RecipeError
from lingraft.languages import language_code, language_of

Entry = dict[str, Any]

METRICS = ("bpb_rise", "accuracy_drop")


def build_entry(
    *,
    step: str,
    title: str,
    tokens_trained: int,
    languages: Mapping[str, Mapping[str, Any]],
    questions: Mapping[str, Mapping[str, Any]],
    generations: Mapping[str, Mapping[str, Any]],
    seconds: float,
) -> Entry:
    """Put one step's measurements together, not yet judged by a gate.

    `languages` and `generations` are keyed by language code, `questions` by set name. `seconds` is what
    measuring took.
    """
    return {
        "step": step,
        "title": title,
        "tokens_trained": tokens_trained,
        "languages": {code: dict(measured) for code, measured in languages.items()},
        "questions": {
            name: {key: value for key, value in result.items() if key != "answers"}
            for name, result in questions.items()
        },
        "generations": {code: dict(measured) for code, measured in generations.items()},
        "gate": None,
        "seconds": seconds,
    }


def parse_limit(name: str) -> tuple[str, str]:
    """(language code, metric) of a limit: "english_bpb_rise" and "en_bpb_rise" are ("en", "bpb_rise").

    Raises RecipeError for a name that ends in no known metric; the run may still not know the language.
    """
    for metric in METRICS:
        if name.endswith(f"_{metric}"):
            return language_code(name.removesuffix(f"_{metric}")), metric
    raise RecipeError(
        f"gate {name!r} is unknown; a gate is <language>_bpb_rise or <language>_accuracy_drop, "
        "for example english_bpb_rise: 0.02"
    )


def gate_checks(entry: Entry, base_entry: Entry, limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """Compare an entry with the base's: one check (name, language, metric, value, limit, passed) a limit.

    `<language>_bpb_rise` is the relative rise of bits per byte (0.02 is 2 %), `<language>_accuracy_drop` the
    absolute drop of accuracy over all the language's questions. A value that is not a number fails. Raises
    RecipeError for an unknown limit and for one whose language was not measured.
    """
    checks = []
    for name, limit in limits.items():
        language, metric = parse_limit(name)
        if metric == "bpb_rise":
            value = _bits_per_byte(entry, language, name) / _bits_per_byte(base_entry, language, name) - 1
        else:
            value = _accuracy(base_entry, language, name) - _accuracy(entry, language, name)
        checks.append(
            {
                "name": name,
                "language": language,
                "metric": metric,
                "value": value,
                "limit": limit,
                "passed": value <= limit,
            }
        )
    return checks


def alarms(base_entry: Entry, old_language: str) -> list[str]:
    """One line for each question set on which the base does no better than guessing.

    A base that guesses in the language it was trained on says more about the evaluation than about the base.
    """
    lines = []
    for name, result in base_entry["questions"].items():
        if result["low"] > result["chance"]:
            continue
        position = "at" if result["at_chance"] else "below"
        numbers = (
            f"{result['accuracy']:.1%} of {result['total']}, interval {result['low']:.1%} to "
            f"{result['high']:.1%}, chance {result['chance']:.1%}"
        )
        if result["language"] == old_language:
            lines.append(
                f"alarm: the base answers {name} {position} chance ({numbers}): the evaluation or the base "
                "is broken; check the prompt format and the answer key"
            )
        else:
            lines.append(
                f"note: base {position} chance on {name} ({numbers}), expected if the base never met "
                f"{language_of(result['language']).name}; if it is published as "
                "knowing it, check the evaluation"
            )
    return lines


def _bits_per_byte(entry: Entry, language: str, limit_name: str) -> float:
    if language not in entry["languages"]:
        raise RecipeError(
            f"gate {limit_name!r}: no {language_of(language).name} text was measured; "
            "add held-out text in that language to the evaluation or remove the gate"
        )
    return entry["languages"][language]["bits_per_byte"]


def _accuracy(entry: Entry, language: str, limit_name: str) -> float:
    """Accuracy over all questions of a language: the sets' mean, weighted by their totals."""
    results = [result for result in entry["questions"].values() if result["language"] == language]
    if not results:
        raise RecipeError(
            f"gate {limit_name!r}: no {language_of(language).name} questions were measured; "
            "add a question set in that language to the evaluation or remove the gate"
        )
    return sum(result["correct"] for result in results) / sum(result["total"] for result in results)
