"""One training cycle, and only its order. Snapshot, learn, judge, publish or not.

A cycle that is killed is begun again and goes on: the snapshot is written down first, learning has its checkpoint, and
a version is published in one step.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from active_learning.corrections import CorrectionStore, Snapshot
from active_learning.dataset import EmbeddingFiles, photos_of
from active_learning.folders import write_whole
from active_learning.gate import Margins, Objects, Verdict, curves_of, judge, judged_by, objects_of, write_verdict
from active_learning.images import ImageStore
from active_learning.learn import LearningConfig, Trainable, blended, learn, write_untrained
from active_learning.lines import SHARED, project_of
from active_learning.registry import AdapterRegistry, AdapterVersion
from active_learning.scores import ObjectCurve, paired
from active_learning.snapshots import HOLD_OUT, TRAIN, annotated, of_split, read_snapshot, write_snapshot
from active_learning.status import State, TrainingFolder, TrainingStatus
from active_learning.training_run import Progress
from model import heap
from model.adapter import read_adapter
from model.annotations import AnnotationSet
from model.embeddings import EmbeddingFolder
from model.evaluation.protocol import Models
from model.evaluation.runner import scene_of
from model.graco.segmenter import GracoSegmenter
from model.segmenter import Segmenter, digest_of_file
from model.types import Refusal

log = logging.getLogger(__name__)

_PASSES = 12  # after which memory that is free is given back: it has to be had again, so not after each
_VIEWS = "views"
"""Folder in a training's own that holds encoded crops."""


class Cancelled(Exception):
    """Somebody wants this training to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a training may take."""

    time_s: float = 3600.0
    memory_mb: int = 0  # that the process may hold for itself while it learns; 0: no limit
    device: str = "cpu"
    precision: str = "bf16"
    too_few: Literal["ask", "publish"] = "ask"  # where the hold-out is too small to judge by


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Workplace:
    """All that a cycle works with."""

    store: CorrectionStore
    images: ImageStore
    registry: AdapterRegistry
    segmenter: Trainable  # the base, without adapter
    embeddings: Path  # folder of encoded photos
    configured: Path | None  # the adapter that serves a line without a version of its own; None: the base alone does
    bundled: Path | None  # the adapter to begin from where the base alone serves; None: one that changes nothing
    weights: Path | None = None  # the base's file, which `graco` is trained from
    replay: AnnotationSet  # learned from beside the corrections
    reference: AnnotationSet  # judged on beside the hold-out


def run(
    place: Workplace,
    trainings: TrainingFolder,
    status: TrainingStatus,
    *,
    config: LearningConfig,
    margins: Margins,
    limits: Limits,
    pause: Callable[[], None] = lambda: None,
) -> TrainingStatus:
    """Carry out the training that was asked for, and return how it ended.

    Args:
        place: what to work with.
        trainings: of the line; its lock is held.
        status: the request, noted as running.
        config: how to learn.
        margins: how to judge.
        limits: time, memory, device, and what to do where the hold-out is too small.
        pause: called again and again; may wait while somebody clicks.
    """
    folder = trainings.work(status)
    folder.mkdir(parents=True, exist_ok=True)
    watch = _Watch(trainings, status, limits, pause)
    try:
        snapshot = _snapshot(place.store, folder, project_of(status.line), watch)
        if not snapshot.corrections:
            return watch.end("nothing new", "there are no corrections yet")
        instead_of = _instead_of(place.registry, status.line, folder)
        made = _made(place.registry, status, snapshot)
        if made is not None:
            return _end_with(place.registry, watch, made)
        base = place.segmenter.digest
        parent = _serving(place.registry, status.line)
        incumbent = place.configured if parent is None else place.registry.path(parent)
        begin = incumbent or place.bundled or _untrained(place.segmenter, folder)
        _keep_if_same(folder, {"parent": digest_of_file(begin), "config": asdict(config), "base": base})
        found, views = annotated(snapshot, place.images), folder / _VIEWS
        trained = learn(
            config,
            place.segmenter,
            config.photos(of_split(found, TRAIN)),
            photos_of(place.replay),
            EmbeddingFiles(place.embeddings, place.segmenter, views=views),
            begin,
            folder,
            card={"snapshot": snapshot.id, "recipe": json.dumps(asdict(config), sort_keys=True)},
            weights=place.weights,
            device=limits.device,
            precision=limits.precision,
            before_step=watch.look,
            report=watch.report,
        )
        shutil.rmtree(views, ignore_errors=True)
        watch.note(state="judging", left_s=None)
        exact = isinstance(place.segmenter, GracoSegmenter)
        holdout = judged_by(of_split(found, HOLD_OUT), margins)
        judge_candidate = _Judge(place, incumbent, holdout, margins, folder, watch)

        def judged(share: float) -> tuple[Path, Verdict]:
            candidate = blended(begin, trained, share, folder / "adapter.safetensors", exact=exact)
            return candidate, judge_candidate(candidate)

        ranks: dict[float, int] = {}
        for share in config.blends:
            candidate, verdict = judged(share)
            ranks[share] = verdict.rank
            if verdict.rank == 2:
                break
        else:
            best = max(ranks, key=lambda share: ranks[share])
            if ranks[best] > verdict.rank:  # an earlier one was better: its file and pictures once more
                candidate, verdict = judged(best)
        return _publish(place.registry, watch, verdict, candidate, parent, instead_of, folder, config, limits)
    except Cancelled:
        return watch.end("cancelled", "it was cancelled")
    except Refusal as refusal:
        log.error("training %s failed: %s", status.id, refusal)
        return watch.end("failed", str(refusal))


class _Watch:
    """Keeps the status of a training up to date, and stops it where it shall stop."""

    def __init__(
        self,
        trainings: TrainingFolder,
        status: TrainingStatus,
        limits: Limits,
        pause: Callable[[], None],
    ) -> None:
        self._trainings = trainings
        self.status = status
        self._limits = limits
        self._pause = pause
        self._until_s = time.monotonic() + limits.time_s
        self._passes = 0
        self._first: tuple[float, int] | None = None  # when the first steps were reported, and how many

    def note(self, **changes: object) -> None:
        self.status = self._trainings.note(self.status, **changes)

    def end(self, state: State, said: str, **changes: object) -> TrainingStatus:
        return self._trainings.end(self.status, state, said, **changes)

    def look(self) -> None:
        """Wait while somebody clicks.

        Raises:
            Cancelled: somebody wants it to stop.
            MemoryError: the process holds too much.
            Refusal: time is up.
        """
        if self._trainings.cancelled:
            raise Cancelled
        if time.monotonic() > self._until_s:
            raise Refusal(
                f"the training took longer than {self._limits.time_s / 60:g} minutes; raise "
                "GRACO_TRAIN_LIMIT_MINUTES, or let it run when the machine is quiet"
            )
        self._look_at_memory()
        self._pause()

    def _look_at_memory(self) -> None:
        """Give back now and then what is free, since photos of many shapes leave holes; see whether too much is held.

        As the heap keeps what a pass freed, what is held after it is what the pass took.
        """
        held, most = heap.held(), self._limits.memory_mb * 2**20
        self._passes += 1
        if self._passes % _PASSES == 0:
            heap.give_back()
        if held is not None and 0 < most < held:
            raise MemoryError(f"it held {held // 2**20} MB, and may hold {self._limits.memory_mb}")

    def look_once_more(self, _: int) -> None:
        """Do as `look` does between objects that are judged, which is not limited in time."""
        if self._trainings.cancelled:
            raise Cancelled
        self._pause()

    def report(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if self._first is None or progress.step <= self._first[1]:  # the first, or begun anew
            self._first = now_s, progress.step
        began_s, first = self._first
        done = progress.step - first
        left_s = (progress.steps - progress.step) * (now_s - began_s) / done if done else None
        loss = progress.figures.get("loss")
        if loss is not None:
            self._trainings.note_loss(progress.step, loss)
        self.note(step=progress.step, steps=progress.steps, loss=loss, left_s=left_s)


def _snapshot(store: CorrectionStore, folder: Path, project: str | None, watch: _Watch) -> Snapshot:
    """Return the snapshot of this training: taken at its first attempt, and the same at later ones."""
    path = folder / "snapshot.json"
    if not path.is_file():
        watch.note(snapshot_s=time.time())
        write_snapshot(path, store.snapshot(project))
    snapshot = read_snapshot(path)
    watch.note(snapshot=snapshot.id, masks=len(snapshot.corrections))
    return snapshot


def _instead_of(registry: AdapterRegistry, line: str, folder: Path) -> str | None:
    """Return what ACTIVE said at this training's first attempt: what was activated since then is not replaced.

    That is so whether the version it names can serve or not: a damaged one is passed over, and replaced.
    """
    path = folder / "instead-of.json"
    if not path.is_file():
        write_whole(path, json.dumps(registry.active_text(line)))
    named: str | None = json.loads(path.read_text())
    return named


def _made(registry: AdapterRegistry, status: TrainingStatus, snapshot: Snapshot) -> AdapterVersion | None:
    """Return the newest version that a snapshot gave and that can serve: whole, and of this base.

    For a thorough training only what a thorough one made counts. Where a version of this snapshot is to serve and
    cannot, none does but this training's own: another is made in its place.
    """
    named, found, lost = registry.active_text(status.line), None, False
    for version in reversed(registry.versions(status.line)):
        if version.snapshot != snapshot.id:
            continue
        try:
            card = registry.card(status.line, version.id)
            registry.intact(version)
        except Refusal as refusal:
            log.warning("what these corrections gave before does not count: %s", refusal)
            lost = lost or version.id == named
            continue
        if card.get("training") == status.id:
            return version
        if found is None and (card.get("thorough") or not status.thorough):
            found = version
    return None if lost else found


def _serving(registry: AdapterRegistry, line: str) -> AdapterVersion | None:
    """Return the version that serves a line, whole and of this base; None: the configured adapter does."""
    for name in (line, SHARED):
        try:
            version = registry.active(name)
            if version is not None:
                registry.intact(version)
                return version
        except Refusal as refusal:
            log.warning("line %s is passed over, as it is when answering: %s", name, refusal)
    return None


def _untrained(segmenter: Trainable, folder: Path) -> Path:
    if not isinstance(segmenter, GracoSegmenter):
        raise Refusal("the light family begins from the adapter that ships with it; restore it from the repository")
    return write_untrained(folder / "untrained.safetensors", segmenter)


def _keep_if_same(folder: Path, plan: dict[str, Any]) -> None:
    """Have what an earlier attempt left only where it began from the same; else it would be mixed with another."""
    path, text = folder / "plan.json", json.dumps(plan, sort_keys=True)
    if path.is_file() and path.read_text() != text:
        log.warning("what this training began from has changed: it begins anew")
        for name in ("checkpoint.pt", "trained.safetensors"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / _VIEWS, ignore_errors=True)
    write_whole(path, text)


def _end_with(registry: AdapterRegistry, watch: _Watch, version: AdapterVersion) -> TrainingStatus:
    """End with the version that the snapshot gave: by this training, killed just after it was published, or before."""
    card = registry.card(version.line, version.id)
    if card.get("training") != watch.status.id:
        return watch.end(
            "nothing new",
            f"version {version.id} was already trained on exactly these {watch.status.masks} corrections",
            version=version.id,
        )
    if card["serves"] and registry.active_text(version.line) == card["instead_of"]:
        registry.activate(version.line, version.id, by="training")
    return _ended(registry, watch, version, serves=card["serves"])


class _Judge:
    """Has the robot click hold-out and reference set with the incumbent, once, and with each candidate."""

    def __init__(
        self,
        place: Workplace,
        incumbent: Path | None,
        holdout: AnnotationSet,
        margins: Margins,
        folder: Path,
        watch: _Watch,
    ) -> None:
        self._place, self._margins, self._folder, self._watch = place, margins, folder, watch
        self._embeddings = EmbeddingFolder(place.embeddings)
        self._sets = holdout, place.reference
        self._incumbent = place.segmenter.with_adapter(incumbent)
        self._known = [self._curves(self._incumbent, found) for found in self._sets]
        self._first: list[ObjectCurve] | None = None
        if incumbent != place.configured:
            first = place.segmenter.with_adapter(place.configured)
            self._first = self._curves(first, place.reference)

    def __call__(self, candidate: Path) -> Verdict:
        """Return the verdict; it, its curves and its pictures are kept in the folder `verdict`."""
        adapted = self._place.segmenter.with_adapter(candidate)
        holdout, reference = (
            paired(candidate=self._curves(adapted, found), incumbent=known)
            for found, known in zip(self._sets, self._known, strict=True)
        )
        since_first = None
        if self._first is not None:
            since_first = paired(candidate=[ours for ours, _ in reference], incumbent=self._first)
        verdict = judge(holdout, reference, self._margins, np.random.default_rng(0), since_first=since_first)
        write_verdict(
            self._folder / "verdict",
            verdict,
            holdout=holdout,
            reference=reference,
            objects=(one for found in self._sets for one in self._objects(found)),
            models=Models(base=self._incumbent, adapted=adapted),
        )
        return verdict

    def _objects(self, found: AnnotationSet) -> Iterator[Objects]:
        return encoded_objects(found, self._margins.limit, self._place.segmenter, self._embeddings)

    def _curves(self, segmenter: Segmenter, found: AnnotationSet) -> list[ObjectCurve]:
        report = self._watch.look_once_more
        return curves_of(segmenter, self._objects(found), budget=self._margins.budget, report=report)


def encoded_objects(
    found: AnnotationSet, limit: int, segmenter: Segmenter, embeddings: EmbeddingFolder
) -> Iterator[Objects]:
    """Yield what `curves_of` clicks: at most `limit` objects of a set, their photos as `segmenter` encodes them."""
    models = Models(base=segmenter, adapted=segmenter)
    for image, masks in objects_of(found, limit):
        yield scene_of(found.name, image, models, embeddings), masks


def _publish(
    registry: AdapterRegistry,
    watch: _Watch,
    verdict: Verdict,
    candidate: Path,
    parent: AdapterVersion | None,
    instead_of: str | None,
    folder: Path,
    config: LearningConfig,
    limits: Limits,
) -> TrainingStatus:
    status = watch.status
    unjudged = verdict.decision == "too-few"
    serves = verdict.accepted or (unjudged and not verdict.worse_on_few and limits.too_few == "publish")
    scores = {"hold-out": verdict.holdout, "reference": verdict.reference}
    version = registry.publish(
        status.line,
        candidate,
        card={
            "parent": None if parent is None else parent.id,
            "blend": read_adapter(candidate).card["blend"],
            "parent_line": None if parent is None else parent.line,
            "snapshot": status.snapshot,
            "masks": status.masks,
            "recipe": json.dumps(asdict(config), sort_keys=True),
            "seed": config.seed,
            "created_s": time.time(),
            "accepted": None if unjudged else verdict.accepted,
            "scores": {name: asdict(found.candidate) for name, found in scores.items() if found is not None},
            "training": status.id,
            "thorough": status.thorough,
            "reason": status.reason,
            "serves": serves,
            "instead_of": instead_of,
            "note": " ".join(verdict.reasons),
        },
        activate=serves,
        instead_of=instead_of,
        folder_of_pictures=folder / "verdict",
    )
    return _ended(registry, watch, version, serves=serves)


def _ended(registry: AdapterRegistry, watch: _Watch, version: AdapterVersion, *, serves: bool) -> TrainingStatus:
    """End as the verdict was, and as it was carried out."""
    wait = f"It waits for you: python -m ml_backend adapters activate {version.line} {version.id}"
    if serves and registry.active_text(version.line) == version.id:
        return watch.end("published", version.note, version=version.id)
    if serves:
        return watch.end("kept", f"{version.note} Another version was activated meanwhile. {wait}", version=version.id)
    if version.accepted is None:
        return watch.end("kept", f"{version.note} {wait}", version=version.id)
    return watch.end("rejected", version.note, version=version.id)
