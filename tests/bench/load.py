"""Many images and many annotators: first clicks, memory, and whether /health still answers at once."""

from __future__ import annotations

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import requests

from tests.bench.backend import Annotator
from tests.bench.photos import Photo
from tests.bench.report import Row, milliseconds
from tests.bench.stage import Stage

_THINK_S = 0.3
_ANNOTATORS = 4
_HEALTH_EVERY_S = 0.1
_GIGABYTE = 1e9
_ENCODED = 'graco_embeddings_total{source="encoded"}'


def new_images(stage: Stage) -> list[Row]:
    """Click once on each of 50 images nobody opened before."""
    since = stage.backend.memory_samples
    at_start = stage.backend.memory()
    before = stage.backend.metrics()
    seconds = [stage.annotator.click(p.uri(), [p.click_inside(stage.rng)])[1] for p in stage.photos]
    after = stage.backend.metrics()
    if after[_ENCODED] - before.get(_ENCODED, 0) != len(seconds):
        raise RuntimeError("not every photo was new to the backend: measure new images first")
    held, peak = stage.backend.memory(), stage.backend.peak_memory(since=since)
    steps = {
        step: (after[name := f'graco_step_seconds_sum{{step="{step}"}}'] - before.get(name, 0)) / len(seconds)
        for step in ("fetch", "encode", "decode", "shape")
    }
    return [
        Row(
            what=f"first click on a new photo, p50 / p95 of {len(seconds)}",
            measured=f"{milliseconds(seconds, 50, 95)}; means: fetch and JPEG {1000 * steps['fetch']:.0f} ms, encode "
            f"{1000 * steps['encode']:.0f} ms, decoder and mask {1000 * steps['decode']:.0f} ms, brush RLE "
            f"{1000 * steps['shape']:.0f} ms",
        ),
        Row(
            what=f"memory of the web process, model loaded, {len(seconds)} images cached: highest while encoding them",
            reach="1.5 GB",
            measured=f"{_gigabytes(peak)}; {_gigabytes(held)} after it, {_gigabytes(at_start)} before",
            reached=peak < 1.5 * _GIGABYTE,
        ),
    ]


def health(stage: Stage) -> list[Row]:
    """Ask /health from another process while annotators click and one of them opens image after image."""
    photos = stage.warm(_ANNOTATORS)
    done = threading.Event()
    encoded = stage.backend.metrics().get(_ENCODED, 0)
    probes = stage.count(400, 40)
    with (
        multiprocessing.get_context("spawn").Pool(1) as elsewhere,
        ThreadPoolExecutor(_ANNOTATORS + 1) as people,
    ):
        seeds = stage.rng.integers(2**32, size=_ANNOTATORS + 1).tolist()
        clicking = [
            people.submit(_click_on, Annotator(stage.backend), photo, seed, done)
            for photo, seed in zip(photos, seeds[1:], strict=True)
        ]
        opening = people.submit(_open_images, Annotator(stage.backend), stage.photos, seeds[0], done)
        try:
            answered = elsewhere.apply(probe_health, (f"{stage.backend.url}/health", probes))
        finally:
            done.set()
        clicks = [taken for future in clicking for taken in future.result()]
        opened = opening.result()
    encoded = stage.backend.metrics().get(_ENCODED, 0) - encoded
    return [
        Row(
            what=f"/health p99 of {probes} while {_ANNOTATORS} annotators click ({len(clicks)} clicks) and images are "
            f"encoded ({encoded:.0f})",
            reach="50 ms",
            measured=f"{milliseconds(answered, 99)} (p50 {milliseconds(answered, 50)}, longest "
            f"{milliseconds(answered, 100)})",
            reached=bool(np.percentile(answered, 99) <= 0.05),
        ),
        Row(what="their clicks meanwhile, p50 / p95", measured=milliseconds(clicks, 50, 95)),
        Row(what="first clicks on the new images meanwhile, p50 / p95", measured=milliseconds(opened, 50, 95)),
    ]


def probe_health(url: str, count: int) -> list[float]:
    """Return the seconds of `count` answers; run in a process of its own, whose only work this is."""
    seconds = []
    with requests.Session() as session:
        session.get(url).raise_for_status()
        for _ in range(count):
            time.sleep(_HEALTH_EVERY_S)
            start = time.perf_counter()
            response = session.get(url)
            seconds.append(time.perf_counter() - start)
            response.raise_for_status()
    return seconds


def _click_on(annotator: Annotator, photo: Photo, seed: int, done: threading.Event) -> list[float]:
    rng = np.random.default_rng(seed)
    seconds = []
    while not done.wait(_THINK_S * rng.uniform(0.7, 1.3)):
        seconds.append(annotator.click(photo.uri(), [photo.click_inside(rng)])[1])
    return seconds


def _open_images(annotator: Annotator, photos: list[Photo], seed: int, done: threading.Event) -> list[float]:
    rng = np.random.default_rng(seed)
    seconds: list[float] = []
    while not done.wait(_THINK_S):
        photo = photos[len(seconds) % len(photos)]
        seconds.append(annotator.click(photo.uri(1000 + len(seconds)), [photo.click_inside(rng)])[1])
    return seconds


def highest_memory(stage: Stage) -> list[Row]:
    """Say the most the web process held in all that was measured before."""
    if not stage.backend_started:
        return []
    return [
        Row(
            what="memory of the web process, highest of the whole run",
            measured=_gigabytes(stage.backend.peak_memory()),
        )
    ]


def _gigabytes(size: int) -> str:
    return f"{size / _GIGABYTE:.2f} GB"
