"""The bytes of corrected images, as they were received: FOLDER/<first two digits>/<id>, the id their SHA-256 in hex.

Pixels are not decoded here. A file appears by rename, when its bytes are on the disk.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path

_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ImageStore:
    """A folder of images; safe between threads and processes."""

    folder: Path

    def path(self, image_id: str) -> Path | None:
        """Return where an image is, or None where it is not kept."""
        if _ID.fullmatch(image_id) is None:
            return None
        path = self._place(image_id)
        return path if path.is_file() else None

    def put(self, image_id: str, data: bytes, *, checked: bool = True) -> Path:
        """Keep an image and return where it is; a second time nothing is written.

        Args:
            image_id: the SHA-256 of its bytes, 64 hex digits in lower case.
            data: its bytes.
            checked: false where the id was just computed from these bytes.

        Raises:
            OSError: it cannot be written; nothing of it is left.
            ValueError: the id is no such digest, or that of other bytes.
        """
        if _ID.fullmatch(image_id) is None:
            raise ValueError(f"image id {image_id!r} is no SHA-256; give 64 hex digits in lower case")
        if checked and hashlib.sha256(data).hexdigest() != image_id:
            raise ValueError(f"these {len(data)} bytes are not image {image_id[:12]}: their SHA-256 is another")
        path = self._place(image_id)
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{image_id}.{os.getpid()}.{threading.get_ident()}")
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        return path

    def delete(self, image_id: str) -> bool:
        """Forget an image; return whether it was kept.

        Raises:
            OSError: it cannot be deleted.
        """
        path = self.path(image_id)
        if path is None:
            return False
        path.unlink(missing_ok=True)
        return True

    def _place(self, image_id: str) -> Path:
        return self.folder / image_id[:2] / image_id
