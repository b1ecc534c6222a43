"""A snapshot of corrections as annotated photos: which mask is part of which, and how fine each one is.

A mask that lies in another of the same photo is its part. Its granularity is what the annotator gave; else its scale,
the share that it takes of its whole, the outermost mask around it (`model.granularity.scale`), as the shipped
adapter learned; a mask with nothing around it is a whole. Parts of one whole that belong together (left
and right wheel) are merged into the levels between them (`model.trie`). What was drawn twice counts once.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from active_learning.corrections import Correction, Snapshot, held_out, parents_of
from active_learning.folders import write_whole
from active_learning.images import ImageStore
from model.annotations import AnnotatedImage, AnnotatedMask, AnnotationSet, overlaps
from model.granularity import scale
from model.trie import merge_siblings
from model.types import Click

log = logging.getLogger(__name__)

HOLD_OUT, TRAIN = "hold-out", "train"
"""Splits of a snapshot's photos, by the digest of the photo alone."""
ACCEPTED = "accepted"
"""Origin of a mask that people took as a model had made it; those they drew or changed are `human`."""
_AS_MADE = ("accepted", "predicted")  # kinds of corrections
_SAME = 0.85  # IoU from which two masks of one photo, class and level are one thing, drawn twice
_LEAST_GRANULARITY = 0.01
_FEWEST_LEVELS = 20
_USUAL = 0.6


def annotated(snapshot: Snapshot, images: ImageStore) -> AnnotationSet:
    """Return the photos of a snapshot with their masks, in the splits `train` and `hold-out`.

    Every corrected mask has its granularity stated, 0..1; merged levels, made in photos of `train` only, have none. A
    photo whose file is gone is left out, and so is a mask of another size than the photo's others, with a line in the
    log.
    """
    of_image: dict[str, list[Correction]] = defaultdict(list)
    for correction in snapshot.corrections:
        of_image[correction.image].append(correction)
    found: list[AnnotatedImage] = []
    following = 1
    for number, (digest, corrections) in enumerate(sorted(of_image.items()), 1):
        path = images.path(digest)
        if path is None:
            log.warning("image %s is not kept any more: its %d masks are left out", digest[:12], len(corrections))
            continue
        size = corrections[0].height, corrections[0].width
        kept = [c for c in corrections if (c.height, c.width) == size]
        if len(kept) < len(corrections):
            log.warning("image %s: %d masks of other sizes are left out", digest[:12], len(corrections) - len(kept))
        masks = _masks(kept, number, following)
        split = HOLD_OUT if held_out(digest) else TRAIN
        if split == TRAIN:
            masks = merge_siblings(masks, following=following + len(masks))
        following += len(masks)
        found.append(
            AnnotatedImage(
                id=number, path=path, height=size[0], width=size[1], split=split, masks=masks, known_digest=digest
            )
        )
    return AnnotationSet(name=f"corrections {snapshot.id[:12]}", licence="", images=tuple(found))


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Write a snapshot down, so that a training that is begun again learns from the same; whole or not at all."""

    def plain(value: object) -> str:
        assert isinstance(value, bytes)  # run lengths, all ASCII
        return value.decode("ascii")

    content = {"id": snapshot.id, "corrections": [asdict(correction) for correction in snapshot.corrections]}
    write_whole(path, json.dumps(content, default=plain))


def read_snapshot(path: Path) -> Snapshot:
    """Return what `write_snapshot` wrote."""
    content = json.loads(path.read_text())
    return Snapshot(content["id"], tuple(_correction(values) for values in content["corrections"]))


def _correction(values: dict[str, Any]) -> Correction:
    for name in ("mask", "proposed"):
        if values[name] is not None:
            values[name]["counts"] = values[name]["counts"].encode("ascii")
    values["clicks"] = tuple(Click(**click) for click in values["clicks"])
    return Correction(**values)


def usual_level(corrections: Sequence[Correction]) -> float | None:
    """Return the level that most corrections have, in tenths: a click without a level may as well be taken for it.

    Levels are those that `annotated` states. None where no level and its two neighbours hold `_USUAL` of them, or where
    there are too few to say so.

    Args:
        corrections: of a project; of several on one photo all should be there.
    """
    of_image: dict[tuple[str, int, int], list[Correction]] = defaultdict(list)
    for correction in corrections:
        of_image[correction.image, correction.height, correction.width].append(correction)
    levels = [round((mask.granularity or 0.0) * 10) for found in of_image.values() for mask in _masks(found, 1, 1)]
    if len(levels) < _FEWEST_LEVELS:
        return None
    counts = np.bincount(np.clip(levels, 1, 10), minlength=12)
    around = counts[:-2] + counts[1:-1] + counts[2:]  # of levels 1 .. 10, each with its neighbours
    most = int(np.lexsort((counts[1:-1], around))[-1])
    return (most + 1) / 10 if around[most] >= _USUAL * len(levels) else None


def of_split(found: AnnotationSet, split: str) -> AnnotationSet:
    """Return the photos of one split."""
    return replace(found, images=tuple(image for image in found.images if image.split == split))


def _masks(corrections: Sequence[Correction], image_id: int, first: int) -> tuple[AnnotatedMask, ...]:
    """Return the masks of a photo, ids from `first` on."""
    ordered = _once(sorted(corrections, key=lambda c: (c.annotation, c.region)))
    plain = [
        AnnotatedMask(
            id=first + i,
            image_id=image_id,
            name=c.label,
            level="object",
            parent_id=None,
            origin=ACCEPTED if c.kind in _AS_MADE else "human",
            area=0,
            segmentation=c.mask,
            granularity=c.granularity,
        )
        for i, c in enumerate(ordered)
    ]
    pixels = [mask.mask() for mask in plain]
    made = []
    parents = parents_of(pixels)
    for index, (mask, own, parent) in enumerate(zip(plain, pixels, parents, strict=True)):
        stated = mask.granularity
        if stated is None:
            stated = scale(own, pixels[_whole(parents, index)]) if own.any() else 1.0
        made.append(
            replace(
                mask,
                area=int(np.count_nonzero(own)),
                parent_id=None if parent is None else first + parent,
                level="object" if parent is None else "part",
                granularity=max(_LEAST_GRANULARITY, stated),
            )
        )
    return tuple(made)


def _whole(parents: Sequence[int | None], index: int) -> int:
    """Return the outermost mask around one: itself where nothing is. Parents are larger, so there is no ring."""
    while (parent := parents[index]) is not None:
        index = parent
    return index


def _once(corrections: Sequence[Correction]) -> list[Correction]:
    """Return corrections of a photo without those that repeat another: in two tasks, two projects, or by mistake.

    The ground truth stays, else what was changed last.
    """
    alike = overlaps([one.mask for one in corrections]) >= _SAME
    kept: list[int] = []
    latest = sorted(enumerate(corrections), key=lambda c: (c[1].ground_truth, c[1].updated_s), reverse=True)
    for index, one in latest:
        others = (corrections[other] for other in kept if alike[index, other])
        if not any(one.label == other.label and _of_one_level(one, other) for other in others):
            kept.append(index)
    return [corrections[index] for index in sorted(kept)]


def _of_one_level(one: Correction, other: Correction) -> bool:
    if (one.project, one.annotation) == (other.project, other.annotation):
        return one.granularity is not None and one.granularity == other.granularity  # a part may be nearly its whole
    return None in (one.granularity, other.granularity) or one.granularity == other.granularity
