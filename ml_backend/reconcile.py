"""What webhooks lost, fetched from Label Studio: annotations newer than the ledger knows, and those it deleted.

Everything goes through the inbox and the same `ingest` as an event does. An annotation counts as deleted only when a
complete listing of the project lacks it and Label Studio, asked for it by its id, says that it is not there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from ml_backend.connections import Connection, is_ours
from ml_backend.fetch import Fetcher, TooLarge, make_fetcher, read_answer
from ml_backend.ingest import Intake, annotation_event, ingest, note_classes
from ml_backend.label_studio import Json, changed_s
from ml_backend.settings import Settings
from model.types import Refusal

log = logging.getLogger(__name__)

T = TypeVar("T")

_PAGE = 64  # tasks, with all their masks; a power of two, so that halves of a page are pages
_PROJECTS_PAGE = 100
_LIMIT_S = 60.0  # of one page
_MARGIN_S = 300.0  # by which clocks, and requests under way, may differ
_NEWEST_FIRST = quote('{"ordering":["-tasks:updated_at"]}')
_BY_ID = quote('{"ordering":["tasks:id"]}')


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciled:
    """What was found."""

    projects: int  # connected to us, or the one that was asked for
    added: int  # annotations put into the inbox
    deleted: int  # annotations that Label Studio no longer has
    ids: tuple[int, ...]  # of the projects that could be compared


class _Project(msgspec.Struct):
    id: int
    label_config: str | None = None
    updated_at: str | None = None


class _Projects(msgspec.Struct):
    results: list[_Project]
    next: str | None = None


class _Tasks(msgspec.Struct):
    tasks: list[dict[str, Any]]
    total: int


def reconcile(
    settings: Settings,
    intake: Intake,
    *,
    project: int | None = None,
    since_s: Mapping[int, float] | None = None,
    report: Callable[[int, int, int], None] | None = None,
) -> Reconciled:
    """Put into the inbox what Label Studio has and the ledger has not, and delete what it has no longer.

    Args:
        settings: Label Studio's address and token, and how we know projects that are connected to us.
        intake: where it goes.
        project: only this one, connected or not; None: all that are connected to us.
        since_s: UTC, by project; of these only tasks changed since then are looked at, and deletions are left to
            another time.
        report: is called with a project's id, its tasks looked at and how many it has.

    Raises:
        Refusal: Label Studio cannot be asked, or the token's user may not see the projects.
    """
    studio = make_fetcher(settings)
    projects = [_get(studio, f"/api/projects/{project}/", _Project)] if project is not None else None
    connected, added, deleted = 0, 0, 0
    looked: list[int] = []
    for one in projects if projects is not None else _connected(studio, settings):
        connected += 1
        try:
            new, gone = _project(studio, intake, one, (since_s or {}).get(one.id), report)
        except Refusal as refusal:
            if projects is not None:
                raise
            log.warning("project %d could not be compared: %s", one.id, refusal)
            continue
        looked.append(one.id)
        added, deleted = added + new, deleted + gone
    return Reconciled(projects=connected, added=added, deleted=deleted, ids=tuple(looked))


def take_in(intake: Intake, report: Callable[[int, int], None] | None = None, *, failed_s: float | None = None) -> None:
    """Act on all events of the inbox that are undone, in this process.

    Args:
        intake: whose inbox.
        report: is called with how many were acted on and how many there are.
        failed_s: leaves out those that failed lately, as `Inbox.undone` has it; None: they are tried as well.
    """
    waiting = intake.inbox.undone(1_000_000, 0, failed_s=failed_s)
    place = 0
    while place < len(waiting):
        waiting += ingest(intake, waiting[place])
        place += 1
        if report is not None:
            report(place, len(waiting))


def _connected(studio: Fetcher, settings: Settings) -> Iterator[_Project]:
    page = 1
    while True:
        query = f"page={page}&page_size={_PROJECTS_PAGE}&include=id,label_config,updated_at"
        found = _get(studio, f"/api/projects?{query}", _Projects)
        for project in found.results:
            if backends_of(studio, settings, project.id):
                yield project
        if not found.next:
            return
        page += 1


def backends_of(studio: Fetcher, settings: Settings, project: int) -> list[Connection]:
    """Return the connections of a project that lead to us; none: it is not connected.

    Raises:
        Refusal: Label Studio cannot be asked, or the token's user may not see the project.
    """
    found = _get(studio, f"/api/ml?project={project}", list[Connection])
    return [connection for connection in found if is_ours(settings, project, connection)]


def _project(
    studio: Fetcher,
    intake: Intake,
    project: _Project,
    since_s: float | None,
    report: Callable[[int, int, int], None] | None,
) -> tuple[int, int]:
    begun_s = time.time()
    try:
        note_classes(intake, str(project.id), msgspec.to_builtins(project), received_s=begun_s)
    except Refusal as refusal:
        log.warning("the classes of project %d are not known: %s", project.id, refusal)
    known = intake.corrections.known(str(project.id))
    seen: set[int] = set()
    present: set[int] = set()
    totals: set[int] = set()
    added, complete, place, size = 0, True, 0, _PAGE
    while True:
        order = _BY_ID if since_s is None else _NEWEST_FIRST
        path = f"/api/tasks?project={project.id}&page={place // size + 1}&page_size={size}&query={order}&fields="
        try:
            found = _get(studio, f"{path}all", _Tasks)
        except TooLarge as refusal:
            if size > 1:
                size //= 2
                continue
            found, complete = _get(studio, f"{path}task_only", _Tasks), False
            log.warning(
                "task %s of project %d is not compared, and nothing of the project is taken for deleted: %s",
                *(found.tasks[0].get("id") if found.tasks else "?", project.id, refusal),
            )
        totals.add(found.total)
        for task in found.tasks:
            annotations = task.get("annotations")
            if not isinstance(annotations, list) or not isinstance(task.get("id"), int):
                complete = False
                continue
            seen.add(task["id"])
            for annotation in annotations:
                number = annotation.get("id") if isinstance(annotation, dict) else None
                if not isinstance(number, int):
                    complete = False
                    continue
                present.add(number)
                if (changed_s(annotation) or begun_s) > known.get(number, 0):
                    added += _add(intake, annotation, task, project)
        if report is not None:
            report(project.id, len(seen), found.total)
        place += size
        if place >= found.total or not found.tasks or _is_older(found.tasks[-1], since_s):
            break
        if size < _PAGE and place % (2 * size) == 0:
            size *= 2
    if since_s is not None or not complete or totals != {len(seen)}:  # tasks came or went meanwhile
        return added, 0
    for number in sorted(known.keys() - present):
        if _status(studio, f"/api/annotations/{number}/") != 404:
            present.add(number)
    gone = intake.corrections.delete_missing(str(project.id), present, before_s=begun_s)
    if gone:
        log.info("project %d: Label Studio no longer has the annotations %s", project.id, gone)
    return added, len(gone)


def _add(intake: Intake, annotation: Json, task: Json, project: _Project) -> bool:
    """Put an annotation into the inbox; return whether it is to be acted on."""
    body = annotation_event(annotation, task, {"id": project.id, "label_config": project.label_config})
    key = intake.inbox.add(body, "ANNOTATION_UPDATED", again=True)  # the ledger lacks it, whatever was done before
    return intake.inbox.state(key) == "undone"


def _is_older(task: Json, since_s: float | None) -> bool:
    return since_s is not None and (changed_s(task) or 0) < since_s - _MARGIN_S


def _status(studio: Fetcher, path: str) -> int:
    return studio.ask(path, timeout_s=_LIMIT_S).status


def _get(studio: Fetcher, path: str, kind: type[T]) -> T:
    """Return what Label Studio's API says, of the shape we expect."""
    answer = studio.ask(path, timeout_s=_LIMIT_S)
    route = path.partition("?")[0]
    if answer.status == 401 and studio.auth is not None:
        raise studio.auth.refused()
    if answer.status != 200:
        raise Refusal(
            f"Label Studio answered {answer.status} to {route}; see that LABEL_STUDIO_API_KEY is the token of a user "
            "who may see the project, and look into Label Studio's log"
        )
    return read_answer(answer.body, path, kind)
