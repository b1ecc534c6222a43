"""The web process is killed while annotators submit: what it had answered is not lost. Clients fall silent."""

import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
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

    def __init__(self, settings: Settings, certificate: Path | None = None) -> None:
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{settings.port}"
        self.certificate = certificate
        self.log = settings.data_dir.parent / "web.log"
        self._command = web_command(settings)
        self._environment = {
            **os.environ,
            **{"GRACO_DATA_DIR": str(settings.data_dir), "GRACO_AUTH": "off", "GRACO_ENCODER": "exact"},
            **{"LABEL_STUDIO_URL": str(settings.label_studio_url), "LABEL_STUDIO_API_KEY": TOKEN},
            **{"GRACO_REQUEST_TIME_S": str(settings.request_time_s)},
            **({"GUNICORN_CMD_ARGS": f"--certfile {certificate} --keyfile {certificate}"} if certificate else {}),
        }
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, start_new_session=True, stderr=log
            )
        wait_until(self.answers, limit_s=120)

    def answers(self) -> bool:
        with suppress(requests.RequestException):
            verify = str(self.certificate) if self.certificate else True
            return requests.get(f"{self.url}/health", timeout=2, verify=verify).status_code == 200
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


@contextmanager
def running(folder: Path, label_studio, certificate: Path | None = None) -> Iterator[Web]:
    label_studio.add("/data/upload/3/photo.png", photo())
    web = Web(settings_for(folder / "data", label_studio, port=free_port(), request_time_s=5), certificate)
    try:
        yield web
    finally:
        with suppress(ProcessLookupError):
            os.killpg(web.process.pid, signal.SIGKILL)
        web.process.wait()


@pytest.fixture
def web(tmp_path: Path, label_studio) -> Iterator[Web]:
    with running(tmp_path, label_studio) as web:
        yield web


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


def connect(web: Web) -> socket.socket:
    plain = socket.create_connection(("127.0.0.1", int(web.url.rpartition(":")[2])))
    if web.certificate is None:
        return plain
    return ssl.create_default_context(cafile=str(web.certificate)).wrap_socket(plain, server_hostname="127.0.0.1")


def pour(client: socket.socket, begun: bytes, piece: bytes, *, pause_s: float, limit_s: float) -> bytes:
    """Send a piece again and again; return what is answered until the connection is closed."""
    client.sendall(begun)
    client.settimeout(pause_s)
    said, until_s = b"", time.monotonic() + limit_s
    while time.monotonic() < until_s:
        with suppress(OSError):  # the answer may still be there to be read
            client.sendall(piece)
        try:
            new = client.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            return said
        if not new:
            return said
        said += new
    raise AssertionError(f"not cut off after {limit_s} s; it was answered {said!r}")


def test_what_comes_after_a_body_was_cut_off_is_no_request(web: Web):
    begun = b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n"
    piece = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(web)) for _ in range(8)]
        with ThreadPoolExecutor(8) as threads:
            said = list(threads.map(lambda one: pour(one, begun, piece, pause_s=0.001, limit_s=20), clients))
    assert [one.count(b"HTTP/1.1 ") for one in said] == [1] * 8
    for one in said:
        assert one.startswith(b"HTTP/1.1 408")
        assert b"Connection: close" in one
        assert b"GRACO_REQUEST_TIME_S" in one
    assert web.log.read_text().count("the body of the request did not arrive within 5 s (GRACO_REQUEST_TIME_S") >= 8
    assert web.answers()


def test_a_large_body_has_a_second_more_for_each_megabyte(web: Web):
    body = json.dumps(event(annotation(id=1))).encode()
    body += b" " * (4_000_000 - len(body))
    with connect(web) as client:
        client.sendall(b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
        client.sendall(body[:-10])
        for at in range(7):  # seconds, of 5 + 4
            client.sendall(body[-10 + at : -9 + at])
            time.sleep(1)
        client.sendall(body[-3:])
        client.settimeout(20)
        assert client.recv(1000).startswith(b"HTTP/1.1 201")


def test_clients_that_drip_are_cut_off_in_a_connection_by_tls_too(tmp_path: Path, label_studio):
    certificate = tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", certificate, "-out", tmp_path / "alone.pem"),
        ],
        check=True,
        capture_output=True,
    )
    certificate.write_text(certificate.read_text() + (tmp_path / "alone.pem").read_text())
    with running(tmp_path, label_studio, certificate) as web:
        with connect(web) as client:
            pour(client, HEAD, b"x", pause_s=0.4, limit_s=20)
        with connect(web) as client:
            pour(client, BODY, b"x", pause_s=0.4, limit_s=20)
        with connect(web) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        time.sleep(11)  # HEAD_S
        told = web.log.read_text()
        assert told.count("the client is cut off") == 2, "who was in time is none of them"
        assert "head of a request did not arrive" in told
        assert "GRACO_REQUEST_TIME_S" in told
