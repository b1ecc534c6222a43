"""Memory of every process that a backend is made of, over time, and whether it grows."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import psutil
from scipy.stats import theilslopes

WARM_UP = 0.2  # of the time
_PARTS = 12  # of the time after it
_MB = 2**20

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class Process:
    """One process: when it was looked at and what it held."""

    role: str
    times_s: list[float] = field(default_factory=list)  # since the clock started
    rss_mb: list[float] = field(default_factory=list)
    uss_mb: list[float] = field(default_factory=list)


def growth(times_s: Sequence[float], values: Sequence[float], whole_s: float) -> float | None:
    """Return by how many percent values grew after the warm-up: what is held at the least, between pieces of work.

    A process's memory swings with its work, and by far more than a leak adds. What leaked stays when the work is done,
    so that the least value of each twelfth of the time is looked at; of these it is the median of all slopes (Theil and
    Sen). Simulated, it errs by 0.3 % (standard deviation) for a process at work two thirds of the time, a fit through
    all values by 3 %.

    None where the process did not last from the warm-up to the end, within a tenth of the time.

    >>> growth(range(101), [100] * 20 + [200 + second / 4 for second in range(81)], 100)
    10.0
    >>> growth(range(101), [200 + 150 * (second % 3 > 0) for second in range(101)], 100)
    0.0
    """
    times, found = np.asarray(times_s, float), np.asarray(values, float)
    after = times >= WARM_UP * whole_s
    if after.sum() < 5 or times[after][0] > (WARM_UP + 0.1) * whole_s or times[-1] < 0.9 * whole_s:
        return None
    places, least = _least(times[after], found[after])
    slope, start, *_ = theilslopes(least, places)
    first = start + slope * WARM_UP * whole_s
    return round(float(100 * slope * (1 - WARM_UP) * whole_s / first), 2)


def _least(times: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Return when and how much was held at the least, for each part of the time."""
    part = np.minimum((times - times[0]) * _PARTS / (times[-1] - times[0]), _PARTS - 1).astype(int)
    lowest = [np.flatnonzero(part == one)[np.argmin(values[part == one])] for one in np.unique(part)]
    return times[lowest], values[lowest]


class Watch:
    """Looks at a process's descendants every few seconds, until it is stopped."""

    def __init__(self, parent: psutil.Process, *, every_s: float) -> None:
        """Begin now: the clock starts."""
        self._parent = parent
        self._every_s = every_s
        self._closing = threading.Event()
        self.processes: dict[tuple[int, float], Process] = {}
        self._began_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Return for how many seconds it looked."""
        self._closing.set()
        self._thread.join()
        return time.monotonic() - self._began_s

    def _run(self) -> None:
        while True:
            for process in self._parent.children(recursive=True):
                try:
                    self._look(process)
                except psutil.Error:  # it ended
                    continue
            if self._closing.wait(self._every_s):
                return

    def _look(self, process: psutil.Process) -> None:
        key = process.pid, process.create_time()
        if key not in self.processes:
            self.processes[key] = Process(role_of(process))
        found, held = self.processes[key], process.memory_full_info()
        found.times_s.append(time.monotonic() - self._began_s)
        found.rss_mb.append(held.rss / _MB)
        found.uss_mb.append(held.uss / _MB)


def role_of(process: psutil.Process) -> str:
    """Return what a process of the backend does: web, worker, redis, training ..."""
    line = " ".join(process.cmdline())
    above = process.parent()
    forked = above is not None and above.cmdline() == process.cmdline()
    if "redis-server" in line:
        return "redis"
    if "gunicorn" in line:
        return "web" if forked else "gunicorn"
    for name, job in (("worker", "a job of the worker"), ("trainer", "training")):
        if f"ml_backend {name}" in line:
            return job if forked else name
    return "run" if "ml_backend run" in line else "other"
