"""Adapter versions: every one kept whole and unchanged, one of a line serving, and the way back.

A line is `shared` or `project-<id>`: whose corrections train its versions and whose requests these serve. A version is
a folder that appears by rename and is never written to again; the one that serves is named by the file ACTIVE, which is
replaced in one step. So whoever reads sees one whole version or the other, whenever a writer is killed. Writers take
turns by a lock that ends with their process.

    <line>/v0001-1a2b3c4d/    adapter.safetensors, card.json, pictures of the verdict
    <line>/ACTIVE             the id of the version that serves; no file: none of this line does
    <line>/history.jsonl      what was activated when, and by whom
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import EllipsisType
from typing import Any

from active_learning.folders import draft_folder, sync
from active_learning.lines import is_line
from model.adapter import read_adapter
from model.segmenter import digest_of, digest_of_file, read_weights
from model.types import Refusal

log = logging.getLogger(__name__)

ADAPTER, CARD, ACTIVE, HISTORY = "adapter.safetensors", "card.json", "ACTIVE", "history.jsonl"
_VERSION = re.compile(r"v([0-9]{4,9})-[0-9a-f]{8}")
_PICTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.(png|jpg|svg|json)")
_LARGEST = {ADAPTER: 512 * 2**20, CARD: 2**20}  # bytes read of an archive's member
_LARGEST_PICTURE = 32 * 2**20
_MOST_PICTURES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersion:
    """What is known of one version; `card` of the registry also has what its training wrote beyond this."""

    id: str  # running number in the line and digest of the file, such as v0001-1a2b3c4d
    line: str
    parent: str | None  # the version its training began with; None: the configured adapter
    base: str  # digest of the base weights
    snapshot: str | None  # of the corrections it was trained on
    recipe: str
    seed: int
    created_s: float  # UTC
    accepted: bool | None  # by the gate; None: not judged
    scores: dict[str, Any]
    note: str
    digest: str  # SHA-256 of adapter.safetensors


@dataclass(frozen=True, slots=True, kw_only=True)
class WayBack:
    """From the active version of a line to the one before it that can serve."""

    was: str  # what ACTIVE said: the id of a version, be that one readable or not
    now: AdapterVersion | None  # None: none of this line
    passed_over: tuple[str, ...]  # why each version between them cannot serve, the latest first


_FIELDS = frozenset(field.name for field in fields(AdapterVersion))


class AdapterRegistry:
    """The versions of all lines; any number of processes may read and write."""

    def __init__(self, folder: Path, *, base: str) -> None:
        """Take the folder of all lines, which need not exist yet, and the digest of the base weights that serve."""
        self.base = base
        self._folder = folder

    def lines(self) -> list[str]:
        """Return the lines that have a folder."""
        try:
            names = [entry.name for entry in os.scandir(self._folder) if entry.is_dir()]
        except FileNotFoundError:
            return []
        return sorted((name for name in names if is_line(name)), key=lambda name: (len(name), name))

    def versions(self, line: str) -> list[AdapterVersion]:
        """Return the versions of a line, oldest first; one whose card cannot be read is left out, and logged."""
        found = []
        for name in self._ids(line):
            try:
                found.append(self.get(line, name))
            except Refusal as refusal:
                log.warning("%s", refusal)
        return found

    def get(self, line: str, version: str) -> AdapterVersion:
        """Return what a version's card says.

        Raises:
            Refusal: there is no such version, or its card cannot be read.
        """
        card = self.card(line, version)
        known: dict[str, Any] = {name: card.get(name) for name in _FIELDS}
        found = AdapterVersion(**known)
        texts = found.id, found.line, found.base, found.digest, found.recipe, found.note
        numbers = isinstance(found.created_s, int | float) and isinstance(found.scores, dict)
        if not numbers or not all(isinstance(text, str) for text in texts):
            raise Refusal(f"the card of {line} {version} is not one of ours; import that version again")
        return found

    def card(self, line: str, version: str) -> dict[str, Any]:
        """Return a version's whole card.

        Raises:
            Refusal: there is no such version, or its card cannot be read.
        """
        folder = self._version_folder(line, version)
        try:
            card = json.loads((folder / CARD).read_bytes())
        except FileNotFoundError as error:
            known = ", ".join(self._ids(line)) or "none"
            raise Refusal(f"line {line} has no version {version}; it has: {known}") from error
        except (OSError, ValueError) as error:
            raise Refusal(
                f"the card of {line} {version} cannot be read ({error}); import that version again"
            ) from error
        return card if isinstance(card, dict) else {}

    def path(self, version: AdapterVersion) -> Path:
        """Return the adapter file of a version."""
        return self._version_folder(version.line, version.id) / ADAPTER

    def intact(self, version: AdapterVersion) -> Path:
        """Return the adapter file of a version once its digest was found to be that of the card.

        Raises:
            Refusal: it was changed or truncated, cannot be read, or is of another base than the one that serves.
        """
        path, name = self.path(version), f"adapter {version.line} {version.id}"
        if version.base != self.base:
            raise Refusal(
                f"{name} was trained on base {version.base[:12]}, but base {self.base[:12]} is loaded; "
                "activate a version of this base"
            )
        if digest_of_file(path) != version.digest:
            raise Refusal(
                f"{name} is damaged (its digest is not that of its card); activate another, or import it again"
            )
        return path

    def active_id(self, line: str) -> str | None:
        """Return what ACTIVE says, or None where there is none; quick enough to be asked at each request.

        Raises:
            Refusal: it holds no version's id.
        """
        text = self.active_text(line)
        if text is not None and not _VERSION.fullmatch(text):
            raise Refusal(f"{ACTIVE} of line {line} names no version; run: python -m ml_backend adapters activate")
        return text

    def active_text(self, line: str) -> str | None:
        """Return what ACTIVE says, be it a version's id or not, or None where there is none."""
        try:
            return (self._line_folder(line) / ACTIVE).read_bytes()[:100].decode("ascii", "replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def active(self, line: str) -> AdapterVersion | None:
        """Return the version of a line that serves; None: none of its own.

        Raises:
            Refusal: the file ACTIVE or the card it leads to cannot be read.
        """
        version = self.active_id(line)
        return None if version is None else self.get(line, version)

    def publish(
        self,
        line: str,
        file: Path,
        *,
        card: dict[str, Any],
        activate: bool,
        instead_of: str | EllipsisType | None = ...,
        folder_of_pictures: Path | None = None,
        by: str = "training",
    ) -> AdapterVersion:
        """Keep an adapter file as a new version; the same one on the same snapshot with the same verdict is kept once.

        Args:
            line: where.
            file: as `model.adapter.write_adapter` wrote it; it is copied.
            card: JSON-able: the fields of `AdapterVersion` that are known (parent, snapshot, recipe, seed, accepted,
                scores, note, created_s) and whatever else is worth keeping.
            activate: whether it serves from now on.
            instead_of: only where ACTIVE says this now, see `active_text` (None: it is not there); unset: in any case.
            folder_of_pictures: files to keep beside the card: png, jpg, svg, json; no folders.
            by: who, for the history.

        Raises:
            Refusal: the file cannot be read, holds values that are not finite, or is of another base.
            OSError: the disk is full, or not ours; nothing is left behind then.
        """
        folder = self._line_folder(line)
        folder.mkdir(parents=True, exist_ok=True)
        with self._writing(line), draft_folder(folder) as draft:
            shutil.copyfile(file, draft / ADAPTER)
            data = read_weights(draft / ADAPTER)
            read_adapter(draft / ADAPTER, base=self.base)
            version = self._described(line, digest_of(data), card)
            told = version.snapshot, version.accepted
            same = (v for v in self._intact(line, version.digest) if (v.snapshot, v.accepted) == told)
            if (known := next(same, None)) is not None:
                version = known
            else:
                self._keep(draft, version, card, folder_of_pictures)
            if activate and (instead_of is ... or self.active_text(line) == instead_of):
                self._set_active(line, version.id, by=by)
        return version

    def activate(self, line: str, version: str | None, *, by: str = "command") -> AdapterVersion | None:
        """Have a version serve; None: none of this line, so that the shared one does, or the configured adapter.

        Raises:
            Refusal: there is no such version, it is damaged, or of another base; the one that serves goes on.
            OSError: the disk is full, or not ours; the one that serves goes on.
        """
        with self._writing(line):
            found = None if version is None else self._servable(line, version)
            self._set_active(line, version, by=by)
        return found

    def roll_back(self, line: str, *, by: str = "command") -> WayBack:
        """Have the version serve that did so before the active one, whatever its parent; again: the one before that.

        The active one need not be readable: this is the way out when it is damaged. An earlier one that cannot serve is
        passed over.

        Raises:
            Refusal: no version of the line is active; nothing changes.
        """
        with self._writing(line):
            way = self.way_back(line)
            if way is None:
                raise Refusal(f"line {line} serves no version of its own, so there is nothing to go back from")
            self._set_active(line, None if way.now is None else way.now.id, by=by, back=True)
        return way

    def way_back(self, line: str) -> WayBack | None:
        """Return where `roll_back` goes, or None where no version of the line is active."""
        was = self.active_text(line)
        if was is None:
            return None
        *before, _ = self._served(line)
        there = {None, *self._ids(line)} - {was}
        now, passed_over = None, []
        for version in dict.fromkeys(one for one in reversed(before) if one in there):
            try:
                now = None if version is None else self._servable(line, version)
                break
            except Refusal as refusal:
                passed_over.append(str(refusal))
        return WayBack(was=was, now=now, passed_over=tuple(passed_over))

    def prune(self, line: str, *, keep: int) -> list[str]:
        """Remove the oldest versions but the newest `keep`, and return their ids.

        What serves stays, in any case, as do the parents of what serves and the version to go back to.
        """
        folder = self._line_folder(line)
        with self._writing(line):
            removed = self.prunable(line, keep=keep)
            for name in removed:
                gone = folder / f".gone-{name}"  # so that a version is there whole or not at all
                (folder / name).rename(gone)
                shutil.rmtree(gone)
        return removed

    def prunable(self, line: str, *, keep: int) -> list[str]:
        """Return what `prune` would remove now."""
        if keep < 0:
            raise Refusal(f"{keep} versions cannot be kept; name 0 or more")
        ids = self._ids(line)
        way = self.way_back(line)
        before = None if way is None or way.now is None else way.now.id
        needed = {self.active_id(line), before, *self._parents_of_active()}
        return [name for name in ids[: max(0, len(ids) - keep)] if name not in needed]

    def export(self, line: str, version: str, target: Path) -> Path:
        """Write a version as one zip archive, which appears whole or not at all.

        Args:
            line: where it is kept.
            version: its id.
            target: the archive, or an existing folder to put it in as <line>-<version>.zip.

        Raises:
            Refusal: there is no such version, or it is damaged.
        """
        found = self.get(line, version)
        folder = self.intact(found).parent
        target = target / f"{line}-{version}.zip" if target.is_dir() else target
        draft = target.with_name(f".{target.name}.draft")
        try:
            with zipfile.ZipFile(draft, "w") as archive:
                for path in sorted(folder.iterdir()):
                    if path.name == ADAPTER or not path.is_symlink():  # a link could lead to any file of this machine
                        archive.write(path, path.name)
            sync(draft)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        return target

    def import_(self, line: str, source: Path) -> AdapterVersion:
        """Keep a version that was exported elsewhere, or a bare adapter file, without activating it.

        It gets a number of its own here, counts as not judged (its scores are of another hold-out), and has no parent.
        One that the line has already is not kept twice.

        Raises:
            Refusal: it cannot be read, is damaged, or is of another base.
            OSError: the disk is full, or not ours; nothing is left behind then.
        """
        if not source.is_file():
            raise Refusal(f"there is no file {source}; name an exported version (.zip), or an adapter file")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if zipfile.is_zipfile(source):
                card = _unpack(source, folder)
            else:
                folder.joinpath(ADAPTER).write_bytes(read_weights(source))
                card = {"note": f"from {source.name}"}
            (folder / "pictures").mkdir(exist_ok=True)
            digest = digest_of_file(folder / ADAPTER)
            for known in self._intact(line, digest):
                return known
            kept = card | {"accepted": None, "parent": None}
            return self.publish(
                *(line, folder / ADAPTER), card=kept, activate=False, folder_of_pictures=folder / "pictures"
            )

    def _line_folder(self, line: str) -> Path:
        if not is_line(line):
            raise Refusal(f"{line!r} is no line; name shared, or project-<id> such as project-7")
        return self._folder / line

    def _version_folder(self, line: str, version: str) -> Path:
        folder = self._line_folder(line)
        if not _VERSION.fullmatch(version):
            raise Refusal(f"{version!r} is no version's id; it looks like v0001-1a2b3c4d: see adapters list")
        return folder / version

    def _ids(self, line: str) -> list[str]:
        """Return the ids of a line's versions, in the order of their numbers."""
        try:
            names = os.listdir(self._line_folder(line))
        except FileNotFoundError:
            return []
        return sorted((name for name in names if _VERSION.fullmatch(name)), key=lambda name: (_number(name), name))

    @contextmanager
    def _writing(self, line: str) -> Iterator[None]:
        """Keep other writers of a line out, and clear away what a killed one left."""
        folder = self._line_folder(line)
        if not folder.is_dir():
            raise Refusal(f"line {line} has no version yet; there are: {', '.join(self.lines()) or 'none'}")
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in (*folder.glob(".draft-*"), *folder.glob(".gone-*")):
                shutil.rmtree(left, ignore_errors=True)
            yield

    def _keep(self, draft: Path, version: AdapterVersion, card: dict[str, Any], pictures: Path | None) -> None:
        """Complete a draft that holds the adapter, and have it appear."""
        for picture in sorted(pictures.iterdir()) if pictures is not None else ():
            if picture.is_file() and _PICTURE.fullmatch(picture.name) and picture.name != CARD:
                shutil.copyfile(picture, draft / picture.name)
        (draft / CARD).write_text(json.dumps(card | asdict(version), indent=1, sort_keys=True))
        for path in (*draft.iterdir(), draft):
            sync(path)
        draft.rename(draft.parent / version.id)
        sync(draft.parent)

    def _described(self, line: str, digest: str, card: dict[str, Any]) -> AdapterVersion:
        number = max(map(_number, self._ids(line)), default=0) + 1
        return AdapterVersion(
            id=f"v{number:04d}-{digest[:8]}",
            line=line,
            parent=card.get("parent"),
            base=self.base,
            snapshot=card.get("snapshot"),
            recipe=card.get("recipe", ""),
            seed=card.get("seed", 0),
            created_s=card.get("created_s", time.time()),
            accepted=card.get("accepted"),
            scores=card.get("scores", {}),
            note=card.get("note", ""),
            digest=digest,
        )

    def _intact(self, line: str, digest: str) -> Iterator[AdapterVersion]:
        """Give the versions of a line whose file has this digest, on the disk as in the card."""
        for known in self.versions(line):
            if known.digest == digest:
                with contextlib.suppress(Refusal):
                    self.intact(known)
                    yield known

    def _servable(self, line: str, version: str) -> AdapterVersion:
        found = self.get(line, version)
        read_adapter(self.intact(found), base=self.base)
        return found

    def _set_active(self, line: str, version: str | None, *, by: str, back: bool = False) -> None:
        """Write the change down, then replace ACTIVE: killed in between, ACTIVE is what is so (see `_served`)."""
        folder = self._line_folder(line)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"at": at, "by": by, "version": version, "back": back, "from": self.active_text(line)}
        with (folder / HISTORY).open("ab") as file:
            torn = file.tell() > 0 and not _ends_with_newline(folder / HISTORY)  # by a writer that was killed
            file.write((b"\n" if torn else b"") + json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if version is None:
            (folder / ACTIVE).unlink(missing_ok=True)
        else:
            draft = folder / f".{ACTIVE}.draft"
            draft.write_text(f"{version}\n")
            sync(draft)
            draft.replace(folder / ACTIVE)
        sync(folder)

    def _served(self, line: str) -> list[str | None]:
        """Return what has served, the active one last; what was gone back from is left out."""
        served: list[str | None] = []
        try:
            lines = (self._line_folder(line) / HISTORY).read_bytes().splitlines()
        except FileNotFoundError:
            lines = []
        for text in lines:
            try:
                entry = json.loads(text)
                version, back = entry["version"], entry["back"]
            except (ValueError, KeyError, TypeError):  # torn by a kill
                continue
            if "from" in entry:
                _reach(served, entry["from"])
            if back:
                _reach(served, version)
            else:
                served.append(version)
        _reach(served, self.active_text(line))
        return served

    def _parents_of_active(self) -> set[str]:
        parents = set()
        for line in self.lines():
            try:
                version = self.active(line)
            except Refusal as refusal:
                log.warning("%s", refusal)
                continue
            if version is not None and version.parent is not None:
                parents.add(version.parent)
        return parents


def _reach(served: list[str | None], active: str | None) -> None:
    """Have `served` end with `active`: what comes after it was gone back from, or written by a writer killed then."""
    if active not in served:
        served.append(active)
    while served[-1] != active:
        served.pop()


def _number(version: str) -> int:
    return int(version[1:].partition("-")[0])


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _unpack(source: Path, folder: Path) -> dict[str, Any]:
    """Put an exported version's file and pictures into `folder`, and return its card."""
    (folder / "pictures").mkdir()
    broken = f"{source} is no exported version, or a damaged one"
    try:
        with zipfile.ZipFile(source) as archive:
            sizes = {member.filename: member.file_size for member in archive.infolist()}
            pictures = [name for name in sizes if _PICTURE.fullmatch(name) and name != CARD][:_MOST_PICTURES]
            for name in (ADAPTER, CARD, *pictures):
                if sizes[name] > _LARGEST.get(name, _LARGEST_PICTURE):
                    raise Refusal(f"{source} holds {name} of {sizes[name]} bytes, which is too large; export it anew")
                (folder / ("pictures" if name in pictures else "") / name).write_bytes(archive.read(name))
        card: dict[str, Any] = json.loads((folder / CARD).read_bytes())
        digest, came_from = str(card["digest"]), f"{card['line']} {card['id']}"
    except Refusal:
        raise
    except (zipfile.BadZipFile, zlib.error, KeyError, TypeError, ValueError, EOFError, RuntimeError) as error:
        raise Refusal(f"{broken} ({error}); export it anew") from error
    if digest_of_file(folder / ADAPTER) != digest:
        raise Refusal(f"{broken} (the digest of its adapter is not that of its card); export it anew")
    return card | {"note": f"imported, was {came_from}" + (f": {card['note']}" if card.get("note") else "")}
