"""Encoded photos on disk, for commands that look at the same photos again and again.

One file for each, FOLDER/<encoding>/<first two of id>/<id>.safetensors, as the web process's cache has them too; the id
of a photo as it is stored is the SHA-256 of its file. A file appears by rename, so that nobody reads half of one; a
damaged one is made anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load

from model.files import save_tensors
from model.segmenter import Encoded, Segmenter
from model.types import RGBImage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EmbeddingFolder:
    """A folder of encoded photos; `folder` None keeps nothing and encodes each time."""

    folder: Path | None

    def path(self, segmenter: Segmenter, image_id: str) -> Path | None:
        """Return where a photo's embedding is or will be; None: it is not kept."""
        if self.folder is None or not segmenter.costly_to_encode:
            return None
        return self.folder / segmenter.encoding / image_id[:2] / f"{image_id}.safetensors"

    def encoded(
        self, segmenter: Segmenter, image_id: str, pixels: Callable[[], RGBImage], *, height: int, width: int
    ) -> Encoded:
        """Return a photo as `segmenter` encodes it, from its file or made now and kept.

        Args:
            segmenter: encodes, and names the encoding.
            image_id: names the photo.
            pixels: decodes it; called only where there is no file. What it raises is raised.
            height: of the photo.
            width: of the photo.

        Raises:
            OSError: its file cannot be written.
        """
        path = self.path(segmenter, image_id)
        if path is None:
            return segmenter.encode(pixels())
        if path.is_file():
            try:
                return Encoded(load(path.read_bytes()), height, width)
            except (OSError, SafetensorError) as error:
                log.warning("the embedding %s is damaged (%s) and is made anew", path, error)
        encoded = segmenter.encode(pixels())
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        size = {"height": str(encoded.height), "width": str(encoded.width)}  # the web process's cache asks for it
        save_tensors(draft, encoded.tensors, size)
        draft.replace(path)
        return encoded
