"""Servers that a test starts as a user would: own process, own log, gone with all their children at the end."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

_STOP_S = 30


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: where it answers, and what it has written."""

    url: str
    log: Path

    def tail(self, lines: int = 80) -> str:
        """Return the end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def get_text(url: str, timeout_s: float = 5, auth: tuple[str, str] | None = None) -> str | None:
    """Return what a server answers with status 200, or None while it does not; `auth` is user and password."""
    with requests.Session() as session:
        session.trust_env = False  # loopback requests never go through a proxy
        try:
            response = session.get(url, timeout=timeout_s, auth=auth)
        except requests.RequestException:
            return None
        return response.text if response.status_code == 200 else None


@contextmanager
def serve(
    command: Sequence[str], *, url: str, environment: Mapping[str, str], cwd: Path, log: Path, limit_s: float
) -> Iterator[Server]:
    """Start a server, wait until its /health answers 200, and stop it and all its children at the end.

    Raises:
        RuntimeError: it ended, or was not healthy after `limit_s`; with the end of its log.
    """
    server = Server(url, log)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | {"no_proxy": "*", "NO_PROXY": "*"} | dict(environment),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline_s = time.monotonic() + limit_s
        while get_text(f"{url}/health") is None:
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended with status {process.returncode}:\n{server.tail()}")
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{url}/health was not 200 after {limit_s:.0f} s:\n{server.tail()}")
            time.sleep(0.3)
        yield server
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process politely, then whatever of its children is left."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(family, timeout=5)
    for child in left:
        child.kill()
    psutil.wait_procs(left, timeout=5)
