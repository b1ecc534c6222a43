"""A data folder as a team leaves it: photos, corrections of several days and people, judged versions."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from active_learning.corrections import Correction, CorrectionStore
from active_learning.gate import Margins, judge, write_verdict
from active_learning.images import ImageStore
from active_learning.registry import AdapterRegistry, AdapterVersion
from active_learning.scores import ObjectCurve, paired
from model.annotations import encode
from model.types import Click

WIDTH, HEIGHT = 320, 240
DAY_S = 86400.0
KINDS = ("corrected", "accepted", "drawn", "predicted-changed")


def fill(data: Path, *, project: str = "3", photos: int = 12, label: str = "disc") -> list[Correction]:
    """Keep photos and two corrections on each, and return these; the newest is of the last photo."""
    images = ImageStore(data / "images")
    now_s = time.time()
    kept = []
    with closing(CorrectionStore(data / "corrections.sqlite")) as store:
        for number in range(photos):
            photo = _photo(number)
            digest = hashlib.sha256(photo).hexdigest()
            images.put(digest, photo)
            found = _corrections(project, number, digest, now_s - (photos - number) * DAY_S / 3, label)
            store.replace(project, found[0].annotation, found, updated_s=found[0].updated_s)
            kept += found
    return kept


def _photo(number: int) -> bytes:
    """Draw a red disc and a blue door before a wall, without noise: pictures of it stay small."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (214, 205, 186 + number))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0.8 * HEIGHT, WIDTH, HEIGHT), fill=(150, 140, 128))
    x, y, radius = 0.31 * WIDTH, 0.4 * HEIGHT, 0.18 * HEIGHT
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(190, 40, 30))
    draw.rectangle((0.65 * WIDTH, 0.2 * HEIGHT, 0.85 * WIDTH, 0.8 * HEIGHT), fill=(30, 60, 160))
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return file.getvalue()


def _corrections(project: str, number: int, image: str, updated_s: float, label: str) -> list[Correction]:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    disc = np.hypot(x - 0.31 * WIDTH, y - 0.4 * HEIGHT) < 0.18 * HEIGHT
    door = (abs(x - 0.75 * WIDTH) < 0.1 * WIDTH) & (abs(y - 0.5 * HEIGHT) < 0.3 * HEIGHT)
    kind = KINDS[number % len(KINDS)]
    known = {"accepted": disc, "drawn": None}.get(kind, np.roll(disc, 12, axis=1))
    one = Correction(
        project=project,
        annotation=100 + number,
        region=f"r{number}",
        task=number,
        image=image,
        height=HEIGHT,
        width=WIDTH,
        mask=encode(disc),
        label=label,
        granularity=1.0,
        phrase=None,
        clicks=(Click(x=0.31 * WIDTH, y=0.4 * HEIGHT, positive=True),),
        kind=kind,
        proposed=None if known is None else encode(known),
        adapter=None,
        annotator=number % 3 + 1,
        ground_truth=False,
        updated_s=updated_s,
    )
    other = replace(
        one, region=f"s{number}", mask=encode(door), label="door", granularity=None, kind="drawn", proposed=None
    )
    return [one, other]


def publish(
    registry: AdapterRegistry, file: Path, scratch: Path, *, clicks: int, before: int = 5, **card: object
) -> AdapterVersion:
    """Keep a version of project 3 that the gate had click the same twelve objects, and return it."""
    holdout, reference = (
        paired(candidate=_curves(name, clicks), incumbent=_curves(name, before)) for name in ("own", "outside")
    )
    verdict = judge(holdout, reference, Margins(), np.random.default_rng(0))
    write_verdict(scratch, verdict, holdout=holdout, reference=reference)
    scores = {name: one.candidate for name, one in (("hold-out", verdict.holdout), ("reference", verdict.reference))}
    told = {"recipe": "drawn", "accepted": True, "scores": {k: _scores(v) for k, v in scores.items()}}
    return registry.publish("project-3", file, card=told | card, activate=False, folder_of_pictures=scratch)


def _scores(found) -> dict[str, object]:
    return {name: getattr(found, name) for name in ("objects", "noc85", "noc90", "misses90", "iou1")}


def _curves(name: str, clicks: int) -> Sequence[ObjectCurve]:
    def ious(number: int) -> tuple[float, ...]:
        needed = min(10, clicks + number % 3)
        return tuple(0.95 if click >= needed else 0.4 + 0.02 * click for click in range(1, 11))

    return [ObjectCurve(object=f"{name}/{n}", name="disc", level=10, ious=ious(n)) for n in range(12)]
