"""The admin's page on trainings: start, watch and cancel one, and see how others ended."""

from __future__ import annotations

from dataclasses import dataclass

from flask import Blueprint, flash, render_template
from markupsafe import Markup

from active_learning.registry import AdapterRegistry
from active_learning.status import TrainingStatus
from ml_backend import charts
from ml_backend.admin_common import Answer, given, known_lines, ledger, line_or_404, show_at, telling
from ml_backend.service import BoundedCache, Service
from ml_backend.trainings import cancel, folder_of, last_of, new_for, request, why_not
from model.types import Refusal

_SHOWN = 20  # of those that ended
_CHECKED = 100  # versions of which it is remembered whether their files are intact


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    name: str
    new: int | None  # corrections that none has learned from; None: not known here
    why_not: str | None
    why_not_thorough: str | None
    pending: TrainingStatus | None
    cancelled: bool
    curve: Markup  # of the one that is pending, or ended last
    ended: list[TrainingStatus]  # newest first

    @property
    def percent(self) -> int:
        """Steps done of the one that is pending."""
        return round(100 * self.pending.step / self.pending.steps) if self.pending and self.pending.steps else 0


def add_trainings(admin: Blueprint, service: Service) -> None:
    """Add the page to the blueprint."""
    settings = service.settings
    checked: BoundedCache[bool] = BoundedCache(_CHECKED)

    @admin.get("/training")
    def training() -> Answer:
        kept = {(line, version.id) for line in service.registry.lines() for version in service.registry.versions(line)}
        return render_template(
            "admin/training.html", lines=[_look(service, line, checked) for line in known_lines(service)], kept=kept
        )

    @admin.post("/training/start")
    def start_training() -> Answer:
        line = line_or_404(service, given("line"))
        with telling():
            stands = _look(service, line, checked)
            thorough = given("kind") == "thorough"
            why_not = stands.why_not_thorough if thorough else stands.why_not
            if why_not is not None:
                raise Refusal(f"no training of {line} was started: {why_not}")
            status = request(settings, line, "asked for on the admin page", thorough=thorough)
            if thorough and not status.thorough:  # another was asked for just now
                raise Refusal(f"no thorough training of {line} was started: one is {status.state} already")
            flash(f"Training {status.id} of {line} is queued.", "done")
        return show_at("admin.training", line)

    @admin.post("/training/cancel")
    def cancel_training() -> Answer:
        line = line_or_404(service, given("line"))
        with telling():
            found = cancel(settings, line)
            if found is None:
                raise Refusal(f"no training of {line} is pending any more")
            status, ended = found
            when = "is cancelled" if ended else "will stop at its next step"
            flash(f"Training {status.id} {when}; nothing of it is served.", "done")
        return show_at("admin.training", line)


def _look(service: Service, line: str, checked: BoundedCache[bool]) -> _Line:
    folder = folder_of(service.settings, line)
    pending, ended, losses = folder.pending(), folder.history(), folder.losses()
    last = folder.status()
    last_quick, last_thorough = (last_of(pending, ended, thorough=thorough) for thorough in (False, True))
    try:
        with ledger(service.settings) as store:
            new: int | None = new_for(store, folder)
            new_for_thorough = new_for(store, folder, thorough=True)
    except Refusal:
        new, new_for_thorough = None, 1
    matters = pending is None and 0 in (new, new_for_thorough)
    whole = not matters or _is_whole(service.registry, line, checked)
    return _Line(
        name=line,
        new=new,
        why_not=why_not(last_quick or last_thorough, 1 if new is None else new, whole=whole),
        why_not_thorough=why_not(last_thorough, new_for_thorough, whole=whole, thorough=True),
        pending=pending,
        cancelled=folder.cancelled,
        curve=charts.line(
            f"loss-{line}", "Loss by step", losses, until=float(last.steps if last is not None and last.steps else 0)
        ),
        ended=ended[::-1][:_SHOWN],
    )


def _is_whole(registry: AdapterRegistry, line: str, checked: BoundedCache[bool]) -> bool:
    """Whether the version of a line that is to serve can do so, or none of its own is.

    The page asks every two seconds, so a file is read again only once it has changed.
    """
    try:
        version = registry.active(line)
        if version is None:
            return True
        path = registry.path(version)
        found = path.stat()
    except (OSError, Refusal):
        return False
    key = (path, version.digest, version.base, found.st_mtime_ns, found.st_size)
    whole = checked.get(key)
    if whole is None:
        try:
            registry.intact(version)
            whole = True
        except Refusal:
            whole = False
        checked.put(key, whole)
    return whole
