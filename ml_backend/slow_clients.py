"""A gunicorn worker in which no client takes for ever to send a request: each holds one of its threads meanwhile.

`gunicorn_settings` limits how long a client may be silent; one that drips single bytes never is. Here the head of a
request has to be there within `HEAD_S` as a whole, its body within GRACO_REQUEST_TIME_S and the time that its length
takes at `SLOWEST` (what nobody read is thrown away for `UNREAD_S`). Then the connection is shut for reading, so that
whoever waits for it goes on, and closed: Linux delivers what comes later all the same, and it must not be taken for
another request.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from werkzeug.exceptions import RequestTimeout

from ml_backend import gunicorn_settings
from ml_backend.settings import Settings

log = logging.getLogger(__name__)

HEAD_S = 10.0
"""Seconds in which the head of a request has to arrive."""
SLOWEST = 1e6
"""Bytes a second at which a body that tells its length may arrive, once GRACO_REQUEST_TIME_S are over."""
UNREAD_S = 5.0
"""Seconds in which the rest of a body that was answered unread has to arrive, for the connection to stay."""
_TICK_S = 0.5


class _Handle(socket.socket):
    """A second handle of a connection, which TLS leaves alone."""

    late = False  # it was cut off: nothing of it may be read any more

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(fileno=os.dup(sock.fileno()))


class _Clock:
    """The connections that are read from, each with when that has to be over; used from many threads."""

    def __init__(self) -> None:
        self._reading: dict[_Handle, float] = {}
        self._some = threading.Condition()
        threading.Thread(target=self._watch, name="slow-clients", daemon=True).start()

    def start(self, sock: _Handle, limit_s: float) -> None:
        """Give a connection so long from now."""
        with self._some:
            self._reading[sock] = time.monotonic() + limit_s
            self._some.notify()

    def stop(self, sock: _Handle) -> None:
        """Wait for this connection no more; whether it is late changes no more."""
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
                    sock.late = True
                    with contextlib.suppress(OSError):  # the client is gone
                        sock.shutdown(socket.SHUT_RD)
            time.sleep(_TICK_S)


class _Body:
    """The body of a request; all reading of it together may take so long."""

    def __init__(self, request: Any, clock: _Clock, sock: _Handle, limit_s: float) -> None:
        self._request, self._body, self._clock, self._sock = request, request.body, clock, sock
        self._limit_s = self._left_s = limit_s
        self._answered = False

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

    def answered(self) -> None:
        """Have what nobody read thrown away in a short time."""
        self._answered = True
        self._left_s = min(self._left_s, UNREAD_S)

    def _timed(self, read: Callable[..., bytes], *size: int | None) -> bytes:
        if self._sock.late:
            raise self._too_late()
        began_s = time.monotonic()
        self._clock.start(self._sock, self._left_s)
        try:
            found = read(*size)
        except Exception as error:
            self._clock.stop(self._sock)
            if self._sock.late:
                raise self._cut_off() from error
            raise
        finally:
            self._clock.stop(self._sock)
            self._left_s -= time.monotonic() - began_s
        if self._sock.late:  # what is there may be less than was asked for
            raise self._cut_off()
        return found

    def _cut_off(self) -> Exception:
        self._request.force_close()
        log.warning("%s; the client is cut off", self._sentence())
        return self._too_late()

    def _too_late(self) -> Exception:
        if self._answered:
            return TimeoutError(self._sentence())  # for gunicorn, which throws the rest away
        return RequestTimeout(self._sentence())

    def _sentence(self) -> str:
        if self._answered:
            return f"the rest of a body that was answered unread did not arrive within {UNREAD_S:.0f} s"
        return (
            f"the body of the request did not arrive within {self._limit_s:.0f} s "
            "(GRACO_REQUEST_TIME_S, and a second for each MB that it announced)"
        )


class Worker(gunicorn_settings.Worker):
    """Cuts off who takes too long."""

    def init_process(self) -> None:
        """Begin to serve."""
        self._clock, self._body_s = _Clock(), Settings().request_time_s
        super().init_process()

    def handle(self, conn: Any) -> Any:
        """Answer a request; return whether the connection stays."""
        conn.began = False
        with _Handle(conn.sock) as conn.handle:
            self._clock.start(conn.handle, HEAD_S)
            try:
                return super().handle(conn)
            finally:
                self._clock.stop(conn.handle)
                if conn.handle.late and not conn.began:
                    log.warning("the head of a request did not arrive within %.0f s; the client is cut off", HEAD_S)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer a request whose head is there."""
        self._clock.stop(conn.handle)
        if conn.handle.late:
            return False
        conn.began = True
        length = getattr(req.body.reader, "length", 0)  # chunks tell none
        req.body = _Body(req, self._clock, conn.handle, self._body_s + length / SLOWEST)
        stays = super().handle_request(req, conn)
        req.body.answered()
        return stays
