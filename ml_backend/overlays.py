"""A correction as a small picture: the photo, what stands as proposed, what was added and what was taken away.

Each area has a pattern beside its colour: as proposed, plain; added, stripes; taken away, dots.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from active_learning.corrections import Correction
from model.types import Mask, Refusal, RGBImage

SIDE = 480
"""Pixels of a picture's longer side at most."""
_KEPT, _ADDED, _GONE = (0, 114, 178), (0, 200, 120), (225, 40, 150)
_FORMATS = ("JPEG", "PNG")  # as photos are kept


def changed_shares(one: Correction) -> tuple[float, float, float] | None:
    """Return IoU with what was proposed, and what was added and taken away as shares of the proposal.

    None where the proposal is not known or is empty. Masks are not decoded.
    """
    from pycocotools import mask as coco  # what serves clicks shall not hold it in memory

    if one.proposed is None:
        return None
    both = int(coco.area(coco.merge([one.mask, one.proposed], intersect=True)))
    now, before = int(coco.area(one.mask)), int(coco.area(one.proposed))
    if before == 0:
        return None
    return both / (now + before - both), (now - both) / before, (before - both) / before


def draw_correction(path: Path, one: Correction, *, max_pixels: int) -> bytes:
    """Return a JPEG of a correction on its photo.

    Args:
        path: the photo.
        one: the correction.
        max_pixels: width x height above which a photo is not read.

    Raises:
        Refusal: the photo cannot be read, or is of another size.
    """
    from model.annotations import decode

    pixels = _small(path, one, max_pixels)
    now = _shrunk(decode(one.mask), pixels)
    before = now if one.proposed is None else _shrunk(decode(one.proposed), pixels)
    rows, columns = np.indices(now.shape)
    everywhere = np.ones_like(now)
    for area, colour, pattern in (
        (now & before, _KEPT, everywhere),
        (now & ~before, _ADDED, (rows + columns) % 8 < 5),
        (before & ~now, _GONE, (rows % 6 < 4) & (columns % 6 < 4)),
    ):
        _tint(pixels, area & pattern, colour)
        _outline(pixels, area, colour)
    with BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        return file.getvalue()


def _small(path: Path, one: Correction, max_pixels: int) -> RGBImage:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > max_pixels or image.size != (one.width, one.height):
                raise Refusal(f"the photo has {image.width} x {image.height} pixels, which is not what was annotated")
            image.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded at a fraction of its size
            small = image.convert("RGB")
            small.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
            return np.array(small)
    except OSError as error:
        raise Refusal(f"the photo cannot be read ({type(error).__name__})") from error


def _shrunk(mask: Mask, pixels: RGBImage) -> Mask:
    size = (pixels.shape[1], pixels.shape[0])
    return np.asarray(cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)).astype(bool)


def _tint(pixels: RGBImage, area: Mask, colour: tuple[int, int, int]) -> None:
    mixed: npt.NDArray[np.floating] = 0.5 * pixels[area] + 0.5 * np.array(colour)
    pixels[area] = mixed.astype(np.uint8)


def _outline(pixels: RGBImage, area: Mask, colour: tuple[int, int, int]) -> None:
    found, _ = cv2.findContours(area.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(pixels, found, -1, colour, 1)
