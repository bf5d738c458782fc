"""From the run's data to the page. Every string is escaped: model generations are untrusted text.

The page needs no network, no script and no other file; its Content-Security-Policy forbids them all.
"""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader

from lingraft.errors import RunError
from lingraft.report import charts, numbers, summary


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lingraft.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        # A run that was stopped or has not come far lacks many parts: shown as dashes, not as errors.
        undefined=ChainableUndefined,
        finalize=lambda value: numbers.MISSING if value is None else value,
    )
    environment.filters.update(
        count=numbers.count,
        decimals=numbers.decimals,
        duration=numbers.duration,
        moment=moment,
        percent=numbers.percent,
        piece=piece,
        plain=numbers.plain,
        scientific=numbers.scientific,
        size=numbers.size,
    )
    environment.globals.update(
        interval=numbers.interval,
        percent_interval=numbers.percent_interval,
        relative_change=numbers.relative_change,
        signed=numbers.signed,
        kept_loss=summary.kept_loss,
        set_title=summary.set_title,
    )
    return environment


def piece(text: str) -> str:
    """A token's text with its invisible characters made visible: spaces as ␣, line ends as ↵, tabs as ⇥."""
    return text.replace("▁", "␣").replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


def moment(text: str) -> str:
    """An ISO 8601 time as "2026-11-21 01:00 UTC"; times without a zone are UTC."""
    time = datetime.fromisoformat(text)
    return time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def step_labels(data: dict) -> list[str]:
    """Short axis labels of the scoreboard's steps: "base", "graft" if there was one, then 1, 2, …"""
    fixed = ["base", "graft"] if data.get("tokenizer") or data.get("embeddings") else ["base"]
    steps = len(data.get("scoreboard") or [])
    return [*fixed, *(str(stage) for stage in range(1, steps))][:steps]


def _styles(data: dict) -> dict[str, str]:
    """CSS class of each language's lines: the colour that it keeps through the page."""
    return dict(zip(summary.language_codes(data), ("target", "old", "other", "other"), strict=False))


def _set_styles(data: dict) -> dict[str, str]:
    """CSS classes of each question set: its language's colour, and a dash of its own within the language."""
    languages = _styles(data)
    seen: dict[str, int] = {}
    styles = {}
    for name, code in summary.question_sets(data).items():
        styles[name] = f"{languages.get(code, 'other')} dash{seen.setdefault(code, 0)}"
        seen[code] += 1
    return styles


def _charts(data: dict) -> dict[str, Any]:
    losses = [
        charts.loss_chart(f"{number}. {stage.get('title') or stage.get('name')}", stage)
        for number, stage in enumerate(data.get("stages") or [], start=1)
    ]
    board = data.get("scoreboard") or []
    always = {"losses": losses, "savings": _savings_chart(data)}
    if len(board) < 2:  # a line needs two points, a comparison two sides
        return always

    def over_steps(part: str, key: str) -> list[tuple[str, dict]]:
        return [(entry.get("title") or entry["step"], (entry.get(part) or {}).get(key) or {}) for entry in board]

    bits = [
        charts.bits_series(summary.language_name(data, code), style, over_steps("languages", code))
        for code, style in _styles(data).items()
    ]
    sets = [
        charts.QuestionSet(summary.set_title(name), style, over_steps("questions", name))
        for name, style in _set_styles(data).items()
    ]
    accuracy = [charts.accuracy_series(questions) for questions in sets]
    ends = [replace(questions, measured=[questions.measured[0], questions.measured[-1]]) for questions in sets]
    labels = step_labels(data)
    return always | {
        "bits": charts.line_chart("Bits per byte after each step", bits, labels),
        "accuracy": charts.line_chart("Right answers after each step", accuracy, labels, as_percent=True),
        "before_after": charts.bar_chart("Right answers, before and after", ends),
    }


def _savings_chart(data: dict) -> charts.LineChart | None:
    """The curve of each source, and of all together where there are several."""
    economics = (data.get("tokenizer") or {}).get("economics")
    if not economics:
        return None
    entries = summary.token_entries(economics["compared"])
    curves = {name: entry["curve"] for name, entry in entries.items() if entry["curve"]}
    return charts.savings_chart("Share of tokens saved by the slots spent", curves)


def _gates(data: dict) -> list[dict[str, Any]]:
    """Each gated step's title, outcome and checks by name."""
    return [
        {
            "title": entry.get("title") or entry.get("step"),
            "passed": entry["gate"]["passed"],
            "checks": {check["name"]: check for check in entry["gate"]["checks"]},
        }
        for entry in data.get("scoreboard") or []
        if entry.get("gate")
    ]


def _generations(data: dict) -> list[dict[str, Any]]:
    """By language: the checks before and after, and (prompt, text before, text after) of each sampled prompt.

    While only the base has been measured there is no "after".
    """
    board = data.get("scoreboard") or [{}]
    first = board[0].get("generations") or {}
    last = (board[-1].get("generations") or {}) if len(board) > 1 else {}
    found = []
    for code in summary.language_codes(data):
        before, after = first.get(code) or {}, last.get(code) or {}
        texts: dict[str, list[str | None]] = {}
        for position, side in enumerate((before, after)):
            for sample in side.get("samples") or []:
                texts.setdefault(sample["prompt"], [None, None])[position] = sample["text"]
        if before or after:
            samples = [(prompt, *pair) for prompt, pair in texts.items()]
            found.append({"code": code, "before": before, "after": after, "samples": samples})
    return found


def render(data: dict) -> str:
    """The whole page as one HTML text.

    `data` is the run's summary as JSON-like values; parts that a run doesn't have may be missing, empty or
    None.
    """
    gates = _gates(data)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=data,
            board=data.get("scoreboard") or [],
            names={code: summary.language_name(data, code) for code in summary.language_codes(data)},
            styles=_styles(data),
            sets=summary.question_sets(data),
            labels=step_labels(data),
            token_entries=summary.token_entries,
            comparisons=summary.comparisons(data),
            verdict=summary.verdict(data),
            charts=_charts(data),
            gates=gates,
            gate_checks=list(dict.fromkeys(name for gate in gates for name in gate["checks"])),
            generations=_generations(data),
        )
    )


def write(data: dict, path: Path) -> None:
    """Render the page and publish it at `path`. Raises RunError where the file can't be written."""
    publish(render(data), path)


def render_template(name: str, **values: Any) -> str:
    """A template of this folder with its values."""
    return _environment().get_template(name).render(**values)


def publish(text: str, path: Path) -> None:
    """Write a page: a reader sees the old one or the new one, never half of one.

    Raises RunError where the file can't be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunError(
            f"{path}: the report can't be written ({error.strerror}); "
            "check that its folder exists, is writable and has space, then run the same command again"
        ) from error
