"""What Label Studio reports: tasks imported, annotations submitted, settings changed, training wanted.

Label Studio waits one second and does not retry, so everything here is quick. Submitted regions are compared with
the remembered answers and counted; learning from them is the [learning] work.
"""

from __future__ import annotations

import logging
from typing import Any

from ml_backend import metrics
from ml_backend.images import TaskImage
from ml_backend.jobs import encode_later
from ml_backend.label_config import read_config
from ml_backend.label_studio import read_batch, read_submitted
from ml_backend.service import Service
from model.types import Refusal

log = logging.getLogger(__name__)


def handle_event(service: Service, event: dict[str, Any]) -> dict[str, Any]:
    """Act on one event and return the answer; an action we do not know is acknowledged.

    Raises:
        Refusal: the event has no action.
    """
    action = event.get("action")
    if not isinstance(action, str):
        raise Refusal("the event has no 'action'; is this request from Label Studio's webhooks?")
    if action == "TASKS_CREATED":
        queued = _encode_tasks(service, event)
        return {"status": "ok", "queued": queued}
    if action in ("ANNOTATION_CREATED", "ANNOTATION_UPDATED"):
        _count_regions(service, event.get("annotation"))
    elif action == "ANNOTATIONS_CREATED":
        annotations = event.get("annotation")
        for annotation in annotations if isinstance(annotations, list) else ():
            _count_regions(service, annotation)
    elif action == "START_TRAINING":
        log.warning("training was asked for, but this version does not train yet; nothing was started")
        return {"status": "ok", "message": "this version does not train yet; nothing was started"}
    return {"status": "ok"}


def _encode_tasks(service: Service, event: dict[str, Any]) -> int:
    project, tasks = event.get("project"), event.get("tasks")
    text = project.get("label_config") if isinstance(project, dict) else None
    if not isinstance(text, str) or not isinstance(tasks, list):
        return 0
    images: list[TaskImage] = []
    try:
        config = read_config(text)
        for task in tasks:
            try:
                asked = read_batch(config, task) if isinstance(task, dict) else ()
            except Refusal as refusal:
                log.warning("an imported task is not encoded ahead: %s", refusal)
                continue
            images += [TaskImage(ask.task_id, ask.uri) for ask in asked]
    except Refusal as refusal:
        log.warning("imported tasks are not encoded ahead: %s", refusal)
    if not images:
        return 0
    return encode_later(service, images)


def _count_regions(service: Service, annotation: object) -> None:
    if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
        return
    kinds = [service.answers.judge(region_id, digest) for region_id, digest in read_submitted(annotation)]
    for kind in kinds:
        metrics.REGIONS.labels(kind).inc()
    if kinds:
        log.info(
            "annotation %s: %s", annotation.get("id"), ", ".join(f"{kinds.count(k)} {k}" for k in sorted(set(kinds)))
        )
