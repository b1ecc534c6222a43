"""What Label Studio reports: tasks imported, annotations submitted, settings changed, training wanted.

Label Studio waits one second and does not retry, so an event is written down (`inbox`), answered, and acted on
elsewhere (`ingest`, by the worker).
"""

from __future__ import annotations

import logging
import re
from typing import Any

import msgspec

from ml_backend.images import TaskImage
from ml_backend.ingest import ACTIONS, project_event
from ml_backend.jobs import encode_later
from ml_backend.label_config import read_config
from ml_backend.label_studio import read_batch
from ml_backend.service import Service
from ml_backend.serving import lines_of, names_project
from ml_backend.trainings import request
from model.types import Refusal

log = logging.getLogger(__name__)

_ACTION = re.compile(r"[A-Z][A-Z_]{2,59}")


def _nothing() -> msgspec.Raw:
    return msgspec.Raw(b"null")


class EventBody(msgspec.Struct):
    """POST /webhook; what else it holds is kept as it came, and read later."""

    action: str | None = None
    project: msgspec.Raw = msgspec.field(default_factory=_nothing)
    tasks: msgspec.Raw = msgspec.field(default_factory=_nothing)


def handle_event(service: Service, event: EventBody, body: bytes) -> dict[str, Any]:
    """Write one event down or act on it, and return the answer; an action we do not know is acknowledged.

    Args:
        service: whose inbox it goes to.
        event: what is read of it at once.
        body: all of it, as it came.

    Raises:
        Refusal: the event has no action.
        sqlite3.Error: it could not be written down.
    """
    if event.action is None:
        raise Refusal("the event has no 'action'; is this request from Label Studio's webhooks?")
    if event.action == "START_TRAINING":
        return start_training(service, msgspec.json.decode(event.project))
    answer: dict[str, Any] = {"status": "ok"}
    tasks: list[dict[str, Any]] = []
    keep = event.action in ACTIONS
    if event.action == "TASKS_CREATED":
        found = msgspec.json.decode(event.tasks)
        tasks = [task for task in found if isinstance(task, dict)] if isinstance(found, list) else []
        keep = any(task.get("annotations") for task in tasks)
    if event.action == "PROJECT_UPDATED":
        project = msgspec.json.decode(event.project)
        keep = isinstance(project, dict)
        body = project_event(project) if keep else body
    if keep:
        service.hand_over.put(service.inbox.add(body, event.action))
    else:
        log.debug("event %s brings nothing to keep", event.action if _ACTION.fullmatch(event.action) else "of no kind")
    if event.action == "TASKS_CREATED":  # what it brought is safe by now
        answer["queued"] = _encode_tasks(service, msgspec.json.decode(event.project), tasks)
    return answer


def start_training(service: Service, project: object) -> dict[str, Any]:
    """Ask for a training on a project's corrections, and return its id as `job`.

    Args:
        service: whose settings name the line of adapters.
        project: as Label Studio sends it: an object with an id, or an id.

    Raises:
        Refusal: it does not say which project.
    """
    number = project.get("id") if isinstance(project, dict) else project
    if isinstance(number, bool) or not isinstance(number, str | int) or not names_project(number):
        raise Refusal("the request does not say which project to train for: its 'project' names none by id")
    line = lines_of(service.settings, number)[0]
    status = request(service.settings, line, "Start Training in Label Studio")
    log.info("training %s of %s was asked for", status.id, line)
    return {"status": "ok", "job": status.id}


def _encode_tasks(service: Service, project: object, tasks: list[dict[str, Any]]) -> int:
    text = project.get("label_config") if isinstance(project, dict) else None
    if not isinstance(text, str):
        return 0
    images: list[TaskImage] = []
    try:
        config = read_config(text)
        for task in tasks:
            try:
                asked = read_batch(config, task)
            except Refusal as refusal:
                log.warning("an imported task is not encoded ahead: %s", refusal)
                continue
            images += [TaskImage(ask.task_id, ask.uri) for ask in asked]
    except Refusal as refusal:
        log.warning("imported tasks are not encoded ahead: %s", refusal)
    if not images:
        return 0
    return encode_later(service, images)
