"""When a training is due by rules, without anybody's wish. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

_HOUR_S = 3600.0
_LONGEST_REST_H = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class When:
    """What makes a training due beside somebody's wish."""

    after: int = 50  # new corrections; 0: never by their number
    every_h: float = 0.0  # hours since the last one, or the first correction, where one is new; 0: never by time
    night_h: tuple[int, int] | None = None  # from, to in hours of the day, UTC: a thorough one, once a night


def due(when: When, *, new: int, first_s: float, last_s: float | None, now_s: float) -> str | None:
    """Return why a training is due, or None.

    Args:
        when: the rules.
        new: corrections that came after the snapshot of the last training that neither failed nor was cancelled.
        first_s: when the first correction came, UTC seconds.
        last_s: when that training was asked for; None: there was none.
        now_s: the time.

    >>> due(When(after=50), new=50, first_s=0.0, last_s=None, now_s=0.0)
    '50 new corrections'
    >>> due(When(after=50), new=49, first_s=0.0, last_s=None, now_s=0.0)
    """
    if new == 0:
        return None
    if when.after and new >= when.after:
        return f"{new} new corrections"
    if when.every_h and now_s - (first_s if last_s is None else last_s) >= when.every_h * _HOUR_S:
        return f"{when.every_h:g} hours without a training, {new} new corrections"
    return None


def due_at_night(when: When, *, new: int, last_s: float | None, now_s: float) -> str | None:
    """Return why a thorough training is due, or None.

    Args:
        when: the rules.
        new: corrections that came after the snapshot of the last thorough training that neither failed nor was
            cancelled, whether others learned from them or not.
        last_s: when that training was asked for, UTC seconds; None: there was none.
        now_s: the time.
    """
    if new and when.night_h is not None and _night_began_s(when.night_h, now_s) > (last_s or 0.0):
        return f"the night has begun, {new} corrections since the last thorough training"
    return None


def rest_s(failures: int) -> float:
    """Return the seconds without a training by rules after so many in a row that failed or were cancelled.

    An hour, twice as long after each further one, and a day at most: what is broken is not done again and again.

    >>> [rest_s(failures) / 3600 for failures in (0, 1, 2, 5, 6, 7)]
    [0.0, 1.0, 2.0, 16.0, 24.0, 24.0]
    """
    return min(2 ** (failures - 1), _LONGEST_REST_H) * _HOUR_S if failures else 0.0


def _night_began_s(night_h: tuple[int, int], now_s: float) -> float:
    """Return when the night that is now began, UTC seconds, or 0 by day."""
    begin, end = night_h
    hour = datetime.fromtimestamp(now_s, UTC).hour
    into = (hour - begin) % 24
    if into >= (end - begin) % 24:
        return 0.0
    return now_s - now_s % 3600 - into * 3600
