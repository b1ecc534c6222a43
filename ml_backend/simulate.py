"""A simulated team: it annotates a folder of photos through HTTP, and we see whether the backend learns from it.

The backend runs as users run it, in processes of its own with a Redis, on an empty data folder. A robot clicks at each
mask's own level until the answer is good or the annotator would take the brush, submits what it wanted as a webhook,
labelled as the folder names it, presses Start Training now and then, and waits until the new version serves. Before and
after, the robot counts its clicks on the photos that no training sees, and on the bundled reference set.

Which photo comes next is random, or what `next_tasks` would have Label Studio show (`active`): scored anew after each
training, by the version that serves. With `both` two teams work, each at a backend of its own, one after the other.
"""

from __future__ import annotations

import functools
import http.server
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import requests
from matplotlib.figure import Figure

from active_learning.bundle import bundled_sets
from active_learning.corrections import held_out
from active_learning.gate import objects_of
from active_learning.scores import ObjectCurve, Scores, scores_of
from active_learning.selection import priorities
from active_learning.status import ENDED, TrainingFolder, TrainingStatus
from ml_backend import brush
from ml_backend.images import TaskImage
from ml_backend.label_config import make_config
from ml_backend.next_tasks import look_at
from ml_backend.service import Service
from ml_backend.settings import Settings
from model.annotations import AnnotatedImage, AnnotatedMask, AnnotationSet
from model.evaluation.report import draw_cell, draw_click_curves, draw_rows
from model.metrics import iou
from model.robot import next_click
from model.types import Click, Granularity, Mask, Refusal

log = logging.getLogger(__name__)

Json = dict[str, Any]
Order = Literal["random", "active"]
PROJECT = 1
_LEVELS = tuple(level / 10 for level in range(1, 11))
_CLASS = "Object"  # of what has no class of its own
_USER = "simulated"
_START_S = 180.0
_TRAINING_S = 1800.0
_THOROUGH_S = 4 * _TRAINING_S
_LEAST_AREA = 0.001  # of the photo: what is smaller nobody clicks
_SHOWN = 8  # hold-out objects whose masks are drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is simulated."""

    rounds: tuple[int, ...] = (100, 300)  # corrections after which a training is asked for
    budget: int = 20  # clicks on one object at most, when we measure
    patience: int = 5  # clicks until the annotator takes the brush, when it annotates
    limit: int = 40  # objects measured of hold-out and reference
    seed: int = 0
    orders: tuple[Order, ...] = ("random",)  # in which photos come, a team for each
    thorough: bool = False  # after each training a thorough one is asked for as well, as at night


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Shown:
    """An object and the answer to its first click."""

    image: AnnotatedImage
    mask: AnnotatedMask
    click: Click
    answer: Mask


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Attempt:
    """How the robot got on with an object."""

    ious: tuple[float, ...]  # after each click
    region: str  # id of the one offered last
    first: Shown


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
    shown: tuple[Shown, ...] = ()  # of the hold-out, the same ones each time
    thorough: bool = False  # the training was

    @property
    def title(self) -> str:
        """What a reader knows the round by."""
        return f"{self.corrections} corrections{', thorough' if self.thorough else ''}"

    def to_json(self) -> Json:
        """Return the figures as plain values, without the pictures."""
        return asdict(replace(self, shown=())) | {"shown": len(self.shown)}


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
            "GRACO_TRAIN_TOO_FEW": "publish",  # an admin who says yes to what is not worse
            "GRACO_REDIS_URL": "",
            "LABEL_STUDIO_URL": "",
            "GRACO_SHARED_DIR": "",
            "GRACO_LEDGER": "",
            "GRACO_USERNAME": _USER,
            "GRACO_PASSWORD": secrets.token_urlsafe(),
            "GRACO_PASSWORD_FILE": "",
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
        self.session.auth = _USER, settings["GRACO_PASSWORD"]
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
    classes: frozenset[str] = frozenset()  # names of masks that are labels of `config`; all others are an Object

    def _label(self, mask: AnnotatedMask) -> str:
        return mask.name if mask.name in self.classes else _CLASS

    def click(
        self, task: Json, size: tuple[int, int], clicks: Sequence[Click], level: Granularity, label: str = _CLASS
    ) -> tuple[Mask, str]:
        """Return the mask that clicks at a level give, and its region's id.

        Raises:
            Refusal: there is no mask in the answer.
        """
        result = [item for n, click in enumerate(clicks) for item in _click(n, click, size, level, label)]
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

    def curve(
        self, task: Json, image: AnnotatedImage, mask: AnnotatedMask, budget: int, until: float
    ) -> tuple[ObjectCurve, Shown]:
        """Return how the robot gets on with one object, the last value held once `until` is reached; and its start."""
        tried = self.annotate(task, image, mask, budget, until)
        held = (*tried.ious, *tried.ious[-1:] * (budget - len(tried.ious)))
        level = image.level_of(mask)
        curve = ObjectCurve(object=f"{task['id']}/{mask.id}", name=mask.name, level=level.level, ious=held)
        return curve, tried.first

    def annotate(self, task: Json, image: AnnotatedImage, mask: AnnotatedMask, budget: int, until: float) -> Attempt:
        """Click at an object until the answer is good, or the budget is spent."""
        truth, region = mask.mask(), ""
        shown: Shown | None = None
        height, width = truth.shape
        answer = np.zeros_like(truth)
        clicks: list[Click] = []
        ious: list[float] = []
        while len(ious) < budget and not (ious and ious[-1] >= until):
            click = next_click(truth, answer, clicks)
            if click is None:
                break
            clicks.append(click)
            answer, region = self.click(task, (height, width), clicks, image.level_of(mask), self._label(mask))
            ious.append(iou(answer, truth))
            shown = shown or Shown(image=image, mask=mask, click=click, answer=answer)
        assert shown is not None, "a mask has a place to click at"
        return Attempt(ious=tuple(ious), region=region, first=shown)

    def submit(self, number: int, task: Json, masks: Sequence[tuple[AnnotatedMask, str]]) -> None:
        """Submit an annotation: of each mask the truth, in the region that was offered last."""
        result = []
        for mask, region in masks:
            truth = mask.mask()
            result.append(
                {
                    **{"original_width": truth.shape[1], "original_height": truth.shape[0], "image_rotation": 0},
                    "value": {"format": "rle", "rle": brush.encode(truth), "brushlabels": [self._label(mask)]},
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

    def train(self, *, thorough: bool = False) -> tuple[TrainingStatus, float | None]:
        """Press Start Training; return how it ended, and the seconds until a new version served, if one does.

        Args:
            thorough: ask for a thorough training instead, which no button of Label Studio does.

        Raises:
            Refusal: it does not end in time.
        """
        before, began_s = self.backend.version(), time.monotonic()
        project = {"id": PROJECT, "title": "simulated", "label_config": self.config}
        folder = TrainingFolder(self.backend.data_dir / "trainings", f"project-{PROJECT}")
        if thorough:
            job = folder.ask("the simulated night", thorough=True).id
        else:
            job = self.backend.post("/webhook", {"action": "START_TRAINING", "project": project})["job"]
        longest_s = _THOROUGH_S if thorough else _TRAINING_S
        while time.monotonic() < began_s + longest_s:
            status = folder.status()
            if status is not None and status.id == job and status.state in ENDED:
                if status.state != "published":
                    return status, None
                if self.backend.version() != before:
                    return status, time.monotonic() - began_s
            time.sleep(0.2)
        raise Refusal(f"training {job} did not end within {longest_s / 60:.0f} minutes")


def _click(number: int, click: Click, size: tuple[int, int], level: Granularity, label: str) -> list[Json]:
    """Return what the editor sends of one click: keypoint and level label under one id."""
    place = {"x": click.x / size[1] * 100, "y": click.y / size[0] * 100, "width": 0.35}
    common = {
        **{"original_width": size[1], "original_height": size[0], "image_rotation": 0},
        **{"is_positive": click.positive, "id": f"click{number:05}", "to_name": "image", "origin": "manual"},
    }
    value = place | {"keypointlabels": [label]}
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
) -> dict[Order, list[Round]]:
    """Return for each order what was measured before any correction and after each round.

    Args:
        found: annotated photos of the new domain, all splits; which are held out, their digests decide.
        plan: what to do.
        data_dir: an empty folder for the backends, a folder for each.
        say: told what happens.

    Raises:
        Refusal: there are too few photos, or the backend refuses something.
    """
    seen = clickable(found)
    holdout = holdout_of(seen)
    work = [image for image in seen.images if image.masks]  # held-out ones too, as people do: for the gate alone
    if not 0 < len(holdout.images) < len(work):
        raise Refusal(
            f"{found.name} has {len(work)} photos with masks, {len(holdout.images)} held out; more are needed"
        )
    np.random.default_rng(plan.seed).shuffle(work)  # type: ignore[arg-type]

    def tell(order: Order) -> Callable[[str], None]:
        return lambda text: say(f"{order} order, {text}" if len(plan.orders) > 1 else text)

    return {order: _team(order, work, holdout, plan, data_dir / order, tell(order)) for order in plan.orders}


def _team(
    order: Order,
    work: Sequence[AnnotatedImage],
    holdout: AnnotationSet,
    plan: Plan,
    data_dir: Path,
    say: Callable[[str], None],
) -> list[Round]:
    _, reference = bundled_sets()
    with _photos([*work, *reference.images]) as photos, _running(data_dir, photos) as backend:
        classes = {mask.name for image in work for mask in image.masks if mask.name}
        config = make_config([*sorted(classes - {_CLASS}), _CLASS], levels=_LEVELS)
        worker = Worker(backend=backend, config=config, classes=frozenset(classes))

        def measure(images: AnnotationSet, first: int) -> tuple[Scores, tuple[Shown, ...]]:
            tried = []
            for number, (image, masks) in enumerate(objects_of(images, plan.limit)):
                task = {"id": first + number, "data": {"image": backend.photo(_name(image))}}
                tried += [worker.curve(task, image, mask, plan.budget, 0.90) for mask in masks]
            return scores_of([curve for curve, _ in tried]), tuple(shown for _, shown in tried[:_SHOWN])

        def look(corrections: int, status: TrainingStatus | None, seconds: float | None) -> Round:
            scores, shown = measure(holdout, 10_000)
            made = Round(
                corrections=corrections,
                version=backend.version(),
                state="" if status is None else status.state,
                thorough=status is not None and status.thorough,
                seconds_to_serving=seconds,
                holdout=scores,
                reference=measure(reference, 20_000)[0],
                said="" if status is None else status.said,
                shown=shown,
            )
            say(
                f"{made.title}, {made.version} {made.state}: NoC@85 {made.holdout.noc85:.2f}, "
                f"NoC@90 {made.holdout.noc90:.2f} on the hold-out, NoC@90 {made.reference.noc90:.2f} on the reference"
            )
            return made

        rounds = [look(0, None, None)]
        corrections = 0
        left, done = dict(enumerate(work, 1)), dict[int, AnnotatedImage]()
        for wanted in plan.rounds:
            following = _by_use(backend, left, done) if order == "active" else list(left)
            while corrections < wanted and following:
                number = following.pop(0)
                image = done[number] = left.pop(number)
                task = {"id": number, "data": {"image": backend.photo(_name(image))}}
                offered = []
                for mask in image.masks[: wanted - corrections]:
                    tried = worker.annotate(task, image, mask, plan.patience, 0.90)
                    offered.append((mask, tried.region))
                worker.submit(number, task, offered)
                corrections += len(offered)
            for thorough in (False, True) if plan.thorough else (False,):
                status, seconds = worker.train(thorough=thorough)
                rounds.append(look(corrections, status, seconds))
        return rounds


def _by_use(backend: Backend, left: dict[int, AnnotatedImage], done: dict[int, AnnotatedImage]) -> list[int]:
    """Return the tasks that are left, the most useful first, by the version that serves now."""
    settings = Settings(
        data_dir=backend.data_dir,
        allow_hosts=("127.0.0.1",),
        label_studio_url=None,
        label_studio_api_key=None,
        redis_url=None,
        shared_dir=None,
        ledger="here",
    )
    service = Service(settings)
    try:
        service.start()
        until_s = time.monotonic() + _START_S
        while not (service.ready or service.failure) and time.monotonic() < until_s:
            time.sleep(0.2)
        serving = service.serving(PROJECT)

        def looks(images: dict[int, AnnotatedImage], **how: int) -> dict[int, tuple[Any, Any]]:
            addresses = {number: TaskImage(number, backend.photo(_name(image))) for number, image in images.items()}
            return {number: look_at(service, serving.segmenter, one, **how) for number, one in addresses.items()}

        seen, known = looks(left), looks(done, clicks=0)
    finally:
        service.close()
    labelled = [vector for _, vector in known.values()]
    return list(
        priorities(
            {number: found.value for number, (found, _) in seen.items()},
            {number: vector for number, (_, vector) in seen.items()},
            np.stack(labelled) if labelled else np.empty((0, 1), np.float32),
        )
    )


def clickable(found: AnnotationSet) -> AnnotationSet:
    """Return a set without the masks that are too small for anybody to click."""

    def kept(image: AnnotatedImage) -> AnnotatedImage:
        least = _LEAST_AREA * image.height * image.width
        return replace(image, masks=tuple(mask for mask in image.masks if mask.area >= least))

    return replace(found, images=tuple(map(kept, found.images)))


def holdout_of(found: AnnotationSet) -> AnnotationSet:
    """Return the photos with masks that no training sees."""
    return replace(found, images=tuple(image for image in found.images if image.masks and held_out(image.digest())))


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


def corrections_until(rounds: Sequence[Round], target: float) -> float | None:
    """Return the corrections after which the hold-out's NoC@85 was as low as this, between rounds by the straight line.

    None where it never was.
    """
    best = float("inf")
    points = [(one.corrections, best := min(best, one.holdout.noc85)) for one in rounds]
    if points[0][1] <= target:
        return float(points[0][0])
    for (before, high), (after, low) in pairwise(points):
        if low <= target:
            return before + (after - before) * (high - target) / (high - low)
    return None


def compared(arms: Mapping[Order, Sequence[Round]]) -> Json | None:
    """Return the corrections that each order needs to the lowest NoC@85 that both reach, and active over random.

    None where one of them did not work, or did not get better.
    """
    if not {"random", "active"} <= arms.keys():
        return None
    target = max(min(one.holdout.noc85 for one in arms[order]) for order in ("random", "active"))
    needed = {order: corrections_until(arms[order], target) for order in ("random", "active")}
    if not needed["random"] or not needed["active"]:
        return None
    return {"noc85": target, **needed, "ratio": needed["active"] / needed["random"]}


def write_report(path: Path, found: AnnotationSet, plan: Plan, arms: Mapping[Order, Sequence[Round]]) -> Json:
    """Write the report, and pictures beside it, and return it.

    Beside REPORT.json: REPORT.png, IoU over clicks; REPORT-corrections.png, clicks over corrections; and
    REPORT-<order>.png, masks of a few hold-out objects after the first click, round by round.

    Args:
        path: the JSON file.
        found: what was annotated.
        plan: how.
        arms: what `simulate` returned; the figures at the top are of the first order.
    """
    first = next(iter(arms.values()))
    report = {
        "data": found.name,
        "plan": asdict(plan),
        **_figures(first),
        "active_against_random": compared(arms),
        "orders": {name: _figures(rounds) | {"rounds": [r.to_json() for r in rounds]} for name, rounds in arms.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(report, indent=1) + "\n")
    draft.replace(path)
    draw_click_curves(
        path.with_suffix(".png"),
        {
            f"{name}, {order} order": {one.title: getattr(one, side).curve for one in rounds}
            for order, rounds in arms.items()
            for name, side in (("hold-out", "holdout"), ("reference set", "reference"))
        },
    )
    _draw_corrections(path.with_name(f"{path.stem}-corrections.png"), arms)
    for order, rounds in arms.items():
        _draw_masks(path.with_name(f"{path.stem}-{order}.png"), rounds)
    return report


def _figures(rounds: Sequence[Round]) -> Json:
    first, last = rounds[0], rounds[-1]
    seconds = [one.seconds_to_serving for one in rounds if one.seconds_to_serving is not None and not one.thorough]
    return {
        "corrections": last.corrections,
        "noc85_before": first.holdout.noc85,
        "noc85_after": last.holdout.noc85,
        "noc90_before": first.holdout.noc90,
        "noc90_after": last.holdout.noc90,
        "noc90_reference_before": first.reference.noc90,
        "noc90_reference_after": last.reference.noc90,
        "seconds_to_serving": fmean(seconds) if seconds else None,
    }


def _draw_corrections(path: Path, arms: Mapping[Order, Sequence[Round]]) -> None:
    drawing = Figure(figsize=(12, 5), layout="constrained")
    sides = (("hold-out, NoC@85", "holdout", "noc85"), ("reference set, NoC@90", "reference", "noc90"))
    for axes, (title, side, figure) in zip(drawing.subplots(1, 2), sides, strict=True):
        for order, rounds in arms.items():
            values = [getattr(getattr(one, side), figure) for one in rounds]
            axes.plot([one.corrections for one in rounds], values, "o-", label=f"{order} order")
        axes.set(title=title, xlabel="corrections", ylabel="clicks")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    draft = path.with_name(f".draft-{path.name}")
    drawing.savefig(draft, dpi=90)
    draft.replace(path)


def _draw_masks(path: Path, rounds: Sequence[Round]) -> None:
    """Draw a row for each object that is shown: photo and click, and the answer of each round."""
    rows = []
    for answers in zip(*(one.shown for one in rounds), strict=True):
        image, mask, click = answers[0].image, answers[0].mask, answers[0].click
        pixels, truth = image.pixels(), mask.mask()
        cells = [draw_cell(pixels, None, truth, click, mask.name)]
        for one, shown in zip(rounds, answers, strict=True):
            label = f"{one.title}: {iou(shown.answer, truth):.2f}"
            cells.append(draw_cell(pixels, shown.answer, truth, shown.click, label))
        rows.append(cells)
    draw_rows(path, rows)
