"""What a person sees while long work goes on: a live bar on a terminal, plain lines elsewhere.

One process-wide console, used like tqdm: `for x in track(xs, "tokenizing"): …`, `say("done")`, or
`with bar("stage 1", total=1000, unit="tokens") as tick: tick(64, loss=2.3)`.
On a terminal rich draws the bar; otherwise one plain line is printed every `PLAIN_INTERVAL_S` seconds.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from lingraft.processes import rank

PLAIN_INTERVAL_S = 10.0
WIDE = 110  # columns of a terminal that has room for a long bar

T = TypeVar("T")


def say(message: str, style: str = "") -> None:
    """Print one line; `style` is a rich style and only shows on a terminal."""
    if rank():
        return
    if sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False).print(message, style=style or None, markup=False)
    else:
        print(message, flush=True)


Tick = Callable[..., None]


@contextmanager
def bar(description: str, total: float | None = None, unit: str = "", done: int = 0) -> Iterator[Tick]:
    """Yield `tick(n, **fields)`: advance by `n` units and show the fields (loss, lr, …) beside the bar.

    Args:
        done: units of an earlier start. The bar begins there; the rate counts what comes after.
    """
    if rank():
        yield lambda n=1, **fields: None
        return
    amount = _Amount(total, unit, done)
    with (_rich_bar if sys.stdout.isatty() else _plain_bar)(description, amount) as tick:
        yield tick


class _Amount:
    """How much of a piece of work is done, and how fast."""

    def __init__(self, total: float | None, unit: str, done: float) -> None:
        self.total, self.unit, self.done = total, unit, done
        self._first, self._start = done, time.monotonic()

    def line(self, fields: dict[str, Any]) -> str:
        """The most important first, since a narrow terminal cuts the end off."""
        rate = (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)
        parts = [f"{100 * self.done / self.total:3.0f} %" if self.total else f"{self.done:,.0f}"]
        if self.total and rate:
            parts.append(f"{timedelta(seconds=round((self.total - self.done) / rate))} left")
        parts += [
            f"{name} {value:#.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in fields.items()
        ]
        if self.unit and rate:
            parts.append(f"{rate:,.0f} {self.unit}/s")
        return "  ".join(parts)


@contextmanager
def _rich_bar(description: str, amount: _Amount) -> Iterator[Tick]:
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    width = 28 if shutil.get_terminal_size().columns >= WIDE else 10
    line = TextColumn(
        "{task.fields[line]}", style="dim", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
    )
    with Progress(TextColumn("  {task.description}"), BarColumn(width), line, transient=True, expand=True) as progress:
        task = progress.add_task(description, total=amount.total, completed=int(amount.done), line=amount.line({}))

        def tick(n: float = 1, **fields: Any) -> None:
            amount.done += n
            progress.update(task, advance=n, line=amount.line(fields))

        yield tick


@contextmanager
def _plain_bar(description: str, amount: _Amount) -> Iterator[Tick]:
    last = time.monotonic()

    def tick(n: float = 1, **fields: Any) -> None:
        nonlocal last
        amount.done += n
        if time.monotonic() - last >= PLAIN_INTERVAL_S:
            last = time.monotonic()
            print(f"  {description}  {amount.line(fields)}", flush=True)

    yield tick


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` with a bar that counts them."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with bar(description, total) as tick:
        for item in items:
            yield item
            tick(1)
