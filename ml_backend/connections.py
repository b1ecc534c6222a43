"""Which of a project's ML backends is this one: the one that says the version that we told that project.

Label Studio asks /setup when a connection is made, shown or listed, and keeps the version that it is answered. So what
we told each project is kept as well, where the worker and other machines see it. The address tells little: behind a
proxy it is the proxy's, and its port may be another backend's. Nothing heavy is imported here.
"""

from __future__ import annotations

from urllib.parse import urlsplit

import msgspec

from ml_backend.project_texts import ProjectTexts
from ml_backend.settings import Settings

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
    model_version: str | None = None  # the last one that it told Label Studio


def note_told(settings: Settings, project: str | int, version: str) -> None:
    """Remember which version we told a project, as Label Studio names it: 3, or 3.1795250578 with its creation."""
    _told(settings).keep(str(project).partition(".")[0], version)


def is_ours(settings: Settings, project: int, connection: Connection) -> bool:
    """Whether a project's connection leads to this backend.

    One that has never told Label Studio a version counts by its port, so that the doctor can say what keeps it away.
    """
    told = _told(settings).find(str(project))
    if told is not None and connection.model_version is not None:
        return _base(told) == _base(connection.model_version)
    unheard = connection.model_version is None and connection.state != "CO"
    return unheard and _port(connection.url) == settings.port


def _told(settings: Settings) -> ProjectTexts:
    return ProjectTexts(settings.shared / "told")


def _base(version: str) -> str:
    return version.partition("+")[0]


def _port(url: str) -> int | None:
    try:
        parts = urlsplit(url)
        return parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
