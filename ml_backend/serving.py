"""Which adapter version answers whom: ACTIVE files are followed, and a change is loaded while the old version answers.

A project is served by the active version of its own line, else by that of the line `shared`, else by the configured
adapter. A version is in effect once it is loaded; one that cannot be loaded never is, and the one before goes on.
Whoever asks gets network and name in one value, so that a request is answered by exactly one version.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from active_learning.lines import SHARED, line_of
from active_learning.registry import AdapterRegistry
from ml_backend import metrics
from ml_backend.settings import Settings
from model.segmenter import Segmenter

log = logging.getLogger(__name__)

_WATCH_S = 0.3
_RETRY_S = 5.0  # after a version could not be loaded
_KEPT = 8  # versions in memory, about 35 MB each, up to 80 while they move the encoder's tail
_PROJECT = re.compile(r"([0-9]{1,19})(\.[0-9]+)?")  # Label Studio sends 3, or 3.1795250578: id and time of creation


@dataclass(frozen=True, slots=True, eq=False)
class Serving:
    """What answers one request, and its name."""

    segmenter: Segmenter
    model_version: str


@dataclass(slots=True)
class _Line:
    version: str | None = None  # in effect
    loading: str | None = None
    failed: str | None = None
    failed_s: float = 0.0  # of time.monotonic
    why: str | None = None


def lines_of(settings: Settings, project: str | int | None) -> tuple[str, ...]:
    """Return the lines that may serve a project, the first that has an active version first.

    Args:
        settings: `adapter_line` decides.
        project: as Label Studio sends it; None, or what is no id: any.
    """
    match = _PROJECT.fullmatch(str(project))
    if match is None or settings.adapter_line == "shared":
        return (SHARED,)
    return line_of(int(match[1])), SHARED


def names_project(project: str | int) -> bool:
    """Whether this is a project's id, as Label Studio sends it."""
    return _PROJECT.fullmatch(str(project)) is not None


def version_name(family: str, base: str, line: str, version: str) -> str:
    """Return what Label Studio shows of a registry's version on a base of this digest.

    >>> version_name("light", "1a2b3c4d5e6f", "project-3", "v0002-5e6f7a8b")
    'light-1a2b3c4d+project-3-v0002-5e6f7a8b'
    """
    return f"{family}-{base[:8]}+{line}-{version}"


class ActiveVersions:
    """The versions that lines serve in this process; may be asked from many threads."""

    def __init__(self, registry: AdapterRegistry, settings: Settings, segmenter: Callable[[], Segmenter]) -> None:
        """Prepare; nothing is read or started before the first question.

        Args:
            registry: where versions are kept.
            settings: decide which lines serve a project.
            segmenter: gives a segmenter of these weights, waiting while it is loaded.
        """
        self._registry = registry
        self._settings = settings
        self._segmenter = segmenter
        self._lock = threading.Lock()
        self._lines: dict[str, _Line] = {}  # those that have had an active version
        self._loaded: OrderedDict[tuple[str, str], Serving] = OrderedDict()
        self._one_load = threading.Lock()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load-adapter")
        self._watcher: threading.Thread | None = None
        self._closing = threading.Event()

    def close(self) -> None:
        """Stop to follow."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
        self._loader.shutdown(wait=True, cancel_futures=True)

    def serving(self, project: str | int | None) -> Serving | None:
        """Return what answers a project; None: the configured adapter. Waits only for what was never in memory."""
        self._begin()
        for line in lines_of(self._settings, project):
            version = self._look(line)
            if version is not None and (found := self._get(line, version)) is not None:
                return found
        return None

    def version(self, project: str | int | None) -> str | None:
        """Return the name of what answers a project, and have it loaded; None: the configured adapter."""
        self._begin()
        for line in lines_of(self._settings, project):
            if (version := self._look(line)) is not None:
                if (line, version) not in self._loaded and not self._closing.is_set():
                    self._loader.submit(self._get, line, version)
                return self._name(line, version)
        return None

    def in_effect(self) -> dict[str, str]:
        """Return the names of the versions that serve, by line."""
        self._begin()
        with self._lock:
            lines = {name: line.version for name, line in self._lines.items()}
        return {name: self._name(name, version) for name, version in lines.items() if version is not None}

    def failures(self) -> list[str]:
        """Return a sentence for each line whose active version cannot be loaded."""
        with self._lock:
            return [line.why for line in self._lines.values() if line.why is not None]

    def _name(self, line: str, version: str) -> str:
        return version_name(self._settings.family, self._registry.base, line, version)

    def _begin(self) -> None:
        with self._lock:
            if self._watcher is not None or self._closing.is_set():
                return
            for name in self._registry.lines():  # there is no older one to go on with: in effect, loaded when asked for
                try:
                    self._lines[name] = _Line(self._registry.active_id(name))
                except (ValueError, OSError) as error:
                    self._lines[name] = _Line(why=str(error))
            self._watcher = threading.Thread(target=self._watch, name="watch-adapters", daemon=True)
            self._watcher.start()

    def _watch(self) -> None:
        while not self._closing.wait(_WATCH_S):
            try:
                for line in {*self._lines.copy(), *self._registry.lines()}:
                    self._look(line)
            except Exception:
                log.exception("adapter versions were not looked at")

    def _look(self, name: str) -> str | None:
        """Return the version of a line that is in effect, and have another one loaded if ACTIVE names it."""
        try:
            wanted = self._registry.active_id(name)
        except (ValueError, OSError) as error:
            with self._lock:
                line = self._lines.setdefault(name, _Line())
                self._blame(line, name, None, error)
                return line.version
        with self._lock:
            line = self._lines.get(name) or _Line()
            if wanted == line.version:
                line.failed = line.why = None
            elif wanted is None:
                log.info("line %s serves no version of its own any more", name)
                line.version = line.failed = line.why = None
            elif line.loading != wanted and not self._closing.is_set():
                self._lines[name] = line
                if line.failed != wanted or time.monotonic() - line.failed_s > _RETRY_S:
                    line.loading = wanted
                    self._loader.submit(self._switch, name, wanted)
            return line.version

    def _switch(self, name: str, wanted: str) -> None:
        """Load a version, then have it answer from the next request on, unless yet another is wanted by now."""
        line = self._lines[name]
        try:
            self.load(name, wanted)
            now = self._registry.active_id(name)
        except Exception as error:
            with self._lock:
                line.loading = None
                self._blame(line, name, wanted, error)
            return
        with self._lock:
            line.loading = None
            if now == wanted:
                log.info("line %s is served by %s (before: %s)", name, wanted, line.version or "none of its own")
                for older in [key for key in self._loaded if key[0] == name and key[1] not in (wanted, line.version)]:
                    del self._loaded[older]  # the one before stays, to go back to
                line.version = wanted
                line.failed = line.why = None
        self._look(name)

    def _get(self, name: str, version: str) -> Serving | None:
        """Return what is in effect, loaded now if it was not yet or was forgotten.

        If that fails it is what served the line before; None: nothing did that can be loaded.
        """
        with self._lock:
            if (name, version) in self._loaded:
                self._loaded.move_to_end((name, version))
                return self._loaded[name, version]
        try:
            return self.load(name, version)
        except Exception as error:
            earlier = self._earlier(name, version)
            with self._lock:
                line = self._lines[name]
                if line.version == version:
                    line.version = None if earlier is None else earlier[0]
                self._blame(line, name, version, error)
            return None if earlier is None else earlier[1]

    def _earlier(self, name: str, version: str) -> tuple[str, Serving] | None:
        """Return what served a line before a version that cannot be loaded: its id, and it loaded; None: nothing."""
        try:
            way = self._registry.way_back(name)
            if way is None or way.was != version or way.now is None:
                return None
            return way.now.id, self.load(name, way.now.id)
        except Exception as error:
            log.warning("line %s: what served before %s cannot be loaded either: %s", name, version, error)
            return None

    def load(self, name: str, version: str) -> Serving:
        """Return any version of a line, loaded now if it was not yet.

        Raises:
            Refusal: it cannot be loaded.
        """
        segmenter = self._segmenter()
        with self._one_load:
            with self._lock:
                if (name, version) in self._loaded:
                    return self._loaded[name, version]
            start = time.perf_counter()
            path = self._registry.intact(self._registry.get(name, version))
            found = Serving(segmenter.with_adapter(path), self._name(name, version))
            took_s = time.perf_counter() - start
            metrics.STEP.labels("load_adapter").observe(took_s)
            log.info("%s is loaded after %.2f s", found.model_version, took_s)
            with self._lock:
                self._loaded[name, version] = found
                while len(self._loaded) > _KEPT:
                    self._loaded.popitem(last=False)
        return found

    def _blame(self, line: _Line, name: str, version: str | None, error: Exception) -> None:
        """Remember why a line's active version does not serve; say it once. The lock is held."""
        serves = "what served before goes on" if line.version is not None else "others serve it"
        command = f"python -m ml_backend adapters activate {name} VERSION"
        why = f"line {name}: {error}; {serves}. To choose another: {command}"
        if why != line.why:
            log.error("%s", why)
            metrics.ADAPTER_FAILURES.inc()
        line.failed, line.failed_s, line.why = version, time.monotonic(), why
