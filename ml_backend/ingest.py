"""From an event in the inbox to the ledger of corrections, with the images they are on.

Doing it twice is doing it once, and events may come in any order: the ledger goes by the time of the last change, and
deletions are final. An event counts as done only when the ledger has it on the disk; what fails is tried again. One
that brings several annotations is split, so that each is tried, and limited in time, by itself.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from active_learning.corrections import Correction, CorrectionStore
from active_learning.images import ImageStore
from ml_backend.answers import AnswerStore
from ml_backend.fetch import make_fetcher
from ml_backend.images import ImageInfo, ImageSource, check_size, is_plain, to_png
from ml_backend.inbox import Event, Inbox
from ml_backend.label_config import read_config
from ml_backend.label_studio import Json, Submitted, SubmittedRegion, changed_s, read_corrections
from ml_backend.settings import Settings
from model.types import Refusal

log = logging.getLogger(__name__)

ACTIONS = (
    *("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_CREATED", "ANNOTATIONS_DELETED"),
    *("TASKS_CREATED", "TASKS_DELETED", "PROJECT_UPDATED"),
)
"""What is worth a place in the inbox; of imports those that carry annotations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """All that is read and written for an event."""

    inbox: Inbox
    corrections: CorrectionStore
    images: ImageStore
    answers: AnswerStore
    source: ImageSource
    max_pixels: int

    def close(self) -> None:
        """Close the files."""
        for part in (self.inbox, self.corrections, self.answers, self.source):
            part.close()


def open_intake(settings: Settings) -> Intake:
    """Open the files of a data folder; the caller closes them."""
    data = settings.data_dir
    return Intake(
        inbox=Inbox(data / "inbox.sqlite"),
        corrections=CorrectionStore(data / "corrections.sqlite"),
        images=ImageStore(data / "images"),
        answers=AnswerStore(data / "answers.sqlite", limit=settings.remembered_answers),
        source=ImageSource(
            make_fetcher(settings),
            max_pixels=settings.image_max_megapixels * 10**6,
            ttl_s=settings.image_ttl_s,
        ),
        max_pixels=settings.image_max_megapixels * 10**6,
    )


def ingest(intake: Intake, key: str) -> tuple[str, ...]:
    """Act on one event of the inbox, and mark it done or failed; one that is done already is left alone.

    Returns:
        The keys of the events it was split into, which are still to be acted on.

    Raises:
        sqlite3.Error: not even the failure could be noted; the event stays undone.
    """
    event = intake.inbox.read(key)
    if event is None:
        return ()
    try:
        body = json.loads(event.body)
        project = _id(body.get("project") if isinstance(body, dict) else None, "project")
    except (ValueError, RecursionError) as error:
        return _nothing(intake, event, str(error))
    try:
        return _act(intake, event, project, body)
    except Exception as error:
        said = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
        again = intake.inbox.failed(key, said)
        log.warning(
            "event %s (%s) could not be taken in, %s: %s",
            *(key, event.action, "it will be tried again" if again else "run 'reconcile --retry' once it is mended"),
            said,
            exc_info=None if isinstance(error, Refusal) else error,
        )
    return ()


def _nothing(intake: Intake, event: Event, why: str) -> tuple[str, ...]:
    """Be done with an event that trying again would not mend."""
    log.warning("event %s (%s) is nothing to learn from: %s", event.key, event.action, why)
    intake.inbox.done(event.key, note=why)
    return ()


def _act(intake: Intake, event: Event, project: str, body: Json) -> tuple[str, ...]:
    if event.action in ("ANNOTATION_CREATED", "ANNOTATION_UPDATED"):
        try:
            submitted = _read(intake, event, project, body)
        except Refusal as refusal:
            return _nothing(intake, event, str(refusal))
        kinds, left_out = _learn(intake, submitted)
        note = "; ".join(f"{region}: {reason}" for region, reason in left_out) or None
        intake.inbox.done(event.key, kinds, note=note)
        return ()
    split: tuple[str, ...] = ()
    if event.action == "PROJECT_UPDATED":
        try:
            note_classes(intake, project, body["project"], received_s=event.received_s)
        except Refusal as refusal:
            return _nothing(intake, event, str(refusal))
    elif event.action == "ANNOTATIONS_DELETED":
        intake.corrections.delete(project, _ids(body.get("annotations")))
    elif event.action == "TASKS_DELETED":
        intake.corrections.delete_tasks(project, _ids(body.get("tasks")))
    else:
        split = tuple(intake.inbox.add(part, "ANNOTATION_CREATED") for part in _split(event.action, body))
    intake.inbox.done(event.key)
    return split


def annotation_event(annotation: Json, task: Json, project: Json) -> bytes:
    """Return the body of an event for one annotation; the same annotation makes the same bytes.

    Args:
        annotation: as the API gives it.
        task: its task; only id and data go into it.
        project: only id and label_config go into it.
    """
    event = {
        "action": "ANNOTATION_UPDATED",
        "annotation": annotation,
        "task": {"id": task.get("id"), "data": task.get("data")},
        "project": {"id": project.get("id"), "label_config": project.get("label_config")},
    }
    return json.dumps(event, sort_keys=True, separators=(",", ":")).encode()


def project_event(project: Json) -> bytes:
    """Return the body of an event for a changed project: its id, configuration and time of the change, no more."""
    kept = {name: project.get(name) for name in ("id", "label_config", "updated_at")}
    return json.dumps({"action": "PROJECT_UPDATED", "project": kept}).encode()


def note_classes(intake: Intake, number: str, project: Json, *, received_s: float) -> None:
    """Have the ledger know the classes that a project has now.

    Args:
        intake: whose ledger.
        number: the project's id.
        project: as Label Studio gives it.
        received_s: UTC, when it did; stands where the project does not say when it was changed.

    Raises:
        Refusal: its labelling configuration cannot be read.
    """
    config = read_config(project.get("label_config") or "")
    outputs = [tag for tag in config.outputs if tag.labelled]
    labels = {label for tag in outputs for label in tag.labels}
    labels |= {label.value for tag in config.classes for label in tag.labels}
    updated_s = changed_s({"updated_at": project.get("updated_at")}) or received_s
    any_may_occur = any(tag.dynamic for tag in outputs) or any(tag.dynamic for tag in config.classes)
    intake.corrections.note_classes(number, None if any_may_occur else labels, updated_s=updated_s)


def _split(action: str, body: Json) -> Iterator[bytes]:
    """Return an event for each annotation of a bulk action or an import."""
    project = body["project"] if isinstance(body.get("project"), dict) else {"id": body.get("project")}
    if action == "TASKS_CREATED":
        for task in _objects(body.get("tasks")):
            for annotation in _objects(task.get("annotations")):
                yield annotation_event(annotation, task, project)
        return
    tasks = {task.get("id"): task for task in _objects(body.get("task"))}
    for annotation in _objects(body.get("annotation")):
        yield annotation_event(annotation, tasks.get(annotation.get("task"), {}), project)


def _learn(intake: Intake, submitted: Submitted) -> tuple[Mapping[str, int], list[tuple[str, str]]]:
    """Write an annotation into the ledger; return its regions by kind, and those left out with the reason."""
    what = f"annotation {submitted.annotation} of project {submitted.project}"
    store, project, number = intake.corrections, submitted.project, submitted.annotation
    if submitted.skipped:
        store.retire(project, number, updated_s=submitted.updated_s, task=submitted.task)
        return {}, []
    if store.is_deleted(project, number, submitted.task):  # its photo shall not come back either
        return {}, []
    kept, left_out = _with_images(intake, submitted)
    for region, reason in left_out:
        log.warning("region %s of %s is left out: %s", region, what, reason)
    if not store.replace(project, number, kept, updated_s=submitted.updated_s, task=submitted.task):
        return {}, left_out
    kinds: Counter[str] = Counter(correction.kind for correction in kept)
    if kinds:
        log.info("%s: %s", what, ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    return kinds, left_out


def _read(intake: Intake, event: Event, project: str, body: Json) -> Submitted:
    annotation, task, owner = body.get("annotation"), body.get("task"), body["project"]
    if not isinstance(annotation, dict):
        raise Refusal("the event holds no annotation")
    config = owner.get("label_config") if isinstance(owner, dict) else None
    return read_corrections(
        annotation,
        task if isinstance(task, dict) else {},
        read_config(config if isinstance(config, str) else ""),
        project,
        intake.answers.find,
        received_s=event.received_s,
        max_pixels=intake.max_pixels,
    )


def _with_images(intake: Intake, submitted: Submitted) -> tuple[list[Correction], list[tuple[str, str]]]:
    """Return the regions as corrections, their images kept, and those left out with the reason.

    Raises:
        Refusal: an image cannot be had.
    """
    images: dict[str, ImageInfo] = {}
    kept: list[Correction] = []
    left_out = list(submitted.left_out)
    for region in submitted.regions:
        if region.uri not in images:
            images[region.uri] = _keep_image(intake, submitted.task, region.uri)
        try:
            check_size(images[region.uri], region.width, region.height)
        except Refusal as refusal:
            left_out.append((region.region, str(refusal)))
            continue
        kept.append(_correction(submitted, region, images[region.uri].id))
    return kept, left_out


def _keep_image(intake: Intake, task: int | None, uri: str) -> ImageInfo:
    """Return a task's image, kept so that trainings find it when Label Studio is away."""
    info = intake.source.identify(task, uri)
    if info is not None and intake.images.path(info.id) is not None:
        return info
    image = intake.source.load(task, uri)
    if is_plain(image.data):
        intake.images.put(image.id, image.data, checked=False)
    else:
        intake.images.put(image.id, to_png(image.pixels), checked=False)
    return ImageInfo(image.id, image.width, image.height)


def _correction(submitted: Submitted, region: SubmittedRegion, image: str) -> Correction:
    return Correction(
        project=submitted.project,
        annotation=submitted.annotation,
        region=region.region,
        task=submitted.task,
        image=image,
        height=region.height,
        width=region.width,
        mask=region.mask,
        label=region.label,
        granularity=region.granularity,
        phrase=region.phrase,
        clicks=region.clicks,
        kind=region.kind,
        proposed=region.proposed,
        adapter=region.adapter,
        annotator=submitted.annotator,
        ground_truth=submitted.ground_truth,
        updated_s=submitted.updated_s,
    )


def _id(value: Any, what: str) -> str:
    number = value.get("id") if isinstance(value, dict) else value
    if not isinstance(number, int) or isinstance(number, bool):
        raise Refusal(f"the event does not say which {what} it is of")
    return str(number)


def _ids(values: object) -> list[int]:
    return [int(_id(value, "one")) for value in values] if isinstance(values, list) else []


def _objects(values: object) -> Iterable[Json]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []
