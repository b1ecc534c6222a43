"""One command starts Redis, worker and web, watches them, and leaves nothing behind."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import psutil
import pytest

from ml_backend.settings import Settings
from ml_backend.supervisor import _children, redis_server, redis_socket, web_command
from tests.conftest import ROOT
from tests.ml_backend.conftest import settings_for, wait_until


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def start(tmp_path):
    """Start `python -m ml_backend run` on a free port; gives the process, its address and its log file."""
    started = []

    def run(port=None, *before):
        port = port or free_port()
        environment = os.environ | {
            **{"GRACO_PORT": str(port), "GRACO_DATA_DIR": str(tmp_path / "data"), "GRACO_LOG_JSON": "1"},
            **{"GRACO_ENCODER": "exact", "GRACO_DEVICE": "cpu"},
        }
        log = tmp_path / f"log-{len(started)}"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*before, sys.executable, "-m", "ml_backend", "run"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run under nohup
            )
        started.append(process)
        return process, f"http://127.0.0.1:{port}", log

    yield run
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.wait(10)


def health(url):
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return json.load(answer)
    except (urllib.error.URLError, OSError):
        return None


def children(process):
    """The children's processes, by name."""
    names = {"redis-server": "redis", "ml_backend worker": "worker", "ml_backend trainer": "trainer", "gunicorn": "web"}
    found = {}
    for child in psutil.Process(process.pid).children():
        try:
            line = " ".join(child.cmdline())
        except psutil.NoSuchProcess:
            continue
        found |= {name: child for word, name in names.items() if word in line}
    return found


def alive(child):
    return child.is_running() and child.status() != psutil.STATUS_ZOMBIE


def test_one_command_serves_restarts_what_dies_and_stops_without_orphans(start, tmp_path):
    process, url, log = start()
    answer = wait_until(lambda: health(url), limit_s=30)
    assert answer["status"] == "UP"
    first = wait_until(lambda: len(found := children(process)) == 4 and found, limit_s=30)

    again, _, said = start()
    assert again.wait(30) == 1
    assert "another run uses" in said.read_text()
    assert redis_socket(tmp_path / "data").exists(), "the second leaves the first one's Redis alone"

    first["redis"].kill()
    first["worker"].kill()
    first["trainer"].kill()

    def replaced():
        found = children(process)
        dead = ("redis", "worker", "trainer")
        return len(found) == 4 and all(found[name].pid != first[name].pid for name in dead) and found

    wait_until(replaced, limit_s=60)
    assert health(url)["status"] == "UP"
    assert "is started again" in log.read_text()

    everything = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    start_s = time.monotonic()
    assert process.wait(15) == 0, log.read_text()
    assert time.monotonic() - start_s < 15
    wait_until(lambda: not any(alive(child) for child in everything), limit_s=5)
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.mark.parametrize("nohup", [False, True], ids=["plain", "nohup"])
def test_a_closed_terminal_stops_everything_unless_nohup_was_asked_for(start, nohup):
    process, url, log = start(None, *(["nohup"] if nohup else []))
    wait_until(lambda: health(url), limit_s=30)
    everything = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGHUP)
    if nohup:
        time.sleep(1.5)
        assert process.poll() is None
        assert health(url)["status"] == "UP"
        process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0, log.read_text()
    wait_until(lambda: not any(alive(child) for child in everything), limit_s=5)


def test_a_killed_supervisor_leaves_its_folder_locked_while_a_child_still_uses_it(start, tmp_path):
    process, url, _ = start(None)
    wait_until(lambda: health(url), limit_s=30)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(5)
    try:
        second, _, log = start(None)
        assert second.wait(30) == 1
        assert "another run uses" in log.read_text()
    finally:
        for child in children:
            child.kill()
        psutil.wait_procs(children, timeout=10)


def test_a_web_process_that_cannot_start_ends_the_command(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process, _, log = start(taken.getsockname()[1])
        assert process.wait(60) != 0
    assert "web ended with status" in log.read_text()


def test_the_redis_server_is_one_that_can_be_run():
    server = redis_server()
    assert server is not None
    assert subprocess.run([server, "--version"], capture_output=True, check=True).stdout.startswith(b"Redis server")


def test_the_socket_of_a_long_data_directory_is_short_and_its_own(tmp_path):
    deep = tmp_path / ("x" * 100) / "data"
    assert len(str(redis_socket(deep))) < 100
    assert str(redis_socket(deep)).startswith(tempfile.gettempdir())
    assert redis_socket(deep) != redis_socket(tmp_path)
    assert redis_socket(deep) == redis_socket(deep / ".." / "data")


def test_the_web_server_has_the_processes_and_threads_of_the_settings(tmp_path, label_studio):
    command = web_command(settings_for(tmp_path, label_studio, threads=5, host="0.0.0.0", port=9999, web_processes=2))
    words = dict(itertools.pairwise(command))
    assert (words["--workers"], words["--threads"], words["--bind"]) == ("2", "5", "0.0.0.0:9999")
    assert "--preload" not in command


def test_an_adapter_named_from_here_is_found_by_the_web_process_which_runs_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.safetensors").write_bytes(b"")
    *_, web = _children(Settings(data_dir=tmp_path, adapter="mine.safetensors"), tmp_path, tmp_path)
    assert web.environment["GRACO_ADAPTER"] == str(tmp_path / "mine.safetensors")
