"""How much one address, and one request, may ask for: far above what annotators do, far below what stops a server.

Each web process counts for itself, in memory, so that clicks do not wait for Redis.
"""

from __future__ import annotations

import threading
import time

from ml_backend.settings import Settings
from model.types import Refusal

FAILURES = 10
"""Wrong credentials of one kind that an address may try in a minute."""
MAX_RESULTS = 10_000
"""Results, of clicks and what is said of them, in the context of one prediction."""


_WINDOW_S = 60.0
_MOST_NAMES = 10_000  # counted until those whose minute is over are forgotten

Name = tuple[str, ...]


class _Counts:
    """How often each name was counted in the minute that began with its first time; used from many threads.

    By hand, since the `limits` package starts a thread at each request, which costs a click 2 ms.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[Name, tuple[float, int]] = {}  # when the minute ends, and how often
        self._clear_at = _MOST_NAMES

    def add(self, name: Name) -> int:
        """Count once more, and return how often by now."""
        now_s = time.monotonic()
        with self._lock:
            if len(self._counts) >= self._clear_at:
                self._counts = {one: found for one, found in self._counts.items() if found[0] > now_s}
                self._clear_at = max(_MOST_NAMES, 2 * len(self._counts))
            ends_s, count = self._counts.get(name, (0.0, 0))
            if ends_s <= now_s:
                ends_s, count = now_s + _WINDOW_S, 0
            self._counts[name] = ends_s, count + 1
            return count + 1

    def wait_s(self, name: Name, most: int) -> int:
        """Return for how many seconds more a name has been counted at least `most` times; 0: it has not."""
        with self._lock:
            ends_s, count = self._counts.get(name, (0.0, 0))
        left_s = ends_s - time.monotonic()
        return max(1, round(left_s)) if count >= most and left_s > 0 else 0


class Limits:
    """Counts of one web process; used from many threads."""

    def __init__(self, settings: Settings) -> None:
        """Begin with nothing counted."""
        self._per_minute = settings.requests_per_minute
        self._requests, self._failures = _Counts(), _Counts()

    def count_request(self, address: str) -> int:
        """Count a request; return 0, or the seconds to wait where it is one too many."""
        if not self._per_minute or self._requests.add((address,)) <= self._per_minute:
            return 0
        return max(1, self._requests.wait_s((address,), self._per_minute))

    def count_failure(self, address: str, kind: str) -> None:
        """Count wrong credentials."""
        self._failures.add((address, kind))

    def locked_s(self, address: str, kind: str) -> int:
        """Return for how many seconds an address may try no more credentials of a kind; 0: it may."""
        return self._failures.wait_s((address, kind), FAILURES)


def check_size(tasks: int, context: dict[str, object] | None, settings: Settings) -> None:
    """Refuse a prediction of so many tasks, or in answer to so many results, that others would wait for it.

    Raises:
        Refusal: it asks for too much.
    """
    if tasks > settings.request_max_tasks:
        raise Refusal(
            f"the request has {tasks} tasks, at most {settings.request_max_tasks} are answered at once; "
            "choose fewer in the data manager, or raise GRACO_REQUEST_MAX_TASKS"
        )
    results = (context or {}).get("result")
    if isinstance(results, list) and len(results) > MAX_RESULTS:
        raise Refusal(
            f"the request has {len(results)} results of clicks, at most {MAX_RESULTS} are read; accept or reject the "
            "suggestion, then click anew"
        )
