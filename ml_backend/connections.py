"""Which of a project's ML backends is this one: the one that says the version that we told that project.

Label Studio asks /setup when a connection is made, shown or listed, and keeps the version that it is answered. So what
we told each project is kept as well, where the worker and other machines see it. So is the version that the web process
starts with, for the time before it has told anybody. The address tells little: behind a proxy it is the proxy's, and
its port may be another backend's. Nothing heavy is imported here.
"""

from __future__ import annotations

import time
from urllib.parse import urlsplit

import msgspec

from ml_backend.project_texts import ProjectTexts
from ml_backend.settings import Settings

_LATELY_S = 86400.0  # seconds would do, but the clocks of machines that share a folder differ
NOT_CONNECTED = (
    "no project of Label Studio is connected to this backend, so nothing that webhooks lose is fetched, and no tasks "
    "are scored: connect them (python -m ml_backend connect --project ID), or see what keeps them away "
    "(python -m ml_backend doctor)"
)


class Connection(msgspec.Struct):
    """An ML backend as a project has it connected."""

    url: str
    state: str = ""  # CO connected, DI disconnected, ER error, TR training, PR predicting
    title: str | None = None
    is_interactive: bool = False
    error_message: str | None = None
    model_version: str | None = None  # the last one that it told Label Studio; empty: none that this keeps


def note_told(settings: Settings, project: str | int, version: str) -> None:
    """Remember which version we told a project, as Label Studio names it: 3, or 3.1795250578 with its creation."""
    _told(settings).keep(str(project).partition(".")[0], version)


def note_serves(settings: Settings, version: str) -> None:
    """Remember which version the web process starts with."""
    _serves(settings).keep("", version)


def is_ours(settings: Settings, project: int, connection: Connection) -> bool:
    """Whether a project's connection leads to this backend.

    Connected means that Label Studio has asked /setup for this very listing: if we did not hear it lately, another did.
    One without a version counts by its port while Label Studio does not get through, so that the doctor can say what
    keeps it away. Where we have told no project yet (an upgrade, a restored backup) the version of our base is enough.
    """
    told, connected = _told(settings).find(str(project)), connection.state == "CO"
    heard_s = _told(settings).kept_s(str(project))
    if connected and (heard_s is None or time.time() - heard_s > _LATELY_S):
        return False
    if not connection.model_version:  # with auto_update=false Label Studio keeps none of what we say
        return connected or _port(connection.url) == settings.port
    if told is None:
        if not _told(settings).empty:
            return False
        told = _serves(settings).find("")
    return told is not None and _base(told) == _base(connection.model_version)


def _told(settings: Settings) -> ProjectTexts:
    return ProjectTexts(settings.shared / "told")


def _serves(settings: Settings) -> ProjectTexts:
    return ProjectTexts(settings.shared / "told" / "serves")


def _base(version: str) -> str:
    return version.partition("+")[0]


def _port(url: str) -> int | None:
    try:
        parts = urlsplit(url)
        return parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
