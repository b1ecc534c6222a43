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
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._errors: list[str] = []
        self._counts: Counter[str] = Counter()
        self._began_s = time.monotonic()

    def took(self, kind: str, seconds: float) -> None:
        """Note the time of a request that was answered."""
        with self._lock:
            self._seconds[kind].append(seconds)

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
            return [taken for kind in kinds for taken in self._seconds[kind]]

    def to_json(self) -> Json:
        """Return figures by kind, counts, and the first errors."""
        with self._lock:
            return {
                "errors": len(self._errors),
                "first_errors": self._errors[:_SHOWN],
                "counts": dict(sorted(self._counts.items())),
                "milliseconds": {kind: percentiles(taken) for kind, taken in sorted(self._seconds.items())},
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
