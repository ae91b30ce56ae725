"""Numbers and dates as people read them.

Contract: rounds and never computes; what is undefined is a dash.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from draftloop.reporting.figures import SuffixFigures

DASH = "–"  # noqa: RUF001
MINUS = "−"  # noqa: RUF001


def number(value: float | None, digits: int = 0) -> str:
    """`1,234.50`."""
    return DASH if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int) -> str:
    """With its sign, + included."""
    return DASH if value is None else f"{value:+,.{digits}f}".replace("-", MINUS)


def signed_percent(share: float | None, digits: int = 1) -> str:
    """A relative change: 0.123 is `+12.3 %`."""
    return DASH if share is None else f"{signed(100 * share, digits)} %"


def percent(share: float | None, digits: int = 0) -> str:
    """A share: 0.123 is `12 %`."""
    return DASH if share is None else f"{number(100 * share, digits)} %"


def count(value: int, noun: str) -> str:
    """`1 request`, `1,234 requests`."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def suffix_line(figures: SuffixFigures) -> str:
    """What suffix matches brought; "" where there was none."""
    if not figures.rounds:
        return ""
    kept = f"{figures.accepted_tokens:,} of {figures.drafted_tokens:,} proposed tokens kept"
    speed = number(figures.tokens_per_s, 1)
    return f"{kept}, {number(figures.tau, 2)} tokens a round, {speed} a second in them"


def when(unix_s: float) -> str:
    """`2026-11-23 14:05`, in the zone of this machine."""
    return f"{datetime.fromtimestamp(unix_s).astimezone():%Y-%m-%d %H:%M}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
