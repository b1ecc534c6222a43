"""What all measurements share: photos, the backend under test, and how much to measure."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from tests.bench.backend import ROOT, Annotator, Backend
from tests.bench.photos import FileServer, Photo, make_photos
from tests.bench.report import Row

WEIGHTS = ROOT / "model" / "weights" / "light.safetensors"
_IMAGES = 50


class Stage:
    """Opened once for a run; each part is made when first asked for."""

    def __init__(self, *, quick: bool, full: bool) -> None:
        self.quick = quick
        self.full = full
        self.rng = np.random.default_rng(20261121)
        self._stack = ExitStack()
        self._seen: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()

    def count(self, whole: int, quick: int) -> int:
        """Return how many to measure."""
        return quick if self.quick else whole

    @cached_property
    def folder(self) -> Path:
        """A folder of this run, deleted after it."""
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="graco-bench-")))

    @cached_property
    def photos(self) -> list[Photo]:
        """Different photos."""
        folder = self.folder / "photos"
        folder.mkdir()
        return make_photos(folder, self.count(_IMAGES, 6))

    @cached_property
    def backend(self) -> Backend:
        """The backend, model loaded."""
        files = FileServer(self.photos[0].path.parent)
        self._stack.callback(files.close)
        data_dir = self.folder / "data"
        data_dir.mkdir()
        backend = Backend(files.url, data_dir)
        self._stack.callback(backend.close)
        return backend

    @property
    def backend_started(self) -> bool:
        """Whether anything was asked of the backend yet."""
        return "backend" in self.__dict__

    @property
    def compiled(self) -> Path:
        """Where a compiled encoder lies: the backend's own folder once that was started."""
        return (self.backend.data_dir if self.backend_started else self.folder) / "compiled"

    @cached_property
    def annotator(self) -> Annotator:
        """Somebody who clicks."""
        return Annotator(self.backend)

    def warm(self, count: int) -> list[Photo]:
        """Return photos whose images the backend has encoded."""
        photos = self.photos[:count]
        for photo in photos:
            if photo.uri() not in self._seen:
                self.annotator.click(photo.uri(), [photo.click_inside(self.rng)])
                self._seen.add(photo.uri())
        return photos


Measure = Callable[[Stage], Sequence[Row]]
