"""Encoded images in two tiers: memory for this process, files for all processes and restarts.

Both are bounded by bytes and forget what was used longest ago. A file appears by rename, so a reader never sees half
of one; a damaged one is deleted and the image encoded anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file

from ml_backend import metrics
from model.segmenter import Encoded

log = logging.getLogger(__name__)

_STALE_DRAFT_S = 3600  # older ones were left by a process that was killed


class EmbeddingCache:
    """Image id to `Encoded`, for one `encoding` of one segmenter."""

    def __init__(self, folder: Path | None, *, memory_bytes: int, disk_bytes: int) -> None:
        """Keep files in `folder` (none: memory only); limits count embeddings' bytes."""
        self._folder = folder if disk_bytes else None
        self._memory_bytes = memory_bytes
        self._disk_bytes = disk_bytes
        self._memory: OrderedDict[str, Encoded] = OrderedDict()
        self._held = 0
        self._running: dict[str, Future[Encoded]] = {}
        self._lock = threading.Lock()
        self._written = 0

    def get(self, image_id: str) -> Encoded | None:
        """Return the embedding from memory or disk, or None."""
        with self._lock:
            encoded = self._memory.get(image_id)
            if encoded is not None:
                self._memory.move_to_end(image_id)
        if encoded is not None:
            metrics.EMBEDDINGS.labels("memory").inc()
            return encoded
        encoded = self._read(image_id)
        if encoded is not None:
            metrics.EMBEDDINGS.labels("disk").inc()
            self._keep(image_id, encoded)
        return encoded

    def peek(self, image_id: str) -> Encoded | None:
        """Return the embedding if it is in memory, and leave no trace of having looked."""
        with self._lock:
            return self._memory.get(image_id)

    def get_or_encode(self, image_id: str, encode: Callable[[], Encoded]) -> Encoded:
        """Return the embedding, encoding at most once however many threads ask for the same image."""
        encoded = self.get(image_id)
        if encoded is not None:
            return encoded
        with self._lock:
            if image_id in self._memory:  # another thread finished since the look above
                return self._memory[image_id]
            running = self._running.get(image_id)
            mine = running is None
            if running is None:
                running = self._running[image_id] = Future()
        if not mine:
            return running.result()
        try:
            encoded = encode()
            metrics.EMBEDDINGS.labels("encoded").inc()
            self._keep(image_id, encoded)
            self._write(image_id, encoded)
            running.set_result(encoded)
            return encoded
        except BaseException as error:
            running.set_exception(error)
            raise
        finally:
            with self._lock:
                self._running.pop(image_id, None)

    def _keep(self, image_id: str, encoded: Encoded) -> None:
        with self._lock:
            if image_id in self._memory:
                return
            self._memory[image_id] = encoded
            self._held += encoded.nbytes
            while self._held > self._memory_bytes and len(self._memory) > 1:
                self._held -= self._memory.popitem(last=False)[1].nbytes
            metrics.EMBEDDING_BYTES.set(self._held)

    @property
    def memory_bytes(self) -> int:
        """Bytes held in memory now."""
        return self._held

    def _path(self, image_id: str) -> Path | None:
        return self._folder / image_id[:2] / f"{image_id}.safetensors" if self._folder else None

    def _read(self, image_id: str) -> Encoded | None:
        path = self._path(image_id)
        if path is None or not path.is_file():
            return None
        try:
            data = path.read_bytes()  # opened once: safetensors' own reader opens twice, and the file may go in between
            tensors = load(data)
            size = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            encoded = Encoded(tensors, int(size["height"]), int(size["width"]))
            with contextlib.suppress(OSError):
                os.utime(path)  # so that files used lately are pruned last
            return encoded
        except FileNotFoundError:  # pruned by another process since the look above
            return None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            log.warning("the stored embedding of image %s is unreadable (%s): it is encoded anew", image_id[:12], error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def _write(self, image_id: str, encoded: Encoded) -> None:
        path = self._path(image_id)
        if path is None:
            return
        draft = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, draft = tempfile.mkstemp(prefix=".draft-", dir=path.parent)
            os.close(handle)
            save_file(encoded.tensors, draft, metadata={"height": str(encoded.height), "width": str(encoded.width)})
            os.replace(draft, path)
        except (OSError, SafetensorError) as error:
            log.warning("the embedding of image %s could not be stored: %s", image_id[:12], error)
            if draft is not None:
                with contextlib.suppress(OSError):
                    os.unlink(draft)
            return
        with self._lock:
            self._written += 1
            due = self._written % 32 == 1
        if due:
            self.prune()

    def prune(self) -> None:
        """Delete the files used longest ago until the rest fit; safe beside other processes doing the same.

        Files of other encodings beside ours count too: they are left over from other weights or another encoder.
        """
        if self._folder is None:
            return
        files = []
        for path in self._folder.parent.glob("*/??/*"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                if path.name.startswith(".draft-") and time.time() - stat.st_mtime > _STALE_DRAFT_S:
                    path.unlink()
                elif path.suffix == ".safetensors":
                    files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._disk_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size
