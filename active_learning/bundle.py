"""The two small sets that ship with the code, so that a project's training forgets nothing, and how they are made.

The replay set is mixed into every training; the reference set is what the gate looks for forgetting on, and no
training sees it. Both are slices of Clothing Co-Parsing in the shape of ../shared/data: the replay set of its `train`
split, whole photos that bring many names and levels; the reference set of its `val` split, in each photo the person
and one part.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from model.annotations import AnnotatedImage, AnnotationSet, encode, read_annotations
from model.types import Refusal

SOURCE = "ccp-person-clothing"
BUNDLED_SETS = Path(__file__).resolve().parent / "bundled"

_QUALITY = 85  # JPEG's, of a photo that is shrunk
_LEAST_PART = 0.005  # of its photo: smaller parts are left out of the reference set, their borders decide too much


def bundled_sets(folder: Path = BUNDLED_SETS) -> tuple[AnnotationSet, AnnotationSet]:
    """Return the replay set and the reference set.

    Raises:
        Refusal: one is missing or damaged.
    """
    try:
        replay, reference = (read_annotations(folder / name, kind="shared") for name in ("replay", "reference"))
    except Refusal as refusal:
        raise Refusal(
            f"{refusal}; restore {folder} from the repository, or make it: python -m active_learning bundle"
        ) from refusal
    return replay, reference


def bundle(data: Path, out: Path, *, replay: int = 24, reference: int = 20, side: int = 640, seed: int = 0) -> None:
    """Make both sets, OUT/replay and OUT/reference; what is there is replaced. Equal arguments give equal files.

    Args:
        data: the folder that holds the source set.
        out: where to.
        replay: photos of the replay set.
        reference: photos of the reference set.
        side: pixels of a photo's longer side at most; larger ones are shrunk, and their masks with them.
        seed: decides among photos that are equally good.

    Raises:
        Refusal: the source is missing or damaged, or has too few photos.
    """
    rng = np.random.default_rng(seed)
    found = read_annotations(data / SOURCE, kind="shared")
    train, val = ([image for image in found.images if image.split == split] for split in ("train", "val"))
    for images, wanted in ((train, replay), (val, reference)):
        if not 1 <= wanted <= len(images):
            raise Refusal(f"{wanted} photos are asked for, and {data / SOURCE} has {len(images)} in that split")
    for name, chosen in (("replay", _various(train, replay, rng)), ("reference", _parts(val, reference, rng))):
        _write_set(out / name, f"{found.name}, {name}", found.licence, chosen, side)


def _various(images: Sequence[AnnotatedImage], count: int, rng: np.random.Generator) -> list[AnnotatedImage]:
    """Return photos, whole: each the one that brings most of what few chosen ones have, names of masks and levels."""
    left = [images[i] for i in rng.permutation(len(images))]
    seen: Counter[str | int] = Counter()
    chosen: list[AnnotatedImage] = []
    holds = {image.id: {m.name for m in image.masks} | {image.level_of(m).level for m in image.masks} for image in left}
    while len(chosen) < count:
        best = max(left, key=lambda image: sum((1 + seen[thing]) ** -2 for thing in sorted(holds[image.id], key=str)))
        left.remove(best)
        chosen.append(best)
        seen.update(holds[best.id])
    return sorted(chosen, key=lambda image: image.id)


def _parts(images: Sequence[AnnotatedImage], count: int, rng: np.random.Generator) -> list[AnnotatedImage]:
    """Return photos with one part and its whole each, the parts spread over levels, then over names."""
    pairs = [
        (image, mask)
        for image in images
        for mask in image.masks
        if mask.level == "part" and mask.area >= _LEAST_PART * image.height * image.width
    ]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    levels: Counter[int] = Counter()
    names: Counter[str] = Counter()
    chosen: list[AnnotatedImage] = []
    while len(chosen) < count:
        if not pairs:
            raise Refusal(f"only {len(chosen)} photos have a part that is large enough, {count} are asked for")
        image, part = min(pairs, key=lambda pair: (levels[pair[0].level_of(pair[1]).level], names[pair[1].name]))
        levels[image.level_of(part).level] += 1
        names[part.name] += 1
        chosen.append(replace(image, masks=(image.whole(part), part)))
        pairs = [pair for pair in pairs if pair[0] is not image]
    return sorted(chosen, key=lambda image: image.id)


def _write_set(folder: Path, title: str, licence: str, images: Sequence[AnnotatedImage], side: int) -> None:
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "images").mkdir(parents=True)
    names = sorted({mask.name for image in images for mask in image.masks})
    numbers = {name: number for number, name in enumerate(names, 1)}
    shots: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for image in images:
        data, height, width = _photo(image, side)
        file_name = f"{image.path.stem}.jpg"
        (draft / "images" / file_name).write_bytes(data)
        shots.append({"id": image.id, "file_name": file_name, "width": width, "height": height, "split": image.split})
        notes += _notes(image, height, width, numbers)
    content = {
        "info": {
            "name": title,
            "license": licence,
            "version": f"made from {SOURCE} by python -m active_learning bundle",
        },
        "images": shots,
        "categories": [{"id": number, "name": name, "supercategory": ""} for name, number in numbers.items()],
        "annotations": notes,
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    (draft / "annotations.json").write_text(text + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    draft.replace(folder)


def _photo(image: AnnotatedImage, side: int) -> tuple[bytes, int, int]:
    """Return a photo's JPEG, height and width; one that is small enough comes as it is stored, to the byte."""
    pixels = image.pixels()
    scale = min(1.0, side / max(image.height, image.width))
    if scale == 1 and image.path.suffix.lower() in (".jpg", ".jpeg"):
        return image.path.read_bytes(), image.height, image.width
    height, width = (max(1, round(length * scale)) for length in (image.height, image.width))
    buffer = BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue(), height, width


def _notes(image: AnnotatedImage, height: int, width: int, numbers: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield the annotations of a photo at its new size, but for masks that vanish there."""
    for mask in image.masks:
        pixels = mask.mask()
        if pixels.shape != (height, width):
            small = cv2.resize(pixels.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
            pixels = np.asarray(small >= 0.5)
        if not pixels.any():
            continue
        rle = encode(pixels)
        yield {
            "id": mask.id,
            "image_id": mask.image_id,
            "category_id": numbers[mask.name],
            "parent_id": mask.parent_id,
            "level": mask.level,
            "origin": mask.origin,
            "area": int(np.count_nonzero(pixels)),
            "bbox": cv2.boundingRect(pixels.astype(np.uint8)),
            "iscrowd": 0,
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        }
