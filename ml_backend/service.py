"""One model, its caches and its threads: from an image and a prompt to a prediction.

What is answered depends on image, prompt and weights alone; every cache here only makes it sooner. Nothing of one
request is kept where another could see it: states and answers are stored under the image's digest, the adapter's id and
the full prompt.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Generic, TypeVar

from active_learning.registry import AdapterRegistry
from ml_backend import metrics
from ml_backend.answers import AnswerStore
from ml_backend.embeddings import EmbeddingCache
from ml_backend.families import adapter_file, base_of, configured_version, load_model
from ml_backend.fetch import make_fetcher
from ml_backend.images import ImageInfo, ImageSource, TaskImage
from ml_backend.inbox import Inbox
from ml_backend.jobs import HandOver
from ml_backend.serving import ActiveVersions, Serving, lines_of, version_name
from ml_backend.settings import Settings
from model import heap
from model.background import background_thread
from model.proposals import whole_image
from model.segmenter import Encoded, MemoKey, Segmenter, State, foresee, predict
from model.types import Prediction, Prompt, Proposal, Refusal, RGBImage

log = logging.getLogger(__name__)

CLICKED = "clicked"
"""File in the data folder that is touched at each click."""
_STATE_BYTES = 128 * 2**20
"""Of earlier steps, 1 to 1.4 MiB each; those with a focus, or one made ready, count its 2 MiB (4 where the adapter
moves the encoder's tail), though they share it."""
_WARM_QUEUE = 64  # images waiting to be encoded in the background
_FORESEEN = 2  # clicks that are made ready for: one now, one next
_LOAD_LIMIT_S = 90  # Label Studio gives up a prediction after 100 s

V = TypeVar("V")
_Asked = tuple[str, str | None, Prompt]  # image, adapter, and what was answered


class BoundedCache(Generic[V]):
    """A thread-safe map that forgets what was used longest ago once the weights of its values exceed a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._lock = threading.Lock()
        self._values: OrderedDict[Any, tuple[V, int]] = OrderedDict()

    def get(self, key: object) -> V | None:
        """Return the value, or None."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: object, value: V, weight: int = 1) -> None:
        """Keep `value`, making room for it; one heavier than the whole limit is not kept."""
        with self._lock:
            if key in self._values:
                self._held -= self._values.pop(key)[1]
            if weight > self._limit:
                return
            self._values[key] = (value, weight)
            self._held += weight
            while self._held > self._limit:
                self._held -= self._values.popitem(last=False)[1][1]


def _goes_on(new: _Asked, old: _Asked) -> bool:
    """Whether the annotator of `old` has gone on to `new`: a further click, or another level."""
    return new[:2] == old[:2] and new[2].clicks[: len(old[2].clicks)] == old[2].clicks


class _Memo:
    """The states of one image and adapter, seen through the cache that all share."""

    def __init__(self, states: BoundedCache[State], image_id: str, adapter: str | None) -> None:
        self._states = states
        self._of = image_id, adapter

    def get(self, key: MemoKey, /) -> State | None:
        return self._states.get((self._of, key))

    def __setitem__(self, key: MemoKey, state: State, /) -> None:
        self._states.put((self._of, key), state, state.nbytes)


def open_registry(settings: Settings) -> AdapterRegistry:
    """Return the adapter versions of the data directory that fit the base weights.

    Raises:
        Refusal: the base weights cannot be read.
    """
    return AdapterRegistry(settings.shared / "adapters", base=base_of(settings).digest)


def serving_version(settings: Settings, project: str | int | None = None) -> str:
    """Return what Label Studio shows as our version: base and adapter, or base, line and version in that line.

    Such as light-1a2b3c4d+granularity-5e6f7a8b, or light-1a2b3c4d+project-3-v0002-5e6f7a8b. Nothing is loaded: it is
    known at once.

    Raises:
        Refusal: one of the files cannot be read.
    """
    registry = open_registry(settings)
    for line in lines_of(settings, project):
        if (version := registry.active_id(line)) is not None:
            return version_name(settings.family, registry.base, line, version)
    return configured_version(settings)


def _share_of_cores(settings: Settings) -> int:
    """Return the CPU threads of one of several web processes; 0 for a single one: all cores."""
    several = settings.web_processes > 1
    return max(1, (os.cpu_count() or 1) // settings.web_processes) if several else 0


@contextmanager
def timed(step: str) -> Iterator[None]:
    """Count the seconds of one step of a prediction."""
    start = time.perf_counter()
    try:
        yield
    finally:
        metrics.STEP.labels(step).observe(time.perf_counter() - start)


class Service:
    """The model and all that is kept between requests; made once per process, used from many threads."""

    def __init__(self, settings: Settings) -> None:
        """Prepare everything but the model; `start` loads it in the background."""
        self.settings = settings
        self.registry = open_registry(settings)
        self._configured = configured_version(settings)
        self._active = ActiveVersions(self.registry, settings, lambda: self._model()[0])
        self.images = ImageSource(
            make_fetcher(settings),
            max_pixels=settings.image_max_megapixels * 10**6,
            ttl_s=settings.image_ttl_s,
        )
        self._clicked = settings.data_dir / CLICKED
        self.answers = AnswerStore(settings.data_dir / "answers.sqlite", limit=settings.remembered_answers)
        self.inbox = Inbox(settings.data_dir / "inbox.sqlite")
        self.hand_over = HandOver(settings, self.inbox)
        self.shapes: BoundedCache[Any] = BoundedCache(64 * 2**20)  # answers ready to send, by approximate bytes
        self._states: BoundedCache[State] = BoundedCache(_STATE_BYTES)
        self._segmenter: Segmenter | None = None
        self._cache: EmbeddingCache | None = None
        self._loaded = threading.Event()
        self._failure: Exception | None = None
        self._starting = threading.Lock()
        self._loader: threading.Thread | None = None
        self._background = background_thread("warm")
        self._waiting: set[TaskImage] = set()
        self._waiting_lock = threading.Lock()
        self._foreseen: dict[_Asked, Future[None]] = {}
        self._foreseeing = threading.Lock()
        self._closed = False
        self._queues: dict[TaskImage, tuple[threading.Lock, int]] = {}
        self._queues_lock = threading.Lock()

    def start(self) -> None:
        """Begin to load the model in a thread of its own; a second call does nothing."""
        with self._starting:
            if self._loader is None:
                self.hand_over.begin()
                self._loader = threading.Thread(target=self._load, name="load-model", daemon=True)
                self._loader.start()

    def drop_background(self) -> None:
        """Leave undone what nobody waits for; an image that is being encoded is finished."""
        with self._waiting_lock, self._foreseeing:  # nobody hands in work from here on
            self._closed = True
        self._background.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """Stop background work and close files."""
        self.drop_background()
        if self._loader is not None:
            self._loader.join()
        self._active.close()
        self.hand_over.close()
        self.images.close()
        self.inbox.close()
        self.answers.close()

    def note_click(self) -> None:
        """Say that somebody clicks: trainings on this machine wait a moment (`ml_backend.trainings.Patience`)."""
        with suppress(OSError):
            self._clicked.touch()

    @property
    def ready(self) -> bool:
        """Whether images can be encoded now."""
        return self._segmenter is not None

    @property
    def loaded(self) -> tuple[str, str | None] | None:
        """The names of base weights and adapter that are loaded, once they are."""
        return None if self._segmenter is None else (self._segmenter.version, self._segmenter.adapter)

    def lines(self) -> dict[str, str]:
        """Return the names of what serves, by line; `configured`: what serves where no line has a version."""
        return {"configured": self._configured, **self._active.in_effect()}

    @property
    def failure(self) -> str | None:
        """Why the model could not be loaded, if it could not."""
        return str(self._failure) if self._failure else None

    def _load(self) -> None:
        settings = self.settings
        start = time.perf_counter()
        try:
            segmenter = load_model(
                settings,
                adapter=adapter_file(settings),
                threads=settings.compute_threads or _share_of_cores(settings),
            )
            self._cache = EmbeddingCache(
                settings.shared / "embeddings" / segmenter.encoding,
                memory_bytes=settings.embedding_memory_mb * 2**20,
                disk_bytes=settings.embedding_disk_mb * 2**20 if segmenter.costly_to_encode else 0,
            )
            self._segmenter = segmenter
            log.info(
                "model %s with adapter %s is loaded after %.1f s",
                *(segmenter.encoding, segmenter.adapter or "none", time.perf_counter() - start),
            )
        except Exception as error:
            self._failure = error
            log.exception("the model could not be loaded; every prediction will be refused until this is mended")
        finally:
            self._loaded.set()

    @property
    def warnings(self) -> list[str]:
        """Sentences on active versions that cannot be loaded; others serve in their place."""
        return self._active.failures()

    def version(self, project: str | int | None) -> str:
        """Return the name of what answers a project, as Label Studio sends it (None: any), without waiting for it."""
        return self._active.version(project) or self._configured

    def versions(self, project: str | int | None) -> list[str]:
        """Return the names of all versions that may answer a project: the one that does, then the others by line."""
        names = [
            version_name(self.settings.family, self.registry.base, line, version.id)
            for line in lines_of(self.settings, project)
            for version in reversed(self.registry.versions(line))
        ]
        return list(dict.fromkeys([self.version(project), *names, self._configured]))

    def serving(self, project: str | int | None) -> Serving:
        """Return what answers a project now, waiting while it is loaded: to be asked for once per request.

        Args:
            project: as Label Studio sends it; None: any.

        Raises:
            Refusal: the model could not be loaded.
        """
        segmenter, _ = self._model()
        return self._active.serving(project) or Serving(segmenter, self._configured)

    def segmenter_of(self, line: str, version: str | None) -> Segmenter:
        """Return the model with any version of a line, whether it serves or not (None: the configured adapter).

        Raises:
            Refusal: the model or the version could not be loaded.
        """
        return self._model()[0] if version is None else self._active.load(line, version).segmenter

    def encode_kept(self, image_id: str, read: Callable[[], RGBImage]) -> Encoded:
        """Return an image of this digest as it is encoded; `read` gives its pixels where no cache has it.

        Raises:
            Refusal: the model could not be loaded, or what `read` raises.
        """
        segmenter, cache = self._model()
        return cache.get_or_encode(image_id, lambda: segmenter.encode(read()))

    @property
    def embedding_bytes(self) -> int:
        """Bytes of encoded images in this process's memory."""
        return 0 if self._cache is None else self._cache.memory_bytes

    def _model(self) -> tuple[Segmenter, EmbeddingCache]:
        self.start()
        if not self._loaded.wait(_LOAD_LIMIT_S):
            raise Refusal("the model is still being loaded; try again in a minute")
        if self._segmenter is None or self._cache is None:
            raise Refusal(f"the model could not be loaded: {self._failure}")
        return self._segmenter, self._cache

    def identify(self, image: TaskImage) -> ImageInfo:
        """Return id and size of a task's image, fetching it only when it is not known.

        Raises:
            Refusal: it cannot be had or read.
        """
        info = self.images.identify(image.task_id, image.uri)
        if info is None:
            _, info = self._encoded(image, None)
        return info

    def _encoded(self, image: TaskImage, info: ImageInfo | None) -> tuple[Encoded, ImageInfo]:
        segmenter, cache = self._model()
        if info is not None:
            encoded = cache.get(info.id)
            if encoded is not None:
                return encoded, info
        with self._alone(image):
            known = self.images.identify(image.task_id, image.uri)
            encoded = cache.get(known.id) if known is not None else None
            if known is not None and encoded is not None:  # another thread was first
                return encoded, known
            with timed("fetch"):
                loaded = self.images.load(image.task_id, image.uri)

            def encode() -> Encoded:
                with timed("encode"):
                    encoded = segmenter.encode(loaded.pixels)
                heap.give_back()
                return encoded

            return cache.get_or_encode(loaded.id, encode), ImageInfo(loaded.id, loaded.width, loaded.height)

    @contextmanager
    def _alone(self, image: TaskImage) -> Iterator[None]:
        """Let one thread at a time fetch, decode and encode an image; the others find what it has left."""
        with self._queues_lock:
            lock, waiting = self._queues.get(image, (threading.Lock(), 0))
            self._queues[image] = lock, waiting + 1
        try:
            with lock:
                yield
        finally:
            with self._queues_lock:
                lock, waiting = self._queues.pop(image)
                if waiting > 1:
                    self._queues[image] = lock, waiting - 1

    def answer(
        self, segmenter: Segmenter, image: TaskImage, info: ImageInfo, prompt: Prompt, *, proposals: int = 1
    ) -> Prediction:
        """Return the prediction of `segmenter` for `prompt` on `image`, encoding the image if no cache has it.

        Raises:
            Refusal: the prompt names nothing, or the image cannot be had.
        """
        encoded, found = self._encoded(image, info)
        if found.id != info.id:  # fetched anew, it was another: nothing of it may be kept under the old one's id
            raise Refusal("the image was replaced while this was answered; reload the task and click again")
        with timed("decode"):
            self._await_foreseen(segmenter, info, prompt)
            memo = _Memo(self._states, info.id, segmenter.adapter)
            return predict(segmenter, encoded, prompt, memo=memo, proposals=proposals)

    def foresee(self, segmenter: Segmenter, info: ImageInfo, prompt: Prompt) -> None:
        """Have what takes long of the next click done in the background, unless images are being encoded.

        Args:
            segmenter: that answered `prompt`.
            info: of the image.
            prompt: all clicks so far, as `segmenter` understands them.
        """
        try:
            encoded = None if self._cache is None or self._awaited else self._cache.peek(info.id)
            if encoded is not None:
                memo = _Memo(self._states, info.id, segmenter.adapter)
                self._begin(foresee(segmenter, encoded, prompt, memo), (info.id, segmenter.adapter, prompt))
        except Exception:
            log.exception("nothing is made ready for the next click, which will take longer")

    def _begin(self, make_ready: Callable[[], None] | None, key: _Asked) -> None:
        with self._foreseeing:
            for other, future in list(self._foreseen.items()):
                if other != key and _goes_on(key, other):
                    future.cancel()
            if make_ready is None or len(self._foreseen) >= _FORESEEN or key in self._foreseen or self._closed:
                return
            self._foreseen[key] = made = self._background.submit(self._make_ready, make_ready)
        made.add_done_callback(lambda _: self._foreseen.pop(key, None))

    @property
    def _awaited(self) -> bool:
        """Whether images are being encoded, or wait for it."""
        return bool(self._waiting or self._queues)

    def _make_ready(self, make_ready: Callable[[], None]) -> None:
        if self._awaited:
            return
        try:
            with timed("encode"):
                make_ready()
            heap.give_back()
        except Exception:
            log.exception("nothing could be made ready for the next click, which will take longer")

    def _await_foreseen(self, segmenter: Segmenter, info: ImageInfo, prompt: Prompt) -> None:
        """Let what is being made ready for this click be done first, and drop it if it has not begun."""
        before = replace(prompt, clicks=prompt.clicks[:-1])
        future = self._foreseen.get((info.id, segmenter.adapter, before))
        if future is not None and not future.cancel():
            wait([future])

    def propose(
        self, segmenter: Segmenter, image: TaskImage, *, deadline_s: float
    ) -> tuple[tuple[Proposal, ...], ImageInfo]:
        """Return whole-image proposals with scores, best first, stopping at `deadline_s` (of time.monotonic)."""
        encoded, info = self._encoded(image, self.images.identify(image.task_id, image.uri))
        with timed("decode"):
            found = whole_image(segmenter, encoded, until=lambda: time.monotonic() > deadline_s)
        return found, info

    def warm(self, image: TaskImage) -> bool:
        """Encode an image in the background so that the first click finds it; False: too many wait, or this ends."""
        with self._waiting_lock:
            if self._closed:
                return False
            if image in self._waiting:
                return True
            if len(self._waiting) >= _WARM_QUEUE:
                return False
            self._waiting.add(image)
            self._background.submit(self._warm, image)
        return True

    def encode_ahead(self, image: TaskImage) -> tuple[Encoded, ImageInfo]:
        """Return an image as it is encoded, now unless a cache has it.

        Raises:
            Refusal: it cannot be had or read.
        """
        return self._encoded(image, self.images.identify(image.task_id, image.uri))

    def _warm(self, image: TaskImage) -> None:
        try:
            self.encode_ahead(image)
        except Refusal as refusal:
            log.warning("task %s was not encoded ahead: %s", image.task_id, refusal)
        except Exception:
            log.exception("task %s was not encoded ahead", image.task_id)
        finally:
            with self._waiting_lock:
                self._waiting.discard(image)

    def once(self, key: object, make: Callable[[], V], weigh: Callable[[V], int]) -> V:
        """Return what `make` gave for `key` before, or make it now and keep it."""
        value = self.shapes.get(key)
        if value is not None:
            metrics.REPEATED.inc()
            return value  # type: ignore[no-any-return]
        made = make()
        self.shapes.put(key, made, weigh(made))
        return made
