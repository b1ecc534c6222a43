"""A gunicorn worker in which no client takes for ever to send a request: each holds one of its threads meanwhile.

`gunicorn_settings` limits how long a client may be silent; one that drips single bytes never is. Here the head of a
request has to be there within `HEAD_S` as a whole, its body within GRACO_REQUEST_TIME_S, read or thrown away. Then the
connection is shut for reading, so that whoever reads from it finds its end.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from ml_backend import gunicorn_settings
from ml_backend.settings import Settings

log = logging.getLogger(__name__)

HEAD_S = 10.0
"""Seconds in which the head of a request has to arrive."""
_TICK_S = 0.5


class _Clock:
    """The sockets that are read from, each with when that has to be over; used from many threads."""

    def __init__(self) -> None:
        self._reading: dict[socket.socket, float] = {}
        self._some = threading.Condition()
        threading.Thread(target=self._watch, name="slow-clients", daemon=True).start()

    def start(self, sock: socket.socket, limit_s: float) -> None:
        """Give a socket so long from now."""
        with self._some:
            self._reading[sock] = time.monotonic() + limit_s
            self._some.notify()

    def stop(self, sock: socket.socket) -> None:
        """Wait for this socket no more."""
        with self._some:
            self._reading.pop(sock, None)

    def _watch(self) -> None:
        while True:
            with self._some:
                while not self._reading:
                    self._some.wait()
                now_s = time.monotonic()
                late = [sock for sock, until_s in self._reading.items() if until_s < now_s]
                for sock in late:
                    del self._reading[sock]
                    with contextlib.suppress(OSError):  # the client is gone
                        sock.shutdown(socket.SHUT_RD)
            for _ in late:
                log.warning("a client took too long to send a request; it is cut off")
            time.sleep(_TICK_S)


class _Body:
    """The body of a request; all reading of it together may take so long."""

    def __init__(self, body: Any, clock: _Clock, sock: socket.socket, limit_s: float) -> None:
        self._body, self._clock, self._sock = body, clock, sock
        self._left_s = limit_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)

    def __iter__(self) -> _Body:
        return self

    def __next__(self) -> bytes:
        return self._timed(self._body.__next__)

    def read(self, *size: int | None) -> bytes:
        return self._timed(self._body.read, *size)

    def readline(self, *size: int | None) -> bytes:
        return self._timed(self._body.readline, *size)

    def _timed(self, read: Callable[..., bytes], *size: int | None) -> bytes:
        began_s = time.monotonic()
        self._clock.start(self._sock, self._left_s)
        try:
            return read(*size)
        finally:
            self._clock.stop(self._sock)
            self._left_s -= time.monotonic() - began_s


class Worker(gunicorn_settings.Worker):
    """Cuts off who takes too long."""

    def init_process(self) -> None:
        """Begin to serve."""
        self._clock, self._body_s = _Clock(), Settings().request_time_s
        super().init_process()

    def handle(self, conn: Any) -> Any:
        """Answer a request; return whether the connection stays."""
        self._clock.start(conn.sock, HEAD_S)
        try:
            return super().handle(conn)
        finally:
            self._clock.stop(conn.sock)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer a request whose head is there."""
        self._clock.stop(conn.sock)
        req.body = _Body(req.body, self._clock, conn.sock, self._body_s)
        return super().handle_request(req, conn)
