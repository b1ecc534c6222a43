"""A simulated team: it annotates a folder of photos through HTTP, and we see whether the backend learns from it.

The backend runs as users run it, in processes of its own with a Redis, on an empty data folder. A robot clicks at each
mask's own level until the answer is good or the annotator would take the brush, submits what it wanted as a webhook,
presses Start Training now and then, and waits until the new version serves. Before and after, the robot counts its
clicks on the photos that no training sees, and on the bundled reference set.
"""

from __future__ import annotations

import functools
import http.server
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import requests

from active_learning.bundle import bundled_sets
from active_learning.corrections import held_out
from active_learning.gate import ObjectCurve, Scores, objects_of, scores_of
from active_learning.status import ENDED, TrainingFolder, TrainingStatus
from ml_backend import brush
from ml_backend.label_config import make_config
from model.annotations import AnnotatedImage, AnnotatedMask, AnnotationSet
from model.evaluation.report import draw_click_curves
from model.metrics import iou
from model.robot import next_click
from model.types import Click, Granularity, Mask, Refusal

log = logging.getLogger(__name__)

Json = dict[str, Any]
PROJECT = 1
_LEVELS = tuple(level / 10 for level in range(1, 11))
_CLASS = "Object"
_START_S = 180.0
_TRAINING_S = 1800.0
_LEAST_AREA = 0.001  # of the photo: what is smaller nobody clicks


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is simulated."""

    rounds: tuple[int, ...] = (100, 300)  # corrections after which a training is asked for
    budget: int = 20  # clicks on one object at most, when we measure
    patience: int = 5  # clicks until the annotator takes the brush, when it annotates
    limit: int = 40  # objects measured of hold-out and reference
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What was measured after so many corrections."""

    corrections: int
    version: str
    state: str  # how the training ended; empty before the first
    seconds_to_serving: float | None  # from Start Training; None: nothing new serves
    holdout: Scores
    reference: Scores
    said: str = ""


class Backend:
    """A backend in processes of its own, and the photos it is told of."""

    def __init__(self, data_dir: Path, photos: Path, *, environment: dict[str, str] | None = None) -> None:
        """Start it, and wait until it can answer.

        Args:
            data_dir: its data folder.
            photos: the folder whose files are served to it.
            environment: settings beside the usual ones.

        Raises:
            Refusal: it does not come up; its log is in `data_dir`/simulate.log.
        """
        self.data_dir = data_dir
        data_dir.mkdir(parents=True, exist_ok=True)
        handler = functools.partial(_Quiet, directory=str(photos))
        self._photos = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._photos.serve_forever, daemon=True).start()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        settings = {
            "GRACO_DATA_DIR": str(data_dir),
            "GRACO_PORT": str(port),
            "GRACO_ALLOW_HOSTS": "127.0.0.1",
            "GRACO_TRAIN_AFTER": "0",
            "GRACO_TRAIN_TOO_FEW": "publish",  # an admin who says yes
            "GRACO_REDIS_URL": "",
            "LABEL_STUDIO_URL": "",
        }
        self._log = (data_dir / "simulate.log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ml_backend", "run"],
            env=os.environ | settings | (environment or {}),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.session = requests.Session()
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        until_s = time.monotonic() + _START_S
        while time.monotonic() < until_s and self._process.poll() is None:
            try:
                if self.session.get(f"{self.url}/health", timeout=2).json().get("model_loaded"):
                    return
                self.session.post(f"{self.url}/setup", json={"project": f"{PROJECT}.0"}, timeout=5)
            except (requests.RequestException, ValueError):
                pass
            time.sleep(0.5)
        raise Refusal(f"the backend does not come up; {self.data_dir / 'simulate.log'} says why")

    def close(self) -> None:
        """Stop everything."""
        self._photos.shutdown()
        self._photos.server_close()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()

    def photo(self, path: str) -> str:
        """Return the address of a photo, given its path below the folder."""
        return f"http://127.0.0.1:{self._photos.server_address[1]}/{path}"

    def post(self, path: str, body: Json, timeout_s: float = 120) -> Json:
        """Return the answer to a POST.

        Raises:
            Refusal: it is an error.
        """
        answer = self.session.post(f"{self.url}{path}", json=body, timeout=timeout_s)
        if answer.status_code not in (200, 201):
            raise Refusal(f"{path} answered {answer.status_code}: {answer.text[:300]}")
        content: Json = answer.json()
        return content

    def version(self) -> str:
        """Return the version that serves the project, as Label Studio is told it."""
        return str(self.post("/setup", {"project": f"{PROJECT}.0"})["model_version"])


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def free_port() -> int:
    """Return a port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """The robot at one backend: clicks, submits, presses buttons."""

    backend: Backend
    config: str

    def click(self, task: Json, size: tuple[int, int], clicks: Sequence[Click], level: Granularity) -> tuple[Mask, str]:
        """Return the mask that clicks at a level give, and its region's id.

        Raises:
            Refusal: there is no mask in the answer.
        """
        result = [item for n, click in enumerate(clicks) for item in _click(n, click, size, level)]
        answer = self.backend.post(
            "/predict",
            {
                "tasks": [task],
                "project": f"{PROJECT}.0",
                "label_config": self.config,
                "params": {"login": None, "password": None, "context": {"result": result}},
            },
        )
        for region in answer["results"][0]["result"]:
            if region["type"] == "brushlabels":
                return brush.decode(region["value"]["rle"], height=size[0], width=size[1]), region["id"]
        raise Refusal(f"no mask for task {task['id']}: {json.dumps(answer)[:300]}")

    def curve(self, task: Json, image: AnnotatedImage, mask: AnnotatedMask, budget: int, until: float) -> ObjectCurve:
        """Return how the robot gets on with one object; the last value is held once `until` is reached."""
        ious, _ = self.annotate(task, image, mask, budget, until)
        held = (*ious, *ious[-1:] * (budget - len(ious)))
        level = image.level_of(mask)
        return ObjectCurve(object=f"{task['id']}/{mask.id}", name=mask.name, level=level.level, ious=held)

    def annotate(
        self, task: Json, image: AnnotatedImage, mask: AnnotatedMask, budget: int, until: float
    ) -> tuple[list[float], str]:
        """Return the IoU after each click, and the id of the last region offered."""
        truth, region = mask.mask(), ""
        height, width = truth.shape
        answer = np.zeros_like(truth)
        clicks: list[Click] = []
        ious: list[float] = []
        while len(ious) < budget and not (ious and ious[-1] >= until):
            click = next_click(truth, answer, clicks)
            if click is None:
                break
            clicks.append(click)
            answer, region = self.click(task, (height, width), clicks, image.level_of(mask))
            ious.append(iou(answer, truth))
        return ious, region

    def submit(self, number: int, task: Json, masks: Sequence[tuple[AnnotatedMask, str]]) -> None:
        """Submit an annotation: of each mask the truth, in the region that was offered last."""
        result = []
        for mask, region in masks:
            truth = mask.mask()
            result.append(
                {
                    **{"original_width": truth.shape[1], "original_height": truth.shape[0], "image_rotation": 0},
                    "value": {"format": "rle", "rle": brush.encode(truth), "brushlabels": [_CLASS]},
                    **{
                        "id": region,
                        "from_name": "mask",
                        "to_name": "image",
                        "type": "brushlabels",
                        "origin": "manual",
                    },
                }
            )
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{number % 10**6:06}Z"
        annotation = {
            **{"id": number, "result": result, "was_cancelled": False, "ground_truth": False, "task": task["id"]},
            **{"created_at": stamp, "updated_at": stamp, "completed_by": 1, "project": PROJECT},
            **{"parent_prediction": None, "lead_time": 10.0},
        }
        project = {"id": PROJECT, "title": "simulated", "label_config": self.config}
        event = {"action": "ANNOTATION_CREATED", "annotation": annotation, "task": task, "project": project}
        self.backend.post("/webhook", event, timeout_s=10)

    def train(self) -> tuple[TrainingStatus, float | None]:
        """Press Start Training; return how it ended, and the seconds until a new version served, if one does.

        Raises:
            Refusal: it does not end in time.
        """
        before, began_s = self.backend.version(), time.monotonic()
        project = {"id": PROJECT, "title": "simulated", "label_config": self.config}
        job = self.backend.post("/webhook", {"action": "START_TRAINING", "project": project})["job"]
        folder = TrainingFolder(self.backend.data_dir / "trainings", f"project-{PROJECT}")
        until_s = began_s + _TRAINING_S
        while time.monotonic() < until_s:
            status = folder.status()
            if status is not None and status.id == job and status.state in ENDED:
                if status.state != "published":
                    return status, None
                if self.backend.version() != before:
                    return status, time.monotonic() - began_s
            time.sleep(0.2)
        raise Refusal(f"training {job} did not end within {_TRAINING_S / 60:.0f} minutes")


def _click(number: int, click: Click, size: tuple[int, int], level: Granularity) -> list[Json]:
    """Return what the editor sends of one click: keypoint and level label under one id."""
    place = {"x": click.x / size[1] * 100, "y": click.y / size[0] * 100, "width": 0.35}
    common = {
        **{"original_width": size[1], "original_height": size[0], "image_rotation": 0},
        **{"is_positive": click.positive, "id": f"click{number:05}", "to_name": "image", "origin": "manual"},
    }
    value = place | {"keypointlabels": [_CLASS]}
    return [
        common | {"value": value, "from_name": "click", "type": "keypointlabels"},
        common | {"value": place | {"labels": [f"{level.value:.1f}"]}, "from_name": "granularity", "type": "labels"},
    ]


def simulate(
    found: AnnotationSet,
    plan: Plan,
    data_dir: Path,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> list[Round]:
    """Return what was measured before any correction and after each round.

    Args:
        found: annotated photos of the new domain, all splits; which are held out, their digests decide.
        plan: what to do.
        data_dir: an empty folder for the backend.
        say: told what happens.

    Raises:
        Refusal: there are too few photos, or the backend refuses something.
    """
    clickable = replace(found, images=tuple(_clickable(image) for image in found.images))
    holdout = replace(clickable, images=tuple(i for i in clickable.images if i.masks and held_out(i.digest())))
    work = [image for image in clickable.images if image.masks]  # held-out ones too, as people do: for the gate alone
    if not 0 < len(holdout.images) < len(work):
        raise Refusal(
            f"{found.name} has {len(work)} photos with masks, {len(holdout.images)} held out; more are needed"
        )
    _, reference = bundled_sets()
    np.random.default_rng(plan.seed).shuffle(work)  # type: ignore[arg-type]
    with _photos([*clickable.images, *reference.images]) as photos, _running(data_dir, photos) as backend:
        worker = Worker(backend=backend, config=make_config([_CLASS], levels=_LEVELS))

        def measure(images: AnnotationSet, first: int) -> Scores:
            curves = []
            for number, (image, masks) in enumerate(objects_of(images, plan.limit)):
                task = {"id": first + number, "data": {"image": backend.photo(_name(image))}}
                curves += [worker.curve(task, image, mask, plan.budget, 0.90) for mask in masks]
            return scores_of(curves)

        def look(corrections: int, status: TrainingStatus | None, seconds: float | None) -> Round:
            made = Round(
                corrections=corrections,
                version=backend.version(),
                state="" if status is None else status.state,
                seconds_to_serving=seconds,
                holdout=measure(holdout, 10_000),
                reference=measure(reference, 20_000),
                said="" if status is None else status.said,
            )
            say(
                f"{corrections} corrections, {made.version} {made.state}: NoC@85 {made.holdout.noc85:.2f}, "
                f"NoC@90 {made.holdout.noc90:.2f} on the hold-out, NoC@90 {made.reference.noc90:.2f} on the reference"
            )
            return made

        rounds = [look(0, None, None)]
        corrections = 0
        left = iter(enumerate(work, 1))
        for wanted in plan.rounds:
            while corrections < wanted and (following := next(left, None)) is not None:
                number, image = following
                task = {"id": number, "data": {"image": backend.photo(_name(image))}}
                offered = []
                for mask in image.masks[: wanted - corrections]:
                    _, region = worker.annotate(task, image, mask, plan.patience, 0.90)
                    offered.append((mask, region))
                worker.submit(number, task, offered)
                corrections += len(offered)
            status, seconds = worker.train()
            rounds.append(look(corrections, status, seconds))
        return rounds


def _clickable(image: AnnotatedImage) -> AnnotatedImage:
    least = _LEAST_AREA * image.height * image.width
    return replace(image, masks=tuple(mask for mask in image.masks if mask.area >= least))


def _name(image: AnnotatedImage) -> str:
    return f"{image.digest()}{image.path.suffix}"


@contextmanager
def _photos(images: Sequence[AnnotatedImage]) -> Iterator[Path]:
    """Give a folder that holds the photos by their digests."""
    with tempfile.TemporaryDirectory() as name:
        for image in images:
            link = Path(name) / _name(image)
            if not link.exists():
                link.symlink_to(image.path.resolve())
        yield Path(name)


@contextmanager
def _running(data_dir: Path, photos: Path) -> Iterator[Backend]:
    backend = Backend(data_dir, photos)
    try:
        yield backend
    finally:
        backend.close()


def write_report(path: Path, found: AnnotationSet, plan: Plan, rounds: Sequence[Round]) -> Json:
    """Write the report and curves beside it, and return it."""
    first, last = rounds[0], rounds[-1]
    seconds = [one.seconds_to_serving for one in rounds if one.seconds_to_serving is not None]
    report = {
        "data": found.name,
        "plan": asdict(plan),
        "corrections": last.corrections,
        "noc85_before": first.holdout.noc85,
        "noc85_after": last.holdout.noc85,
        "noc90_before": first.holdout.noc90,
        "noc90_after": last.holdout.noc90,
        "noc90_reference_before": first.reference.noc90,
        "noc90_reference_after": last.reference.noc90,
        "seconds_to_serving": fmean(seconds) if seconds else None,
        "rounds": [asdict(one) for one in rounds],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(report, indent=1) + "\n")
    draft.replace(path)
    draw_click_curves(
        path.with_suffix(".png"),
        {
            name: {f"{one.corrections} corrections": getattr(one, side).curve for one in rounds}
            for name, side in (("hold-out", "holdout"), ("reference set", "reference"))
        },
    )
    return report
