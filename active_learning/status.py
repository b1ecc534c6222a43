"""Trainings as files: what was asked for, what runs, how far it is, and that it shall stop.

One folder for each line of adapters. A request stays until its training has come to an end, however often the process
that works on it is killed; while one is there, another is not made. Files appear by rename.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from active_learning.folders import write_whole

State = Literal["queued", "running", "judging", "published", "kept", "rejected", "failed", "cancelled", "nothing new"]
ENDED: tuple[State, ...] = ("published", "kept", "rejected", "failed", "cancelled", "nothing new")
"""How a training ends: `kept` is a candidate that waits for an admin's decision."""
SETTLED: tuple[State, ...] = ("published", "kept", "rejected", "nothing new")
"""Ends after which its corrections were learned from; after one that failed or was cancelled they are still new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStatus:
    """Where the training of a line stands."""

    id: str  # names the request: train-<line>-<time>
    line: str
    reason: str  # why it was asked for
    asked_s: float  # UTC seconds
    state: State = "queued"
    attempts: int = 0  # processes that began it
    errors: int = 0  # of them that ended with an error of our own
    snapshot: str | None = None
    snapshot_s: float | None = None  # when it was taken
    masks: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    left_s: float | None = None  # expected until the steps are done
    version: str | None = None  # what came of it
    said: str = ""  # why it ended so
    thorough: bool = False  # it takes its time: more steps, more crops
    ended_s: float | None = None  # when; None also where an earlier version of this backend wrote it down

    @property
    def why(self) -> str:
        """The reason, and that it takes its time where it does."""
        return f"{self.reason} (thorough)" if self.thorough else self.reason


SHORT = "memory-ran-out"
"""File in a training's own folder, there until the next attempt has seen it."""


class TrainingFolder:
    """DATA/trainings/<line>."""

    def __init__(self, folder: Path, line: str) -> None:
        """Name the folder; it is made when something is asked for."""
        self.folder = folder / line
        self.line = line

    def ask(self, reason: str, *, thorough: bool = False, now_s: float | None = None) -> TrainingStatus:
        """Return the pending request, made now unless there is one that goes on.

        One that was cancelled and that no process works on ends here; one that is being worked on is returned, though
        it will end: see `cancelled`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        now_s = time.time() if now_s is None else now_s
        name = f"train-{self.line}-{int(now_s * 1000)}"
        made = TrainingStatus(id=name, line=self.line, reason=reason, asked_s=now_s, thorough=thorough)
        draft = self.folder / f".request.{os.getpid()}.{time.monotonic_ns()}"
        try:
            _write(draft, made)
            while True:
                try:
                    os.link(draft, self._request)  # fails where there is one already
                    break
                except FileExistsError:
                    pending = self.pending()
                    if pending is not None:
                        if self.end_cancelled():
                            continue
                        now = self.pending()
                        if now is None or now.id != pending.id:  # it ended meanwhile
                            continue
                        return now
                    if _read(self._request) is None:  # ended just now, or unreadable after a crash of the machine
                        self._request.unlink(missing_ok=True)
        finally:
            draft.unlink(missing_ok=True)
        for left in (self._cancel, self._losses):
            left.unlink(missing_ok=True)
        self._replace(self.folder / "status.json", made)
        return made

    def note_loss(self, step: int, loss: float) -> None:
        """Write down the mean loss up to a step of the training that runs."""
        with self._losses.open("a") as file:
            file.write(f"{json.dumps([step, loss])}\n")

    def losses(self) -> list[tuple[int, float]]:
        """Return step and loss of the training asked for last, in the order of the steps; what was done again, once."""
        found: dict[int, float] = {}
        try:
            lines = self._losses.read_text().splitlines()
        except OSError:
            return []
        for line in lines:
            try:
                step, loss = json.loads(line)
                found[int(step)] = float(loss)
            except (ValueError, TypeError):  # half a line
                continue
        return sorted(found.items())

    @property
    def _losses(self) -> Path:
        return self.folder / "losses.jsonl"

    @property
    def _cancel(self) -> Path:
        return self.folder / "cancel"  # holds the id of the training that shall stop, so that no other does

    @property
    def _request(self) -> Path:
        return self.folder / "request.json"

    def pending(self) -> TrainingStatus | None:
        """Return the request that has not come to an end, as it stands."""
        request = _read(self._request)
        if request is None:
            return None
        status = self.status()
        return status if status is not None and status.id == request.id else request

    def status(self) -> TrainingStatus | None:
        """Return the training asked for last, as it stands or as it ended."""
        return _read(self.folder / "status.json")

    def history(self) -> list[TrainingStatus]:
        """Return the trainings that ended, oldest first."""
        path = self.folder / "history.jsonl"
        if not path.is_file():
            return []
        found = [_parse(line) for line in path.read_text().splitlines()]
        return [status for status in found if status is not None]

    def note(self, status: TrainingStatus, **changes: Any) -> TrainingStatus:
        """Return `status` changed, and written down."""
        changed = replace(status, **changes)
        self._replace(self.folder / "status.json", changed)
        return changed

    def end(self, status: TrainingStatus, state: State, said: str, **changes: Any) -> TrainingStatus:
        """Write down how a training ended, let the next one be asked for, and remove what it worked with."""
        ended = self.note(status, **{"state": state, "said": said, "left_s": None, "ended_s": time.time()} | changes)
        if not any(old.id == ended.id for old in self.history()):  # killed just here and done again
            self._append(ended)
        self._cancel.unlink(missing_ok=True)
        self._request.unlink(missing_ok=True)
        for left in self.folder.glob(f"train-{self.line}-*"):  # this one's, and where a process was killed just here
            shutil.rmtree(left, ignore_errors=True)
        return ended

    def cancel(self) -> TrainingStatus | None:
        """Have the pending training stop; return it, or None where nothing is pending."""
        pending = self.pending()
        if pending is not None:
            write_whole(self._cancel, pending.id)
        return pending

    def end_cancelled(self) -> bool:
        """End the pending training if it was cancelled and no process works on it; return whether that was so."""
        if not self.cancelled:
            return False
        with self.alone() as ours:
            pending = self.pending()
            if not ours or pending is None or not self.cancelled:
                return False
            self.end(pending, "cancelled", "it was cancelled while nobody worked on it")
            return True

    @property
    def cancelled(self) -> bool:
        """Whether the pending training shall stop."""
        try:
            wanted = self._cancel.read_text()
        except OSError:
            return False
        pending = self.pending()
        return pending is not None and pending.id == wanted

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Hold the line's lock, which the system gives back when the process dies; False where another holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True

    def work(self, status: TrainingStatus) -> Path:
        """Return the folder of a training's own files."""
        return self.folder / status.id

    def note_memory(self, status: TrainingStatus) -> None:
        """Write down that memory ran out: the next attempt is to take smaller steps."""
        folder = self.work(status)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SHORT).touch()

    @property
    def locked(self) -> bool:
        """Whether a process works on this line now."""
        with self.alone() as ours:
            return not ours

    def _append(self, ended: TrainingStatus) -> None:
        path = self.folder / "history.jsonl"
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with path.open("a") as file:
            file.write(("\n" if torn else "") + json.dumps(asdict(ended)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _replace(self, path: Path, status: TrainingStatus) -> None:
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            _write(draft, status)
            draft.replace(path)
        except OSError:  # what is left of it would take room on a full disk
            draft.unlink(missing_ok=True)
            raise


def _write(path: Path, status: TrainingStatus) -> None:
    with path.open("w") as file:
        file.write(json.dumps(asdict(status)))
        file.flush()
        os.fsync(file.fileno())


def lines_in(folder: Path) -> list[str]:
    """Return the lines that have a folder of trainings."""
    return sorted(path.name for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []


def _read(path: Path) -> TrainingStatus | None:
    try:
        return _parse(path.read_text())
    except OSError:
        return None


def _parse(text: str) -> TrainingStatus | None:
    try:
        values = json.loads(text)
        return TrainingStatus(**{f.name: values[f.name] for f in fields(TrainingStatus) if f.name in values})
    except (ValueError, TypeError, KeyError):  # half a line, from a disk that was full
        return None
