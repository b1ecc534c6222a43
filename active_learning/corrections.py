"""The ledger of corrections: every region that annotators submitted, what we proposed for it, and what may be learned.

One SQLite file, safe between processes. An annotation comes, changes and goes as a whole, in one transaction that is on
the disk when the call returns. Events may come twice, late and out of order: the newest state of an annotation counts,
and a deletion is final even when it comes first. Masks stay compressed as COCO's run lengths.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from active_learning.databases import all_or_nothing, open_whole
from model.geometry import extent
from model.types import Click, Mask

if TYPE_CHECKING:  # who writes corrections shall not hold pycocotools and scipy in memory
    from model.annotations import Rle

log = logging.getLogger(__name__)

Kind = Literal["accepted", "corrected", "drawn", "predicted", "predicted-changed"]

_REMEDY = "the ledger begins anew, and what Label Studio still has is fetched by: python -m ml_backend reconcile"
_WAIT_S = 30  # for another process that writes
_INSIDE = 0.9  # share of a mask that lies in the mask it is a part of
_IN_USE, _RETIRED, _DELETED = range(3)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS annotations (
    project TEXT, annotation INTEGER, task INTEGER, state INTEGER NOT NULL, updated_s REAL NOT NULL,
    learned_s REAL NOT NULL, kept_s REAL NOT NULL, PRIMARY KEY (project, annotation)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS regions (
    project TEXT, annotation INTEGER, place INTEGER, region TEXT NOT NULL, image TEXT NOT NULL,
    height INTEGER NOT NULL, width INTEGER NOT NULL, label TEXT NOT NULL, granularity REAL, phrase TEXT,
    clicks TEXT NOT NULL, kind TEXT NOT NULL, adapter TEXT, annotator INTEGER, ground_truth INTEGER NOT NULL,
    mask BLOB NOT NULL, proposed BLOB,
    PRIMARY KEY (project, annotation, place)
);
CREATE TABLE IF NOT EXISTS deleted_tasks (project TEXT, task INTEGER, PRIMARY KEY (project, task)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS classes (
    project TEXT PRIMARY KEY, labels TEXT NOT NULL, updated_s REAL NOT NULL
) WITHOUT ROWID;
"""
_FIELDS = (
    *("region", "image", "height", "width", "label", "granularity", "phrase", "clicks", "kind", "adapter", "annotator"),
    *("ground_truth", "mask", "proposed"),
)
_READ = (
    f"SELECT project, annotation, task, updated_s, {', '.join(_FIELDS)}"
    " FROM regions JOIN annotations USING (project, annotation)"
)


class NotKept(OSError):
    """A change could not be written; nothing of it is in the ledger, and what was there before still is."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Correction:
    """One region of one submitted annotation.

    Raises:
        ValueError: a mask is of another size than the image.
    """

    project: str
    annotation: int
    region: str  # its id in the editor
    task: int | None
    image: str  # digest of its bytes
    height: int  # pixels
    width: int
    mask: Rle
    label: str  # class; empty if it has none
    granularity: float | None  # 0..1 as the annotator gave it; None: unknown
    phrase: str | None
    clicks: tuple[Click, ...]  # that led to it, where they are remembered
    kind: Kind
    proposed: Rle | None  # the mask we proposed, where it is known
    adapter: str | None  # that proposed it; None: the base, or nobody
    annotator: int | None
    ground_truth: bool
    updated_s: float  # UTC: when its annotation was last changed

    def __post_init__(self) -> None:
        for mask in (self.mask, self.proposed):
            if mask is not None and list(mask["size"]) != [self.height, self.width]:
                raise ValueError(
                    f"region {self.region} of annotation {self.annotation} has a mask of size {list(mask['size'])}, "
                    f"but its image is [{self.height}, {self.width}] (height, width)"
                )


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A fixed set of corrections; the same ones make the same id, in whatever order they came."""

    id: str  # hex digest of what it holds; saving an annotation again without a change leaves it as it is
    corrections: tuple[Correction, ...]  # by project, annotation and region


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Counts:
    """How much there is to learn from."""

    corrections: int
    annotations: int
    images: int
    held_out: int  # corrections on held-out images
    held_out_images: int
    kinds: Mapping[Kind, int]  # corrections by kind; 0 for a kind that does not occur
    annotators: Mapping[int | None, int]
    days: Mapping[str, int]  # by UTC day of the last change, 2026-11-25, earliest first


class CorrectionStore:
    """All corrections of all projects. Open it in the process that uses it: a connection does not survive a fork."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Open or create the file; one connection, used by one thread at a time.

        A damaged file is kept under another name, and the ledger begins anew.

        Args:
            path: the file; others appear beside it with the same beginning.
            clock: UTC seconds, to know when we learned of an annotation.
        """
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._db = open_whole(path, _open, _REMEDY)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def replace(
        self,
        project: str,
        annotation: int,
        corrections: Iterable[Correction],
        *,
        updated_s: float,
        task: int | None = None,
    ) -> bool:
        """Keep these regions as all that an annotation holds; doing it twice is doing it once.

        Args:
            project: of the annotation.
            annotation: its id.
            corrections: all its regions that could be read, perhaps none.
            updated_s: UTC, when it was last changed; stands for that of each of its corrections.
            task: it is on; None: what the first correction says.

        Returns:
            False if nothing was done, since a newer state is known, or the annotation or its task is deleted.

        Raises:
            NotKept: the file cannot be written.
            ValueError: a correction is of another annotation.
        """
        found = tuple(corrections)
        for one in found:
            if (one.project, one.annotation) != (project, annotation):
                raise ValueError(
                    f"region {one.region} is of annotation {one.annotation} in project {one.project}, "
                    f"not of {annotation} in {project}"
                )
        if task is None and found:
            task = found[0].task
        rows = [(project, annotation, place, *_packed(one)) for place, one in enumerate(found)]
        with self._change(f"annotation {annotation} of project {project}") as db:
            if not _admit(db, project, annotation, task, updated_s, _IN_USE, self._clock()):
                return False
            db.execute("DELETE FROM regions WHERE project = ? AND annotation = ?", (project, annotation))
            db.executemany(
                f"INSERT INTO regions (project, annotation, place, {', '.join(_FIELDS)})"
                f" VALUES ({_places(3 + len(_FIELDS))})",
                rows,
            )
        return True

    def retire(self, project: str, annotation: int, *, updated_s: float, task: int | None = None) -> bool:
        """Keep what is known of an annotation, but use it no more (it was skipped); a later `replace` brings it back.

        Returns:
            False if nothing was done, as `replace` does.

        Raises:
            NotKept: the file cannot be written.
        """
        with self._change(f"annotation {annotation} of project {project}") as db:
            return _admit(db, project, annotation, task, updated_s, _RETIRED, self._clock())

    def delete(self, project: str, annotations: Iterable[int]) -> None:
        """Forget annotations for good: what comes of them later is ignored, also when nothing came before.

        Raises:
            NotKept: the file cannot be written.
        """
        ids = list(annotations)
        with self._change(f"the deletion of {len(ids)} annotations of project {project}") as db:
            _delete(db, project, ids, self._clock())

    def is_deleted(self, project: str, annotation: int, task: int | None) -> bool:
        """Return whether an annotation or its task is deleted for good, so that nothing more is learned of it."""
        query = (
            "SELECT 1 FROM annotations WHERE project = ? AND annotation = ? AND state = ?"
            " UNION SELECT 1 FROM deleted_tasks WHERE project = ? AND task = ?"
        )
        return bool(self._rows(query, (project, annotation, _DELETED, project, task)))

    def delete_tasks(self, project: str, tasks: Iterable[int]) -> None:
        """Forget tasks for good, with all their annotations: those known now and those that come later.

        Raises:
            NotKept: the file cannot be written.
        """
        keys = [(project, task) for task in tasks]
        with self._change(f"the deletion of {len(keys)} tasks of project {project}") as db:
            db.executemany("INSERT OR IGNORE INTO deleted_tasks VALUES (?, ?)", keys)
            known = db.execute(
                "SELECT annotation FROM annotations JOIN deleted_tasks USING (project, task)"
                " WHERE project = ? AND state <> ?",
                (project, _DELETED),
            )
            _delete(db, project, [annotation for (annotation,) in known.fetchall()], self._clock())

    def delete_missing(self, project: str, present: Collection[int], *, before_s: float) -> list[int]:
        """Delete the annotations that a complete listing no longer shows, and return their ids.

        Args:
            project: that was listed.
            present: ids of all its annotations.
            before_s: UTC by our clock, when the listing began; what we first heard of since then stays.

        Raises:
            NotKept: the file cannot be written.
        """
        with self._change(f"the deletions in project {project}") as db:
            rows = db.execute(
                "SELECT annotation FROM annotations"
                " WHERE project = ? AND state <> ? AND learned_s < ? ORDER BY annotation",
                (project, _DELETED, before_s),
            ).fetchall()
            gone = [annotation for (annotation,) in rows if annotation not in present]
            _delete(db, project, gone, self._clock())
        return gone

    def note_classes(self, project: str, labels: Iterable[str] | None, *, updated_s: float) -> None:
        """Remember the classes a project has now; what was corrected keeps the class it had.

        Args:
            project: of them.
            labels: the classes; None: any may occur.
            updated_s: UTC, when the project was last changed; an older state than the known one is left alone.

        Raises:
            NotKept: the file cannot be written.
        """
        text = "null" if labels is None else json.dumps(sorted(set(labels)))
        with self._change(f"the classes of project {project}") as db:
            db.execute(
                "INSERT INTO classes VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET"
                " labels = excluded.labels, updated_s = excluded.updated_s WHERE excluded.updated_s >= updated_s",
                (project, text, updated_s),
            )

    def strays(self, project: str | None) -> dict[str, dict[str, int]]:
        """Return how many corrections in use are of classes that their project has no more, by project and class.

        Args:
            project: of them; None: all projects.
        """
        query = (
            "SELECT project, label, labels, COUNT(*) FROM regions JOIN annotations USING (project, annotation)"
            " JOIN classes USING (project) WHERE state = ? AND project = ifnull(?, project) AND label <> ''"
            " GROUP BY project, label ORDER BY project, label"
        )
        found: dict[str, dict[str, int]] = {}
        for owner, label, labels, count in self._rows(query, (_IN_USE, project)):
            known = json.loads(labels)
            if known is not None and label not in known:
                found.setdefault(owner, {})[label] = count
        return found

    def known(self, project: str) -> dict[int, float]:
        """Return when each annotation was last changed, UTC seconds; retired ones too, deleted ones not."""
        query = "SELECT annotation, updated_s FROM annotations WHERE project = ? AND state <> ?"
        return dict(self._rows(query, (project, _DELETED)))

    def projects(self) -> list[str]:
        """Return the projects that annotations are known of."""
        query = "SELECT DISTINCT project FROM annotations WHERE state <> ? ORDER BY project"
        return [project for (project,) in self._rows(query, (_DELETED,))]

    def corrections(
        self,
        project: str | None,
        *,
        since_s: float = 0,
        kinds: Collection[Kind] | None = None,
        annotator: int | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[Correction]:
        """Return the corrections in use, newest first.

        Args:
            project: of them; None: all projects.
            since_s: UTC seconds; annotations last changed then or later.
            kinds: only these; None: all.
            annotator: only theirs; None: everyone's.
            limit: corrections to return at most; None: all.
            offset: newer ones to leave out.
        """
        where = "state = ? AND updated_s >= ?"
        values: list[object] = [_IN_USE, since_s]
        if project is not None:
            where, values = f"{where} AND project = ?", [*values, project]
        if kinds is not None:
            where, values = f"{where} AND kind IN ({_places(len(kinds))})", [*values, *kinds]
        if annotator is not None:
            where, values = f"{where} AND annotator = ?", [*values, annotator]
        order = "ORDER BY updated_s DESC, project, annotation DESC, place LIMIT ? OFFSET ?"
        rows = self._rows(f"{_READ} WHERE {where} {order}", (*values, -1 if limit is None else limit, offset))
        return [_correction(row) for row in rows]

    def get(self, project: str, annotation: int, *, retired: bool = False) -> list[Correction]:
        """Return the corrections of one annotation; none if it is deleted, or retired and `retired` is false."""
        rows = self._rows(
            f"{_READ} WHERE project = ? AND annotation = ? AND state <= ? ORDER BY place",
            (project, annotation, _RETIRED if retired else _IN_USE),
        )
        return [_correction(row) for row in rows]

    def snapshot(self, project: str | None) -> Snapshot:
        """Return what to learn from now: for each task one annotation.

        Where several annotators worked on a task, an annotation marked as ground truth is taken, and else the one
        changed last: masks of the same thing by two people contradict each other at the edges, and the later person
        could see more. Annotations without a region do not compete.

        Args:
            project: of the corrections; None: all projects.
        """
        chosen: dict[tuple[object, ...], list[Correction]] = {}
        for found in _by_annotation(self.corrections(project)):
            key = (found[0].project, "annotation", found[0].annotation)
            if found[0].task is not None:
                key = (found[0].project, "task", found[0].task)
            if key not in chosen or _rank(found) > _rank(chosen[key]):
                chosen[key] = found
        keyed = [
            ((one.project, one.annotation, one.region), _content(one), one)
            for group in chosen.values()
            for one in group
        ]
        keyed.sort(key=lambda item: item[:2])
        digest = hashlib.sha256(b"\n".join(content for _, content, _ in keyed)).hexdigest()
        return Snapshot(digest, tuple(one for *_, one in keyed))

    def counts(self, project: str | None) -> Counts:
        """Return how many corrections are in use, by kind, annotator and day.

        Args:
            project: of them; None: all projects.
        """
        rows = self._rows(
            "SELECT project, annotation, image, kind, annotator, date(updated_s, 'unixepoch')"
            " FROM regions JOIN annotations USING (project, annotation)"
            " WHERE state = ? AND project = ifnull(?, project) ORDER BY updated_s",
            (_IN_USE, project),
        )
        images = Counter(row[2] for row in rows)
        apart = [image for image in images if held_out(image)]
        return Counts(
            corrections=len(rows),
            annotations=len({row[:2] for row in rows}),
            images=len(images),
            held_out=sum(images[image] for image in apart),
            held_out_images=len(apart),
            kinds=Counter(row[3] for row in rows),
            annotators=Counter(row[4] for row in rows),
            days=Counter(row[5] for row in rows),
        )

    def new_since(self, project: str | None, since_s: float) -> int:
        """Return how many corrections in use came or changed since then, by our clock.

        Args:
            project: of them; None: all projects.
            since_s: UTC seconds.
        """
        query = (
            "SELECT COUNT(*) FROM regions JOIN annotations USING (project, annotation)"
            " WHERE state = ? AND project = ifnull(?, project) AND kept_s >= ?"
        )
        return int(self._rows(query, (_IN_USE, project, since_s))[0][0])

    def first_s(self, project: str | None) -> float | None:
        """Return when the correction in use came, or was changed, that did so first: UTC seconds, by our clock.

        None where none is in use. Of a project, or with None of all.
        """
        query = (
            "SELECT MIN(kept_s) FROM regions JOIN annotations USING (project, annotation)"
            " WHERE state = ? AND project = ifnull(?, project)"
        )
        found: float | None = self._rows(query, (_IN_USE, project))[0][0]
        return found

    @contextmanager
    def _change(self, what: str) -> Iterator[sqlite3.Connection]:
        """Everything in the block, or nothing."""
        with self._lock:
            try:
                with all_or_nothing(self._db):
                    yield self._db
            except sqlite3.OperationalError as error:
                raise NotKept(
                    f"{what} could not be kept in {self._path} ({error}); "
                    "see that its disk has room and can be written, then let the work be done again"
                ) from error

    def _rows(self, query: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        with self._lock, closing(self._db.execute(query, values)) as rows:
            return rows.fetchall()


def held_out(image: str, share: float = 0.2) -> bool:
    """Whether an image is kept apart to judge adapters by and never trained on.

    Its digest alone decides, forever: more images, another project or another machine change nothing, and what is held
    out at a small share is so at every larger one.

    Args:
        image: digest of its bytes.
        share: of all images to hold out, 0..1.
    """
    place = int.from_bytes(hashlib.sha256(f"hold-out {image}".encode()).digest()[:8], "big")
    return place < share * 2**64


def parents_of(masks: Sequence[Mask]) -> list[int | None]:
    """Return for each mask of an image the index of the mask it is a part of: the smallest that holds 0.9 of it.

    A parent is larger than its part. Of equally large ones the first is taken; an empty mask is nobody's part.

    Args:
        masks: each bool H, W.

    Raises:
        ValueError: they differ in size.

    >>> whole, part = np.ones((4, 4), bool), np.eye(4, dtype=bool)
    >>> parents_of([part, whole, ~whole])
    [1, None, None]
    """
    if len({mask.shape for mask in masks}) > 1:
        raise ValueError(f"masks of one image have one size, not {sorted({mask.shape for mask in masks})}")
    areas = [int(np.count_nonzero(mask)) for mask in masks]
    smallest_first = sorted(range(len(masks)), key=lambda index: areas[index])
    parents: list[int | None] = []
    for mask, area in zip(masks, areas, strict=True):
        if area == 0:
            parents.append(None)
            continue
        box = extent(mask)
        larger = (index for index in smallest_first if areas[index] > area)
        holding = (i for i in larger if np.count_nonzero(mask[box] & masks[i][box]) >= _INSIDE * area)
        parents.append(next(holding, None))
    return parents


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_WAIT_S, check_same_thread=False, isolation_level=None)
    try:
        db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + _SCHEMA)
    except sqlite3.Error:
        db.close()
        raise
    return db


def _admit(
    db: sqlite3.Connection,
    project: str,
    annotation: int,
    task: int | None,
    updated_s: float,
    state: int,
    now_s: float,
) -> bool:
    """Note the state of an annotation, unless what is known of it is newer or final."""
    key = (project, annotation)
    row = db.execute(
        "SELECT state, updated_s, task FROM annotations WHERE project = ? AND annotation = ?", key
    ).fetchone()
    known_state, known_s, known_task = row or (None, updated_s, None)
    task = known_task if task is None else task
    if known_state == _DELETED:
        return False
    if db.execute("SELECT 1 FROM deleted_tasks WHERE project = ? AND task = ?", (project, task)).fetchone():
        _delete(db, project, [annotation], now_s)
        return False
    if known_s > updated_s:
        return False
    db.execute(
        "INSERT INTO annotations (project, annotation, task, state, updated_s, learned_s, kept_s)"
        " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
        " task = excluded.task, state = excluded.state, updated_s = excluded.updated_s, kept_s = excluded.kept_s",
        (*key, task, state, updated_s, now_s, now_s),
    )
    return True


def _delete(db: sqlite3.Connection, project: str, annotations: Iterable[int], now_s: float) -> None:
    keys = [(project, annotation) for annotation in annotations]
    db.executemany(
        "INSERT INTO annotations (project, annotation, state, updated_s, learned_s, kept_s)"
        " VALUES (?, ?, ?, 0, ?, ?) ON CONFLICT DO UPDATE SET state = excluded.state, kept_s = excluded.kept_s",
        [(*key, _DELETED, now_s, now_s) for key in keys],
    )
    db.executemany("DELETE FROM regions WHERE project = ? AND annotation = ?", keys)


def _packed(one: Correction) -> tuple[object, ...]:
    """Return the values of `_FIELDS`."""
    clicks = json.dumps([[click.x, click.y, click.positive] for click in one.clicks])
    return (
        *(one.region, one.image, one.height, one.width, one.label, one.granularity, one.phrase, clicks, one.kind),
        *(one.adapter, one.annotator, one.ground_truth, _pack(one.mask)),
        None if one.proposed is None else _pack(one.proposed),
    )


def _correction(row: tuple[Any, ...]) -> Correction:
    values = dict(zip(("project", "annotation", "task", "updated_s", *_FIELDS), row, strict=True))
    size = (values["height"], values["width"])
    values["clicks"] = tuple(Click(x=x, y=y, positive=positive) for x, y, positive in json.loads(values["clicks"]))
    values["ground_truth"] = bool(values["ground_truth"])
    values["mask"] = _unpack(values["mask"], *size)
    values["proposed"] = None if values["proposed"] is None else _unpack(values["proposed"], *size)
    return Correction(**values)


def _pack(mask: Rle) -> bytes:
    """Return a mask's run lengths, deflated where that is shorter; a deflated one begins with x, run lengths never."""
    return min(mask["counts"], zlib.compress(mask["counts"]), key=len)


def _unpack(packed: bytes, height: int, width: int) -> Rle:
    return {"size": [height, width], "counts": zlib.decompress(packed) if packed[:1] == b"x" else packed}


def _by_annotation(corrections: Iterable[Correction]) -> list[list[Correction]]:
    groups: dict[tuple[str, int], list[Correction]] = {}
    for one in corrections:
        groups.setdefault((one.project, one.annotation), []).append(one)
    return list(groups.values())


def _rank(annotation: list[Correction]) -> tuple[bool, float, int]:
    return any(one.ground_truth for one in annotation), annotation[0].updated_s, annotation[0].annotation


def _content(one: Correction) -> bytes:
    """Return all that a correction holds but the time of its last change."""
    masks = [None if mask is None else mask["counts"].decode("ascii") for mask in (one.mask, one.proposed)]
    clicks = [[click.x, click.y, click.positive] for click in one.clicks]
    said = (one.project, one.annotation, one.region, one.task, one.image, one.height, one.width, one.label)
    came = (one.granularity, one.phrase, one.kind, one.adapter, one.annotator, one.ground_truth)
    return json.dumps([*said, *came, clicks, *masks]).encode()


def _places(count: int) -> str:
    return ", ".join("?" * count)
