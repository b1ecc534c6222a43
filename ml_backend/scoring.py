"""Whose tasks are to be scored, and how far that is: files in SHARED/selection, read by the admin page.

PROJECT.due is there while a project's tasks are to be scored, PROJECT.progress while they are looked at.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from active_learning import lines
from active_learning.folders import write_whole
from ml_backend.settings import Settings

log = logging.getLogger(__name__)

_NOTED_S = 1.0  # between two notes


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """A project whose tasks are to be scored."""

    project: str
    asked_s: float  # UTC
    looked: int  # images looked at
    of: int  # of these many; 0: it has not begun


def due_file(settings: Settings, project: str | int) -> Path:
    """Return the file that is there while a project's tasks are to be scored."""
    return settings.shared / "selection" / f"{project}.due"


def due_files(settings: Settings) -> list[Path]:
    """Return these files of all projects."""
    return list(due_file(settings, 0).parent.glob("*.due"))


def ask_for_scores(settings: Settings, project: str | int) -> None:
    """Have the worker score a project's unlabelled tasks; asked for again before it has begun, it is the same work."""
    if settings.next_tasks == "on":
        file = due_file(settings, project)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def ask_for_lines_scores(settings: Settings, line: str) -> None:
    """Have the tasks of all projects that a line serves scored, as another version of it serves now.

    What keeps that from being asked for is told to the log: the tasks are scored within the hour all the same.
    """
    from active_learning.corrections import CorrectionStore  # brings OpenCV, which a worker that waits does without

    project, ledger = lines.project_of(line), settings.data_dir / "corrections.sqlite"
    try:
        if project is not None:
            projects = [project]
        elif ledger.is_file():
            with closing(CorrectionStore(ledger)) as store:
                projects = store.projects()
        else:  # of another machine
            return
        for one in projects:
            ask_for_scores(settings, one)
    except (OSError, sqlite3.Error) as error:
        log.warning("tasks are not scored by the version of %s that serves now yet: %s", line, error)


class Progress:
    """Says how far the scoring of a project's tasks is, once a second; a job goes on where the one before ended."""

    def __init__(self, settings: Settings, project: int) -> None:
        """Name the file, and read how far it was; nothing is written yet."""
        self._file = _progress_file(due_file(settings, project))
        self._before, _ = _noted(self._file)
        self._noted_s = 0.0

    def __call__(self, looked: int, of: int) -> None:
        """Note that `looked` of the `of` images that are left were looked at.

        A disk that takes no note is no reason to stop.
        """
        if time.monotonic() - self._noted_s >= _NOTED_S:
            self._noted_s = time.monotonic()
            with contextlib.suppress(OSError):
                write_whole(self._file, json.dumps([self._before + looked, self._before + of]))


def forget_progress(settings: Settings, project: str | int) -> None:
    """Remove the note of how far the scoring of a project's tasks is: it came to its end, one way or the other."""
    with contextlib.suppress(OSError):
        _progress_file(due_file(settings, project)).unlink()


def _progress_file(due: Path) -> Path:
    return due.with_suffix(".progress")


def scorings(settings: Settings) -> list[Scoring]:
    """Return whose tasks are to be scored, asked for earliest first."""
    found = []
    for file in due_files(settings):
        with contextlib.suppress(OSError):  # done just now
            looked, of = _noted(_progress_file(file))
            found.append(Scoring(project=file.stem, asked_s=file.stat().st_mtime, looked=looked, of=of))
    return sorted(found, key=lambda one: one.asked_s)


def _noted(file: Path) -> tuple[int, int]:
    try:
        looked, of = json.loads(file.read_text())
        return int(looked), int(of)
    except (OSError, ValueError, TypeError):
        return 0, 0
