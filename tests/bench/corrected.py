"""What corrections of a new domain bring: python -m tests.bench.corrected ../shared/data/car-parts --corrections 300

Everything a training does, without backend and Label Studio: photos in random order, of those that the hold-out rule
lets be learned from, their masks corrected at their own level; then the robot clicks hold-out and reference set with
the adapter that ships and with what was learned. On two cores a hundred corrections and 120 objects take some ten
minutes; the same seed gives the same photos. With --adapter nothing is learned: that file is measured, such as a
version that a simulation published (`simulate --keep`).
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np

from active_learning.bundle import bundled_sets
from active_learning.corrections import Correction, Snapshot, held_out
from active_learning.cycle import encoded_objects
from active_learning.dataset import EmbeddingFiles, photos_of
from active_learning.gate import curves_of
from active_learning.images import ImageStore
from active_learning.learn import LearningConfig, blended, learn
from active_learning.scores import ObjectCurve, compare, paired
from active_learning.snapshots import TRAIN, annotated, of_split
from active_learning.training_run import Progress
from ml_backend.simulate import clickable, holdout_of
from model.annotations import AnnotatedImage, AnnotationSet, encode, read_annotations
from model.embeddings import EmbeddingFolder
from model.light.segmenter import LightSegmenter
from model.segmenter import BUNDLED, BUNDLED_ADAPTER, load_segmenter

_BUDGET = 20  # clicks on one object at most
_REFERENCE = 40  # objects


def corrected(found: AnnotationSet, count: int, seed: int) -> Snapshot:
    """Return `count` corrections of photos that may be learned from, in random order, each mask as the set has it."""
    images = [image for image in found.images if image.masks and not held_out(image.digest())]
    np.random.default_rng(seed).shuffle(images)  # type: ignore[arg-type]
    made = [_correction(image, place, found.name) for image in images for place in range(len(image.masks))][:count]
    return Snapshot(f"{found.name} {count} {seed}", tuple(made))


def _correction(image: AnnotatedImage, place: int, project: str) -> Correction:
    mask = image.masks[place]
    return Correction(
        **{"project": project, "annotation": image.id, "task": image.id, "annotator": None, "ground_truth": False},
        **{"image": image.digest(), "height": image.height, "width": image.width, "label": mask.name, "phrase": None},
        **{"clicks": (), "kind": "corrected", "proposed": None, "adapter": None, "updated_s": 0.0},
        region=f"{place:03}",
        mask=encode(mask.mask()),
        granularity=image.level_of(mask).value,
    )


def measured(
    segmenter: LightSegmenter, adapter: Path, found: AnnotationSet, limit: int, embeddings: Path
) -> list[ObjectCurve]:
    """Return how the robot gets on with at most `limit` objects of a set."""
    objects = encoded_objects(found, limit, segmenter, EmbeddingFolder(embeddings))
    return curves_of(segmenter.with_adapter(adapter), objects, budget=_BUDGET)


def main(
    data: Path, corrections: int, objects: int, config: LearningConfig, work: Path, *, device: Literal["cpu", "auto"]
) -> None:
    """Learn, measure, and print the figures; embeddings in `work` are used again."""
    found = clickable(read_annotations(data))
    replay, _ = bundled_sets()
    segmenter = _base(device)
    store, embeddings = ImageStore(work / "images"), work / "embeddings"
    snapshot = corrected(found, corrections, config.seed)
    wanted = {correction.image for correction in snapshot.corrections}
    for image in found.images:
        if image.digest() in wanted:
            store.put(image.digest(), image.path.read_bytes())
    photos = config.photos(of_split(annotated(snapshot, store), TRAIN))
    print(f"{len(snapshot.corrections)} corrections on {len(wanted)} photos: {asdict(config)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        began_s = time.perf_counter()
        trained = learn(
            config,
            segmenter,
            photos,
            photos_of(replay),
            EmbeddingFiles(embeddings, segmenter),
            BUNDLED_ADAPTER,
            Path(folder),
            card={"snapshot": snapshot.id},
            device=device,
            report=lambda progress: _show(progress, began_s),
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"learned in {time.perf_counter() - began_s:.0f} s, {peak:.1f} GiB at most", flush=True)
        candidates = {
            f"blend {share:g}": blended(BUNDLED_ADAPTER, trained, share, Path(folder) / f"{share}.safetensors")
            for share in (config.blends[0], 1.0)
        }
        _measure(segmenter, candidates, found, objects, embeddings)


def _measure(
    segmenter: LightSegmenter, candidates: dict[str, Path], found: AnnotationSet, objects: int, embeddings: Path
) -> None:
    """Click hold-out and reference set with the adapter that ships and each candidate, and print the figures."""
    _, reference = bundled_sets()
    sets = {f"hold-out of {found.name}": (holdout_of(found), objects), "reference set": (reference, _REFERENCE)}
    before = {n: measured(segmenter, BUNDLED_ADAPTER, s, k, embeddings) for n, (s, k) in sets.items()}
    for candidate, path in candidates.items():
        for name, (one, limit) in sets.items():
            _compare(candidate, name, measured(segmenter, path, one, limit, embeddings), before[name])


def _base(device: Literal["cpu", "auto"]) -> LightSegmenter:
    segmenter = load_segmenter("light", BUNDLED, device=device)
    assert isinstance(segmenter, LightSegmenter)
    return segmenter


def _show(progress: Progress, began_s: float) -> None:
    if progress.step % 100 == 0:
        loss, seconds = progress.figures.get("loss", float("nan")), time.perf_counter() - began_s
        print(f"  step {progress.step} of {progress.steps}, loss {loss:.3f}, {seconds:.0f} s", flush=True)


def _compare(candidate: str, name: str, ours: Sequence[ObjectCurve], theirs: Sequence[ObjectCurve]) -> None:
    found = compare(paired(candidate=ours, incumbent=theirs), np.random.default_rng(0), confidence=0.8)
    before, after = found.incumbent, found.candidate
    print(f"{candidate}, {after.objects} objects of {name}:", end=" ")
    for at, change, values, misses in (
        ("85", found.noc85, (before.noc85, after.noc85), (before.misses85, after.misses85)),
        ("90", found.noc90, (before.noc90, after.noc90), (before.misses90, after.misses90)),
    ):
        low, high = 1 + change.low, 1 + change.high
        print(f"NoC@{at} {values[0]:.2f} -> {values[1]:.2f}, {1 + change.relative:.3f} x", end=" ")
        print(f"({low:.2f} to {high:.2f}), misses {misses[0]} -> {misses[1]};", end=" ")
    print(f"IoU@1 {before.iou1:.3f} -> {after.iou1:.3f}", flush=True)


def _changed(setting: str) -> tuple[str, object]:
    name, _, value = setting.partition("=")
    return name, json.loads(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder in the shape of ../shared/data")
    parser.add_argument("--corrections", type=int, default=100, help="masks to learn from")
    parser.add_argument("--seed", type=int, default=0, help="of the photos' order and of the training")
    parser.add_argument("--objects", type=int, default=120, help="of the hold-out, at most")
    parser.add_argument("--device", choices=("cpu", "auto"), default="cpu", help="auto: a GPU where there is one")
    parser.add_argument("--work", type=Path, help="keeps embeddings for the next time")
    parser.add_argument("--adapter", type=Path, help="measure this file and learn nothing")
    parser.add_argument("--set", action="append", default=[], type=_changed, help="of the recipe: --set views=0")
    given = parser.parse_args()
    known, changes = [field.name for field in fields(LearningConfig)], dict(given.set)
    if unknown := changes.keys() - known:
        parser.error(f"the recipe has no {min(unknown)}; it has {', '.join(known)}")
    recipe = replace(LearningConfig(seed=given.seed), **changes)
    with tempfile.TemporaryDirectory() as place:
        work = given.work or Path(place)
        if given.adapter is not None:
            data, candidates = clickable(read_annotations(given.data)), {given.adapter.name: given.adapter}
            _measure(_base(given.device), candidates, data, given.objects, work / "embeddings")
            parser.exit()
        main(given.data, given.corrections, given.objects, recipe, work, device=given.device)
