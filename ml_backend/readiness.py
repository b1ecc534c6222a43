"""What keeps this backend from being ready, which is more than being alive: model, Redis, a worker that reports.

A click needs the model alone. That corrections are taken in needs Redis and a worker, too; a backend without them would
look well and learn nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ml_backend.jobs import CORRECTIONS
from ml_backend.queues import look

if TYPE_CHECKING:
    from ml_backend.service import Service


def why_no_clicks(service: Service) -> list[str]:
    """Return what keeps clicks from being answered; empty: nothing does."""
    if service.failure is not None:
        return [f"the model could not be loaded: {service.failure}"]
    return [] if service.ready else ["the model is being loaded"]


def why_no_corrections(url: str | None, *, host: str | None = None) -> list[str]:
    """Return what keeps corrections from being taken in; empty: nothing does, or none are to be (no Redis is set up).

    Asks Redis, and waits less than a second for it.

    Args:
        url: of Redis.
        host: name of a machine or container that has to have a worker of its own; None: one anywhere.
    """
    if url is None:
        return []
    found = look(url)
    if found.error is not None:
        return [f"Redis: {found.error}"]
    wanted = (worker.alive and CORRECTIONS in worker.queues and host in (None, worker.host) for worker in found.workers)
    if any(wanted):
        return []
    where = "" if host is None else f" on {host}"
    return [f"no corrections worker{where} has reported lately; start one: python -m ml_backend worker"]
