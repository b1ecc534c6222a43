"""The admin page: what serves, what was corrected, trainings, versions; see docs/admins.md.

Every change is a form that works without a script and is answered by a redirect and a message; `auth` asks for its CSRF
token. A page reads files and asks Redis once; what takes longer (the doctor, comparing versions) is done by a thread of
its own, and the page shows how far it is.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from flask import Blueprint, flash, render_template
from werkzeug.exceptions import HTTPException

from ml_backend import metrics, queues
from ml_backend.admin_checks import Checks
from ml_backend.admin_common import FILTERS, Answer, known_lines, show_at, telling
from ml_backend.admin_corrections import add_corrections
from ml_backend.admin_training import add_trainings
from ml_backend.admin_versions import add_versions
from ml_backend.readiness import why_no_corrections, why_no_trainings
from ml_backend.scoring import scorings
from ml_backend.service import Service
from ml_backend.settings import Settings
from model.types import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served:
    """What answers the requests of one line's project."""

    line: str
    own: str | None  # the version that the line names
    answers: str


def make_admin(service: Service) -> Blueprint:
    """Return the pages under /admin, to be registered before `auth.install`."""
    admin = Blueprint("admin", __name__, url_prefix="/admin", template_folder="templates", static_folder="static")
    settings, checks = service.settings, Checks(service.settings)
    for name, function in FILTERS.items():
        admin.add_app_template_filter(function, name)

    @admin.get("", strict_slashes=False)
    def overview() -> Answer:
        checks.renew()
        redis = queues.look(settings.redis_url)
        return render_template(
            "admin/overview.html",
            service=service,
            configured=service.lines()["configured"],
            served=_served(service),
            checks=checks.last(),
            checking=checks.running,
            redis=redis,
            scorings=scorings(settings),
            missing=why_no_corrections(redis) + why_no_trainings(redis),
            events=service.inbox.counts(),
            failures=service.inbox.failures()[:20],
            disks=_disks(settings),
            embeddings_bytes=_size_of(settings.shared / "embeddings"),
            answers=len(service.answers),
            cache=metrics.cache_counts(),
            dashboard=settings.rq_dashboard_url,
        )

    @admin.post("/checks")
    def check() -> Answer:
        checks.start()
        flash("The checks have been started; their results appear below.", "done")
        return show_at("admin.overview", "checks")

    @admin.post("/inbox/retry")
    def retry() -> Answer:
        with telling():
            count = service.inbox.retry()
            flash(f"{count} events will be tried again by the worker within half a minute.", "done")
        return show_at("admin.overview", "inbox")

    add_corrections(admin, service)
    add_trainings(admin, service)
    add_versions(admin, service)

    @admin.errorhandler(Refusal)
    def refuse(refusal: Refusal) -> Answer:
        return render_template("admin/error.html", title="That is not possible", said=str(refusal)), 422

    @admin.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Answer:
        title = error.name if error.code != 404 else "There is no such page"
        return render_template("admin/error.html", title=title, said=error.description or ""), error.code or 500

    return admin


def _served(service: Service) -> list[_Served]:
    found = []
    for line in known_lines(service):
        try:
            own = service.registry.active_id(line)
        except Refusal:  # of which the warnings tell
            own = None
        project = None if line == "shared" else line.removeprefix("project-")
        found.append(_Served(line=line, own=own, answers=service.version(project)))
    return found


def _disks(settings: Settings) -> dict[str, tuple[int, int]]:
    """Return free and whole bytes of the disks that hold data."""
    found = {}
    for name, folder in (("data", settings.data_dir), ("shared", settings.shared_dir)):
        if folder is not None:
            with contextlib.suppress(OSError):
                usage = shutil.disk_usage(folder)
                found[name] = (usage.free, usage.total)
    return found


def _size_of(folder: Path) -> int:
    size = 0
    for path in folder.glob("*/??/*"):
        with contextlib.suppress(OSError):  # pruned just now
            size += path.stat().st_size
    return size
