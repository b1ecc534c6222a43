"""How much one address, and one request, may ask for: far above what annotators do, far below what stops a server.

Each web process counts for itself, in memory, so that clicks do not wait for Redis.
"""

from __future__ import annotations

import time

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from ml_backend.settings import Settings
from model.types import Refusal

FAILURES = 10
"""Wrong credentials of one kind that an address may try in a minute."""
MAX_RESULTS = 10_000
"""Results, of clicks and what is said of them, in the context of one prediction."""


class Limits:
    """Counts of one web process; used from many threads."""

    def __init__(self, settings: Settings) -> None:
        """Begin with nothing counted."""
        self._window = FixedWindowRateLimiter(MemoryStorage())
        per_minute = settings.requests_per_minute
        self._requests = RateLimitItemPerMinute(per_minute, namespace="requests") if per_minute else None
        self._failures = RateLimitItemPerMinute(FAILURES, namespace="failures")

    def count_request(self, address: str) -> int:
        """Count a request; return 0, or the seconds to wait where it is one too many."""
        if self._requests is None or self._window.hit(self._requests, address):
            return 0
        return self._wait_s(self._requests, address)

    def count_failure(self, address: str, kind: str) -> None:
        """Count wrong credentials."""
        self._window.hit(self._failures, address, kind)

    def locked_s(self, address: str, kind: str) -> int:
        """Return for how many seconds an address may try no more credentials of a kind; 0: it may."""
        return 0 if self._window.test(self._failures, address, kind) else self._wait_s(self._failures, address, kind)

    def _wait_s(self, item: RateLimitItem, *names: str) -> int:
        return max(1, round(self._window.get_window_stats(item, *names).reset_time - time.time()))


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
