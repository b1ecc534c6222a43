"""The command that asks a running backend how it is, for containers: exit status 0 is well."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request

from ml_backend.settings import Settings

_LIMIT_S = 3.0


def ask_health(settings: Settings, *, ready: bool = False) -> list[str]:
    """Return what is wrong with the web process on this machine; empty: it is alive (`ready`: and ready)."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    address = f"[{host}]" if ":" in host else host
    url = f"http://{address}:{settings.port}/health" + ("?ready=1" if ready else "")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=_LIMIT_S):
            return []
    except urllib.error.HTTPError as error:
        return _reasons(error) or [f"{url} answers {error.code}"]
    except OSError as error:
        return [f"{url} does not answer ({error}); is the web process running?"]


def _reasons(error: urllib.error.HTTPError) -> list[str]:
    try:
        return [str(reason) for reason in json.load(error)["reasons"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def ask_worker(settings: Settings) -> list[str]:
    """Return what is wrong with the corrections worker on this machine; empty: Redis has heard of it lately."""
    from ml_backend.readiness import why_no_corrections

    if settings.redis_url is None:
        return ["GRACO_REDIS_URL is not set, and without Redis there is no worker"]
    return why_no_corrections(settings.redis_url, host=socket.gethostname())
