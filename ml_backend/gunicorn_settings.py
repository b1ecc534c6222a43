"""Read by gunicorn (`supervisor.web_command`): its lines look like ours; a dead process is left out of sums.

Whoever stops in the middle of a request, or of taking its answer, would hold one of the threads for good, /health with
the last of them; and no header names our routes: those of proxies are read by GRACO_PROXIES alone (`auth.install`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import sys
from typing import Any

from gunicorn import util
from gunicorn.glogging import Logger
from gunicorn.workers.gthread import ThreadWorker
from prometheus_client import values
from prometheus_client.multiprocess import mark_process_dead

from ml_backend import logs
from ml_backend.settings import Settings

_STALLED_S = 10  # without a byte, in the middle of a request or an answer

forwarded_allow_ips = ""
forwarder_headers = ""


class logger_class(Logger):  # type: ignore[misc]
    """Gunicorn's own lines through the handler of all the others; gunicorn looks for this name."""

    def setup(self, cfg: Any) -> None:
        """Take level and form from our settings."""
        super().setup(cfg)
        settings = Settings()
        logs.hide(settings.secrets())
        logs.configure(settings.log_level, as_json=settings.log_json)
        self.error_log.handlers.clear()
        self.error_log.propagate = True
        self.error_log.setLevel(max(logging.WARNING, logging.getLogger().level))

    def exception(self, msg: str, *args: Any, **kwargs: Any) -> None:
        """Log an error of ours with its traceback, a client that fell silent without."""
        if isinstance(sys.exc_info()[1], BlockingIOError):
            self.warning("a client fell silent for %d s in the middle of a request; it is cut off", _STALLED_S)
        else:
            super().exception(msg, *args, **kwargs)


class Worker(ThreadWorker):  # type: ignore[misc]
    """Lingers for a silent client in the thread that answered it; gunicorn's own does so where it accepts others."""

    def handle(self, conn: Any) -> Any:
        """Answer a request; return whether the connection stays."""
        stays = super().handle(conn)
        if stays is False:
            with contextlib.suppress(OSError):
                util.close_graceful(socket.socket(fileno=os.dup(conn.sock.fileno())))  # TLS knows no dup()
                conn.sock.shutdown(socket.SHUT_RDWR)  # so that gunicorn has nothing to wait for
        return stays


def when_ready(server: Any) -> None:
    """Limit how long a connection may say nothing while a thread waits for it."""
    for listener in server.LISTENERS:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # connections take them over from what accepts them
            listener.sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", _STALLED_S, 0))


def worker_exit(server: Any, worker: Any) -> None:
    """Have a process that ends leave images unencoded that nobody waits for: it has seconds."""
    app = getattr(worker, "wsgi", None)  # None: it was not loaded, or this is the arbiter
    if app is not None:
        app.extensions[app.name].drop_background()


def child_exit(server: Any, worker: Any) -> None:
    """Have gauges of a process that is no more left out of sums."""
    if values.ValueClass is not values.MutexValue:  # several processes count together
        mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
