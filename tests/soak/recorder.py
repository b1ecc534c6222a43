"""What was asked, how long it took, and what went wrong; safe between threads."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from typing import Any

import numpy as np

Json = dict[str, Any]
_SHOWN = 40


class Recorder:
    """Seconds by kind of request, and errors as sentences."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._lock = threading.Lock()
        self._taken: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)  # when it began, how long it took
        self._errors: list[str] = []
        self._counts: Counter[str] = Counter()
        self._began_s = time.monotonic()

    def took(self, kind: str, seconds: float) -> None:
        """Note the time of a request that was answered."""
        with self._lock:
            self._taken[kind].append((time.monotonic() - self._began_s - seconds, seconds))

    def wrong(self, kind: str, sentence: str) -> None:
        """Note an error."""
        with self._lock:
            self._errors.append(f"{time.monotonic() - self._began_s:.1f} s, {kind}: {sentence[:300]}")

    def count(self, what: str, number: int = 1) -> None:
        """Count something else."""
        with self._lock:
            self._counts[what] += number

    def seconds(self, *kinds: str) -> list[float]:
        """Return the seconds of all requests of these kinds."""
        with self._lock:
            return [seconds for kind in kinds for _, seconds in self._taken[kind]]

    def slow(self, limit_s: float, *kinds: str) -> list[tuple[float, str, float]]:
        """Return when each request of these kinds began that took longer, s, its kind, and how long it took, s."""
        with self._lock:
            found = [
                (round(began_s, 1), kind, round(seconds, 2))
                for kind in kinds
                for began_s, seconds in self._taken[kind]
                if seconds > limit_s
            ]
        return sorted(found)

    def to_json(self) -> Json:
        """Return figures by kind, counts, and the first errors."""
        with self._lock:
            return {
                "errors": len(self._errors),
                "first_errors": self._errors[:_SHOWN],
                "counts": dict(sorted(self._counts.items())),
                "milliseconds": {
                    kind: percentiles([seconds for _, seconds in taken]) for kind, taken in sorted(self._taken.items())
                },
            }


def percentiles(seconds: list[float]) -> Json:
    """Return count, p50, p95, p99 and the longest, in ms.

    >>> percentiles([0.1, 0.1, 0.2])
    {'count': 3, 'p50': 100.0, 'p95': 190.0, 'p99': 198.0, 'longest': 200.0}
    """
    if not seconds:
        return {"count": 0}
    values = np.array(seconds) * 1000
    found = {f"p{p}": round(float(np.percentile(values, p)), 1) for p in (50, 95, 99)}
    return {"count": len(seconds), **found, "longest": round(float(values.max()), 1)}
