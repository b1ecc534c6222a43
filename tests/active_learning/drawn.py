"""A drawn set in the shape of ../shared/data whose photo is a strip: few cells of the embedding, so steps are quick."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.annotations import AnnotatedImage, AnnotatedMask, AnnotationSet, encode
from model.types import Mask, RGBImage
from tests.model.drawn_set import disc

HEIGHT, WIDTH = 120, 480
BLUE, WHITE, YELLOW, RED = (30, 60, 160), (235, 235, 240), (220, 200, 60), (190, 40, 30)


def strip_masks() -> dict[str, Mask]:
    """Return a door with a window in its upper half and a handle in its lower, and a ball."""
    door, window = np.zeros((2, HEIGHT, WIDTH), bool)
    door[10:110, 60:180] = True
    window[20:50, 80:160] = True
    return {
        "door": door,
        "window": window,
        "handle": disc(HEIGHT, WIDTH, 165, 80, 9),
        "ball": disc(HEIGHT, WIDTH, 360, 60, 45),
    }


def strip(number: int | None = None) -> RGBImage:
    """Return the photo, uint8 H, W, 3; those of other numbers differ in a corner, so that their files do."""
    photo = np.full((HEIGHT, WIDTH, 3), (95, 145, 85), np.uint8)
    photo += np.random.default_rng(7).integers(0, 12, (HEIGHT, WIDTH, 1), np.uint8)
    for mask, colour in zip(strip_masks().values(), (BLUE, WHITE, YELLOW, RED), strict=True):
        photo[mask] = colour
    if number is not None:
        photo[:4, :4] = number
    return photo


def write_photos(folder: Path, photos: Sequence[RGBImage], masks: dict[str, Mask]) -> AnnotationSet:
    """Write photos and return them as annotated, each with the same masks, all wholes."""
    images, following = [], 1
    for number, pixels in enumerate(photos, 1):
        path = folder / f"{number}.png"
        Image.fromarray(pixels).save(path)
        notes = [
            AnnotatedMask(
                id=following + n,
                image_id=number,
                name=name,
                level="object",
                parent_id=None,
                origin="human",
                area=int(mask.sum()),
                segmentation=encode(mask),
            )
            for n, (name, mask) in enumerate(masks.items())
        ]
        following += len(notes)
        height, width = pixels.shape[:2]
        image = AnnotatedImage(id=number, path=path, height=height, width=width, split=None, masks=tuple(notes))
        images.append(image)
    return AnnotationSet(name="drawn", licence="", images=tuple(images))


def write_strip(folder: Path, **changes: dict[str, Any]) -> Path:
    """Write the set; `changes` are made to the annotation of a name, `door={"parent_id": 99}`."""
    (folder / "images").mkdir(parents=True)
    Image.fromarray(strip()).save(folder / "images" / "strip.png")
    notes, names = [], strip_masks()
    for number, (name, mask) in enumerate(names.items(), 1):
        part = name in ("window", "handle")
        note = {
            "id": number,
            "image_id": 1,
            "category_id": number,
            "parent_id": 1 if part else None,
            "level": "part" if part else "object",
            "origin": "human",
            "area": int(mask.sum()),
            "bbox": [0, 0, 1, 1],
            "iscrowd": 0,
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": encode(mask)["counts"].decode()},
        }
        notes.append(note | changes.get(name, {}))
    content = {
        "images": [{"id": 1, "file_name": "strip.png", "width": WIDTH, "height": HEIGHT, "split": "train"}],
        "categories": [{"id": n, "name": name, "supercategory": ""} for n, name in enumerate(names, 1)],
        "annotations": notes,
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder
