"""The web process is killed while annotators submit: what it had answered is not lost. Clients fall silent."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
import requests

from active_learning.corrections import CorrectionStore
from ml_backend.inbox import Inbox
from ml_backend.ingest import open_intake
from ml_backend.reconcile import take_in
from ml_backend.settings import Settings
from ml_backend.simulate import free_port
from ml_backend.supervisor import web_command
from tests.conftest import ROOT
from tests.ml_backend.conftest import TOKEN, settings_for, wait_until
from tests.ml_backend.test_ingest import annotation, event, photo

EVENTS, SENDERS, KILLS = 1000, 8, 2


class Web:
    """The web process as `run` starts it, with its address."""

    def __init__(self, settings: Settings) -> None:
        self.url = f"http://127.0.0.1:{settings.port}"
        self._command = web_command(settings)
        self._environment = {
            **os.environ,
            **{"GRACO_DATA_DIR": str(settings.data_dir), "GRACO_AUTH": "off", "GRACO_ENCODER": "exact"},
            **{"LABEL_STUDIO_URL": str(settings.label_studio_url), "LABEL_STUDIO_API_KEY": TOKEN},
            **{"GRACO_REQUEST_TIME_S": str(settings.request_time_s)},
        }
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, cwd=ROOT, env=self._environment, start_new_session=True, stderr=subprocess.DEVNULL
        )
        wait_until(self.answers, limit_s=120)

    def answers(self) -> bool:
        with suppress(requests.RequestException):
            return requests.get(f"{self.url}/health", timeout=2).status_code == 200
        return False

    def kill(self, *, whole: bool) -> None:
        """Kill it: with its parent, or the one that answers alone, which the parent replaces."""
        if not whole:
            for child in psutil.Process(self.process.pid).children():
                child.kill()
            return
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.start()


@pytest.fixture
def web(tmp_path: Path, label_studio) -> Iterator[Web]:
    label_studio.add("/data/upload/3/photo.png", photo())
    running = Web(settings_for(tmp_path / "data", label_studio, port=free_port(), request_time_s=5))
    yield running
    with suppress(ProcessLookupError):
        os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()


def test_of_a_thousand_events_none_that_was_answered_is_lost_when_the_web_process_is_killed(
    web: Web, tmp_path: Path, label_studio
):
    numbers = iter(range(1, EVENTS + 1))
    lock = threading.Lock()
    answered: set[int] = set()

    def send() -> None:
        """As Label Studio does: once, whatever becomes of it."""
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                body = event(annotation(id=number))
                if requests.post(f"{web.url}/webhook", json=body, timeout=5).status_code == 201:
                    answered.add(number)
            except requests.RequestException:
                while not web.answers():  # annotators do not submit the rest while nobody listens
                    time.sleep(0.1)

    senders = [threading.Thread(target=send) for _ in range(SENDERS)]
    for sender in senders:
        sender.start()
    for kill in range(1, KILLS + 1):
        wait_until(lambda kill=kill: len(answered) > 250 * kill or not any(s.is_alive() for s in senders), limit_s=120)
        web.kill(whole=kill % 2 == 0)
    for sender in senders:
        sender.join()
    assert len(answered) > EVENTS / 2, "the killed process was started again and went on"
    settings = settings_for(tmp_path / "data", label_studio)
    with closing(Inbox(settings.data_dir / "inbox.sqlite")) as inbox:
        kept = [json.loads(inbox.read(key).body)["annotation"]["id"] for key in inbox.undone(10_000, 0)]
    assert sorted(kept) == sorted(set(kept))
    assert set(kept) >= answered
    with closing(open_intake(settings)) as intake:
        take_in(intake)
    with closing(CorrectionStore(settings.data_dir / "corrections.sqlite")) as store:
        found = [one.annotation for one in store.corrections("3")]
    assert sorted(found) == sorted(set(kept)), "each is in the ledger once"


def test_clients_that_fall_silent_in_the_middle_of_a_request_hold_no_thread_for_long(web: Web):
    half = (
        b"GET /health HTTP/1.1\r\nHost: x\r\n",
        b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{}",
    )
    silent = []
    for number in range(2 * 16):  # GRACO_THREADS
        silent.append(socket.create_connection(("127.0.0.1", int(web.url.rpartition(":")[2]))))
        silent[-1].sendall(half[number % 2])
    try:
        time.sleep(1)
        wait_until(web.answers, limit_s=45)
    finally:
        for one in silent:
            one.close()


def test_a_header_names_neither_our_routes_nor_where_they_are_mounted(web: Web):
    for name in ("SCRIPT_NAME", "PATH_INFO"):
        assert requests.get(f"{web.url}/health", headers={name: "/elsewhere"}, timeout=20).status_code == 200


HEAD, BODY, UNREAD = (
    b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ",
    b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n",
    b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n",
)


@pytest.mark.parametrize("begun", [HEAD, BODY, UNREAD], ids=["head", "body", "body that nobody reads"])
def test_clients_that_drip_bytes_of_a_request_hold_no_thread_for_long(web: Web, begun: bytes):
    slow = [socket.create_connection(("127.0.0.1", int(web.url.rpartition(":")[2]))) for _ in range(16)]
    done = threading.Event()

    def drip() -> None:
        for one in slow:
            one.sendall(begun)
        while not done.wait(0.4):
            for one in slow:
                with suppress(OSError):
                    one.sendall(b"x")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        time.sleep(1.5)
        began_s = time.monotonic()
        wait_until(web.answers, limit_s=30)
        assert time.monotonic() - began_s < 25
        for one in slow:
            one.settimeout(20)
            with suppress(ConnectionError):
                while one.recv(65536):  # to its end, with or without an answer
                    pass
    finally:
        done.set()
        dripping.join()
        for one in slow:
            one.close()


def test_a_body_that_arrives_in_pieces_within_its_time_is_taken(web: Web):
    body = json.dumps(event(annotation(id=1))).encode()
    with socket.create_connection(("127.0.0.1", int(web.url.rpartition(":")[2]))) as client:
        client.sendall(b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), len(body) // 5 + 1):
            client.sendall(body[start : start + len(body) // 5 + 1])
            time.sleep(0.3)
        client.settimeout(20)
        assert client.recv(1000).startswith(b"HTTP/1.1 201")
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")  # the connection serves another
        while not (said := client.recv(1000)).startswith(b"HTTP/1.1"):
            assert said
