"""How good the masks are, and after how many clicks: a simulated annotator on objects people outlined."""

from __future__ import annotations

from itertools import islice

import numpy as np
from PIL import Image

from model.evaluation.protocol import ClickChain
from model.metrics import clicks_over, number_of_clicks
from model.segmenter import Segmenter, load_segmenter
from tests.bench.photos import Annotated, annotated
from tests.bench.report import Row
from tests.bench.stage import WEIGHTS, Stage

_BUDGET = 10


def simulated_annotator(stage: Stage) -> list[Row]:
    """Correct each object's mask up to 10 times."""
    segmenter = load_segmenter("light", WEIGHTS, encoder="fast", compiled=stage.compiled)
    sets = [("COCO objects", annotated("coco-mval", split="val"), stage.count(40, 4))]
    if stage.full:
        parts = annotated("ccp-person-clothing", split="val", level="part")
        sets.append(("clothing parts", parts, stage.count(60, 4)))
    return [_row(name, segmenter, list(islice(objects, count))) for name, objects, count in sets]


def _row(name: str, segmenter: Segmenter, objects: list[Annotated]) -> Row:
    what = f"quality: {name} ({len(objects)}), simulated annotator, at most {_BUDGET} clicks"
    if not objects:
        return Row(what=what, measured="skipped: ../shared/data is missing")
    curves = np.array([_ious(segmenter, one) for one in objects])
    parts = [f"IoU@{n} {curves[:, n - 1].mean():.3f}" for n in (1, 3, 5)]
    for target in (0.85, 0.90):
        clicks = clicks_over([number_of_clicks(curve, target, _BUDGET) for curve in curves], _BUDGET)
        mean = "-" if clicks.reached_mean is None else f"{clicks.reached_mean:.2f}"
        parts.append(f"NoC@{100 * target:.0f} {mean} and {clicks.misses} misses")
    return Row(what=what, measured=", ".join(parts))


def _ious(segmenter: Segmenter, one: Annotated) -> list[float]:
    """Return the IoU after each click; once there is nothing left to click, it stays as it is."""
    encoded = segmenter.encode(np.asarray(Image.open(one.photo).convert("RGB")))
    return ClickChain(segmenter=segmenter, encoded=encoded, truth=one.mask).run(_BUDGET)
