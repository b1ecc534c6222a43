"""The photos that the journeys click on.

The bear is of COCO val2017 (000000361180): its mask was drawn by hand, and the photo stays outside this repository.
The coffee cup is `coffee.jpg` beside this file: the picture of that name in scikit-image, courtesy of Pikolo Espresso
Bar, given into the public domain (CC0) by the photographer, Rachel Michetti; so pictures of it may be published.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.types import Mask
from tests.e2e.masks import Spot, deepest

_COCO = "coco_000000361180"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Photo:
    """A JPEG as it is uploaded, in the size at which a browser shows it; places are fractions of that size."""

    name: str
    data: bytes
    width: int
    height: int
    click: Spot  # well inside the object
    box: tuple[float, float, float, float]  # left, top, right, bottom of an object
    truth: Mask | None = None  # drawn by hand; the object of both click and box


def find_photo(shared: Path) -> Photo:
    """Return the bear with its mask where the shared folder has it, else the coffee cup."""
    folder = shared / "data" / "coco-mval"
    return read_coco(folder, _COCO) if (folder / "images" / f"{_COCO}.jpg").is_file() else coffee()


def coffee() -> Photo:
    """Return the cup: coffee in it, a rim, a saucer and a spoon, so a level has something to choose among."""
    data = (Path(__file__).parent / "coffee.jpg").read_bytes()
    return Photo(name="coffee", data=data, width=600, height=400, click=(0.47, 0.37), box=(0.53, 0.58, 0.69, 0.83))


def read_coco(folder: Path, name: str) -> Photo:
    """Return a photo of a COCO-style folder whose single object fills a good part of it."""
    described = json.loads((folder / "annotations.json").read_text())
    (image,) = (image for image in described["images"] if image["file_name"] == f"{name}.jpg")
    (object_,) = (item for item in described["annotations"] if item["image_id"] == image["id"])
    truth = decode_coco(object_["segmentation"])
    width, height = image["width"], image["height"]
    left, top, wide, high = object_["bbox"]
    return Photo(
        name=name,
        data=(folder / "images" / image["file_name"]).read_bytes(),
        width=width,
        height=height,
        click=deepest(truth),
        box=(left / width, top / height, (left + wide) / width, (top + high) / height),
        truth=truth,
    )


def turned(photo: Photo) -> Photo:
    """Return the photo as a phone held upright stores it: pixels lying on their side, and EXIF orientation 6."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise, before it is shown
    with Image.open(io.BytesIO(photo.data)) as upright, io.BytesIO() as buffer:
        upright.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", quality=92, exif=exif)
        return replace(photo, name=f"{photo.name}-turned", data=buffer.getvalue())


def decode_coco(segmentation: dict[str, Any]) -> Mask:
    """Return a mask of COCO's compressed RLE: run lengths down the columns, off first.

    A length is written in groups of five bits, the lowest first, each as one character from "0"; bit 5 says that more
    follow, bit 4 of the last is the sign. From the third on they are differences to the length before last.

    Source: `rleFrString` of cocoapi's maskApi.c.
    """
    height, width = segmentation["size"]
    lengths: list[int] = []
    value = shift = 0
    for character in segmentation["counts"].encode():
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    flat = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return flat.reshape(width, height).T
