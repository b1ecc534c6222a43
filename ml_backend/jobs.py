"""Work that need not happen inside a request: rq queues on Redis, jobs that name their work, JSON arguments.

Two queues. `corrections`: events in the inbox are taken into the ledger, and unlabelled tasks are scored by a new
version (`next_tasks`). `encode`: images of imported tasks are encoded ahead, so that the first click is warm. Redis
holds nothing that only it knows: what is undone stands in the inbox, from where the worker queues it again; only an
event on its way from another machine is nowhere else until the ledger's machine has written it. Redis gone means that
corrections wait and that images are encoded at their first click; no request waits for it.
"""

from __future__ import annotations

import base64
import contextlib
import contextvars
import functools
import hashlib
import json
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq import Queue, SimpleWorker, Worker
from rq.exceptions import DuplicateJobError, InvalidJobOperation, NoSuchJobError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.timeouts import JobTimeoutException

from ml_backend import logs, metrics
from ml_backend.answers import Answer
from ml_backend.connections import NOT_CONNECTED
from ml_backend.images import TaskImage
from ml_backend.inbox import SETTLE_S, Inbox
from ml_backend.scoring import Progress, ask_for_scores, due_file, due_files, forget_progress
from ml_backend.settings import Settings
from model import heap
from model.types import Refusal

if TYPE_CHECKING:  # a worker that waits shall not hold torch in memory, nor scipy
    from ml_backend.ingest import Intake
    from ml_backend.reconcile import Reconciled
    from ml_backend.service import Service

log = logging.getLogger(__name__)

CORRECTIONS = "corrections"
ENCODE = "encode"
_LIMIT_S = 120
_ENCODED_MB = 5.5  # on the disk, of the largest photos
_KEEP_FAILED_S = 600  # its id is taken as long, and the image not tried again
_INGEST, _NEXT_TASKS = "ingest-", "next-tasks-"  # begin the ids of such jobs
_RECEIVE = "receive-"  # begins the id of a job that brings an event of another machine
_KEEP_RECEIVED_S = 30 * 86400  # an event of another machine that could not be written here: there is no other copy
_INGEST_SPARE_S = 30  # of an event beyond the time to fetch its image
_DRAIN_S = 30.0
_MOST_DEATHS = 3  # of workers at one job
_MOST_DRAINED = 10_000
_WORKER_TTL_S = 45  # rq's idle worker reports 15 s before, and is forgotten a minute after
_PROCESS = "process"  # of a worker in Redis, beside what rq keeps of it
_BEGAN = 19  # field of /proc/PID/stat after the name: when the process began
_SPARE_S = 15  # of a job on another machine beyond its limit
_REDO_ALL_S = 6 * 3600.0  # between reconciliations that look at every task, not at those that changed
_SCORE_AGAIN_S = 3600.0  # between scorings by the same version: tasks came, and others were corrected
_SCORE_S = 60.0  # of one job: corrections that come meanwhile wait as long
_SCORE_LIMIT_S = 600


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
    _enqueue(_queue(ENCODE, connection), spread, [pairs], f"spread-{_digest(pairs)}")


def encode_later(service: Service, images: list[TaskImage]) -> int:
    """Have images encoded by the worker, or by this process where no Redis answers; nobody waits for Redis.

    Of more images than the disk may hold the first ones are: further ones would push these out before they are opened.

    Returns:
        How many are to be encoded.
    """
    settings = service.settings
    images = [image for image in images if image.uri[:5].lower() != "data:"]  # megabytes, and no fetch to spare
    if settings.redis_url is not None and settings.embedding_disk_mb:  # a worker hands over through files alone
        images = _as_fit(settings, images)
        service.hand_over.encode(images, otherwise=partial(_encode_here, service, images))
        return len(images)
    return _encode_here(service, images)


def _as_fit(settings: Settings, images: list[TaskImage]) -> list[TaskImage]:
    """Return the first of the images, as many as the disk may hold encoded."""
    fit = int(settings.embedding_disk_mb / _ENCODED_MB)
    if len(images) > fit:
        log.warning(
            "%d of %d images are not encoded ahead, since GRACO_EMBEDDING_DISK_MB=%d holds some %d: their first click "
            "takes longer",
            *(len(images) - fit, len(images), settings.embedding_disk_mb, fit),
        )
    return images[:fit]


def _encode_here(service: Service, images: Sequence[TaskImage]) -> int:
    return sum(service.warm(image) for image in images)


@dataclass(frozen=True, slots=True)
class _Errand:
    """What is to be told to Redis."""

    tell: Callable[[redis.Redis], object]
    otherwise: Callable[[], object] | None = None  # of an import: to be done where that fails; events wait in the inbox


class HandOver:
    """Tells the worker of events and imports, from a thread of its own: no request waits for Redis, however slow it is.

    Where the ledger is elsewhere, events and answers themselves are handed over, and what could not be is tried again.
    """

    def __init__(self, settings: Settings, inbox: Inbox) -> None:
        """Take where Redis is, and where events wait; the thread begins with the first event."""
        self._settings = settings
        self._inbox = inbox
        self._away = settings.ledger == "elsewhere"
        self._errands: queue.SimpleQueue[_Errand | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def put(self, key: str) -> None:
        """Have an event of the inbox taken in."""
        task = partial(send_events, inbox=self._inbox) if self._away else partial(enqueue_ingest, keys=[key])
        self._put(partial(task, self._settings))

    def encode(self, images: Sequence[TaskImage], *, otherwise: Callable[[], object]) -> None:
        """Have images encoded by the worker; `otherwise` is called where it cannot be told, from the thread."""
        self._put(partial(enqueue_encoding, images=images), otherwise)

    def tell(self, answers: Sequence[Answer]) -> None:
        """Have answers remembered where the ledger is, if that is elsewhere."""
        if self._away and answers:
            self._put(partial(send_answers, answers=answers))

    def begin(self) -> None:
        """Hand over what waits from before, where the ledger is elsewhere."""
        if self._away:
            self._put(partial(send_events, self._settings, inbox=self._inbox))

    def close(self) -> None:
        """End the thread; events that it had not handed over stay in the inbox, images are encoded when opened."""
        with self._starting:
            if self._thread is not None:
                imports = sum(errand.otherwise is not None for errand in self._forget())
                if imports:
                    log.warning("%d imports are not encoded ahead, since this process ends", imports)
                self._errands.put(None)
                self._thread.join()

    def _put(self, tell: Callable[[redis.Redis], object], otherwise: Callable[[], object] | None = None) -> None:
        if self._settings.redis_url is None:
            return
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, args=[self._settings.redis_url], name="hand-over", daemon=True
                )
                self._thread.start()
        here = contextvars.copy_context()  # names the request in the job
        self._errands.put(_Errand(lambda connection: here.run(tell, connection), otherwise))

    def _run(self, url: str) -> None:
        with connect(url) as connection:
            while (errand := self._next()) is not None:
                try:
                    errand.tell(connection)
                except redis.RedisError as error:
                    self._do_without([errand, *self._forget()], f"Redis does not answer ({error})")
                except Exception as error:  # the next errand need not share it
                    log.exception("the worker could not be told what to do")
                    self._do_without([errand], f"the worker could not be told ({type(error).__name__})")

    def _do_without(self, errands: Sequence[_Errand], why: str) -> None:
        imports = [errand.otherwise for errand in errands if errand.otherwise is not None]
        if waiting := len(errands) - len(imports):
            log.warning("%s: %d events wait in the inbox until the worker looks there", why, waiting)
        if imports:
            log.warning("%s: images are encoded by this process, as many as it can queue", why)
        for otherwise in imports:
            otherwise()

    def _next(self) -> _Errand | None:
        try:
            return self._errands.get(timeout=_DRAIN_S if self._away else None)
        except queue.Empty:
            return _Errand(partial(send_events, self._settings, inbox=self._inbox))

    def _forget(self) -> list[_Errand]:
        """Take back what is still to be handed over, and return it."""
        forgotten = []
        with contextlib.suppress(queue.Empty):
            while True:
                errand = self._errands.get_nowait()
                if errand is None:
                    self._errands.put(None)
                    break
                forgotten.append(errand)
        return forgotten


def enqueue_ingest(settings: Settings, connection: redis.Redis, *, keys: Iterable[str]) -> None:
    """Queue events of the inbox to be taken in.

    Raises:
        redis.RedisError: Redis cannot be reached.
    """
    to = _queue(CORRECTIONS, connection)
    limit_s = int(settings.image_timeout_s) + _INGEST_SPARE_S
    for key in keys:
        _enqueue(to, ingest, [key], f"{_INGEST}{key}", limit_s=limit_s, keep_failed_s=60)


def send_events(settings: Settings, connection: redis.Redis, *, inbox: Inbox) -> None:
    """Hand the events of an inbox over to the machine that keeps the ledger.

    Raises:
        redis.RedisError: Redis cannot be reached; what is not handed over stays in the inbox.
    """
    to = _queue(CORRECTIONS, connection)
    limit_s = int(settings.image_timeout_s) + _INGEST_SPARE_S
    for key in inbox.undone(_MOST_DRAINED, 0):
        event = inbox.read(key)
        if event is not None:
            args = [event.action, base64.b64encode(event.body).decode()]
            _enqueue(to, receive, args, f"{_RECEIVE}{key}", limit_s=limit_s, keep_failed_s=_KEEP_RECEIVED_S)
            inbox.done(key, note="handed over")


def send_answers(connection: redis.Redis, *, answers: Sequence[Answer]) -> None:
    """Hand answers over to the machine that keeps the ledger, which then tells accepted regions from drawn ones.

    Raises:
        redis.RedisError: Redis cannot be reached; regions among these count as drawn by hand.
    """
    rows = [asdict(one) | {"shape": one.shape and base64.b64encode(one.shape).decode()} for one in answers]
    _enqueue(_queue(CORRECTIONS, connection), remember, [rows], f"remember-{_digest(rows)}")


def enqueue_scores(settings: Settings, connection: redis.Redis) -> None:
    """Queue what was asked for by `ask_for_scores`; what is queued or running already is not queued again.

    Raises:
        redis.RedisError: Redis cannot be reached.
    """
    if settings.next_tasks == "off" or not (settings.label_studio_url and settings.label_studio_api_key):
        return
    for file in due_files(settings):
        with contextlib.suppress(OSError):  # done just now
            job_id = f"{_NEXT_TASKS}{file.stem}-{file.stat().st_mtime_ns}"
            _enqueue(_queue(CORRECTIONS, connection), score, [int(file.stem)], job_id, limit_s=_SCORE_LIMIT_S)


def drain(settings: Settings, connection: redis.Redis, *, inbox: Inbox, older_than_s: float = SETTLE_S) -> int:
    """Queue what the inbox holds undone and nobody is at, and return how much it is.

    Events of other machines that could not be written are tried again, too.

    Args:
        settings: the limits of a job.
        connection: to the Redis of the queue.
        inbox: to look into.
        older_than_s: what came since then is left to whoever put it there.

    Raises:
        redis.RedisError: Redis cannot be reached.
    """
    requeue_abandoned(settings, connection, inbox=inbox)
    to = _queue(CORRECTIONS, connection)
    for job_id in to.failed_job_registry.get_job_ids(cleanup=False):
        if job_id.startswith(_RECEIVE):
            with contextlib.suppress(NoSuchJobError, InvalidJobOperation):  # Redis dropped it, or another was first
                to.failed_job_registry.requeue(job_id)
    busy = {*to.get_job_ids(), *to.started_job_registry.get_job_ids(cleanup=False)}
    keys = [key for key in inbox.undone(_MOST_DRAINED, older_than_s) if f"{_INGEST}{key}" not in busy]
    for key in keys:
        job = to.fetch_job(f"{_INGEST}{key}")
        if job is not None:  # failed, or lost between queue and worker
            job.delete()
    enqueue_ingest(settings, connection, keys=keys)
    return len(keys)


def requeue_abandoned(settings: Settings, connection: redis.Redis, *, inbox: Inbox) -> int:
    """Queue again the jobs of workers that are no more, and return how many; rq would leave them 'started' for minutes.

    A job may be what kills them (out of memory, a crash in a library): it is given up at the third death.

    Raises:
        redis.RedisError: Redis cannot be reached.
        sqlite3.Error: an event cannot be noted as given up; its job is left as it is.
    """
    found = 0
    for name in (CORRECTIONS, ENCODE):
        to = _queue(name, connection)
        registry = to.started_job_registry
        for job_id, execution_id in registry.get_job_and_execution_ids(cleanup=False):
            try:
                execution = Execution.fetch(id=execution_id, job_id=job_id, connection=connection)
            except ValueError:  # nothing is known of it any more
                execution = Execution(id=execution_id, job_id=job_id, connection=connection)
            job = to.fetch_job(job_id)
            if job is not None and _is_at_work(connection, execution, job):
                continue
            if job is None or job.get_status(refresh=False) != JobStatus.STARTED:
                registry.remove_execution(execution)
                continue
            deaths = int(job.meta.get("abandoned", 0)) + 1
            if deaths >= _MOST_DEATHS:
                _give_up(settings, job, inbox)
            registry.remove_execution(execution)
            job.delete()
            if deaths < _MOST_DEATHS:
                log.warning("job %s was left by a worker that is no more, and is queued again", job_id)
                job.meta["abandoned"] = deaths
                to.enqueue_job(job, at_front=deaths == 1)  # others first where it may be the job's own fault
                found += 1
    return found


def _give_up(settings: Settings, job: Job, inbox: Inbox) -> None:
    """Have nothing try again by itself what a job was to do."""
    why = f"{_MOST_DEATHS} workers died at job {job.id}: out of memory, or a crash in a library"
    key = None
    if job.id.startswith(_INGEST):
        key = job.args[0]
    elif job.id.startswith(_RECEIVE):
        action, body = job.args
        key = inbox.add(base64.b64decode(body), action)
    elif job.id.startswith(_NEXT_TASKS):
        due_file(settings, job.args[0]).unlink(missing_ok=True)
        forget_progress(settings, job.args[0])
    if key is None:
        log.error("%s; it is dropped", why)
        return
    inbox.give_up(key, why)
    log.error("%s; run 'reconcile --retry' once it is mended", why)


def _is_at_work(connection: redis.Redis, execution: Execution, job: Job) -> bool:
    """Whether the worker that began a job lives: seen by its process on this machine, elsewhere by the time passed."""
    age_s = time.time() - execution.created_at.timestamp()
    if not execution.worker_name or age_s > (job.timeout or _LIMIT_S) + _SPARE_S:
        return False
    key = f"{Worker.redis_worker_namespace_prefix}{execution.worker_name}"
    host, pid, mark = connection.hmget(key, "hostname", "pid", _PROCESS)
    if host is None or pid is None:
        return False
    if host != socket.gethostname().encode():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _mark_of(int(pid))
    return mark is None or now is None or mark == now.encode()


def _mark_of(pid: int) -> str | None:
    """Return what tells a process from a later one of its number: when the machine and it began, by no clock.

    In a container that starts again host name and numbers are the same. None: this system does not tell.
    """
    try:
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_BEGAN]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {began}"
    except (OSError, IndexError):
        return None


def _queue(name: str, connection: redis.Redis) -> Queue:
    return Queue(name, connection=connection, serializer=JSONSerializer)


def _enqueue(
    to: Queue,
    function: Callable[..., None],
    args: Sequence[object],
    job_id: str,
    *,
    limit_s: int = _LIMIT_S,
    keep_failed_s: int = _KEEP_FAILED_S,
) -> None:
    """Queue one job under an id that names its work; queued already is as good."""
    with contextlib.suppress(DuplicateJobError):
        to.enqueue_call(
            function,
            args=list(args),
            job_id=job_id,
            unique=True,
            timeout=limit_s,
            result_ttl=0,
            failure_ttl=keep_failed_s,
            description=job_id,
            meta={"request": logs.request_id.get()},
        )


class _Worker(SimpleWorker):
    """Has the lines of a job carry the id of the request that it comes from, and keeps no memory of a job's."""

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        """Become known, and heed a stop from before that on: rq would first listen afterwards, and die unreported."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop_before_first_job)
        super().bootstrap(*args, **kwargs)

    def register_birth(self) -> None:
        """Become known, with what tells this process from a later one of its number."""
        super().register_birth()  # type: ignore[no-untyped-call]
        if (mark := _mark_of(os.getpid())) is not None:
            self.connection.hset(self.key, _PROCESS, mark)

    def _stop_before_first_job(self, signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # who asks twice is not kept waiting
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._stop_requested = True  # the loop looks there before it takes a job

    def perform_job(self, job: Job, queue: Queue, execution: Execution) -> bool:
        try:
            with logs.carrying(str(job.meta.get("request", "-"))):
                return super().perform_job(job, queue, execution)
        finally:
            heap.give_back()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def spread(pairs: list[tuple[int | None, str]]) -> None:
    """Queue one `encode` job for each image of an import."""
    url = Settings().redis_url
    assert url is not None, "a job runs where there is a Redis"
    with connect(url) as connection:
        to = _queue(ENCODE, connection)
        for task_id, uri in pairs:
            _enqueue(to, encode, [task_id, uri], f"encode-{task_id}-{_digest(uri)}")


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


@functools.cache
def _intake() -> Intake:
    """The worker process's own files, opened at its first event."""
    from ml_backend.ingest import open_intake

    return open_intake(Settings())


def ingest(key: str) -> None:
    """Take one event of the inbox into the ledger, and queue those it was split into."""
    from ml_backend.ingest import ingest as take_in

    with metrics.STEP.labels("ingest").time():
        split = take_in(_intake(), key)
    url = Settings().redis_url
    if split and url is not None:
        with connect(url) as connection:
            enqueue_ingest(Settings(), connection, keys=split)


def receive(action: str, body: str) -> None:
    """Take in an event that another machine's web process was sent."""
    ingest(_intake().inbox.add(base64.b64decode(body), action))


def remember(rows: list[dict[str, Any]]) -> None:
    """Remember what another machine's web process answered."""
    _intake().answers.remember(
        Answer(**row | {"shape": row["shape"] and base64.b64decode(row["shape"])}) for row in rows
    )


@functools.cache
def _scorer() -> Service:
    """The worker process's service with the versions that serve, for as long as there are tasks to score."""
    from ml_backend.service import Service

    return Service(Settings())


_pictureless: dict[int, set[int]] = defaultdict(set)
"""Tasks by project whose image cannot be had: not tried again until all the others have their score."""


def score(project: int) -> None:
    """Score a project's unlabelled tasks for a while; what is left then is queued again, behind what came meanwhile."""
    from ml_backend.next_tasks import MOST, score_tasks, wants_scores
    from ml_backend.service import CLICKED
    from ml_backend.trainings import Patience

    settings = Settings()
    file = due_file(settings, project)
    try:
        asked = file.stat().st_mtime_ns
    except OSError:  # somebody else has done it
        return
    finished, progress = True, Progress(settings, project)
    try:
        if wants_scores(settings, project):
            outcome = score_tasks(
                _scorer(),
                project,
                most=MOST,
                limit_s=_SCORE_S,
                refused=_pictureless[project],
                pause=Patience(settings.data_dir / CLICKED).wait,
                report=progress,
            )
            finished = outcome.finished
            log.info("tasks of project %d: %s", project, outcome)
    except (Refusal, JobTimeoutException) as error:
        if _scorer.cache_info().currsize and not (_scorer().ready or _scorer().failure):
            log.info("tasks of project %d are scored once the model is loaded", project)
            return
        log.warning("tasks of project %d are not scored until they are asked for again: %s", project, error)
    except Exception:  # left as asked for, it would fail again every few minutes
        log.exception("tasks of project %d are not scored until they are asked for again", project)
    if finished:
        forget_progress(settings, project)
        _pictureless.pop(project, None)
        if _scorer.cache_info().currsize:
            _scorer().close()
            _scorer.cache_clear()
        with contextlib.suppress(OSError):
            if file.stat().st_mtime_ns == asked:
                file.unlink()


def work(settings: Settings, *, burst: bool = False) -> None:
    """Run jobs until stopped (or, with `burst`, until none is left), below everyone else's priority."""
    if settings.redis_url is None:
        raise SystemExit("GRACO_REDIS_URL is not set: 'python -m ml_backend run' starts a Redis and this worker itself")
    os.nice(19)
    connection = redis.Redis.from_url(settings.redis_url)
    try:
        here = settings.ledger == "here"  # elsewhere: images are encoded for all, corrections are another's
        worker = _Worker(
            [_queue(name, connection) for name in ((CORRECTIONS, ENCODE) if here else (ENCODE,))],
            connection=connection,
            serializer=JSONSerializer,
            worker_ttl=_WORKER_TTL_S,
        )
        with _upkeep(settings, once=burst) if here else contextlib.nullcontext():
            worker.work(burst=burst, logging_level="WARNING")
    except redis.RedisError as error:
        raise SystemExit(f"Redis does not answer ({error}); the worker ends, and is started again by 'run'") from None
    if _service.cache_info().currsize:
        _service().close()
    if _intake.cache_info().currsize:
        _intake().close()


@contextmanager
def _upkeep(settings: Settings, *, once: bool) -> Iterator[None]:
    """Look into the inbox now and, unless it is for once, every half minute; and fetch what webhooks lost."""
    if once:
        _look_after(settings, older_than_s=0)
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_keep_up, args=[settings, stop], name="upkeep", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(5)


def _keep_up(settings: Settings, stop: threading.Event) -> None:
    wants = settings.reconcile_minutes > 0 and settings.label_studio_url and settings.label_studio_api_key
    asked_s, whole_s = -float("inf"), -float("inf")  # when Label Studio was asked, and when for everything
    since_s: dict[int, float] = {}  # by project, when it was last compared: one found only now is looked at whole
    scored_s = -float("inf")  # when tasks were to be scored by whatever serves
    alone = 0  # how often no project was found to be connected
    while True:
        try:
            _look_after(settings)
            now_s = time.monotonic()
            if wants and now_s - asked_s >= settings.reconcile_minutes * 60:
                whole = now_s - whole_s >= _REDO_ALL_S
                asked_s, begun_s = now_s, time.time()
                if whole:
                    since_s.clear()
                found = _fetch_lost(settings, since_s)
                since_s.update(dict.fromkeys(found.ids, begun_s))
                if whole and found.projects:
                    whole_s = now_s
                elif whole:  # and is again the next time; at first the web process may still be starting
                    alone += 1
                    if alone == 2:
                        log.warning(NOT_CONNECTED)
                if found.ids and now_s - scored_s >= _SCORE_AGAIN_S:
                    scored_s = now_s
                    for project in found.ids:
                        ask_for_scores(settings, project)
        except Refusal as refusal:
            log.warning("corrections could not be compared with Label Studio: %s", refusal)
        except redis.RedisError as error:
            log.warning("Redis does not answer (%s): what is undone waits in the inbox", error)
        except Exception:
            log.exception("the inbox could not be looked after; it is tried again")
        if stop.wait(_DRAIN_S):
            return


def _look_after(settings: Settings, *, older_than_s: float = SETTLE_S) -> None:
    assert settings.redis_url is not None, "a worker runs where there is a Redis"
    with connect(settings.redis_url) as connection, closing(Inbox(settings.data_dir / "inbox.sqlite")) as inbox:
        inbox.prune()
        inbox.try_again()
        drain(settings, connection, inbox=inbox, older_than_s=older_than_s)
        enqueue_scores(settings, connection)


def _fetch_lost(settings: Settings, since_s: Mapping[int, float]) -> Reconciled:
    from ml_backend.ingest import open_intake
    from ml_backend.reconcile import reconcile

    with closing(open_intake(settings)) as intake:
        found = reconcile(settings, intake, since_s=since_s)
    if found.added or found.deleted:
        log.info("Label Studio knew of %d annotations more, and %d fewer", found.added, found.deleted)
        _look_after(settings, older_than_s=0)
    return found
