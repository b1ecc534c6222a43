"""Labelling configurations that came with /setup, for servers that send none with /predict: files, for all processes.

One file a project, named by a digest, which appears by rename; the least lately written go when there are too many.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

_MOST = 1000


class Schemas:
    """The configurations of one data folder."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; it is made when there is something to keep."""
        self._folder = folder

    def find(self, project: str) -> str | None:
        """Return the configuration of a project, as Label Studio names it, or None."""
        try:
            return self._path(project).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    def keep(self, project: str, schema: str) -> None:
        """Keep a project's configuration; a disk that is full is logged, no more."""
        if self.find(project) == schema:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, draft = tempfile.mkstemp(prefix=".draft-", dir=self._folder)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(schema)
                os.replace(draft, self._path(project))
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(draft)
            self._prune()
        except (OSError, UnicodeEncodeError) as error:
            log.warning("the labelling configuration of a project is not kept for later: %s", error)

    def _path(self, project: str) -> Path:
        return self._folder / f"{hashlib.sha256(project.encode(errors='replace')).hexdigest()[:32]}.xml"

    def _prune(self) -> None:
        kept = sorted(self._folder.glob("*.xml"), key=lambda path: path.stat().st_mtime)
        for path in kept[:-_MOST]:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
