"""The command that asks a running backend how it is, for containers: exit status 0 is well."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import IO

from ml_backend.settings import Settings

_LIMIT_S = 3.0


@dataclass(frozen=True, slots=True)
class Told:
    """What is wrong (nothing: it is well), and what is worth knowing besides."""

    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def ask_health(settings: Settings, *, ready: bool = False) -> Told:
    """Return what is wrong with the web process on this machine; nothing: it is alive (`ready`: and ready)."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    address = f"[{host}]" if ":" in host else host
    url = f"http://{address}:{settings.port}/health" + ("?ready=1" if ready else "")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=_LIMIT_S) as answer:
            return _read(answer)
    except urllib.error.HTTPError as error:
        told = _read(error)
        return told if told.reasons else Told((f"{url} answers {error.code}",))
    except (OSError, HTTPException) as error:
        return Told((f"{url} does not answer ({error}); is the web process running?",))


def _read(answer: IO[bytes]) -> Told:
    try:
        said = json.load(answer)
        return Told(*(tuple(str(one) for one in said.get(name, ())) for name in ("reasons", "notes")))
    except HTTPException as error:
        return Told((f"the web process's answer breaks off ({error})",))
    except (OSError, ValueError, AttributeError, TypeError):
        return Told()


def ask_worker(settings: Settings) -> Told:
    """Return what is wrong with the corrections worker on this machine; nothing: Redis has heard of it lately."""
    from ml_backend.queues import look
    from ml_backend.readiness import why_no_corrections

    if settings.redis_url is None:
        return Told(("GRACO_REDIS_URL is not set, and without Redis there is no worker",))
    return Told(tuple(why_no_corrections(look(settings.redis_url), host=socket.gethostname())))
