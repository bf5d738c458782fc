"""Geometry of the charts: numbers in, pixel positions and labels out. `macros.html.j2` draws them as SVG.

Charts are drawn in a narrow viewBox (pixels at scale 1), so that their text stays readable when a phone shows
them at full width; wider pages put several side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

from lingraft.report.numbers import count, decimals, interval, is_number, percent, percent_interval

MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 44, 12, 12, 26
DODGE = 5.0  # pixels between lines at one step, so that whiskers don't hide each other
WIDE = 8  # values this many times apart get a logarithmic axis
MAX_STEP_LABELS = 10
MAX_LOSS_POINTS = 120
SOURCE_STYLES = tuple(f"{colour} dash{dash}" for dash in range(3) for colour in ("target", "old", "other"))
SHARE_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)

BAR_WIDTH, BAR_LEFT, BAR_RIGHT = 400, 4.0, 346.0  # the rest of the width is for the written values
BAR_NAME_HEIGHT, BAR_PITCH, BAR_GAP = 24.0, 17.0, 10.0

Ends = tuple[float, float]  # of an interval, low then high


@dataclass(frozen=True)
class Axis:
    """A linear map from values in [low, high] to pixels in [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def pixel(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def pixels(self, ends: Ends | None) -> Ends | None:
        return None if ends is None else (self.pixel(ends[0]), self.pixel(ends[1]))


@dataclass(frozen=True)
class Point:
    """A measured value, or a mark in pixels; `ends` are those of its interval, where it has one."""

    x: float
    y: float
    title: str
    ends: Ends | None = None


@dataclass(frozen=True)
class Series:
    """The points of one line; `style` is its CSS class: colour for the language, dash for the set.

    `marks` are points on the line that stand out, for lines of so many points that they get no dots."""

    name: str
    style: str
    points: list[Point]
    marks: list[Point] = field(default_factory=list)

    @property
    def path(self) -> str:
        """The SVG path through the points."""
        return "M" + "L".join(f"{point.x:.1f} {point.y:.1f}" for point in self.points)


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class LineChart:
    """A line chart in pixels; `left`, `right`, `top`, `bottom` bound the plotting area."""

    title: str
    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Series]
    logarithmic: bool = False


@dataclass(frozen=True)
class QuestionSet:
    """What is drawn of one set: `measured` holds (step's title, its numbers), in the steps' order."""

    name: str
    style: str
    measured: Sequence[tuple[str, dict]]


@dataclass(frozen=True)
class Bar:
    """One horizontal bar in pixels, with its written value."""

    style: str
    y: float
    end: float
    ends: Ends | None
    label: str
    title: str


@dataclass(frozen=True)
class BarGroup:
    """The bars of one question set: `top` is the baseline of its name, `chance` where guessing would end."""

    name: str
    top: float
    chance: float | None
    bars: list[Bar]


@dataclass(frozen=True)
class BarChart:
    title: str
    width: int
    height: int
    left: float
    bottom: float
    x_ticks: list[Tick]
    groups: list[BarGroup]


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """About `target` round numbers (steps of 1, 2 or 5 × a power of ten) that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / target))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= target)
    # The small shifts keep a bound that is a tick already from gaining another step by rounding.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def line_chart(
    title: str, series: Sequence[Series], step_labels: Sequence[str], *, as_percent: bool = False
) -> LineChart | None:
    """Values by step with whiskers, or None where nothing was measured.

    The points' x are indices into `step_labels`. With `as_percent` y is a share and its axis runs from 0 to
    100 %; otherwise values that lie a factor of `WIDE` or more apart get a logarithmic axis, since on a plain one the
    small ones could not be told from each other.
    """
    if not any(line.points for line in series):
        return None
    # Half a step of air on both sides keeps the first and last labels inside the picture.
    x_bounds = (-0.5, len(step_labels) - 0.5)
    stride = math.ceil(len(step_labels) / MAX_STEP_LABELS)
    x_ticks = [Tick(index, label) for index, label in enumerate(step_labels) if index % stride == 0]
    logarithmic = not as_percent and _is_wide(series)
    if as_percent:
        y_ticks = [Tick(share, percent(share, 0)) for share in SHARE_TICKS]
    elif logarithmic:
        y_ticks = _log_ticks(series)
        series = [_logarithm(line) for line in series]
    else:
        y_ticks = _number_ticks(series)
    chart = _draw(title, series, x_bounds, x_ticks, y_ticks, width=400, height=240, dodge=DODGE)
    return replace(chart, logarithmic=logarithmic)


def loss_chart(title: str, stage: Mapping[str, Any]) -> LineChart | None:
    """The loss curves of one stage on their own scale, or None where nothing finite was logged.

    `stage` holds "loss" and, where they were measured, "validation" as pairs of step and loss; "kept_step", which is
    marked, and "first_spikes", see `lingraft.steps.stage`.
    """
    points = [Point(x, loss, f"step {count(x)}: loss {decimals(loss)}") for x, loss in thin(stage.get("loss") or [])]
    if not points:
        return None
    spikes = [
        Point(
            s["step"], s["loss"], f"step {count(s['step'])}: loss {decimals(s['loss'])}, usual {decimals(s['usual'])}"
        )
        for s in stage.get("first_spikes") or []
    ]
    series = [Series("training", "loss", points, spikes)]
    validation = [
        Point(step, loss, f"after step {count(step)}: validation loss {decimals(loss)}")
        for step, loss in stage.get("validation") or []
    ]
    if validation:
        kept = [replace(p, title=f"{p.title}, kept") for p in validation if p.x == stage.get("kept_step")]
        series.append(Series("validation, the kept state marked", "validation", validation, kept))
    first, last = points[0].x, max(points[0].x + 1, *(p.x for line in series for p in (*line.points, *line.marks)))
    whole = (x for x in nice_ticks(first, last, 4) if first <= x <= last and x == int(x))
    x_ticks = [Tick(x, count(x)) for x in whole]
    return _draw(title, series, (first, last), x_ticks, _number_ticks(series), width=300, height=170, dodge=0)


def savings_chart(title: str, curves: Mapping[str, dict]) -> LineChart | None:
    """Share of tokens saved against slots spent, a line for each source with its knee marked; None without curves.

    Each curve holds "points", pairs of slots and share saved, and "knee", see `lingraft.tokenizer.economics`.
    """
    styles = cycle(SOURCE_STYLES)
    series = [_savings_series(name, next(styles), curve) for name, curve in curves.items()]
    if not series:
        return None
    last = max(line.points[-1].x for line in series)
    x_ticks = [Tick(x, count(x)) for x in nice_ticks(0, last, 4) if x <= last]
    tops = nice_ticks(0, max(max(point.y for line in series for point in line.points), 0.01))
    y_ticks = [Tick(share, percent(share, 0 if tops[1] >= 0.01 else 1)) for share in tops]
    return _draw(title, series, (0, last), x_ticks, y_ticks, width=560, height=280, dodge=0)


def _savings_series(name: str, style: str, curve: dict) -> Series:
    points = [
        Point(slots, saved, f"{name}, {count(slots)} slots: {percent(saved)} saved") for slots, saved in curve["points"]
    ]
    marks = []
    if bend := curve["knee"]:
        title = f"{name}, knee at {count(bend['slots'])} slots: {percent(bend['saved'])} saved"
        marks.append(Point(bend["slots"], bend["saved"], title))
    return Series(name, style, points, marks)


def _values(series: Sequence[Series]) -> list[float]:
    """Every value, mark and whisker end."""
    points = (point for line in series for point in (*line.points, *line.marks))
    return [value for point in points for value in (point.y, *(point.ends or ()))]


def _is_wide(series: Sequence[Series]) -> bool:
    return min(_values(series)) > 0 and max(_values(series)) >= WIDE * min(_values(series))


def _logarithm(line: Series) -> Series:
    return Series(line.name, line.style, [replace(p, y=math.log10(p.y), ends=_log_ends(p.ends)) for p in line.points])


def _log_ends(ends: Ends | None) -> Ends | None:
    return None if ends is None else (math.log10(ends[0]), math.log10(ends[1]))


def _log_ticks(series: Sequence[Series]) -> list[Tick]:
    """Ticks at 1, 2 and 5 times powers of ten, at the logarithm's place, around every value and whisker."""
    low, high = min(_values(series)), max(_values(series))
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    round_numbers = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first = max(n for n in round_numbers if n <= low)
    last = min(n for n in round_numbers if n >= high)
    return [Tick(math.log10(n), f"{n:g}") for n in round_numbers if first <= n <= last]


def _number_ticks(series: Sequence[Series]) -> list[Tick]:
    """Ticks around every value and whisker, with as many decimals as the step between them needs."""
    values = _values(series)
    ticks = nice_ticks(min(values), max(values))
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return [Tick(tick, decimals(tick, digits)) for tick in ticks]


def _draw(
    title: str,
    series: Sequence[Series],
    x_bounds: Ends,
    x_ticks: Sequence[Tick],
    y_ticks: Sequence[Tick],
    *,
    width: int,
    height: int,
    dodge: float,
) -> LineChart:
    """Everything from values to pixels; neighbouring lines stand `dodge` pixels apart."""
    left, right, top, bottom = MARGIN_LEFT, width - MARGIN_RIGHT, MARGIN_TOP, height - MARGIN_BOTTOM
    x_axis = Axis(*x_bounds, left, right)
    y_axis = Axis(y_ticks[0].at, y_ticks[-1].at, bottom, top)
    shown = [line for line in series if line.points]
    lines = []
    for index, line in enumerate(shown):
        shift = dodge * (index - (len(shown) - 1) / 2)
        points, marks = (
            [Point(x_axis.pixel(p.x) + shift, y_axis.pixel(p.y), p.title, y_axis.pixels(p.ends)) for p in of_line]
            for of_line in (line.points, line.marks)
        )
        lines.append(Series(line.name, line.style, points, marks))
    return LineChart(
        title=title,
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x_ticks=[Tick(x_axis.pixel(tick.at), tick.label) for tick in x_ticks],
        y_ticks=[Tick(y_axis.pixel(tick.at), tick.label) for tick in y_ticks],
        lines=lines,
    )


def thin(pairs: Sequence[Sequence[float]], limit: int = MAX_LOSS_POINTS) -> list[tuple[float, float]]:
    """(step, loss) pairs without NaN, averaged over equal runs of steps down to at most `limit` pairs."""
    finite = [(pair[0], pair[1]) for pair in pairs if is_number(pair[0]) and is_number(pair[1])]
    run = math.ceil(len(finite) / limit) or 1
    runs = [finite[start : start + run] for start in range(0, len(finite), run)]
    return [(sum(step for step, _ in r) / len(r), sum(loss for _, loss in r) / len(r)) for r in runs]


def _ends(numbers: dict) -> Ends | None:
    low, high = numbers.get("low"), numbers.get("high")
    return (low, high) if is_number(low) and is_number(high) else None


def bits_series(name: str, style: str, measured: Sequence[tuple[str, dict]]) -> Series:
    """Bits per byte of one language; `measured` holds each step's (title, numbers), {} where not measured."""
    points = []
    for index, (step, numbers) in enumerate(measured):
        value, ends = numbers.get("bits_per_byte"), _ends(numbers)
        if is_number(value):
            written = f" ({interval(*ends)})" if ends else ""
            points.append(Point(index, value, f"{step}, {name}: {decimals(value)}{written}", ends))
    return Series(name, style, points)


def _accuracy_title(name: str, step: str, numbers: dict) -> str:
    ends = _ends(numbers)
    written = f" ({percent_interval(*ends)})" if ends else ""
    of = f"{count(numbers.get('correct'))} of {count(numbers.get('total'))}"
    return f"{step}, {name}: {percent(numbers['accuracy'])}{written}, {of}"


def accuracy_series(questions: QuestionSet) -> Series:
    """Accuracy of one question set by step; steps at which it was not measured are left out."""
    points = [
        Point(index, numbers["accuracy"], _accuracy_title(questions.name, step, numbers), _ends(numbers))
        for index, (step, numbers) in enumerate(questions.measured)
        if is_number(numbers.get("accuracy"))
    ]
    return Series(questions.name, questions.style, points)


def bar_chart(title: str, sets: Sequence[QuestionSet]) -> BarChart | None:
    """Accuracy bars from 0 to 100 %, each set's last one strong, the others pale; None without sets."""
    if not sets:
        return None
    axis = Axis(0, 1, BAR_LEFT, BAR_RIGHT)
    top = 0.0
    groups = []
    for questions in sets:
        bars = []
        for index, (step, numbers) in enumerate(questions.measured):
            accuracy = numbers.get("accuracy")
            if not is_number(accuracy):
                continue
            shade = "strong" if index == len(questions.measured) - 1 else "pale"
            bars.append(
                Bar(
                    style=f"{questions.style} {shade}",
                    y=top + BAR_NAME_HEIGHT + BAR_PITCH * index,
                    end=axis.pixel(accuracy),
                    ends=axis.pixels(_ends(numbers)),
                    label=percent(accuracy),
                    title=_accuracy_title(questions.name, step, numbers),
                )
            )
        chance = questions.measured[-1][1].get("chance")
        groups.append(BarGroup(questions.name, top + 14, axis.pixel(chance) if is_number(chance) else None, bars))
        top += BAR_NAME_HEIGHT + BAR_PITCH * len(questions.measured) + BAR_GAP
    ticks = [Tick(axis.pixel(share), percent(share, 0)) for share in SHARE_TICKS]
    return BarChart(title, BAR_WIDTH, int(top + 22), BAR_LEFT, top, ticks, groups)
