"""What a person sees while long work goes on: a live bar on a terminal, plain lines elsewhere.

One process-wide console, used like tqdm: `for x in track(xs, "tokenizing"): …`, `say("done")`, or
`with bar("stage 1", total=1000, unit="tokens") as tick: tick(64, loss=2.3)`.
On a terminal rich draws the bar; otherwise one plain line is printed every `PLAIN_INTERVAL_S` seconds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

PLAIN_INTERVAL_S = 10.0

T = TypeVar("T")


def _main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(message: str, style: str = "") -> None:
    """Print one line; `style` is a rich style and only shows on a terminal."""
    if not _main_process():
        return
    if sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False).print(message, style=style or None, markup=False)
    else:
        print(message, flush=True)


def _describe(fields: dict[str, Any]) -> str:
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items())
    return "  ".join(shown)


Tick = Callable[..., None]


@contextmanager
def bar(description: str, total: float | None = None, unit: str = "") -> Iterator[Tick]:
    """Yield `tick(n, **fields)`: advance by `n` units and show the fields (loss, lr, …) beside the bar."""
    if not _main_process():
        yield lambda n=1, **fields: None
    elif sys.stdout.isatty():
        with _rich_bar(description, total, unit) as tick:
            yield tick
    else:
        with _plain_bar(description, total, unit) as tick:
            yield tick


@contextmanager
def _rich_bar(description: str, total: float | None, unit: str) -> Iterator[Tick]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}", style="cyan"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}", style="dim"),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(description, total=total, rate="", shown="")
        start = time.monotonic()
        done = 0.0

        def tick(n: float = 1, **fields: Any) -> None:
            nonlocal done
            done += n
            rate = done / max(time.monotonic() - start, 1e-9)
            shown = f"{rate:,.0f} {unit}/s" if unit else ""
            progress.update(task, advance=n, rate=shown, shown=_describe(fields))

        yield tick


@contextmanager
def _plain_bar(description: str, total: float | None, unit: str) -> Iterator[Tick]:
    start = last = time.monotonic()
    done = 0.0

    def tick(n: float = 1, **fields: Any) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last < PLAIN_INTERVAL_S:
            return
        last = now
        rate = done / max(now - start, 1e-9)
        parts = [f"  {description}"]
        if total:
            parts.append(f"{100 * done / total:.0f} %")
        if unit:
            parts.append(f"{rate:,.0f} {unit}/s")
        if total and rate:
            parts.append(f"{(total - done) / rate:.0f} s left")
        if fields:
            parts.append(_describe(fields))
        print("  ".join(parts), flush=True)

    yield tick


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` with a bar that counts them."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with bar(description, total) as tick:
        for item in items:
            yield item
            tick(1)
