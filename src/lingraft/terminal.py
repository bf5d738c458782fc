"""Results as plain text for a terminal: aligned columns, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = Sequence[str]


def table(rows: Sequence[Row], indent: str = "") -> str:
    """Rows of equally many cells in columns, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def before_after(entries: Sequence[dict[str, Any]]) -> str:
    """The base's measurements against the last ones."""
    first, last = entries[0], entries[-1]
    rows = [("", first["title"], last["title"])]
    for language in last["languages"]:
        before, after = (entry["languages"].get(language, {}) for entry in (first, last))
        for key in ("bits_per_byte", "tokens_per_character"):
            rows.append((f"{language} {key.replace('_', ' ')}", _number(before, key), _number(after, key)))
    for name in last["questions"]:
        before, after = (entry["questions"].get(name) for entry in (first, last))
        rows.append((f"{name} questions", _accuracy(before), _accuracy(after)))
    return table(rows)


def plan(data: dict[str, Any]) -> str:
    """What `lingraft plan` shows: the base, every step with its state, every stage with what it trains."""
    base = data["base"]
    size = f"size unknown ({base.get('unknown')})"
    if "parameters" in base:
        tied = "tied" if base["tied"] else "untied"
        size = f"{base['parameters']:,} parameters with the graft, {base['rows']:,} rows, {tied}"
    steps = [(step["state"], step["step"]) for step in data["steps"]]
    stages = [("", "stage", "trains", "lr", "length", "values that train", "memory at least")]
    for number, stage in enumerate(data["stages"], 1):
        chosen = {which.replace("_", " "): rows for which, rows in stage["train"].items() if rows != "none"}
        trains = ", ".join(f"{which} {rows}" for which, rows in chosen.items())
        length = f"{stage['tokens']:,} tokens" if stage["tokens"] else f"{stage['epochs']:g} epoch(s)"
        values, memory = "–", "–"
        if "trainable" in stage:
            values, memory = f"{stage['trainable']:,}", f"{stage['minimum_memory_gb']:.2f} GB"
        stages.append((str(number), stage["name"], trains, f"{stage['learning_rate']:g}", length, values, memory))
    head = [f"{data['name']} → {data['run']}", f"base {base['model']}: {size}", *data["notes"]]
    return "\n".join([*head, "", table(steps, "  "), "", table(stages, "  ")])


def status(data: dict[str, Any]) -> str:
    """What `lingraft status` shows: every step with its state and time, and the scoreboard so far."""
    steps = [
        (step["state"], step["step"], "" if step["seconds"] is None else f"{step['seconds']:.1f} s")
        for step in data["steps"]
    ]
    return "\n\n".join([table(steps), *([before_after(data["scoreboard"])] if data["scoreboard"] else [])])


def _number(measured: dict[str, Any], key: str) -> str:
    return f"{measured[key]:.3f}" if key in measured else "–"


def _accuracy(asked: dict[str, Any] | None) -> str:
    return f"{asked['accuracy']:.1%} [{asked['low']:.1%}, {asked['high']:.1%}]" if asked else "–"
