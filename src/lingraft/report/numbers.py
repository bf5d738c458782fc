"""How numbers are written in the report. Whatever is missing, NaN or infinite is shown as a dash."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

MISSING = "–"
MINUS = "\u2212"
SPACE = "\u00a0"  # no-break space between a number and its unit


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite int or float; `None`, NaN, infinities and booleans are not numbers to show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def decimals(value: Any, digits: int = 3) -> str:
    """A fixed number of decimals: 1.0237 → "1.024"."""
    return f"{value:,.{digits}f}".replace("-", MINUS) if is_number(value) else MISSING


def count(value: Any) -> str:
    """A whole number with thousands separators: 1803000 → "1,803,000"."""
    return decimals(value, 0)


def percent(value: Any, digits: int = 1) -> str:
    """A share as a percentage: 0.783 → "78.3 %"."""
    return f"{decimals(100 * value, digits)}{SPACE}%" if is_number(value) else MISSING


def percent_interval(low: Any, high: Any, digits: int = 1) -> str:
    """The ends of an interval of shares, "72.1–83.5 %"; empty where there is none."""
    if not (is_number(low) and is_number(high)):
        return ""
    return f"{decimals(100 * low, digits)}–{percent(high, digits)}"


def interval(low: Any, high: Any, digits: int = 3) -> str:
    """The ends of an interval, "1.210–1.260"; empty where there is none."""
    if not (is_number(low) and is_number(high)):
        return ""
    return f"{decimals(low, digits)}–{decimals(high, digits)}"


def signed(value: Any, digits: int = 1, unit: str = "") -> str:
    """A change with its sign: −0.412 → "−0.4"; a change that rounds to zero has no sign."""
    if not is_number(value):
        return MISSING
    magnitude = f"{abs(value):,.{digits}f}"
    sign = "" if float(magnitude.replace(",", "")) == 0 else MINUS if value < 0 else "+"
    return f"{sign}{magnitude}{SPACE + unit if unit else ''}"


def relative_change(before: Any, after: Any) -> float | None:
    """(after − before) / before, or None where either is missing or `before` is 0."""
    if not (is_number(before) and is_number(after)) or before == 0:
        return None
    return (after - before) / before


def plain(value: Any) -> str:
    """A number of unknown kind, to four decimals without trailing zeros: 0.0204, 0.02, "1,500"."""
    text = decimals(value, 4)
    return text.rstrip("0").rstrip(".") if is_number(value) else text


def scientific(value: Any) -> str:
    """A learning rate: 0.0001 → "1e−4", 2.5e-05 → "2.5e−5"."""
    if not is_number(value):
        return MISSING
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}".replace("-", MINUS)


def duration(seconds: Any) -> str:
    """Seconds in the two units that matter: 391 → "6 min 31 s", 7500 → "2 h 5 min"."""
    if not is_number(seconds):
        return MISSING
    if 0 < seconds < 10:
        return f"{seconds:.1f}{SPACE}s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    rest = round(seconds)
    parts = []
    for unit, length in units:
        amount, rest = divmod(rest, length)
        if amount:
            parts.append(f"{amount}{SPACE}{unit}")
        elif parts:
            break
    return " ".join(parts[:2]) or f"0{SPACE}s"


def size(bytes_: Any) -> str:
    """Bytes in decimal units: 1234567 → "1.2 MB"."""
    if not is_number(bytes_):
        return MISSING
    amount = float(bytes_)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.{0 if unit == 'B' else 1}f}{SPACE}{unit}"
        amount /= 1000
    return f"{amount:,.1f}{SPACE}TB"
