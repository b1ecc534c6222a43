"""How many warm clicks a second go through HTTP, against the decoder alone: python -m tests.soak.saturation

The backend runs as `make run` starts it. Clients click as fast as they are answered, each at a place and level nobody
asked for before, on photos of 3000 x 2000 that are encoded. In turns with that, in one run, a process with the same
model, heap and threads calls `predict` with prompts of the same kind. The ratio of both is what HTTP, JSON, brush RLE,
remembering and locks leave. CPU time a click is shown too: on a machine that others use it is what can be compared.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64encode
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from ml_backend.families import adapter_file, load_model
from ml_backend.label_config import make_config
from ml_backend.settings import Settings
from ml_backend.supervisor import _heap
from model.segmenter import Encoded, Segmenter, predict
from model.types import Click, Granularity, Prompt
from tests.bench.backend import _CREDENTIALS, ROOT, Backend
from tests.bench.photos import HEIGHT, WIDTH, FileServer, Photo, make_photos
from tests.bench.report import Row, machine, show
from tests.ml_backend.conftest import ask, click

Json = dict[str, Any]
REACH = 0.85
_LEVELS = tuple(level / 10 for level in range(1, 11))
_STEPS = ("read", "decode", "shape", "remember")


class Client:
    """One connection, kept alive, that does no more with an answer than see that it holds a mask."""

    def __init__(self, backend: Backend, photos: list[Photo], seed: int) -> None:
        """Connect at the first click."""
        self._connection = http.client.HTTPConnection("127.0.0.1", backend.port, timeout=100)
        self._headers = {"Content-Type": "application/json"}
        self._headers["Authorization"] = "Basic " + b64encode(":".join(_CREDENTIALS).encode()).decode()
        self._config = make_config(["Object"], levels=_LEVELS)
        self._photos = photos
        self._rng = np.random.default_rng(seed)
        self.clicks = 0

    def click(self) -> None:
        """Click somewhere on a photo's object.

        Raises:
            RuntimeError: there is no mask in the answer.
        """
        place = int(self._rng.integers(len(self._photos)))
        photo, spot = self._photos[place], self._photos[place].click_inside(self._rng)
        level = f"{self._rng.integers(1, 11) / 10:.1f}" if self._rng.random() < 0.5 else None
        regions = click(spot.x / WIDTH * 100, spot.y / HEIGHT * 100, level=level, size=(WIDTH, HEIGHT))
        body = json.dumps(ask(regions, image=photo.uri(), config=self._config, task=place + 1)).encode()
        self._connection.request("POST", "/predict", body, self._headers)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200 or b'"rle":[' not in content:
            raise RuntimeError(f"/predict answered {answer.status} {content[:300]!r}")
        self.clicks += 1


def together(jobs: list[Any], seconds: float) -> float:
    """Have each job done again and again in a thread of its own; return the seconds it took in all.

    Raises:
        RuntimeError: one of them failed.
    """
    ending, failed = threading.Event(), []

    def work(job: Any) -> None:
        try:
            while not ending.is_set():
                job()
        except Exception as error:
            failed.append(error)
            ending.set()

    threads = [threading.Thread(target=work, args=[job]) for job in jobs]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    ending.wait(seconds)
    ending.set()
    for thread in threads:
        thread.join()
    if failed:
        raise RuntimeError("a click was not answered") from failed[0]
    return time.perf_counter() - start


class Decoder:
    """The decoder's process, as seen from here."""

    def __init__(self, folder: Path, data: Path) -> None:
        """Start it; it is ready at the first answer."""
        environment = os.environ | _heap("web") | {"GRACO_DATA_DIR": str(data)}
        command = [sys.executable, "-m", "tests.soak.saturation", "--decoder", str(folder)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, threads: int, seconds: float) -> Json:
        """Return clicks, seconds and seconds of CPU of one turn."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{json.dumps([threads, seconds])}\n")
        self.process.stdin.flush()
        found: Json = json.loads(self.process.stdout.readline())
        return found

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def decode(folder: Path) -> None:
    """Be the decoder's process: for each line on stdin predict for so long in so many threads."""
    settings = Settings()
    segmenter = load_model(settings, adapter=adapter_file(settings), threads=settings.compute_threads)
    truths = np.load(folder / "truths.npz")
    photos = [Photo(folder / f"{name}.jpg", truths[name]) for name in sorted(truths)]
    encoded = [segmenter.encode(photo.pixels()) for photo in photos]
    rng = np.random.default_rng(99)
    for line in sys.stdin:
        threads, seconds = json.loads(line)
        people = [_Predictor(segmenter, photos, encoded, int(rng.integers(2**32))) for _ in range(threads)]
        before = sum(psutil.Process().cpu_times()[:2])
        took_s = together([one.predict for one in people], seconds)
        used_s = sum(psutil.Process().cpu_times()[:2]) - before
        print(json.dumps({"clicks": sum(one.clicks for one in people), "seconds": took_s, "cpu_s": used_s}), flush=True)


class _Predictor:
    def __init__(self, segmenter: Segmenter, photos: list[Photo], encoded: list[Encoded], seed: int) -> None:
        self._segmenter, self._photos, self._encoded = segmenter, photos, encoded
        self._rng = np.random.default_rng(seed)
        self.clicks = 0

    def predict(self) -> None:
        place = int(self._rng.integers(len(self._photos)))
        spot: Click = self._photos[place].click_inside(self._rng)
        level = Granularity(int(self._rng.integers(1, 11))) if self._rng.random() < 0.5 else None
        predict(self._segmenter, self._encoded[place], Prompt(clicks=(spot,), granularity=level))
        self.clicks += 1


def measure(options: argparse.Namespace, folder: Path) -> Json:
    """Return the report of one run."""
    shots, data = folder / "photos", folder / "data"
    shots.mkdir()
    data.mkdir()
    photos = make_photos(shots, options.photos)
    np.savez(shots / "truths.npz", **{photo.path.stem: photo.truth for photo in photos})
    files = FileServer(shots)
    backend = Backend(files.url, data)
    decoder = Decoder(shots, data)
    try:
        clients = [Client(backend, photos, seed) for seed in range(options.clients)]
        warming = Client(backend, photos, 10**6)
        while warming.clicks < 4 * len(photos):
            warming.click()
        decoder.run(options.clients, 1)
        turns: list[Json] = []
        before = backend.metrics()
        for turn in range(options.rounds):
            found: dict[str, Json] = {}
            for side in ("http", "decoder") if turn % 2 == 0 else ("decoder", "http"):
                if side == "decoder":
                    found[side] = decoder.run(options.clients, options.seconds)
                else:
                    found[side] = _http(backend, clients, options.seconds)
            turns.append(found)
        return _report(turns, before, backend.metrics())
    finally:
        decoder.close()
        backend.close()
        files.close()


def _http(backend: Backend, clients: list[Client], seconds: float) -> Json:
    before, used = sum(one.clicks for one in clients), sum(backend.web.cpu_times()[:2])
    own = sum(psutil.Process().cpu_times()[:2])
    took_s = together([one.click for one in clients], seconds)
    return {
        "clicks": sum(one.clicks for one in clients) - before,
        "seconds": took_s,
        "cpu_s": sum(backend.web.cpu_times()[:2]) - used,
        "clients_cpu_s": sum(psutil.Process().cpu_times()[:2]) - own,
    }


def _report(turns: list[Json], before: dict[str, float], after: dict[str, float]) -> Json:
    def rate(side: str) -> float:
        return float(sum(turn[side]["clicks"] for turn in turns) / sum(turn[side]["seconds"] for turn in turns))

    def cpu_ms(side: str, what: str = "cpu_s") -> float:
        return float(1000 * sum(turn[side][what] for turn in turns) / sum(turn[side]["clicks"] for turn in turns))

    def step_ms(step: str) -> float:
        total, count = (
            after[name] - before.get(name, 0.0)
            for name in (f'graco_step_seconds_{part}{{step="{step}"}}' for part in ("sum", "count"))
        )
        return 1000 * total / max(1.0, count)

    ratio = rate("http") / rate("decoder")
    each = [
        turn["http"]["clicks"] / turn["http"]["seconds"] / (turn["decoder"]["clicks"] / turn["decoder"]["seconds"])
        for turn in turns
    ]
    rows = [
        Row(
            what="warm clicks at saturation, against the decoder alone in turns",
            reach=f"{REACH} x",
            measured=f"{rate('http'):.1f} clicks/s against {rate('decoder'):.1f}: {ratio:.3f} x "
            f"(each turn: {', '.join(f'{one:.2f}' for one in each)})",
            reached=ratio >= REACH,
        ),
        Row(
            what="CPU time a click: web process; clients; the decoder alone",
            measured=f"{cpu_ms('http'):.1f} ms; {cpu_ms('http', 'clients_cpu_s'):.1f} ms; {cpu_ms('decoder'):.1f} ms",
        ),
        Row(what="wall time a click in the server", measured=", ".join(f"{s} {step_ms(s):.1f} ms" for s in _STEPS)),
    ]
    return {"passed": ratio >= REACH, "rows": [asdict(row) for row in rows], "turns": turns}


def main() -> None:
    """Measure, print, write the report if a file is named."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.saturation", description=__doc__)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=8, help="of each turn of each side")
    parser.add_argument("--photos", type=int, default=12)
    parser.add_argument("--report", type=Path, help="JSON file to write")
    parser.add_argument("--decoder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decoder is not None:
        decode(options.decoder)
        return
    average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="graco-soak-") as folder:
        report = measure(options, Path(folder))
    report["machine"] = machine("python -m tests.soak.saturation", average)
    if options.report is not None:
        options.report.write_text(json.dumps(report, indent=1) + "\n")
    console = Console()
    show([Row(**row) for row in report["rows"]], console)
    for line in report["machine"]:
        console.print(line)
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
