"""Annotators: each opens tasks, clicks, types, accepts and submits as Label Studio passes it on."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import requests
from PIL import Image

from ml_backend import brush
from ml_backend.simulate import Backend
from model.metrics import iou
from model.robot import next_click
from model.types import Click, Mask
from tests.ml_backend.conftest import ask, box, click
from tests.soak.pictures import Picture, Pictures
from tests.soak.recorder import Recorder

Json = dict[str, Any]
PROJECT = 3
WARM, FIRST, UNSEEN, OPEN = "click", "first click, task opened before", "first click, image new", "task opened"
FOURTH = "fourth click at a level or phrase"  # where small things are looked at again
CLICKS = (WARM, FOURTH, FIRST, UNSEEN)
_LIMIT_S = {"/predict": 100.0, "/webhook": 1.0, "/setup": 3.0, "/health": 1.0}  # as long as Label Studio waits
_NOTHING = "the model finds nothing at these clicks"
_PHRASES = ("wheel", "car door", "person", "the window", "something without a name")
_OPENED, _KNOWN, _SETUP = 0.75, 0.2, 0.2  # shares: tasks that ask when opened; images seen before; /setup before
_GOOD, _PATIENCE = 0.9, 6  # IoU at which an annotator is content; clicks at most on an object


@dataclass(slots=True, eq=False)
class Team:
    """What all annotators share."""

    backend: Backend
    pictures: Pictures
    recorder: Recorder
    config: str
    webhook_secret: str
    think_s: float
    ending: threading.Event
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    submitted: set[int] = field(default_factory=set)
    """Annotations whose webhook was answered with 2xx."""


class Caller:
    """A connection of Label Studio's, kept alive; whatever goes wrong is noted."""

    def __init__(self, team: Team) -> None:
        """Connect at the first request."""
        self._team = team
        self._session = requests.Session()

    def send(self, kind: str, path: str, body: Json | None, *, secret: bool = False) -> Json | None:
        """Return the answer to a POST (no body: GET), or None after an error."""
        team = self._team
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"X-Graco-Secret": team.webhook_secret} if secret else {})
        start = time.perf_counter()
        try:
            answer = self._session.request(
                *("GET" if data is None else "POST", f"{team.backend.url}{path}"),
                data=data,
                headers=headers,
                auth=None if secret else team.backend.session.auth,
                timeout=_LIMIT_S[path],
            )
            content: Json = answer.json()
        except (requests.RequestException, ValueError) as error:
            team.recorder.wrong(kind, f"no answer ({type(error).__name__}: {error})")
            return None
        seconds = time.perf_counter() - start
        if not 200 <= answer.status_code < 300:
            team.recorder.wrong(kind, f"{answer.status_code} {answer.text[:200]}")
            return None
        team.recorder.took(kind, seconds)
        return content


class Annotator:
    """One of them, with a connection, dice and a pace of its own."""

    def __init__(self, team: Team, seed: int) -> None:
        """Sit down."""
        self._team = team
        self._rng = np.random.default_rng(seed)
        self._caller = Caller(team)
        self._seen: list[Picture] = []
        self._clicked_s = 0.0

    def work(self) -> None:
        """Annotate task after task until the run ends."""
        self._team.ending.wait(self._rng.uniform(0, self._team.think_s))  # not all at once
        while not self._team.ending.is_set():
            self._task()

    def open(self, picture: Picture, clicks: int) -> None:
        """Click on a picture here and there, without a thought: it is encoded, and caches of answers fill."""
        for _ in range(clicks):
            regions = self._regions(picture, [self._place(picture)], 0)
            self._ask("before the clock", self._request(picture, 1, regions, []))

    def submit_drawn(self, picture: Picture) -> None:
        """Submit all objects of a picture as drawn by hand."""
        number = next(self._team.numbers)
        regions = [self._drawn(picture, truth, f"drawn-{number}-{n}") for n, truth in enumerate(picture.truths)]
        self._submit(picture, number, [[region] for region in regions])

    def _task(self) -> None:
        team, rng = self._team, self._rng
        known = len(self._seen) > 3 and rng.random() < _KNOWN
        picture = self._seen[rng.integers(len(self._seen))] if known else team.pictures.new()
        number = next(team.numbers)
        if rng.random() < _SETUP:
            self._caller.send("setup", "/setup", {"project": f"{PROJECT}.0", "schema": team.config})
        first = WARM if known else UNSEEN
        if rng.random() < _OPENED:
            self._ask(OPEN, self._request(picture, number, None, []), empty=True)
            self._think()
            first = first if known else FIRST
        accepted: list[list[Json]] = []
        for place in rng.permutation(len(picture.truths)).tolist():
            region = self._object(picture, number, picture.truths[place], accepted, first)
            first = WARM
            if region:
                accepted.append(region)
            if team.ending.is_set():
                return
        self._seen = [*self._seen[-20:], picture]
        if accepted and self._submit(picture, number, accepted):
            self._ask("empty context", self._request(picture, number, [], accepted), empty=True)
            if rng.random() < 0.1:  # seen an error, mended
                self._submit(picture, number, accepted[:1], action="ANNOTATION_UPDATED")

    def _object(self, picture: Picture, number: int, truth: Mask, accepted: list[list[Json]], first: str) -> list[Json]:
        """Return the results of one region, clicked until it is good, or mended by hand."""
        rng = self._rng
        how = rng.choice(("level", "all", "phrase", "plain", "box"), p=(0.45, 0.1, 0.15, 0.2, 0.1))
        level = {"level": f"{rng.integers(1, 11) / 10:.1f}", "all": "all"}.get(how)
        phrase = str(rng.choice(_PHRASES)) if how == "phrase" else None
        answer, clicks, found = np.zeros_like(truth), [], []
        drawn = self._box(picture, truth) if how == "box" else []
        for turn in range(_PATIENCE):
            if turn or not drawn:
                spot = next_click(truth, answer, clicks)
                if spot is None:
                    break
                clicks.append(spot)
            regions = drawn + self._regions(picture, clicks, turn, level, phrase)
            fourth = len(clicks) == 4 and (how == "level" or phrase)
            kind = first if turn == 0 else FOURTH if fourth else WARM
            result = self._ask(kind, self._request(picture, number, regions, accepted))
            if result is None:
                break
            if result:
                found, answer = self._best(picture, truth, result)
            self._think()
            if iou(answer, truth) >= _GOOD or self._team.ending.is_set():
                break
        if not found or rng.random() < 0.1:
            return [self._drawn(picture, truth, f"drawn-{number}-{len(accepted)}")]
        if iou(answer, truth) < _GOOD:  # takes the brush
            mended = self._drawn(picture, truth, found[0]["id"])
            return [mended, *(item for item in found if item["type"] == "labels")]
        return found

    def _ask(self, kind: str, body: Json, *, empty: bool = False) -> list[Json] | None:
        """Return the results of an answer; None: there was an error. An empty one is no error if it has to be so."""
        answer = self._caller.send(kind, "/predict", body)
        if answer is None:
            return None
        try:
            (one,) = answer["results"]
            result: list[Json] = one["result"]
        except (KeyError, ValueError, TypeError):
            self._team.recorder.wrong(kind, f"not one result: {json.dumps(answer)[:200]}")
            return None
        reason = str(one.get("reason", ""))
        if not result and not empty:
            if not reason.startswith(_NOTHING):
                self._team.recorder.wrong(kind, f"empty: {reason or 'no reason'}")
                return None
            self._team.recorder.count("clicks at which nothing is found")
        if result and reason:
            self._team.recorder.count("answers with a remark on the phrase")
        return result

    def _think(self) -> None:
        """Wait until it is time for the next click: one in `think_s` seconds, give or take a half."""
        next_s = self._clicked_s + self._team.think_s * self._rng.uniform(0.5, 1.5)
        self._team.ending.wait(max(0.0, next_s - time.monotonic()))
        self._clicked_s = time.monotonic()

    def _request(self, picture: Picture, number: int, regions: list[Json] | None, accepted: list[list[Json]]) -> Json:
        draft = [item for region in accepted for item in region]
        drafts = [{"id": number, "result": draft, "updated_at": _now()}] if draft else []
        address = self._team.backend.photo(picture.name)
        body = ask(regions or [], image=address, config=self._team.config, task=number, drafts=drafts)
        if regions is None:
            body["params"]["context"] = None
        return body

    def _regions(
        self, picture: Picture, clicks: list[Click], turn: int, level: str | None = None, phrase: str | None = None
    ) -> list[Json]:
        rows, columns = picture.truths[0].shape
        size = picture.width, picture.height
        found: list[Json] = []
        for n, spot in enumerate(clicks):
            where = spot.x / columns * 100, spot.y / rows * 100
            newest = level if n == len(clicks) - 1 and not (level == "all" and turn) else None
            found += click(*where, region=f"c{n}", positive=spot.positive, level=newest, size=size)
        if phrase is not None:
            spot_value = found[-1]["value"] | {"text": [phrase]}
            found.append(found[-1] | {"type": "textarea", "from_name": "phrase", "value": spot_value})
        return found

    def _box(self, picture: Picture, truth: Mask) -> list[Json]:
        rows, columns = np.nonzero(truth.any(axis=1))[0], np.nonzero(truth.any(axis=0))[0]
        high, wide = truth.shape
        left, top = columns[0] / wide * 100, rows[0] / high * 100
        sides = (columns[-1] + 1) / wide * 100 - left, (rows[-1] + 1) / high * 100 - top
        drawn: list[Json] = box(float(left), float(top), *map(float, sides), size=(picture.width, picture.height))
        return drawn

    def _place(self, picture: Picture) -> Click:
        rows, columns = np.nonzero(picture.truths[0])
        index = self._rng.integers(rows.size)
        return Click(x=float(columns[index]) + 0.5, y=float(rows[index]) + 0.5, positive=True)

    def _best(self, picture: Picture, truth: Mask, result: list[Json]) -> tuple[list[Json], Mask]:
        """Return the results of the proposal that fits best, and its mask at the resolution of the truth."""
        best: tuple[float, str, Mask] | None = None
        for item in result:
            if item["type"] == "brushlabels":
                mask = brush.decode(item["value"]["rle"], height=picture.height, width=picture.width)
                small = np.asarray(Image.fromarray(mask).resize(truth.shape[::-1], Image.Resampling.NEAREST))
                fits = iou(small, truth)
                if best is None or fits > best[0]:
                    best = fits, item["id"], small
        assert best is not None, "an answer that is not empty holds a mask"
        return [item for item in result if item["id"] == best[1]], best[2]

    def _drawn(self, picture: Picture, truth: Mask, region: str) -> Json:
        size = picture.width, picture.height
        mask = np.asarray(Image.fromarray(truth).resize(size, Image.Resampling.NEAREST))
        return {
            **{"original_width": size[0], "original_height": size[1], "image_rotation": 0},
            "value": {"format": "rle", "rle": brush.encode(mask, surplus=False), "brushlabels": ["Object"]},
            **{"id": region, "from_name": "mask", "to_name": "image", "type": "brushlabels", "origin": "manual"},
        }

    def _submit(
        self, picture: Picture, number: int, regions: list[list[Json]], *, action: str = "ANNOTATION_CREATED"
    ) -> bool:
        annotation = {
            **{"id": number, "result": [item for region in regions for item in region], "task": number},
            **{"was_cancelled": False, "ground_truth": False, "completed_by": 1, "project": PROJECT},
            **{"created_at": _now(), "updated_at": _now(), "parent_prediction": None, "lead_time": 10.0},
        }
        task = {"id": number, "project": PROJECT, "data": {"image": self._team.backend.photo(picture.name)}}
        project = {"id": PROJECT, "title": "soak", "label_config": self._team.config}
        event = {"action": action, "annotation": annotation, "task": task, "project": project}
        done = self._caller.send("webhook", "/webhook", event, secret=True) is not None
        if done:
            self._team.submitted.add(number)
        return done


def _now() -> str:
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1e6):06}Z"
