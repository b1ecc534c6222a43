"""Two versions of a line side by side: the gate's figures where both were judged, and live answers on the same photos.

Answers are made by a thread of their own and kept as pictures, since they take seconds; they depend on the versions,
the photos and their masks alone.

    DATA/admin/compare/<line>_<first>_<second>/    state.json, and a picture for each photo
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from active_learning.corrections import CorrectionStore, Snapshot, held_out
from active_learning.folders import write_whole
from active_learning.images import ImageStore
from active_learning.lines import project_of
from active_learning.registry import AdapterRegistry
from active_learning.scores import ObjectCurve, Paired, compare, paired
from ml_backend.service import Service
from model.types import Refusal

if TYPE_CHECKING:  # what serves clicks shall not hold scipy and matplotlib in memory
    from model.annotations import AnnotationSet

log = logging.getLogger(__name__)

CONFIGURED = "configured"
"""Stands for the adapter that serves a line without a version of its own."""
SETS = ("hold-out", "reference set")
PHOTOS = 6
_KEPT = 20  # comparisons
_STOPPED_S = 180.0  # without a word of its process
_LARGEST_VERDICT = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One object that both answered with one click."""

    name: str
    set: str
    first: float  # IoU with the true mask
    second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far live answers are."""

    state: Literal["running", "done", "failed"]
    said: str = ""
    answers: tuple[Answered, ...] = ()


def judged_together(registry: AdapterRegistry, line: str, first: str, second: str) -> dict[str, Paired]:
    """Return how the second version compares with the first, by set, on the objects that the gate had both click.

    A set is left out where they have no object in common, and all are where one of them was not judged.
    """
    found = {}
    curves = [_curves(registry, line, version) for version in (first, second)]
    for name in SETS:
        theirs, ours = (of.get(name, {}) for of in curves)
        common = sorted(theirs.keys() & ours.keys())
        common = [key for key in common if len(theirs[key].ious) == len(ours[key].ious)]
        if common:
            pairs = paired(candidate=(ours[key] for key in common), incumbent=(theirs[key] for key in common))
            found[name] = compare(pairs, np.random.default_rng(0))
    return found


def _curves(registry: AdapterRegistry, line: str, version: str) -> dict[str, dict[str, ObjectCurve]]:
    """Return the curves that a version's verdict holds of itself, by set and object."""
    path = registry.path(registry.get(line, version)).with_name("verdict.json")
    try:
        if path.stat().st_size > _LARGEST_VERDICT:
            return {}
        by_set: dict[str, Any] = json.loads(path.read_bytes())["curves"]
        found = {}
        for name, pairs in by_set.items():
            curves = [ObjectCurve.from_json(pair["candidate"]) for pair in pairs]
            found[name] = {curve.object: curve for curve in curves}
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.info("version %s %s has no curves to compare: %s", line, version, type(error).__name__)
        return {}


class Comparisons:
    """Live answers of two versions, made one comparison at a time."""

    def __init__(self, service: Service) -> None:
        """Take whose model answers."""
        self._service = service
        self._folder = service.settings.data_dir / "admin" / "compare"
        self._one = threading.Lock()

    def ask(self, line: str, first: str, second: str) -> None:
        """Have two versions answer in the background; what was answered before is answered anew.

        Raises:
            Refusal: there is no such version, or another comparison is being made.
        """
        folder = self._place(line, first, second)
        if not self._one.acquire(blocking=False):
            raise Refusal("another comparison is being made; try again in half a minute")
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            _write(folder, Comparison(state="running"))
            threading.Thread(target=self._run, args=[folder, line, first, second], name="compare", daemon=True).start()
        except BaseException:
            self._one.release()
            raise

    def get(self, line: str, first: str, second: str) -> Comparison | None:
        """Return how far two versions' answers are; None: nobody asked for them.

        Raises:
            Refusal: there is no such version.
        """
        path = self._place(line, first, second) / "state.json"
        try:
            content = json.loads(path.read_bytes())
            found = Comparison(**content | {"answers": tuple(Answered(**one) for one in content["answers"])})
            silent_s = time.time() - path.stat().st_mtime
        except (OSError, ValueError, TypeError, KeyError):
            return None
        if found.state == "running" and silent_s > _STOPPED_S:
            return replace(found, state="failed", said="the process that made it was stopped; ask again")
        return found

    def picture(self, line: str, first: str, second: str, place: int) -> Path | None:
        """Return the picture of one object, or None.

        Raises:
            Refusal: there is no such version.
        """
        path = self._place(line, first, second) / f"{place:d}.png"
        return path if place < PHOTOS and path.is_file() else None

    def _place(self, line: str, first: str, second: str) -> Path:
        for version in (first, second):
            if version != CONFIGURED:
                self._service.registry.get(line, version)  # refuses what is no version's id
        return self._folder / f"{line}_{first}_{second}"

    def _run(self, folder: Path, line: str, first: str, second: str) -> None:
        try:
            done = self._answer(folder, line, first, second)
            _write(folder, done)
            self._forget()
        except Refusal as refusal:
            _write(folder, Comparison(state="failed", said=str(refusal)))
        except Exception as error:
            log.exception("versions %s and %s of %s could not be compared", first, second, line)
            _write(folder, Comparison(state="failed", said=f"{type(error).__name__}, see the log"))
        finally:
            self._one.release()

    def _answer(self, folder: Path, line: str, first: str, second: str) -> Comparison:
        from active_learning.gate import objects_of, row_of
        from model.evaluation.protocol import Bench, Models, Options, Scene
        from model.evaluation.report import draw_rows

        base, adapted = (
            self._service.segmenter_of(line, None if version == CONFIGURED else version) for version in (first, second)
        )
        models, labels = Models(base=base, adapted=adapted), (_short(first), _short(second))
        done = Comparison(state="running")
        for found in self._photos(line):
            for image, masks in objects_of(found, PHOTOS - len(done.answers)):
                encoded = self._service.encode_kept(image.digest(), image.pixels)
                scene = Scene(set_name=found.name, image=image, encoded=encoded, pixels=image.pixels)
                for mask in masks:
                    cells, (theirs, ours) = row_of(Bench(models, scene, mask, Options()), labels)
                    draw_rows(folder / f"{len(done.answers)}.png", [cells])
                    answer = Answered(name=mask.name or mask.level, set=found.name, first=theirs, second=ours)
                    done = replace(done, answers=(*done.answers, answer))
                    _write(folder, done)
        return replace(done, state="done")

    def _photos(self, line: str) -> list[AnnotationSet]:
        """Return photos to click: held-out ones of the line, then of the reference set, `PHOTOS` in all."""
        from active_learning.bundle import bundled_sets
        from active_learning.snapshots import annotated
        from model.evaluation.sets import evenly_spaced

        settings = self._service.settings
        found = []
        if settings.ledger == "here":
            with closing(CorrectionStore(settings.data_dir / "corrections.sqlite")) as store:
                corrections = store.snapshot(project_of(line)).corrections
            apart = sorted({one.image for one in corrections if held_out(one.image)})
            chosen = set(evenly_spaced(apart, PHOTOS))
            snapshot = Snapshot("compare", tuple(one for one in corrections if one.image in chosen))
            found.append(replace(annotated(snapshot, ImageStore(settings.data_dir / "images")), name=SETS[0]))
        own = sum(bool(image.masks) for one in found for image in one.images)
        if own < PHOTOS:
            reference = bundled_sets()[1]
            images = tuple(evenly_spaced(list(reference.images), PHOTOS - own))
            found.append(replace(reference, images=images, name=SETS[1]))
        return found

    def _forget(self) -> None:
        """Keep the newest comparisons only."""
        folders = sorted(self._folder.iterdir(), key=lambda folder: folder.stat().st_mtime)
        for folder in folders[:-_KEPT]:
            shutil.rmtree(folder, ignore_errors=True)


def _short(version: str) -> str:
    return version.partition("-")[0]


def _write(folder: Path, comparison: Comparison) -> None:
    write_whole(folder / "state.json", json.dumps(asdict(comparison)))
