"""Trainings from the outside: asked for by a button, a command or their rules; carried out by a worker of their own.

What was asked for is a file (`active_learning.status`) and stays until it has come to an end; rq only wakes the worker
up. So nothing is lost with Redis or with a process, and what was killed is queued again within a minute.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import time
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import redis
from rq import Queue, Worker
from rq.exceptions import DuplicateJobError, NoSuchJobError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from active_learning.corrections import CorrectionStore
from active_learning.status import TrainingFolder, TrainingStatus, lines_in
from ml_backend.settings import Settings
from model.types import Refusal

if TYPE_CHECKING:  # a worker that waits shall not hold torch in memory
    from active_learning.learn import LearningConfig

log = logging.getLogger(__name__)

TRAINING = "training"
_SPARE_S = 1800  # of a job beyond its training's own limit: encoding and judging
_TICK_S = 2.0
_DUE_S = 30.0  # between looks at the rules
_DEAD_S = 60.0  # without a sign of life
_MOST_ATTEMPTS = 40
_QUIET_S = 0.4  # without a click before training goes on
_LONGEST_PAUSE_S = 3.0  # of one step
_TO_END: tuple[JobStatus, ...] = (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED, JobStatus.CANCELED)


def line_of(settings: Settings, project: str | int) -> str:
    """Return the line of adapters that a project's corrections train."""
    from active_learning import registry

    return registry.line_of(project) if settings.adapter_line == "project" else registry.SHARED


def folder_of(settings: Settings, line: str) -> TrainingFolder:
    """Return the trainings of a line."""
    return TrainingFolder(settings.data_dir / "trainings", line)


def request(settings: Settings, line: str, reason: str) -> TrainingStatus:
    """Ask for a training, unless one of this line is pending, and return the one that is pending then.

    The worker looks every other second; no Redis is asked.
    """
    return folder_of(settings, line).ask(reason)


def enqueue(settings: Settings, connection: redis.Redis, status: TrainingStatus) -> None:
    """Queue the next attempt of a training, once.

    Raises:
        redis.RedisError: Redis cannot be reached.
    """
    queue = Queue(TRAINING, connection=connection, serializer=JSONSerializer)
    with contextlib.suppress(DuplicateJobError):
        queue.enqueue_call(
            train,
            args=[status.line],
            job_id=f"{status.id}-{status.attempts + 1}",
            unique=True,
            timeout=int(settings.train_limit_minutes * 60) + _SPARE_S,
            result_ttl=0,
            failure_ttl=600,
            description=status.id,
        )


def requeue(settings: Settings, connection: redis.Redis) -> list[TrainingStatus]:
    """Queue again what is asked for and nobody works on; return it.

    Raises:
        redis.RedisError: Redis cannot be reached.
    """
    again = []
    for line in lines_in(settings.data_dir / "trainings"):
        trainings = folder_of(settings, line)
        status = trainings.pending()
        if status is None or _alive(connection, status):
            continue
        with trainings.alone() as ours:
            if not ours:  # it runs, as the child of a worker that died
                continue
        if status.attempts >= _MOST_ATTEMPTS:
            trainings.end(status, "failed", f"its process died {status.attempts} times; see the worker's log")
            continue
        enqueue(settings, connection, status)
        again.append(status)
    return again


def _alive(connection: redis.Redis, status: TrainingStatus) -> bool:
    """Whether a job of this training waits or works."""
    try:
        job = Job.fetch(f"{status.id}-{status.attempts + 1}", connection=connection, serializer=JSONSerializer)
    except NoSuchJobError:
        try:
            job = Job.fetch(f"{status.id}-{status.attempts}", connection=connection, serializer=JSONSerializer)
        except NoSuchJobError:
            return False
    state = job.get_status()
    if state is JobStatus.STARTED:  # of a worker that was killed, it would stay so for minutes
        return time.time() - status.heard_s < _DEAD_S
    return state not in _TO_END


def ask_when_due(settings: Settings, store: CorrectionStore, *, now_s: float) -> list[TrainingStatus]:
    """Ask for the trainings that are due by their rules, and return them."""
    from active_learning.cycle import When, due, project_of

    night = settings.train_at_night
    when = When(
        after=settings.train_after,
        every_h=settings.train_every_hours,
        night_h=None if night is None else (int(night.partition("-")[0]), int(night.partition("-")[2])),
    )
    asked = []
    for line in {line_of(settings, project) for project in store.projects()}:
        last = folder_of(settings, line).status()
        last_s = None if last is None else last.asked_s
        reason = due(when, new=store.new_since(project_of(line), last_s or 0.0), last_s=last_s, now_s=now_s)
        if reason is not None and folder_of(settings, line).pending() is None:
            asked.append(request(settings, line, reason))
    return asked


def train(line: str) -> None:
    """Carry out what is asked for in a line; the job's function."""
    from active_learning.bundle import bundled_sets
    from active_learning.cycle import Limits, Workplace, run
    from active_learning.gate import Margins
    from active_learning.images import ImageStore
    from active_learning.registry import AdapterRegistry
    from ml_backend.service import ADAPTER, CLICKED, FAMILY, WEIGHTS, adapter_file
    from model.light.segmenter import LightSegmenter
    from model.segmenter import load_segmenter

    settings = Settings()
    trainings = folder_of(settings, line)
    with trainings.alone() as ours:
        status = trainings.pending()
        if not ours or status is None:
            return
        _take_in(settings, status)
        if settings.train_memory_mb:
            limit = settings.train_memory_mb * 2**20
            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
        segmenter = load_segmenter(
            FAMILY,
            WEIGHTS,
            device=settings.train_device,
            encoder=settings.encoder,
            threads=settings.train_threads or max(1, (os.cpu_count() or 2) // 2),
            compiled=settings.cache_dir,
        )
        assert isinstance(segmenter, LightSegmenter)
        data = settings.data_dir
        replay, reference = bundled_sets()
        store = CorrectionStore(data / "corrections.sqlite")
        try:
            ended = run(
                Workplace(
                    store=store,
                    images=ImageStore(data / "images"),
                    registry=AdapterRegistry(data / "adapters", base=segmenter.digest),
                    segmenter=segmenter,
                    embeddings=data / "embeddings",
                    configured=adapter_file(settings) or ADAPTER,
                    replay=replay,
                    reference=reference,
                ),
                trainings,
                status,
                config=_config(settings),
                margins=Margins(),
                limits=Limits(
                    time_s=settings.train_limit_minutes * 60,
                    device=settings.train_device,
                    too_few=settings.train_too_few,
                ),
                pause=Patience(data / CLICKED).wait,
            )
        finally:
            store.close()
    log.info("training %s: %s (%s)", ended.id, ended.state, ended.said)


def _take_in(settings: Settings, status: TrainingStatus) -> None:
    """Have everything in the ledger that was submitted: what webhooks lost, and what waits in the inbox."""
    from active_learning.cycle import project_of
    from ml_backend.ingest import open_intake
    from ml_backend.reconcile import reconcile, take_in

    intake = open_intake(settings)
    try:
        if settings.label_studio_url is not None and settings.label_studio_api_key is not None:
            project = project_of(status.line)
            try:
                reconcile(settings, intake, project=None if project is None else int(project))
            except Refusal as refusal:
                log.warning("training %s goes by what webhooks brought: %s", status.id, refusal)
        take_in(intake)
    finally:
        intake.close()


def _config(settings: Settings) -> LearningConfig:
    from active_learning.learn import LearningConfig

    if not settings.train_steps:
        return LearningConfig()
    return LearningConfig(fewest_steps=settings.train_steps, most_steps=settings.train_steps)


class Patience:
    """Waits while annotators click: the web process touches a file at each click."""

    def __init__(self, clicked: Path) -> None:
        """Name the file; where it is not there, nobody has clicked."""
        self._clicked = clicked

    def wait(self) -> None:
        """Return when no click came for a moment, or when this was long enough."""
        until_s = time.monotonic() + _LONGEST_PAUSE_S
        while time.monotonic() < until_s:
            try:
                quiet_s = time.time() - self._clicked.stat().st_mtime
            except OSError:
                return
            if not 0 <= quiet_s < _QUIET_S:
                return
            time.sleep(_QUIET_S - quiet_s + 0.01)


class _Worker(Worker):
    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Stop at once, also in mid-training: it goes on where it was when it is begun again."""
        if self.horse_pid:
            self.kill_horse()
        super().request_stop(signum, frame)  # type: ignore[no-untyped-call]


def work(settings: Settings, *, once: bool = False) -> None:
    """Carry out trainings one after another until stopped (or, with `once`, until none is asked for).

    Each runs in a process of its own, so that this one holds neither torch nor a GPU.
    """
    if settings.redis_url is None:
        raise SystemExit("GRACO_REDIS_URL is not set: 'python -m ml_backend run' starts a Redis and this worker itself")
    os.nice(19)
    connection = redis.Redis.from_url(settings.redis_url)
    looked_s = -float("inf")
    while True:
        try:
            if time.monotonic() - looked_s >= _DUE_S:
                looked_s = time.monotonic()
                with closing(CorrectionStore(settings.data_dir / "corrections.sqlite")) as store:
                    ask_when_due(settings, store, now_s=time.time())
            requeue(settings, connection)
            queue = Queue(TRAINING, connection=connection, serializer=JSONSerializer)
            if queue.count:
                worker = _Worker([queue], connection=connection, serializer=JSONSerializer)
                worker.work(burst=True, logging_level="WARNING")
            elif once:
                return
        except redis.RedisError as error:
            raise SystemExit(
                f"Redis does not answer ({error}); the trainer ends, and is started again by 'run'"
            ) from None
        time.sleep(_TICK_S)
