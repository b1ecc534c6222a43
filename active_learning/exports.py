"""Corrections as a folder that others can read: COCO's JSON and its pictures, in the shape of ../shared/data.

`model.annotations.read_annotations` reads it back. Pictures are copied as they are; one that browsers turn by its EXIF
orientation is written upright, because that is how annotators saw it and what masks are of.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from active_learning.corrections import Correction, held_out, parents_of
from model.annotations import decode
from model.geometry import extent
from model.types import Mask, Refusal

log = logging.getLogger(__name__)

_ORIENTATION = 0x0112  # EXIF tag; 1: upright
_TURNED = ("JPEG", "MPO", "PNG", "AVIF")  # where browsers heed it, as ml_backend.images does; Pillow turns TIFF itself
_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}  # others: as the format is called
_UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)  # what Pillow raises
_LEVELS = ("object", "part", "subpart")


def write_coco(corrections: Iterable[Correction], images: Callable[[str], Path | None], target: Path) -> int:
    """Write corrections and their pictures to a new folder, and return how many were written.

    Besides COCO's keys an annotation has `parent_id` and `level` (what `parents_of` finds among the regions of its
    image), `origin`, and of the correction `kind`, `annotator`, `phrase`, `granularity` and `adapter`; an image has
    `split`, `val` where it is held out and else `train`, and `digest`. Left out and logged are corrections whose
    picture is not there, cannot be read or has another size, and empty ones.

    Args:
        corrections: in any order.
        images: gives the file of an image's digest, or None.
        target: the folder; it appears whole or not at all.

    Raises:
        Refusal: there is something in the folder already.
        OSError: it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Refusal(f"{target} is not empty; give a folder that does not exist yet")
    by_image: dict[str, list[Correction]] = {}
    for one in corrections:
        by_image.setdefault(one.image, []).append(one)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "images").mkdir(parents=True)
    try:
        content = _content(by_image, images, draft / "images")
        (draft / "annotations.json").write_text(json.dumps(content))
        draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return len(content["annotations"])


def _content(
    by_image: Mapping[str, list[Correction]], images: Callable[[str], Path | None], folder: Path
) -> dict[str, Any]:
    labels = sorted({one.label for found in by_image.values() for one in found})
    categories = {label: number for number, label in enumerate(labels, 1)}
    shots: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for image, found in sorted(by_image.items()):
        drawn = [(one, mask) for one in found if (mask := decode(one.mask)).any()]
        height, width = found[0].height, found[0].width
        name = _copy(image, images(image), folder, height, width) if drawn else None
        if name is None:
            log.warning("image %s: %d corrections left out", image[:12], len(found))
            continue
        split = "val" if held_out(image) else "train"
        shot = {"id": len(shots) + 1, "file_name": name, "width": width, "height": height}
        shots.append(shot | {"split": split, "digest": image})
        notes += _notes(drawn, image_id=len(shots), first=len(notes) + 1, categories=categories)
    return {
        "info": {"name": "corrections"},
        "images": shots,
        "categories": [{"id": number, "name": label, "supercategory": ""} for label, number in categories.items()],
        "annotations": notes,
    }


def _notes(
    drawn: Sequence[tuple[Correction, Mask]], *, image_id: int, first: int, categories: Mapping[str, int]
) -> list[dict[str, Any]]:
    parents = parents_of([mask for _, mask in drawn])

    def depth(place: int) -> int:
        parent = parents[place]
        return 0 if parent is None else 1 + depth(parent)  # parents are larger: no rings

    notes = []
    for place, (one, mask) in enumerate(drawn):
        parent = parents[place]
        rows, columns = extent(mask)
        left, top, right, bottom = columns.start, rows.start, columns.stop, rows.stop
        notes.append(
            {
                "id": first + place,
                "image_id": image_id,
                "category_id": categories[one.label],
                "parent_id": None if parent is None else first + parent,
                "level": _LEVELS[min(2, depth(place))],
                "origin": "human",
                "area": int(np.count_nonzero(mask)),
                "bbox": [left, top, right - left, bottom - top],
                "iscrowd": 0,
                "segmentation": {"size": [one.height, one.width], "counts": one.mask["counts"].decode("ascii")},
                "kind": one.kind,
                "annotator": one.annotator,
                "phrase": one.phrase,
                "granularity": one.granularity,
                "adapter": one.adapter,
            }
        )
    return notes


def _copy(image: str, source: Path | None, folder: Path, height: int, width: int) -> str | None:
    """Copy a picture as it is shown, and return its name; None where it is of no use."""
    if source is None:
        log.warning("image %s is not kept here", image[:12])
        return None
    upright = None
    try:
        with Image.open(source) as picture:
            kind, size = picture.format or "", picture.size
            if kind in _TURNED and picture.getexif().get(_ORIENTATION, 1) in range(2, 9):
                upright = ImageOps.exif_transpose(picture).convert("RGB")
                size = upright.size
    except _UNREADABLE as error:
        log.warning("%s cannot be read (%s)", source, error)
        return None
    if size != (width, height):
        log.warning("%s is %d x %d pixels, but its masks are %d x %d", source, *size, width, height)
        return None
    if upright is not None:
        name = f"{image}.png"
        upright.save(folder / name)
    else:
        name = f"{image}{_SUFFIXES.get(kind, f'.{kind.lower()}')}"
        shutil.copyfile(source, folder / name)
    return name
