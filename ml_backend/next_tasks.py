"""Which task next: looks at a project's unlabelled images and gives each task the score Label Studio serves them by.

Label Studio's uncertainty sampling shows the task with the lowest prediction score first, but only among predictions
whose model version is the project's. So each task gets one prediction of ours, of the version that serves, without
regions (or with those of GRACO_PRELABEL), scored by `active_learning.selection`. With more than one annotator it draws
at random among all tasks that have such a prediction (1.23), so then only the most useful ones get one.

The version that Label Studio takes as the project's is moved to the new one where the project is on uncertainty
sampling and the version there was ours, or the title of our backend, which no prediction has; never from that of
another model.

What was computed is kept in DATA/selection, one line for each task: how unsure a version is of it in
<project>-<version>.jsonl, and what its images resemble, which is the same for all versions, in
<project>-features-<encoding>.jsonl. A second run goes on, and looks anew only at tasks whose image's address has
changed.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import quote

import msgspec
import numpy as np
import numpy.typing as npt
from rich.console import Console

from active_learning.selection import Uncertainty, feature, priorities, uncertainty
from ml_backend.families import GRACO, LIGHT
from ml_backend.fetch import Fetcher, make_fetcher, read_answer
from ml_backend.images import TaskImage
from ml_backend.label_config import LabelConfig, read_config
from ml_backend.label_studio import read_batch
from ml_backend.predictions import predict_tasks
from ml_backend.reconcile import backends_of
from ml_backend.service import Service
from ml_backend.settings import Settings
from model.bars import progress_bar
from model.segmenter import Segmenter
from model.types import Refusal

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST = 500
"""Tasks of a project that count: labelled ones, those annotated last; unlabelled ones, for the worker, the oldest."""
SAMPLING = "Uncertainty sampling"
SHARED_OUT = 20  # tasks that get a score where Label Studio draws among them at random
CLICKS = 8  # places an image is asked at
_PAGE = 100
_LIMIT_S = 60.0  # for one answer of Label Studio
_WIDTH = 512  # numbers of a feature
_OURS = re.compile(rf"({LIGHT}|{GRACO})-[0-9a-f]{{8}}(\+.*)?")


class _Project(msgspec.Struct):
    id: int
    label_config: str | None = None
    model_version: str | None = None
    sampling: str | None = None


class _Prediction(msgspec.Struct):
    id: int
    model_version: str | None = None
    score: float | None = None
    result: Any = None


class _Task(msgspec.Struct):
    id: int
    data: dict[str, Any]
    predictions: list[_Prediction] = []


class _Page(msgspec.Struct):
    total: int
    tasks: list[_Task]


class _Annotator(msgspec.Struct):
    id: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Look:
    """How unsure a version is of a task: of that of its images that it is least sure of."""

    task: int
    images: str  # digest of the addresses
    uncertainty: Uncertainty
    place: int  # of that image among the task's

    def line(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)

    @classmethod
    def read(cls, record: dict[str, Any]) -> Look:
        """Return what `line` wrote.

        Raises:
            KeyError, TypeError, ValueError: it did not, or not this version of it.
        """
        return cls(
            task=int(record["task"]),
            images=str(record["images"]),
            uncertainty=Uncertainty(**record["uncertainty"]),
            place=int(record["place"]),
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Likeness:
    """What a task's images resemble."""

    task: int
    images: str  # digest of the addresses
    features: npt.NDArray[np.float32]  # one for each image, N, _WIDTH

    def line(self) -> dict[str, Any]:
        """Return it as JSON."""
        features = base64.b64encode(self.features.astype("<f2").tobytes()).decode()
        return {"task": self.task, "images": self.images, "features": features}

    @classmethod
    def read(cls, record: dict[str, Any]) -> Likeness:
        """Return what `line` wrote.

        Raises:
            KeyError, TypeError, ValueError: it did not, or not this version of it.
        """
        numbers = np.frombuffer(base64.b64decode(record["features"], validate=True), "<f2").astype(np.float32)
        features = numbers.reshape(-1, _WIDTH)
        return cls(task=int(record["task"]), images=str(record["images"]), features=features)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run has come to."""

    version: str  # that the scores belong to
    looked: int  # tasks looked at in this run
    refused: int  # of these, how many images cannot be had
    left: int  # tasks still to be looked at
    unwritten: int  # scores that time did not suffice to write
    scored: int  # tasks that have a score now
    several: bool  # people annotate: Label Studio draws among the tasks that have a score
    advice: str  # what is still to be done so that Label Studio serves by them; empty if nothing

    @property
    def finished(self) -> bool:
        """Whether another run would find nothing to do."""
        return not self.left and not self.unwritten

    def __str__(self) -> str:
        """Say it to the person who asked."""
        said = f"{self.looked} tasks looked at, {self.refused} of them without an image, {self.left} still to look at; "
        said += f"{self.scored} have a score of {self.version}"
        if self.several:
            said += ", of which Label Studio shows any, since several people annotate"
        return f"{said}\n{self.advice}" if self.advice else said


def score_tasks(
    service: Service,
    project: int,
    *,
    limit: int | None = None,
    best: int | None = None,
    most: int | None = None,
    limit_s: float | None = None,
    refused: set[int] | None = None,
    set_sampling: bool = False,
    clicks: int = CLICKS,
    pause: Callable[[], None] = lambda: None,
    console: Console | None = None,
    report: Callable[[int, int], None] = lambda looked, of: None,
) -> Outcome:
    """Score a project's unlabelled tasks, so that the most useful one comes first in the label stream.

    Args:
        service: the model and its caches.
        project: its id in Label Studio.
        limit: unlabelled tasks looked at in this run at most; the next run goes on.
        best: tasks that get a score at most, the most useful ones; None: all, or `SHARED_OUT` where several annotate.
        most: unlabelled tasks that count at all, the oldest ones; None: all.
        limit_s: seconds for looking and writing; the next run goes on. Scores are written once all was looked at.
        refused: tasks that are not tried again; those whose image cannot be had are added.
        set_sampling: switch the project to uncertainty sampling by this version.
        clicks: places the network is asked at in each image.
        pause: called before each look; may wait while somebody clicks.
        console: where progress is shown; None: nowhere.
        report: called before each look with how many images were looked at, and how many shall be.

    Raises:
        Refusal: the family that serves has no embeddings, Label Studio cannot be reached or does not let us, or the
            model cannot be loaded.
    """
    if service.settings.family != LIGHT:
        raise Refusal(
            f"next tasks are scored by the light model's embeddings, which GRACO_FAMILY={service.settings.family} has "
            "none of; serve light, or choose another task sampling than uncertainty in the project's settings"
        )
    console = console or Console(quiet=True)
    studio = make_fetcher(service.settings)
    about = _get(studio, f"/api/projects/{project}", _Project)
    config = read_config(about.label_config or "")
    serving = service.serving(project)
    version = serving.model_version
    unlabelled = list(islice(_tasks(studio, project, labelled=False), most))
    labelled = list(islice(_tasks(studio, project, labelled=True), MOST))
    folder = service.settings.data_dir / "selection"
    looks = _Kept(folder / f"{project}-{version}.jsonl", Look.read)
    likenesses = _Kept(folder / f"{project}-features-{serving.segmenter.encoding}.jsonl", Likeness.read)
    refused = set() if refused is None else refused
    hopeless = len(refused)
    until_s = float("inf") if limit_s is None else time.monotonic() + limit_s
    unlike = [t for t in (*unlabelled, *labelled) if t.id not in refused and likenesses.get(config, t) is None]
    unseen = {task.id for task in unlike}
    missing = [t for t in unlabelled if t.id in unseen or (t.id not in refused and looks.get(config, t) is None)]
    wanted = [(task, False) for task in labelled if task.id in unseen]
    wanted += [(task, True) for task in missing[:limit]]  # opened next: encoded last, they are kept longest
    looked = 0
    with progress_bar(console) as bar:
        for task, unsure in bar.track(wanted, description="looking"):
            if time.monotonic() > until_s:
                break
            report(looked, len(wanted))
            looked += 1
            pause()
            try:
                look, likeness = _look(service, serving.segmenter, config, task, clicks if unsure else 0)
                if task.id in unseen:
                    likenesses.add(likeness)
                if look is not None:
                    looks.add(look)
            except Refusal as refusal:
                refused.add(task.id)
                log.warning("task %d has no score: %s", task.id, refusal)
        in_time = looked == len(wanted)
        scores = _scores(looks, likenesses, config, unlabelled, labelled) if in_time else {}
        several = len(_get(studio, f"/api/projects/{project}/annotators/", list[_Annotator])) > 1
        if best is None:
            best = SHARED_OUT if several else len(scores)
        by_id = {task.id: task for task in unlabelled}
        unwritten = len(scores)
        for place, (task_id, score) in enumerate(bar.track(scores.items(), description="writing")):
            if time.monotonic() > until_s:
                break
            unwritten -= 1
            task = by_id[task_id]
            regions = partial(_regions, service, config, project, task)
            _write(studio, task, version, score if place < best else None, regions)
    advice = ""
    if unwritten < len(scores) and (about.model_version, about.sampling) != (version, SAMPLING):
        served = {"model_version": version, "sampling": SAMPLING}
        if set_sampling or _follows(about, studio, service.settings):
            _send(studio, f"/api/projects/{project}", "PATCH", served)
        else:
            advice = (
                f"Label Studio does not serve by these scores yet; run this again with --set-sampling, or PATCH "
                f"/api/projects/{project} {json.dumps(served)} (predictions of other versions are then not shown)"
            )
    return Outcome(
        version=version,
        looked=looked,
        refused=len(refused) - hopeless,
        left=len(wanted) - looked + len(missing) - len(missing[:limit]),
        unwritten=unwritten,
        scored=min(best, len(scores) - unwritten),
        several=several,
        advice=advice,
    )


def wants_scores(settings: Settings, project: int) -> bool:
    """Whether scores of ours would be of use: the project is ours, and on uncertainty sampling by our versions.

    Raises:
        Refusal: Label Studio cannot be reached or does not let us.
    """
    studio = make_fetcher(settings)
    return _follows(_get(studio, f"/api/projects/{project}", _Project), studio, settings)


def _follows(about: _Project, studio: Fetcher, settings: Settings) -> bool:
    """Whether the project's version is ours to move."""
    if about.sampling != SAMPLING:
        return False
    backends = backends_of(studio, settings, about.id)
    version = about.model_version or ""
    titles = {"", *(backend.title or "" for backend in backends)}
    return bool(backends) and (version in titles or _OURS.fullmatch(version) is not None)


def _tasks(studio: Fetcher, project: int, *, labelled: bool) -> Iterator[_Task]:
    """Yield a project's unlabelled tasks, oldest first, with predictions; or the labelled, annotated last first."""
    counted = {"filter": "filter:tasks:total_annotations", "type": "Number", "value": 0}
    items = [counted | {"operator": "greater" if labelled else "equal"}]
    order = "-tasks:completed_at" if labelled else "tasks:id"
    query = {"filters": {"conjunction": "and", "items": items}, "ordering": [order]}
    fields = "task_only" if labelled else "all"
    path = f"/api/tasks?project={project}&page_size={_PAGE}&fields={fields}&resolve_uri=false"
    page, seen, total = 1, 0, 1
    while seen < total:
        found = _get(studio, f"{path}&page={page}&query={quote(json.dumps(query))}", _Page)
        if not found.tasks:
            return
        yield from found.tasks
        page, seen, total = page + 1, seen + len(found.tasks), found.total


def _images(config: LabelConfig, task: _Task) -> list[TaskImage]:
    return [TaskImage(ask.task_id, ask.uri) for ask in read_batch(config, {"id": task.id, "data": task.data})]


def _images_digest(images: Sequence[TaskImage]) -> str:
    return hashlib.sha256(json.dumps([image.uri for image in images]).encode()).hexdigest()[:16]


def _look(
    service: Service, segmenter: Segmenter, config: LabelConfig, task: _Task, clicks: int
) -> tuple[Look | None, Likeness]:
    """Look at a task's images; with no click allowed the network is not asked how unsure it is.

    Raises:
        Refusal: one of them cannot be had.
    """
    images = _images(config, task)
    digest = _images_digest(images)
    seen = [look_at(service, segmenter, image, clicks) for image in images]
    likeness = Likeness(task=task.id, images=digest, features=np.stack([vector for _, vector in seen]))
    unsure = [(found, place) for place, (found, _) in enumerate(seen) if found is not None]
    if not unsure:
        return None, likeness
    most, place = max(unsure, key=lambda one: one[0].value)
    return Look(task=task.id, images=digest, uncertainty=most, place=place), likeness


def look_at(
    service: Service, segmenter: Segmenter, image: TaskImage, clicks: int = CLICKS
) -> tuple[Uncertainty | None, npt.NDArray[np.float32]]:
    """Return how unsure the network is of an image, None with no click allowed, and the image's feature.

    Raises:
        Refusal: the image cannot be had.
    """
    encoded, info = service.encode_ahead(image)
    rng = np.random.default_rng(int(info.id[:16], 16))  # of the image: looked at again, it is the same
    found = uncertainty(segmenter, encoded, rng, clicks=clicks) if clicks else None
    return found, feature(encoded)


class _Record(Protocol):
    @property
    def task(self) -> int: ...
    @property
    def images(self) -> str: ...
    def line(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=_Record)


class _Kept(Generic[R]):
    """What is known by task, in memory and in a file that only grows."""

    def __init__(self, path: Path, read: Callable[[dict[str, Any]], R]) -> None:
        self._path = path
        self._known: dict[int, R] = {}
        if path.exists():
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, or of another version of this
                    record = read(json.loads(line))
                    self._known[record.task] = record

    def get(self, config: LabelConfig, task: _Task) -> R | None:
        """Return what is known of a task, unless its images have changed."""
        known = self._known.get(task.id)
        return known if known is not None and known.images == _images_digest(_images(config, task)) else None

    def add(self, record: R) -> None:
        self._known[record.task] = record
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(b"\n" * _is_torn(self._path) + json.dumps(record.line()).encode() + b"\n")


def _is_torn(path: Path) -> bool:
    """Whether the last line has no end: a run was killed while it wrote."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _scores(
    looks: _Kept[Look],
    likenesses: _Kept[Likeness],
    config: LabelConfig,
    unlabelled: Sequence[_Task],
    labelled: Sequence[_Task],
) -> dict[int, float]:
    """Return the score of each task that was looked at, most useful first."""
    unsure, features = {}, {}
    for task in unlabelled:
        look, likeness = looks.get(config, task), likenesses.get(config, task)
        if look is not None and likeness is not None:
            unsure[task.id] = look.uncertainty.value
            features[task.id] = likeness.features[look.place]
    corrected = [likeness.features[0] for task in labelled if (likeness := likenesses.get(config, task)) is not None]
    return priorities(unsure, features, np.stack(corrected) if corrected else np.empty((0, _WIDTH), np.float32))


def _write(studio: Fetcher, task: _Task, version: str, score: float | None, regions: Callable[[], list[Any]]) -> None:
    """Have one prediction of ours at a task, with this score; None: none, unless it holds regions.

    Predictions of earlier versions of ours go, unless they hold regions: annotations may have begun from those.
    """
    ours = [p for p in task.predictions if _OURS.fullmatch(p.model_version or "")]
    current = sorted((p for p in ours if p.model_version == version), key=lambda p: (bool(p.result), p.id))
    kept = current[-1] if current and (score is not None or current[-1].result) else None
    if kept is not None and kept.score != score:
        _send(studio, f"/api/predictions/{kept.id}/", "PATCH", {"score": 1.0 if score is None else score})
    if kept is None and score is not None:
        content = {"task": task.id, "model_version": version, "score": score, "result": regions()}
        _send(studio, "/api/predictions/", "POST", content)
    for old in ours:
        if old is not kept and not old.result:
            _send(studio, f"/api/predictions/{old.id}/", "DELETE")


def _regions(service: Service, config: LabelConfig, project: int, task: _Task) -> list[Any]:
    """Return what a new prediction shows: nothing, unless the operator wants tasks pre-labelled."""
    if not service.settings.prelabel:
        return []
    asked = [{"id": task.id, "data": task.data}]
    (answered,) = predict_tasks(service, config, asked, None, project=str(project))
    return list(answered["result"])


def _get(studio: Fetcher, path: str, kind: type[T]) -> T:
    return read_answer(_ask(studio, path, "GET"), path, kind)


def _send(studio: Fetcher, path: str, method: str, content: object = None) -> None:
    _ask(studio, path, method, None if content is None else json.dumps(content).encode())


def _ask(studio: Fetcher, path: str, method: str, content: bytes | None = None) -> bytes:
    answer = studio.ask(path, timeout_s=_LIMIT_S, method=method, content=content)
    if answer.status in (200, 201, 204) or (answer.status == 404 and method == "DELETE"):
        return answer.body
    route = f"{method} {path.partition('?')[0]}"
    if answer.status == 401 and studio.auth is not None:
        raise studio.auth.refused()
    if answer.status in (401, 403, 404):
        raise Refusal(
            f"Label Studio answered {answer.status} to {route}; there is no such project or task, or the token's user "
            "may not change it: use the token of a manager or administrator in LABEL_STUDIO_API_KEY"
        )
    raise Refusal(f"Label Studio answered {answer.status} to {route}; look into Label Studio's log")
