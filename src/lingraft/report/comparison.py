"""The page of a comparison of initial rows: bars at step 0 and after the short training, the best candidate first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lingraft.report.charts import (
    BAR_GAP,
    BAR_LEFT,
    BAR_NAME_HEIGHT,
    BAR_PITCH,
    BAR_RIGHT,
    BAR_WIDTH,
    Axis,
    Bar,
    BarChart,
    BarGroup,
    Tick,
    nice_ticks,
)
from lingraft.report.numbers import decimals, interval
from lingraft.report.page import publish, render_template

WHEN = {"start": "step 0", "end": "trained"}


def bits_chart(data: dict[str, Any], language: str, style: str) -> BarChart:
    """Two bars a candidate, pale at step 0 and strong after the training, with the intervals over documents."""
    measured = [[result[when][language] for when in WHEN] for result in data["results"]]
    largest = max(numbers["high"] or numbers["bits_per_byte"] for pair in measured for numbers in pair)
    ticks = nice_ticks(0, largest)
    axis = Axis(0, ticks[-1], BAR_LEFT, BAR_RIGHT)
    top = 0.0
    groups = []
    for rank, (result, pair) in enumerate(zip(data["results"], measured, strict=True), 1):
        bars = [
            Bar(
                style=f"{style} {shade}",
                y=top + BAR_NAME_HEIGHT + BAR_PITCH * place,
                end=axis.pixel(numbers["bits_per_byte"]),
                ends=axis.pixels((numbers["low"], numbers["high"])) if numbers["low"] is not None else None,
                label=decimals(numbers["bits_per_byte"]),
                title=f"{result['name']}, {when}: {decimals(numbers['bits_per_byte'])} bits per byte "
                f"{interval(numbers['low'], numbers['high'])}".rstrip(),
            )
            for place, (when, shade, numbers) in enumerate(zip(WHEN.values(), ("pale", "strong"), pair, strict=True))
        ]
        groups.append(BarGroup(f"{rank}. {result['name']}", top + 14, None, bars))
        top += BAR_NAME_HEIGHT + 2 * BAR_PITCH + BAR_GAP
    return BarChart(
        title=f"Bits per byte of held-out text: {language}",
        width=BAR_WIDTH,
        height=int(top + 22),
        left=BAR_LEFT,
        bottom=top,
        x_ticks=[Tick(axis.pixel(tick), f"{tick:g}") for tick in ticks],
        groups=groups,
    )


def render(data: dict[str, Any]) -> str:
    """The page as one HTML text; `data` is what `lingraft embeddings compare --json` prints."""
    measured = [language for language in data["languages"] if language in data["winner"]["end"]]
    charts = {
        language: bits_chart(data, language, style)
        for language, style in zip(measured, ("target", "old"), strict=False)
    }
    return render_template("comparison.html.j2", data=data, charts=charts)


def write(data: dict[str, Any], path: Path) -> None:
    """Render the page and publish it at `path`.

    Raises:
        RunError: the file can't be written.
    """
    publish(render(data), path)
