"""When a training is due by rules, without anybody's wish. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class When:
    """What makes a training due beside somebody's wish."""

    after: int = 50  # new corrections; 0: never by their number
    every_h: float = 0.0  # hours since the last one, where there is a new correction; 0: never by time
    night_h: tuple[int, int] | None = None  # from, to in hours of the day, UTC: with new corrections, once a night


def due(when: When, *, new: int, last_s: float | None, now_s: float) -> str | None:
    """Return why a training is due, or None.

    Args:
        when: the rules.
        new: corrections that came after the last training's snapshot.
        last_s: when that training was asked for, UTC seconds; None: never.
        now_s: the time.

    >>> due(When(after=50), new=50, last_s=None, now_s=0.0)
    '50 new corrections'
    >>> due(When(after=50), new=49, last_s=None, now_s=0.0)
    """
    if new == 0:
        return None
    if when.after and new >= when.after:
        return f"{new} new corrections"
    if when.every_h and now_s - (last_s or 0.0) >= when.every_h * 3600:
        return f"{when.every_h:g} hours without a training, {new} new corrections"
    if when.night_h is not None and _night_began_s(when.night_h, now_s) > (last_s or 0.0):
        return f"the night has begun, {new} new corrections"
    return None


def _night_began_s(night_h: tuple[int, int], now_s: float) -> float:
    """Return when the night that is now began, UTC seconds, or 0 by day."""
    begin, end = night_h
    hour = datetime.fromtimestamp(now_s, UTC).hour
    into = (hour - begin) % 24
    if into >= (end - begin) % 24:
        return 0.0
    return now_s - now_s % 3600 - into * 3600
