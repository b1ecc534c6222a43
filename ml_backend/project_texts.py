"""What /setup brought or was answered, by project: short texts in files, for all processes.

One file a project, named by a digest, which appears by rename; the least lately kept go when there are too many.
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


class ProjectTexts:
    """One text for each project, in one folder."""

    def __init__(self, folder: Path, *, suffix: str = ".txt") -> None:
        """Name the folder, which is made when there is something to keep, and what the names of its files end in."""
        self._folder = folder
        self._suffix = suffix

    @property
    def empty(self) -> bool:
        """Whether no project has a text."""
        return not any(self._folder.glob(f"*{self._suffix}"))

    def find(self, project: str) -> str | None:
        """Return the text of a project, by the name it was kept under, or None."""
        try:
            return self._path(project).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    def kept_s(self, project: str) -> float | None:
        """Return when a project's text was last kept, the same or not (UTC seconds); None: never."""
        try:
            return self._path(project).stat().st_mtime
        except OSError:
            return None

    def keep(self, project: str, text: str) -> None:
        """Keep a project's text; a disk that is full is logged, no more."""
        if self.find(project) == text:
            with contextlib.suppress(OSError):  # another process has removed it, or it is another user's: written anew
                os.utime(self._path(project))
                return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, draft = tempfile.mkstemp(prefix=".draft-", dir=self._folder)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                os.replace(draft, self._path(project))
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(draft)
            self._prune()
        except (OSError, UnicodeEncodeError) as error:
            log.warning("what /setup said of a project is not kept in %s: %s", self._folder.name, error)

    def _path(self, project: str) -> Path:
        return self._folder / f"{hashlib.sha256(project.encode(errors='replace')).hexdigest()[:32]}{self._suffix}"

    def _prune(self) -> None:
        kept = sorted(self._folder.glob(f"*{self._suffix}"), key=lambda path: path.stat().st_mtime)
        for path in kept[:-_MOST]:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
