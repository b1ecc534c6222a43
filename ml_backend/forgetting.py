"""To forget a photo: its corrections, its file, what was encoded of it and what was answered on it.

A training keeps what it was started with until it ends, and an adapter what it learned, with pictures, until it is
pruned.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from active_learning.corrections import Correction, CorrectionStore
from active_learning.images import ImageStore
from ml_backend.answers import AnswerStore
from ml_backend.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is kept of a task, or of a whole project."""

    project: str
    task: int | None  # None: the whole project
    corrections: tuple[Correction, ...]
    annotations: frozenset[int]
    photos: frozenset[str]  # that nothing else names
    shared: frozenset[str]  # that other corrections name as well, so they stay


def find(store: CorrectionStore, answers: AnswerStore, project: str, task: int | None) -> Found:
    """Return what is kept of a task of a project, or with None of all its tasks; skipped annotations count, too."""
    every = [one for owner in store.projects() for one in _of(store, owner)]
    mine = [one for one in every if one.project == project and task in (None, one.task)]
    annotations = set(store.known(project)) if task is None else {one.annotation for one in mine}
    images = {one.image for one in mine} | answers.images_of(project, task)
    shared = images & {one.image for one in every if one.project != project or task not in (None, one.task)}
    return Found(
        project=project,
        task=task,
        corrections=tuple(mine),
        annotations=frozenset(annotations),
        photos=frozenset(images - shared),
        shared=frozenset(shared),
    )


def forget(settings: Settings, store: CorrectionStore, answers: AnswerStore, found: Found) -> int:
    """Delete what was found, for good: what comes of these tasks later is ignored; return how many answers went.

    The ledger comes last, so that what was cut short finds everything again.

    Raises:
        OSError: something cannot be deleted; do it again.
        sqlite3.Error: the answers cannot be written; do it again.
    """
    images = ImageStore(settings.data_dir / "images")
    for photo in found.photos:
        for path in (settings.shared / "embeddings").glob(f"*/{photo[:2]}/{photo}.safetensors"):
            path.unlink(missing_ok=True)
        images.delete(photo)
    if found.photos:  # pictures of versions beside each other; any of them may show it, and they are drawn anew
        shutil.rmtree(settings.data_dir / "admin" / "compare", ignore_errors=True)
    gone = answers.forget(found.project, found.task, found.photos)
    store.delete(found.project, found.annotations)
    tasks = {found.task} if found.task is not None else {one.task for one in found.corrections}
    store.delete_tasks(found.project, [task for task in tasks if task is not None])
    return gone


def _of(store: CorrectionStore, project: str) -> list[Correction]:
    return [one for annotation in store.known(project) for one in store.get(project, annotation, retired=True)]
