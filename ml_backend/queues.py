"""What Redis knows of queues and workers, for people: one look, less than a second also where nothing answers."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import redis
from rq import Queue, Worker
from rq.serializers import JSONSerializer

from ml_backend.jobs import CORRECTIONS, ENCODE, connect
from ml_backend.trainings import TRAINING

_MOST_WORKERS = 100
FRESH_S = 480.0
"""A worker that said nothing for so long is dead; Redis forgets those that were killed earlier (jobs.run_worker)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """One queue."""

    name: str
    waiting: int
    running: int
    failed: int
    oldest_s: float | None  # since the first of those that wait was queued


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """One worker process."""

    name: str
    queues: tuple[str, ...]
    state: str  # idle, busy, ...
    silent_s: float | None  # since its last heartbeat
    job: str | None
    host: str = ""  # machine or container

    @property
    def alive(self) -> bool:
        """Whether it was heard of lately."""
        return self.silent_s is not None and self.silent_s < FRESH_S


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisState:
    """What one look found; `error` says why there is nothing else."""

    version: str | None = None
    error: str | None = None
    queues: tuple[QueueState, ...] = ()
    workers: tuple[WorkerState, ...] = ()


def look(url: str | None) -> RedisState:
    """Return how queues and workers are at the Redis of this address."""
    if url is None:
        return RedisState(error="none is set up (GRACO_REDIS_URL): nothing is learned, images are encoded when clicked")
    try:
        with connect(url) as connection:
            version = str(connection.info("server").get("redis_version", "unknown"))
            queues = tuple(_queue(connection, name) for name in (CORRECTIONS, ENCODE, TRAINING))
            return RedisState(version=version, queues=queues, workers=_workers(connection))
    except (redis.RedisError, OSError) as error:
        said = type(error).__name__  # its text may hold the address, and that a password
        return RedisState(error=f"it does not answer ({said}): corrections wait in the inbox, no training begins")


class RecentLook:
    """What `look` found, for whoever may ask as often as they like: however many do, one of them looks."""

    def __init__(self, url: str | None, *, keep_s: float) -> None:
        """Take the address of Redis and how long what was found holds good."""
        self._url = url
        self._keep_s = keep_s
        self._lock = threading.Lock()
        self._found: RedisState | None = None
        self._found_s = 0.0

    def get(self) -> RedisState:
        """Return how queues and workers are, or were `keep_s` ago at most."""
        with self._lock:
            if self._found is None or time.monotonic() - self._found_s >= self._keep_s:
                self._found = look(self._url)
                self._found_s = time.monotonic()
            return self._found


def _queue(connection: redis.Redis, name: str) -> QueueState:
    queue = Queue(name, connection=connection, serializer=JSONSerializer)
    oldest_s = None
    for job_id in queue.get_job_ids(0, 1):
        job = queue.fetch_job(job_id)
        if job is not None and (asked := job.enqueued_at or job.created_at) is not None:
            oldest_s = _since(asked)
    return QueueState(
        name=name,
        waiting=int(queue.count),
        running=int(queue.started_job_registry.get_job_count(cleanup=False)),
        failed=int(queue.failed_job_registry.get_job_count(cleanup=False)),
        oldest_s=oldest_s,
    )


def _workers(connection: redis.Redis) -> tuple[WorkerState, ...]:
    keys = sorted(Worker.all_keys(connection=connection))
    with connection.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.hmget(key, "queues", "state", "last_heartbeat", "current_job", "hostname")
        answers = pipeline.execute() if keys else []
    found = []
    known = [(key, values) for key, values in zip(keys, answers, strict=True) if any(values)]  # not killed ones' keys
    for key, values in known[:_MOST_WORKERS]:
        queues, state, beat, job, host = (None if value is None else value.decode() for value in values)
        found.append(
            WorkerState(
                name=key.removeprefix(Worker.redis_worker_namespace_prefix),
                queues=tuple((queues or "").split(",")),
                state=state or "unknown",
                silent_s=None if beat is None else _since(datetime.fromisoformat(beat)),
                job=job,
                host=host or "",
            )
        )
    return tuple(found)


def _since(moment: datetime) -> float:
    return max(0.0, time.time() - moment.replace(tzinfo=moment.tzinfo or UTC).timestamp())
