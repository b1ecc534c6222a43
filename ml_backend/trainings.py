"""Trainings from the outside: asked for by a button, a command or their rules; carried out by a worker of their own.

What was asked for is a file (`active_learning.status`) and stays until it has come to an end; rq only wakes the worker
up. So nothing is lost with Redis or with a process, and what was killed is queued again within a minute.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import math
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil
import redis
from rq import Queue, Worker
from rq.exceptions import DuplicateJobError, StopRequested
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.worker import WorkerStatus

from active_learning import lines
from active_learning.corrections import CorrectionStore
from active_learning.rules import When, due, due_at_night, rest_s
from active_learning.status import ENDED, SETTLED, TrainingFolder, TrainingStatus, lines_in
from ml_backend import logs
from ml_backend.scoring import ask_for_lines_scores
from ml_backend.settings import Settings
from model.types import Refusal

if TYPE_CHECKING:  # a worker that waits shall not hold torch in memory
    from active_learning.learn import LearningConfig

log = logging.getLogger(__name__)

TRAINING = "training"
_SPARE_S = 1800  # of a job beyond its training's own limit: encoding and judging
_PR_SET_PDEATHSIG = 1
_TICK_S = 2.0
_WORKER_TTL_S = 45  # one that was killed is forgotten a minute after
_DUE_S = 30.0  # between looks at the rules
_BEGINS_S = 60.0  # from a job's start until it has locked its line
_MOST_ATTEMPTS = 40  # processes that were killed
_MOST_ERRORS = 3
_ROOM_MB = 128  # that the disk has to spare for checkpoints and a version, thrice their size
_ASKS, _ASKS_AGAIN_S = 5, 0.1
_FULL_S = 30.0
_QUIET_S = 0.4  # without a click before training goes on
_LONGEST_PAUSE_S = 3.0  # of one step
_ALONE_S = 10.0  # without a click until a training takes more than half of the cores
_LOOK_S = 5.0  # between looks at what others compute
_BUSY = 0.5  # cores that others use, from which on it takes half of them
_MOST_ALONE = 4  # threads of a training that is alone; more were not tried, unless they are half of the cores


def line_of(settings: Settings, project: str | int) -> str:
    """Return the line of adapters that a project's corrections train."""
    return lines.line_of(project) if settings.adapter_line == "project" else lines.SHARED


def folder_of(settings: Settings, line: str) -> TrainingFolder:
    """Return the trainings of a line."""
    return TrainingFolder(settings.shared / "trainings", line)


def request(settings: Settings, line: str, reason: str, *, thorough: bool = False) -> TrainingStatus:
    """Ask for a training, unless one of this line is pending, and return the one that is pending then.

    The worker looks every other second; no Redis is asked.

    Raises:
        Refusal: the one that is pending was cancelled, and has not come to its end yet.
    """
    trainings = folder_of(settings, line)
    for _ in range(_ASKS):  # who looks whether one is worked on holds it for a moment, too
        status = trainings.ask(reason, thorough=thorough)
        if not trainings.cancelled:
            return status
        time.sleep(_ASKS_AGAIN_S)
    raise Refusal(f"{status.id} was cancelled and ends at its next step; ask again in a moment")


def cancel(settings: Settings, line: str) -> tuple[TrainingStatus, bool] | None:
    """Have the pending training of a line stop; return it, and whether it ended at once as nobody works on it.

    None: nothing is pending.
    """
    trainings = folder_of(settings, line)
    status = trainings.cancel()
    return None if status is None else (status, trainings.end_cancelled())


def requeue(settings: Settings, connection: redis.Redis) -> list[TrainingStatus]:
    """Queue what is asked for and nobody works on; return it.

    Raises:
        redis.RedisError: Redis cannot be reached.
    """
    queued = []
    queue = Queue(TRAINING, connection=connection, serializer=JSONSerializer)
    for line in lines_in(settings.shared / "trainings"):
        trainings = folder_of(settings, line)
        status = trainings.pending()
        if status is None or trainings.locked:  # it runs, perhaps as the child of a worker that died
            continue
        with contextlib.suppress(OSError):  # no room to write that it ended: the next look does
            if trainings.end_cancelled():
                continue
        if lacks_room(settings):
            if status.said != _waits(settings):
                log.error("training %s %s", status.id, _waits(settings))
                with contextlib.suppress(OSError):
                    trainings.note(status, state="queued", said=_waits(settings))
            continue
        if status.attempts >= _MOST_ATTEMPTS:
            trainings.end(status, "failed", f"its process died {status.attempts} times; see the trainer's log")
            continue
        job_id = f"{status.id}-{status.attempts + 1}"
        if job_id in queue.get_job_ids() or _is_beginning(queue, job_id):
            continue
        if (old := queue.fetch_job(job_id)) is not None:  # of a worker that was killed, or it failed before it began
            old.delete()
        _enqueue(settings, queue, status.line, job_id)
        queued.append(status)
    return queued


def _is_beginning(queue: Queue, job_id: str) -> bool:
    """Whether a worker has taken a job just now, and may be about to lock its line."""
    job = queue.fetch_job(job_id)
    if job is None or job.get_status(refresh=False) is not JobStatus.STARTED or job.started_at is None:
        return False
    return time.time() - job.started_at.timestamp() < _BEGINS_S


def _enqueue(settings: Settings, queue: Queue, line: str, job_id: str) -> None:
    with contextlib.suppress(DuplicateJobError):
        queue.enqueue_call(
            train,
            args=[line],
            job_id=job_id,
            unique=True,
            timeout=int(settings.train_limit_minutes * 60) + _SPARE_S,
            result_ttl=0,
            failure_ttl=600,
            description=job_id,
        )


def ask_when_due(settings: Settings, store: CorrectionStore, *, now_s: float) -> list[TrainingStatus]:
    """Ask for the trainings that are due by their rules, and return them."""
    night = settings.train_at_night
    when = When(
        after=settings.train_after,
        every_h=settings.train_every_hours,
        night_h=None if night is None else (int(night.partition("-")[0]), int(night.partition("-")[2])),
    )
    asked = []
    for line in {line_of(settings, project) for project in store.projects()}:
        trainings = folder_of(settings, line)
        if trainings.pending() is None and (found := _why_due(when, store, trainings, now_s)) is not None:
            reason, thorough = found
            with contextlib.suppress(Refusal):  # somebody asked and cancelled just now
                asked.append(request(settings, line, reason, thorough=thorough))
    return asked


def _why_due(when: When, store: CorrectionStore, trainings: TrainingFolder, now_s: float) -> tuple[str, bool] | None:
    """Return why a training is due and whether it is a thorough one, or None."""
    if not _rests(trainings, thorough=True, now_s=now_s):
        last = _settled(trainings, thorough=True)
        new = new_for(store, trainings, thorough=True)
        if reason := due_at_night(when, new=new, last_s=None if last is None else last.asked_s, now_s=now_s):
            return reason, True
    if _rests(trainings, thorough=False, now_s=now_s):
        return None
    last, first_s = _settled(trainings), store.first_s(lines.project_of(trainings.line))
    reason = due(
        when,
        new=new_for(store, trainings),
        first_s=now_s if first_s is None else first_s,
        last_s=None if last is None else last.asked_s,
        now_s=now_s,
    )
    return None if reason is None else (reason, False)


def _rests(trainings: TrainingFolder, *, thorough: bool, now_s: float) -> bool:
    """Whether the rules ask for none of a kind now, since the latest of that kind failed or were cancelled."""
    ended = (one for one in reversed(trainings.history()) if one.thorough == thorough)
    failed = list(takewhile(lambda one: one.state not in SETTLED, ended))  # the latest first
    return bool(failed) and now_s - (failed[0].ended_s or failed[0].asked_s) < rest_s(len(failed))


def new_for(store: CorrectionStore, trainings: TrainingFolder, *, thorough: bool = False) -> int:
    """Return how many corrections of a line no training has learned from, nor does one that is pending.

    Args:
        store: the ledger.
        trainings: of the line.
        thorough: only thorough trainings count.
    """
    pending = trainings.pending()
    counts = pending is not None and (pending.thorough or not thorough)
    last = pending if counts else _settled(trainings, thorough=thorough)
    seen_s = 0.0 if last is None else last.snapshot_s or last.asked_s
    return store.new_since(lines.project_of(trainings.line), seen_s)


def last_of(
    pending: TrainingStatus | None, ended: Sequence[TrainingStatus], *, thorough: bool
) -> TrainingStatus | None:
    """Return the training of a line that is pending, else of those that ended, oldest first, the last of a kind."""
    return pending or next((one for one in reversed(ended) if one.thorough == thorough), None)


def _settled(trainings: TrainingFolder, *, thorough: bool = False) -> TrainingStatus | None:
    """Return the last training of a line, a thorough one if so wanted, that neither failed nor was cancelled."""
    ended = reversed(trainings.history())
    return next((one for one in ended if one.state in SETTLED and (one.thorough or not thorough)), None)


def why_not(last: TrainingStatus | None, new: int, *, whole: bool = True, thorough: bool = False) -> str | None:
    """Return why asking for a training of a line would bring nothing now, or None.

    Args:
        last: as `last_of` returns it.
        new: as `new_for` returns it.
        whole: the line's version that is to serve can do so; else the same corrections may give another.
        thorough: a thorough one.
    """
    if last is not None and last.state not in ENDED:
        return f"one is {last.state} already"
    if new or not whole or (last is not None and last.state in ("failed", "cancelled")):
        return None
    if last is None:
        return "there are no corrections yet"
    return f"nothing was corrected since the last {'thorough ' if thorough else ''}training"


def train(line: str) -> None:
    """Carry out what is asked for in a line; the job's function."""
    _die_with_parent()
    settings = Settings()
    trainings = folder_of(settings, line)
    with trainings.alone() as ours:
        status = trainings.pending()
        if not ours or status is None:
            return
        try:
            said = "" if status.said == _waits(settings) else status.said
            status = trainings.note(status, state="running", attempts=status.attempts + 1, said=said)
            ended = _carry_out(settings, trainings, status)
        except Exception as error:
            if _is_full(settings, error):
                log.error("training %s %s (%s: %s)", status.id, _waits(settings), type(error).__name__, error)
                return
            now = trainings.pending() or status
            said = f"{type(error).__name__}: {error}"
            now = trainings.note(now, errors=now.errors + 1, said=said)
            if now.errors >= _MOST_ERRORS:
                trainings.end(now, "failed", f"{said} ({now.errors} times; the trainer's log has the details)")
            raise
    log.info("training %s: %s (%s)", ended.id, ended.state, ended.said)
    if ended.state == "published":
        ask_for_lines_scores(settings, line)


def lacks_room(settings: Settings) -> bool:
    """Whether the disk has too little room for a training, which then waits."""
    folder = settings.shared
    return folder.is_dir() and shutil.disk_usage(folder).free < _ROOM_MB * 2**20


def _waits(settings: Settings) -> str:
    return f"waits until {_ROOM_MB} MB are free on the disk of {settings.shared.resolve()}: make room there"


def _is_full(settings: Settings, error: Exception) -> bool:
    """Whether an error came of a full disk; torch and SQLite say so by errors of their own."""
    if lacks_room(settings):
        return True
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        time.sleep(_FULL_S)  # by a limit that we cannot ask for: not again at once
        return True
    return False


def _carry_out(settings: Settings, trainings: TrainingFolder, status: TrainingStatus) -> TrainingStatus:
    import torch

    from active_learning.bundle import bundled_sets
    from active_learning.cycle import Limits, Workplace, run
    from active_learning.gate import Margins
    from active_learning.images import ImageStore
    from active_learning.learn import Trainable
    from active_learning.registry import AdapterRegistry
    from ml_backend.families import LIGHT, adapter_file, base_of, load_model
    from ml_backend.service import CLICKED
    from model.segmenter import BUNDLED_ADAPTER

    data = settings.data_dir
    _take_in(settings, status)
    if settings.train_memory_mb:
        _limit_memory(settings.train_memory_mb * 2**20)
    patience = Patience(data / CLICKED)
    cores = Cores(os.cpu_count() or 2)
    threads = settings.train_threads or cores.alone  # of the encoder, which cannot change them
    segmenter = load_model(settings, adapter=None, device=settings.train_device, threads=threads)
    assert isinstance(segmenter, Trainable)
    torch.set_num_threads(settings.train_threads or cores.beside)

    def pause() -> None:
        patience.wait()
        if not settings.train_threads:
            torch.set_num_threads(cores.now(patience.quiet_s()))

    replay, reference = bundled_sets()
    with closing(CorrectionStore(data / "corrections.sqlite")) as store:
        return run(
            Workplace(
                store=store,
                images=ImageStore(data / "images"),
                registry=AdapterRegistry(settings.shared / "adapters", base=segmenter.digest),
                segmenter=segmenter,
                embeddings=settings.shared / "embeddings",
                configured=adapter_file(settings),
                bundled=BUNDLED_ADAPTER if settings.family == LIGHT else None,
                weights=base_of(settings).path,
                replay=replay,
                reference=reference,
            ),
            trainings,
            status,
            config=_config(settings, thorough=status.thorough),
            margins=Margins(),
            limits=Limits(
                time_s=settings.train_limit_minutes * 60,
                memory_mb=settings.train_memory_mb,
                device=settings.train_device,
                too_few=settings.train_too_few,
            ),
            pause=pause,
        )


def _die_with_parent() -> None:
    """Have the system end this process when its worker is killed, so that no orphan holds the data folder."""
    with contextlib.suppress(OSError, AttributeError):  # other systems than Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit_memory(wanted: int) -> None:
    """Have the system refuse what is far beyond `wanted` bytes, should that come between two looks at what is held.

    What the heap keeps for later counts here as well, though it may take no memory: a gigabyte and more. With the usual
    limit the sum stays below the 6 GB of a trainer's container, so that this comes before the system ends the process.
    """
    wanted += 3 * 2**29
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _take_in(settings: Settings, status: TrainingStatus) -> None:
    """Have everything in the ledger that was submitted: what webhooks lost, and what waits in the inbox."""
    from ml_backend.inbox import SETTLE_S
    from ml_backend.ingest import open_intake
    from ml_backend.reconcile import reconcile, take_in

    intake = open_intake(settings)
    try:
        if settings.label_studio_url is not None and settings.label_studio_api_key is not None:
            project = lines.project_of(status.line)
            try:
                reconcile(settings, intake, project=None if project is None else int(project))
            except Refusal as refusal:
                log.warning("training %s goes by what webhooks brought: %s", status.id, refusal)
        take_in(intake, failed_s=SETTLE_S)  # a training that is tried again shall not use up their attempts
    finally:
        intake.close()


def _config(settings: Settings, *, thorough: bool) -> LearningConfig:
    from active_learning.learn import LearningConfig, graco_learning
    from active_learning.learn import thorough as thoroughly
    from ml_backend.families import GRACO

    config = graco_learning(settings.train_device) if settings.family == GRACO else LearningConfig()
    if thorough:
        config = thoroughly(config)
    if not settings.train_steps:
        return config
    return replace(config, fewest_steps=settings.train_steps, most_steps=settings.train_steps)


class Patience:
    """Waits while annotators click: the web process touches a file at each click."""

    def __init__(self, clicked: Path) -> None:
        """Name the file; where it is not there, nobody has clicked."""
        self._clicked = clicked

    def wait(self) -> None:
        """Return when no click came for a moment, or when this was long enough."""
        until_s = time.monotonic() + _LONGEST_PAUSE_S
        while time.monotonic() < until_s and (quiet_s := self.quiet_s()) < _QUIET_S:
            time.sleep(_QUIET_S - quiet_s + 0.01)

    def quiet_s(self) -> float:
        """Return the seconds since the last click, infinite where there was none or the clock was set back."""
        try:
            quiet_s = time.time() - self._clicked.stat().st_mtime
        except OSError:
            return math.inf
        return quiet_s if quiet_s >= 0 else math.inf


def _used_by_others_s() -> float:
    """Return the seconds that other processes have computed on all cores since the machine began."""
    cores, own = psutil.cpu_times(), psutil.Process().cpu_times()
    return float(cores.user + getattr(cores, "nice", 0.0) + cores.system - own.user - own.system)


class Cores:
    """How many threads a training computes with: half of the cores beside others, more of them while it is alone.

    Others are annotators, and whatever else keeps the cores busy: threads that share a core with other work wait for
    each other most of the time.
    """

    def __init__(self, count: int, used_s: Callable[[], float] = _used_by_others_s) -> None:
        """Take the number of the machine's cores, and what says how many seconds of them others have used so far."""
        self.beside = max(1, count // 2)
        self.alone = max(self.beside, min(count, _MOST_ALONE))
        self._used_s = used_s
        self._seen = time.monotonic(), used_s()
        self._busy = True

    def now(self, quiet_s: float) -> int:
        """Return the threads to take now, given the seconds since somebody clicked."""
        (before_s, used_before_s), now_s = self._seen, time.monotonic()
        if now_s - before_s >= _LOOK_S:
            used_s = self._used_s()
            self._busy = used_s - used_before_s > _BUSY * (now_s - before_s)
            self._seen = now_s, used_s
        return self.beside if self._busy or quiet_s < _ALONE_S else self.alone


def _note_memory(settings: Settings, line: str, most_mb: float) -> None:
    """Write down that the system ended a training's process for its memory: the next attempt takes smaller steps."""
    trainings = folder_of(settings, line)
    status = trainings.pending()
    if status is None:
        return
    log.error("training %s: the system ended its process at %.0f MB, since memory ran out", status.id, most_mb)
    said = f"memory ran out: the system ended its process, which held {most_mb:.0f} MB; it goes on with smaller steps"
    with contextlib.suppress(OSError):
        trainings.note(status, said=said)
        trainings.note_memory(status)


def _ended_for_memory() -> int | None:
    """Return how many processes the system has ended since it began because memory ran out; None: it does not say."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1])


class _Worker(Worker):
    """Is known to Redis for as long as its process lives, not only while it trains."""

    stopped = False

    def perform_job(self, job: Job, queue: Queue, execution: Execution) -> bool:
        with logs.carrying(job.id):  # of the training and its attempt
            return super().perform_job(job, queue, execution)

    killed_for_memory: Callable[[str, float], None]
    _ended_before: int | None = None

    def report(self) -> None:
        """Say that it waits for a training to be asked for."""
        self.register_birth()
        self.set_state(WorkerStatus.IDLE)
        self.heartbeat()

    def leave(self) -> None:
        """Have Redis forget it."""
        with contextlib.suppress(redis.RedisError):
            super().register_death()  # type: ignore[no-untyped-call]

    def register_birth(self) -> None:
        """Become known, unless it is already; a Redis that has lost it is told again."""
        listed = self.connection.sismember(self.redis_workers_keys, self.key)  # not by rq's heartbeat of a training
        if not (listed and self.connection.hexists(self.key, "birth")):
            self.connection.delete(self.key)
            super().register_birth()  # type: ignore[no-untyped-call]

    def register_death(self) -> None:
        """Stay known after a training; see `leave`."""

    def fork_work_horse(self, job: Job, queue: Queue) -> None:
        """Begin a job."""
        self._ended_before = _ended_for_memory()
        super().fork_work_horse(job, queue)

    def handle_work_horse_killed(self, job: Job, retpid: int, ret_val: int, rusage: resource.struct_rusage) -> None:
        """See whether it was for its memory that a job's process was killed."""
        super().handle_work_horse_killed(job, retpid, ret_val, rusage)  # type: ignore[no-untyped-call]
        by_force = os.WIFSIGNALED(ret_val) and os.WTERMSIG(ret_val) == signal.SIGKILL
        if by_force and not self.stopped and _ended_for_memory() != self._ended_before:
            self.killed_for_memory(job.args[0], rusage.ru_maxrss / 1024)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Stop at once, also in mid-training: it goes on where it was when it is begun again."""
        self.stopped = True
        if self.horse_pid:
            self.kill_horse()
        super().request_stop(signum, frame)  # type: ignore[no-untyped-call]


def work(settings: Settings, *, once: bool = False) -> None:
    """Carry out trainings one after another until stopped (or, with `once`, until none is asked for).

    Each runs in a process of its own, so that this one holds neither torch nor a GPU. Redis hears of it every few
    seconds, whether it trains or waits.
    """
    if settings.redis_url is None:
        raise SystemExit("GRACO_REDIS_URL is not set: 'python -m ml_backend run' starts a Redis and this worker itself")
    if settings.ledger == "elsewhere":
        raise SystemExit("GRACO_LEDGER is elsewhere: trainings run on the machine that keeps the ledger")
    os.nice(19)
    connection = redis.Redis.from_url(settings.redis_url)
    try:
        queue = Queue(TRAINING, connection=connection, serializer=JSONSerializer)
        worker = _Worker([queue], connection=connection, serializer=JSONSerializer, worker_ttl=_WORKER_TTL_S)
        worker.killed_for_memory = partial(_note_memory, settings)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, worker.request_stop)
        try:
            _carry_out_all(settings, worker, queue, once=once)
        finally:
            worker.leave()
    except StopRequested:  # the signal came between two trainings
        return
    except redis.RedisError as error:
        raise SystemExit(f"Redis does not answer ({error}); the trainer ends, and is started again by 'run'") from None


def _carry_out_all(settings: Settings, worker: _Worker, queue: Queue, *, once: bool) -> None:
    looked_s = -float("inf")
    while not worker.stopped:
        worker.report()
        if time.monotonic() - looked_s >= _DUE_S:
            looked_s = time.monotonic()
            with closing(CorrectionStore(settings.data_dir / "corrections.sqlite")) as store:
                ask_when_due(settings, store, now_s=time.time())
        requeue(settings, worker.connection)
        if queue.count:
            worker.work(burst=True, logging_level="WARNING")
        elif once:
            return
        if not worker.stopped:
            time.sleep(_TICK_S)
