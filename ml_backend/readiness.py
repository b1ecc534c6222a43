"""What keeps this backend from being ready, which is more than being alive: model, Redis, a worker that reports.

A click needs the model alone. That corrections are taken in needs Redis and a worker, too; a backend without them would
look well and learn nothing. A trainer that is missing keeps nobody from working: it is a note, no reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ml_backend.jobs import CORRECTIONS
from ml_backend.queues import RedisState
from ml_backend.trainings import TRAINING

if TYPE_CHECKING:
    from ml_backend.service import Service


def why_no_clicks(service: Service) -> list[str]:
    """Return what keeps clicks from being answered; empty: nothing does."""
    if service.failure is not None:
        return [f"the model could not be loaded: {service.failure}"]
    return [] if service.ready else ["the model is being loaded"]


def why_no_corrections(found: RedisState, *, host: str | None = None) -> list[str]:
    """Return what keeps corrections from being taken in; empty: nothing does.

    Args:
        found: what Redis knows (`queues.look`).
        host: name of a machine or container that has to have a worker of its own; None: one anywhere.
    """
    if found.error is not None:
        return [f"Redis: {found.error}"]
    if _works(found, CORRECTIONS, host):
        return []
    where = "" if host is None else f" on {host}"
    return [f"no corrections worker{where} has reported lately; start one: python -m ml_backend worker"]


def why_no_trainings(found: RedisState) -> list[str]:
    """Return what keeps trainings from being carried out; empty: nothing does. Clicks and corrections go on without."""
    if found.error is not None or _works(found, TRAINING):  # of a Redis that is gone the other says so
        return []
    return ["no trainer has reported lately, so nothing is learned; start one: python -m ml_backend trainer"]


def _works(found: RedisState, queue: str, host: str | None = None) -> bool:
    return any(worker.alive and queue in worker.queues and host in (None, worker.host) for worker in found.workers)
