"""What the admin pages have in common: messages, redirects, lines, and how numbers and times are written."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import Any

from flask import abort, flash, redirect, request, url_for
from flask.typing import ResponseReturnValue

from active_learning.corrections import CorrectionStore
from active_learning.lines import SHARED, is_line, line_of
from active_learning.status import lines_in
from ml_backend.service import Service
from ml_backend.settings import Settings
from model.types import Refusal

Answer = ResponseReturnValue
_LONGEST_FIELD = 200  # characters


def show_at(endpoint: str, anchor: str | None = None, **values: Any) -> Answer:
    """Return the redirect that follows a change, to a place on a page."""
    return redirect(url_for(endpoint, _anchor=anchor, **values), 303)


@contextmanager
def telling() -> Iterator[None]:
    """Have what cannot be done told on the page that comes next."""
    try:
        yield
    except Refusal as refusal:
        flash(_sentence(str(refusal)), "error")
    except OSError as error:
        flash(f"That was not possible: {error.strerror or error}. Free some space, or mend permissions.", "error")
    except sqlite3.Error as error:
        flash(f"That was not possible: the database cannot be written ({error}).", "error")


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text[:1].upper()}{text[1:]}."


def given(name: str) -> str:
    """Return a field of the form that was sent, or of the query."""
    return request.values.get(name, "")[:_LONGEST_FIELD].strip()


def number(name: str, *, default: int, least: int, most: int) -> int:
    """Return a number of the form or the query, within limits."""
    text = given(name)
    return max(least, min(most, int(text[:9]))) if text.isascii() and text.isdigit() else default


@contextmanager
def ledger(settings: Settings) -> Iterator[CorrectionStore]:
    """Give the corrections of this machine.

    Raises:
        Refusal: they are kept elsewhere, or cannot be read.
    """
    if settings.ledger == "elsewhere":
        raise Refusal("corrections are kept by another machine (GRACO_LEDGER=elsewhere); open the admin page there")
    try:
        with closing(CorrectionStore(settings.data_dir / "corrections.sqlite")) as store:
            yield store
    except sqlite3.Error as error:
        raise Refusal(
            f"the ledger of corrections cannot be read ({error}); see that its disk can be written"
        ) from error


def projects_of(settings: Settings) -> list[str]:
    """Return the projects with corrections, or none where that is not known here."""
    try:
        with ledger(settings) as store:
            return sorted(store.projects(), key=lambda project: (len(project), project))
    except Refusal:
        return []


def known_lines(service: Service) -> list[str]:
    """Return all lines that something is known of, the shared one first."""
    settings = service.settings
    found = {SHARED, *service.registry.lines(), *lines_in(settings.shared / "trainings")}
    if settings.adapter_line == "project":
        found |= {line_of(project) for project in projects_of(settings)}
    return sorted(filter(is_line, found), key=lambda line: (line != SHARED, len(line), line))


def line_or_404(service: Service, line: str) -> str:
    """Return a line that is known, or end the request."""
    if line not in known_lines(service):
        abort(404, "Nothing is known of such a line.")
    return line


def _moment(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _lasting(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{_lasting(max(0.0, time.time() - seconds))} ago"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.1f} MB"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _figure(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value) if isinstance(value, int) else ""


FILTERS: dict[str, Callable[[Any], str]] = {
    **{"moment": _moment, "lasting": _lasting, "ago": _ago, "size": _size, "share": _share, "figure": _figure},
}
"""By name in templates: UTC seconds; seconds; UTC seconds; bytes; 0..1; a number or something else."""
