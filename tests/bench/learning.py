"""Webhooks and clicks while a training runs: python -m tests.bench.learning ../shared/data/car-parts

Starts a backend of its own as `simulate` does, submits annotations, presses Start Training, and measures beside it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from active_learning.status import TrainingFolder
from ml_backend.label_config import make_config
from ml_backend.simulate import PROJECT, Backend, Worker
from model.annotations import AnnotatedImage, read_annotations
from model.types import Click

_EVENTS, _A_SECOND = 1000, 50
_CLICKS = 60


def main(data: Path) -> None:
    """Print the figures."""
    levels = tuple(level / 10 for level in range(1, 11))
    images = [replace(image, masks=image.masks[:4]) for image in read_annotations(data).images[:40]]
    with tempfile.TemporaryDirectory() as folder:
        backend = Backend(Path(folder), data / "images")
        try:
            worker = Worker(backend=backend, config=make_config(["Object"], levels=levels))
            _show("click, idle", _clicks(worker, images[0], seed=1))
            for number, image in enumerate(images, 1):
                worker.submit(number, _task(worker, image), [(m, f"region{m.id}") for m in image.masks])
            event = {"action": "START_TRAINING", "project": {"id": PROJECT, "label_config": worker.config}}
            backend.post("/webhook", event)
            trainings = TrainingFolder(Path(folder) / "trainings", f"project-{PROJECT}")
            while (status := trainings.status()) is None or status.step < 10:
                time.sleep(0.5)
            _show("click, training", _clicks(worker, images[0], seed=2))
            _show("webhook, training", _webhooks(worker, images[0]))
            print("training is", trainings.status())
            print(f"largest of its processes: {max(_memory_mb()):.0f} MB")
        finally:
            backend.close()


def _task(worker: Worker, image: AnnotatedImage) -> dict[str, object]:
    return {"id": image.id, "data": {"image": worker.backend.photo(image.path.name)}}


def _clicks(worker: Worker, image: AnnotatedImage, *, seed: int) -> list[float]:
    """Return the seconds of clicks at new places, four a second, on a warm image."""
    rng = np.random.default_rng(seed)
    seconds = []
    for number in range(_CLICKS + 1):
        click = Click(x=float(rng.uniform(0, image.width)), y=float(rng.uniform(0, image.height)), positive=True)
        level = image.level_of(image.masks[number % len(image.masks)])
        start = time.perf_counter()
        worker.click(_task(worker, image), (image.height, image.width), [click], level)
        seconds.append(time.perf_counter() - start)
        time.sleep(0.25)
    return seconds[1:]  # the first one encodes


def _webhooks(worker: Worker, image: AnnotatedImage) -> list[float]:
    """Return the seconds of submitted annotations, sent at a steady rate."""
    seconds = []
    begin = time.perf_counter()
    for number in range(_EVENTS):
        time.sleep(max(0.0, begin + number / _A_SECOND - time.perf_counter()))
        start = time.perf_counter()
        worker.submit(10_000 + number, _task(worker, image), [(image.masks[0], f"event{number}")])
        seconds.append(time.perf_counter() - start)
    return seconds  # encoding the mask and writing JSON included


def _memory_mb() -> list[float]:
    found = [p.info for p in psutil.process_iter(["cmdline", "memory_info"]) if p.info["cmdline"]]
    return [info["memory_info"].rss / 2**20 for info in found if info["cmdline"][-1:] == ["trainer"]]


def _show(name: str, seconds: list[float]) -> None:
    p50, p95, p99 = np.percentile(np.array(seconds) * 1000, [50, 95, 99])
    print(
        f"{name}: p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms, longest {max(seconds) * 1000:.1f} ms",
        flush=True,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
