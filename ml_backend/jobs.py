"""Work that need not happen inside a request: rq queues on Redis, jobs that name their work, JSON arguments.

In this version one queue, `encode`: images of imported tasks are encoded ahead, so that the first click is warm.
Redis gone means only that images are encoded at their first click; no request waits for it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq import Queue, SimpleWorker
from rq.exceptions import DuplicateJobError
from rq.serializers import JSONSerializer

from ml_backend.images import TaskImage
from ml_backend.settings import Settings
from model.types import Refusal

if TYPE_CHECKING:  # a worker that waits shall not hold torch in memory
    from ml_backend.service import Service

log = logging.getLogger(__name__)

ENCODE = "encode"
_LIMIT_S = 120
_KEEP_FAILED_S = 600  # its id is taken as long, and the image not tried again


def connect(url: str) -> redis.Redis:
    """Return a client that gives up within a second, so that no request hangs on a lost Redis."""
    once = Retry(NoBackoff(), 0)  # the client's own default would wait and try again for seconds
    return redis.Redis.from_url(url, socket_connect_timeout=0.4, socket_timeout=0.4, retry=once)


def enqueue_encoding(connection: redis.Redis, images: Sequence[TaskImage]) -> None:
    """Queue images to be encoded, by one write however many they are.

    Raises:
        redis.RedisError: Redis cannot be reached.
    """
    pairs = [[image.task_id, image.uri] for image in images]
    _enqueue(
        Queue(ENCODE, connection=connection, serializer=JSONSerializer), spread, [pairs], f"spread-{_digest(pairs)}"
    )


def encode_later(service: Service, images: list[TaskImage]) -> int:
    """Have images encoded by the worker, or by this process where no Redis answers. Returns how many are queued."""
    settings = service.settings
    images = [image for image in images if image.uri[:5].lower() != "data:"]  # megabytes, and no fetch to spare
    if settings.redis_url is not None and settings.embedding_disk_mb:  # a worker hands over through files alone
        try:
            with connect(settings.redis_url) as connection:
                enqueue_encoding(connection, images)
            return len(images)
        except redis.RedisError as error:
            log.warning(
                "Redis does not answer (%s): images are encoded by this process, as many as it can queue", error
            )
    return sum(service.warm(image) for image in images)


def _enqueue(queue: Queue, function: Callable[..., None], args: Sequence[object], job_id: str) -> None:
    """Queue one job under an id that names its work; queued already is as good."""
    with contextlib.suppress(DuplicateJobError):
        queue.enqueue_call(
            function,
            args=list(args),
            job_id=job_id,
            unique=True,
            timeout=_LIMIT_S,
            result_ttl=0,
            failure_ttl=_KEEP_FAILED_S,
            description=job_id,
        )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def spread(pairs: list[tuple[int | None, str]]) -> None:
    """Queue one `encode` job for each image of an import."""
    url = Settings().redis_url
    assert url is not None, "a job runs where there is a Redis"
    with connect(url) as connection:
        queue = Queue(ENCODE, connection=connection, serializer=JSONSerializer)
        for task_id, uri in pairs:
            _enqueue(queue, encode, [task_id, uri], f"encode-{task_id}-{_digest(uri)}")


@functools.cache
def _service() -> Service:
    """The worker process's own service, loaded at its first job."""
    from ml_backend.service import Service

    return Service(Settings(adapter="none"))  # embeddings are the base's


def encode(task_id: int | None, uri: str) -> None:
    """Encode one task's image into the disk tier, where every web process finds it."""
    try:
        _service().encode_ahead(TaskImage(task_id, uri))
    except Refusal as refusal:  # a failed job would keep its id, and the image would not be tried again for a while
        log.warning("task %s is not encoded ahead: %s", task_id, refusal)


def work(settings: Settings, *, burst: bool = False) -> None:
    """Run jobs until stopped (or, with `burst`, until none is left), below everyone else's priority."""
    if settings.redis_url is None:
        raise SystemExit("GRACO_REDIS_URL is not set: 'python -m ml_backend run' starts a Redis and this worker itself")
    os.nice(19)
    connection = redis.Redis.from_url(settings.redis_url)
    try:
        worker = SimpleWorker(
            [Queue(ENCODE, connection=connection, serializer=JSONSerializer)],
            connection=connection,
            serializer=JSONSerializer,
        )
        worker.work(burst=burst, logging_level="WARNING")
    except redis.RedisError as error:
        raise SystemExit(f"Redis does not answer ({error}); the worker ends, and is started again by 'run'") from None
    if _service.cache_info().currsize:
        _service().close()
