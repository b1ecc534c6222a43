"""How long an annotator waits for a click: on a warm image, again, with many regions drawn already."""

from __future__ import annotations

import json
from itertools import cycle, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ml_backend import brush
from model.types import Click
from tests.bench.photos import HEIGHT, WIDTH, Photo
from tests.bench.report import Row, milliseconds
from tests.bench.stage import Stage

_REGIONS = (0, 50, 100, 200)
_SLACK_MS = 10.0  # 'no slope': see `drafts`


def warm_clicks(stage: Stage) -> list[Row]:
    """Click objects one, two and three times, the later clicks where the mask is wrong; then ask the same again."""
    stage.warm(stage.count(20, 3))
    objects = list(islice(cycle(stage.warm(stage.count(20, 3))), stage.count(40, 4)))
    before = stage.backend.metrics()
    seconds: list[list[float]] = [[], [], []]
    bodies: list[bytes] = []
    for photo in objects:
        clicks: list[Click] = []
        correction: Click | None = photo.click_inside(stage.rng)
        for nth in seconds:
            if correction is None:
                break
            clicks.append(correction)
            bodies.append(stage.annotator.body(photo.uri(), clicks))
            region, taken = stage.annotator.click(photo.uri(), clicks)
            nth.append(taken)
            mask = brush.decode(region["value"]["rle"], height=HEIGHT, width=WIDTH)
            correction = photo.correction(mask, clicks)
    after = stage.backend.metrics()
    again = [stage.annotator.ask(body)[1] for body in bodies]
    repeated = stage.backend.metrics()["graco_repeated_answers_total"]
    if (after["graco_repeated_answers_total"], repeated - len(bodies)) != (before["graco_repeated_answers_total"],) * 2:
        raise RuntimeError("a fresh click was answered from memory, or an identical one was not: figures mean nothing")
    everything = [taken for nth in seconds for taken in nth]
    return [
        Row(
            what=f"click on a warm image, p50 / p95 of {len(everything)} different prompts of 1-3 clicks",
            reach="120 / 250 ms",
            measured=milliseconds(everything, 50, 95),
            reached=bool(np.percentile(everything, 50) <= 0.12 and np.percentile(everything, 95) <= 0.25),
        ),
        *(
            Row(what=f"of these, the {name} click of an object", measured=milliseconds(nth, 50, 95))
            for name, nth in zip(("first", "second", "third"), seconds, strict=True)
        ),
        Row(what="where such a click's time goes, means", measured=_shares(before, after, float(np.mean(everything)))),
        Row(
            what=f"identical click again, p50 / p95 of {len(again)}",
            reach="10 ms",
            measured=milliseconds(again, 50, 95),
            reached=bool(np.percentile(again, 95) <= 0.01),
        ),
    ]


def _shares(before: dict[str, float], after: dict[str, float], client_s: float) -> str:
    """Return the parts of a click: of the server by its own counters, the rest of the round trip by the client's."""

    def mean_ms(histogram: str, label: str) -> float:
        total, number = (after[k] - before.get(k, 0) for k in (f"{histogram}_{x}{{{label}}}" for x in ("sum", "count")))
        return 1000 * total / number

    decode = mean_ms("graco_step_seconds", 'step="decode"')
    shape = mean_ms("graco_step_seconds", 'step="shape"')
    server = mean_ms("graco_request_seconds", 'route="/predict"')
    return (
        f"decoder and mask {decode:.1f} ms, brush RLE {shape:.1f} ms, rest of the server {server - decode - shape:.1f} "
        f"ms, sending and parsing {1000 * client_s - server:.1f} ms"
    )


def drafts(stage: Stage) -> list[Row]:
    """Click with more and more regions in the task's drafts: side by side in the photo, and large overlapping ones."""
    photos = stage.warm(stage.count(20, 3))
    answered = [stage.annotator.click(photo.uri(), [photo.click_inside(stage.rng)])[0] for photo in photos]
    tiles = [answered[0] | {"value": answered[0]["value"] | {"rle": rle}} for rle in _side_by_side()]
    own = "no slope: the median with 200 is at most 10 % or 10 ms above that with none"
    return [
        _draft_row(stage, photos, tiles, f"200 regions side by side in the task's drafts, click latency; {own}", True),
        _draft_row(stage, photos, answered, "the same with 200 large regions, ten deep over the whole photo", False),
    ]


def _side_by_side() -> list[list[int]]:
    """Return 200 masks that share a photo: wavy discs, 20 across and 10 down."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    high, wide = HEIGHT / 10, WIDTH / 20
    found = []
    for row in range(10):
        for column in range(20):
            dx, dy = (x - (column + 0.5) * wide) / wide, (y - (row + 0.5) * high) / high
            found.append(brush.encode(np.hypot(dx, dy) < 0.42 + 0.05 * np.sin(9 * np.arctan2(dy, dx))))
    return found


def _draft_row(stage: Stage, photos: list[Photo], regions: list[dict[str, Any]], what: str, judged: bool) -> Row:
    texts = [json.dumps(region) for region in regions]
    bodies = {}
    for count in _REGIONS:
        results = [
            text.replace(regions[i]["id"], f"{regions[i]['id']}-{n}", 1)
            for n, (i, text) in enumerate(islice(cycle(enumerate(texts)), count))
        ]
        bodies[count] = '[{"id": 1, "result": [' + ",".join(results) + '], "updated_at": "2026-11-21T08:42:58Z"}]'
    taken: dict[int, list[float]] = {count: [] for count in _REGIONS}
    for photo in islice(cycle(photos), stage.count(20, 3)):
        for count in stage.rng.permutation(_REGIONS).tolist():
            _, seconds = stage.annotator.click(photo.uri(), [photo.click_inside(stage.rng)], drafts=bodies[count])
            taken[count].append(1000 * seconds)
    medians = {count: float(np.median(taken[count])) for count in _REGIONS}
    slope, low, high = _slope(taken, stage.rng)
    none, most = medians[0], medians[_REGIONS[-1]]
    return Row(
        what=f"{what} ({len(bodies[_REGIONS[-1]]) / 1e6:.1f} MB of request)",
        reach="no slope" if judged else "",
        measured=f"{', '.join(f'{count}: {ms:.0f} ms' for count, ms in medians.items())}; slope {slope:+.1f} ms a "
        f"100 regions (95 % {low:+.1f} .. {high:+.1f})",
        reached=most - none <= max(_SLACK_MS, 0.1 * none) if judged else None,
    )


def _slope(taken: dict[int, list[float]], rng: np.random.Generator) -> tuple[float, float, float]:
    """Return the least-squares slope in ms for 100 regions and its 95 % interval, by bootstrap within each count."""

    def fit(samples: dict[int, npt.NDArray[np.float64]]) -> float:
        x = np.concatenate([np.full(len(ms), count / 100) for count, ms in samples.items()])
        return float(np.polyfit(x, np.concatenate(list(samples.values())), 1)[0])

    samples = {count: np.array(ms) for count, ms in taken.items()}
    resampled = [fit({count: rng.choice(ms, len(ms)) for count, ms in samples.items()}) for _ in range(1000)]
    low, high = np.percentile(resampled, (2.5, 97.5))
    return fit(samples), float(low), float(high)
