"""What the run changed: the before/after rows and the verdict, from the first and last measurement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lingraft.report.numbers import (
    MISSING,
    SPACE,
    decimals,
    interval,
    is_number,
    percent,
    percent_interval,
    relative_change,
    signed,
)

Judgement = Literal["better", "worse", "unclear", ""]
Tone = Literal["good", "bad", "neutral"]


@dataclass(frozen=True)
class Value:
    """A written number with its written interval and a remark, either possibly empty."""

    text: str
    interval: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Comparison:
    """One row of the before/after table. `judgement` is empty where there are no intervals to judge by."""

    measure: str
    unit: str
    before: Value
    after: Value
    change: str
    judgement: Judgement


@dataclass(frozen=True)
class Verdict:
    headline: str
    sentence: str
    tone: Tone


def language_name(data: dict, code: str) -> str:
    """The language's name where the run gives one, else its code."""
    return (data.get("language_names") or {}).get(code, code)


def language_codes(data: dict) -> list[str]:
    """The target language, the old one, then any other that was measured."""
    roles = data.get("languages") or {}
    codes = [roles[role] for role in ("target", "old") if roles.get(role)]
    measured = (code for entry in data.get("scoreboard") or [] for code in entry.get("languages") or {})
    return list(dict.fromkeys([*codes, *measured]))


def question_sets(data: dict) -> dict[str, str]:
    """Each question set's language, by the set's name; target-language sets first."""
    sets: dict[str, str] = {}
    for entry in data.get("scoreboard") or []:
        for name, numbers in (entry.get("questions") or {}).items():
            sets.setdefault(name, numbers.get("language", ""))
    order = language_codes(data)
    return dict(sorted(sets.items(), key=lambda item: order.index(item[1]) if item[1] in order else len(order)))


def set_title(name: str) -> str:
    """A question set's name for reading: "korean-unseen-facts" → "Korean unseen facts"."""
    words = name.replace("-", " ").replace("_", " ")
    return words[:1].upper() + words[1:]


def token_entries(compared: dict) -> dict[str, dict]:
    """Token savings by source; all together last, where there are several sources."""
    together = {"together": compared["together"]} if len(compared["sources"]) > 1 else {}
    return {**compared["sources"], **together}


def kept_loss(stage: dict) -> float | None:
    """The validation loss of the state that a stage ended with; None where it was not measured."""
    return dict(stage.get("validation") or []).get(stage.get("kept_step"))


def first_and_last(data: dict, part: str, key: str) -> tuple[dict, dict]:
    """The base's and the latest numbers of one language or question set; empty where it was not measured."""
    before, after = ((data["scoreboard"][end].get(part) or {}).get(key) or {} for end in (0, -1))
    return before, after


def judge(before: dict, after: dict, key: str, *, lower_is_better: bool) -> Judgement:
    """Better or worse only where the two intervals don't touch.

    Both measure the same texts or questions, so a paired test would see smaller changes: a cautious rule.
    """
    ends = [numbers.get(end) for numbers in (before, after) for end in ("low", "high")]
    if not all(is_number(value) for value in (*ends, before.get(key), after.get(key))):
        return ""
    if before["low"] <= after["high"] and after["low"] <= before["high"]:
        return "unclear"
    return "better" if (after[key] < before[key]) == lower_is_better else "worse"


def _judge_bits(before: dict, after: dict) -> Judgement:
    return judge(before, after, "bits_per_byte", lower_is_better=True)


def _bits_value(numbers: dict) -> Value:
    return Value(decimals(numbers.get("bits_per_byte")), interval(numbers.get("low"), numbers.get("high")))


def _bits_row(name: str, before: dict, after: dict) -> Comparison:
    change = relative_change(before.get("bits_per_byte"), after.get("bits_per_byte"))
    return Comparison(
        measure=f"{name} text",
        unit="bits per byte, lower is better",
        before=_bits_value(before),
        after=_bits_value(after),
        change=MISSING if change is None else signed(100 * change, 1, "%"),
        judgement=_judge_bits(before, after),
    )


def _questions_value(numbers: dict) -> Value:
    ends = percent_interval(numbers.get("low"), numbers.get("high"))
    return Value(percent(numbers.get("accuracy")), ends, "at chance" if numbers.get("at_chance") else "")


def _questions_row(name: str, before: dict, after: dict) -> Comparison:
    was, now = before.get("accuracy"), after.get("accuracy")
    chance = after.get("chance", before.get("chance"))
    return Comparison(
        measure=f"Questions: {set_title(name)}",
        unit="right answers" + (f", chance {percent(chance, 0)}" if is_number(chance) else ""),
        before=_questions_value(before),
        after=_questions_value(after),
        change=signed(100 * (now - was), 1, "points") if is_number(was) and is_number(now) else MISSING,
        judgement=judge(before, after, "accuracy", lower_is_better=False),
    )


def _tokens_row(name: str, before: dict, after: dict) -> Comparison:
    was, now = before.get("tokens_per_character"), after.get("tokens_per_character")
    change = relative_change(was, now)
    return Comparison(
        measure=f"{name} tokens",
        unit="per character",
        before=Value(decimals(was)),
        after=Value(decimals(now)),
        change=MISSING if change is None else f"×{SPACE}{decimals(1 + change, 2)}",
        judgement="",
    )


def comparisons(data: dict) -> list[Comparison]:
    """First against last measurement: bits per byte, accuracy, tokens; empty before two were taken."""
    if len(data.get("scoreboard") or []) < 2:
        return []
    languages = [(language_name(data, code), *first_and_last(data, "languages", code)) for code in language_codes(data)]
    sets = [(name, *first_and_last(data, "questions", name)) for name in question_sets(data)]
    return [
        *(_bits_row(*language) for language in languages),
        *(_questions_row(*questions) for questions in sets),
        *(_tokens_row(*language) for language in languages),
    ]


def _bits_clause(name: str, before: dict, after: dict) -> str:
    change = relative_change(before.get("bits_per_byte"), after.get("bits_per_byte"))
    if change is None:
        return ""
    held = ", within the confidence intervals" if _judge_bits(before, after) == "unclear" else ""
    return f"{name} text takes {percent(abs(change))} {'fewer' if change < 0 else 'more'} bits per byte{held}"


def _questions_clause(name: str, before: dict, after: dict) -> str:
    if not (is_number(before.get("accuracy")) and is_number(after.get("accuracy"))):
        return ""
    chance = " (at chance)" if after.get("at_chance") else ""
    return f"{set_title(name)} from {percent(before['accuracy'])} to {percent(after['accuracy'])}{chance}"


def _sentence(start: str, clauses: Iterable[str]) -> str:
    text = "; ".join(filter(None, clauses))
    return f"{start}{text}." if text else ""


def _headline(data: dict) -> tuple[str, Tone]:
    codes = language_codes(data)[:2]
    judged = [_judge_bits(*first_and_last(data, "languages", code)) for code in codes]
    if len(judged) < 2 or "" in judged:
        return "Measured, but without the intervals to judge a change by.", "neutral"
    target, old = (language_name(data, code) for code in codes)
    gain = {"better": "{} improved", "worse": "{} got worse", "unclear": "No clear change in {}"}[judged[0]]
    cost = {"better": "{} improved too", "worse": "{} got worse", "unclear": "{} held"}[judged[1]]
    tone: Tone = "bad" if "worse" in judged else "good" if judged[0] == "better" else "neutral"
    return f"{gain.format(target)}; {cost.format(old)}.", tone


def verdict(data: dict) -> Verdict:
    """A headline and a sentence or two that say what the numbers say, no more certainly than they do."""
    board = data.get("scoreboard") or []
    if not board:
        return Verdict("Nothing has been measured yet.", "The base model is scored first.", "neutral")
    if len(board) == 1:
        return Verdict("Only the base model has been measured so far.", "There is nothing to compare yet.", "neutral")
    codes, sets = language_codes(data), question_sets(data)
    bits = (_bits_clause(language_name(data, code), *first_and_last(data, "languages", code)) for code in codes)
    answers = (_questions_clause(name, *first_and_last(data, "questions", name)) for name in sets)
    sentence = " ".join(filter(None, (_sentence("", bits), _sentence("Right answers: ", answers))))
    if data.get("state") == "stopped by a gate":
        return Verdict("A gate stopped the run.", f"So far: {sentence}", "bad")
    if data.get("state") != "finished":
        return Verdict("The run has not finished.", f"So far: {sentence}", "neutral")
    headline, tone = _headline(data)
    return Verdict(headline, sentence, tone)
