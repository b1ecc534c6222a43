"""Where the light family looks again: from the fourth click on, small things are encoded by themselves.

The embedding of a whole photo has one vector for 16 x 16 pixels of 1024, too coarse for the outline of a belt. So the
photo is kept beside its embedding, and what earlier clicks found, with as much again around it, becomes the focus of
the later ones if it is small.

Source: the zoom-in of RITM (arXiv 2102.06583), which SimpleClick and GraCo use at every click.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.geometry import Fit, FloatMap, Focus
from model.light.network import LOW_RES, SIDE
from model.types import RGBImage

FIRST_CLICK = 4
"""The first click that may be answered in a focus, which costs an encoding: most things need no more than three."""
OUTSIDE = -32.0
"""Logit of a pixel that lies outside the focus."""
_EXPANSION = 2.0  # of the long side of what was found, to a side of the focus
_SMALLEST = 64  # pixels of the image
_LARGEST = 0.6  # of the image's long side; a focus larger than this shows little more
_KEPT_SIDE = 2048  # pixels of the photo's long side that are kept
_QUALITY = 95


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What the encoder saw: all of an image or a focus in it."""

    focus: Focus
    embedding: Tensor  # 1, 256, 64, 64, as the encoder left it

    @property
    def fit(self) -> Fit:
        """How the focus sits in the encoder's square."""
        return Fit(*self.focus.shape, SIDE)


def kept(image: RGBImage) -> Tensor:
    """Return an image (uint8 H, W, 3) small enough to keep: the bytes of a JPEG of at most 2048 pixels, uint8 N."""
    if max(image.shape) > _KEPT_SIDE:
        image = Fit(image.shape[0], image.shape[1], _KEPT_SIDE).resize(image)
    written = io.BytesIO()
    Image.fromarray(image).save(written, "JPEG", quality=_QUALITY, subsampling=0)
    return torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)


def seen_in(photo: Tensor, focus: Focus, height: int, width: int) -> RGBImage:
    """Return the focus of a photo as the encoder reads it, resized to its square: uint8, long side 1024.

    Args:
        photo: as `kept` returns it.
        focus: a part of the image.
        height: of the image, pixels.
        width: of the image, pixels.
    """
    stored = Image.open(io.BytesIO(photo.numpy().tobytes()))
    down, across = stored.height / height, stored.width / width
    box = focus.left * across, focus.top * down, (focus.right + 1) * across, (focus.bottom + 1) * down
    rows, columns = Fit(*focus.shape, SIDE).resized
    return np.asarray(stored.resize((columns, rows), Image.Resampling.BILINEAR, box=box))


def next_focus(found: FloatMap, look: Look, places: Iterable[tuple[float, float]], whole: Focus) -> Focus:
    """Return where to look at the next click: where the last one looked, as long as all that counts lies in there.

    Args:
        found: logits of what earlier clicks found, 256, 256, in the square of `look`.
        look: what they were answered on.
        places: x and y of positive clicks and of a box's corners, pixels of the image.
        whole: the image.
    """
    rows, columns = (-(-size * LOW_RES // SIDE) for size in look.fit.resized)
    mask = found[:rows, :columns] > 0
    if not mask.any():
        return look.focus
    y, x = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    corners = np.array([[x[0], y[0]], [x[-1] + 1, y[-1] + 1]], np.float32) * (SIDE / LOW_RES)
    extent = look.fit.from_square(corners) + np.array([look.focus.left, look.focus.top], np.float32)
    points = np.concatenate([extent, np.array(list(places), np.float32).reshape(-1, 2)])
    points = points.clip((0, 0), (whole.right + 1, whole.bottom + 1))
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    if look.focus != whole and look.focus.covers(left, top) and look.focus.covers(right, bottom):
        return look.focus
    side = max(_EXPANSION * max(bottom - top, right - left), _SMALLEST)
    wanted = Focus(
        top=max(0, int((top + bottom - side) / 2)),
        bottom=min(whole.bottom, int((top + bottom + side) / 2)),
        left=max(0, int((left + right - side) / 2)),
        right=min(whole.right, int((left + right + side) / 2)),
    )
    return wanted if max(wanted.shape) < _LARGEST * max(whole.shape) else whole


def moved(logits: FloatMap, old: Look, new: Look) -> FloatMap:
    """Return logits 256, 256 of the square of one look in the square of another; what was not seen is outside."""
    pixel = LOW_RES / SIDE
    (old_rows, old_columns), (new_rows, new_columns) = old.fit.resized, new.fit.resized
    (height, width), (new_height, new_width) = old.focus.shape, new.focus.shape
    # from places in the new square to places in the old one, both counted from the middle of the first logit
    down, across = (new_height / new_rows) * (old_rows / height), (new_width / new_columns) * (old_columns / width)
    top = (new.focus.top - old.focus.top) * (old_rows / height) * pixel + 0.5 * down - 0.5
    left = (new.focus.left - old.focus.left) * (old_columns / width) * pixel + 0.5 * across - 0.5
    there = np.array([[across, 0, left], [0, down, top]], np.float32)
    return np.asarray(
        cv2.warpAffine(
            logits,
            there,
            (LOW_RES, LOW_RES),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=OUTSIDE,
        ),
        np.float32,
    )


def pasted(logits: FloatMap, look: Look, height: int, width: int) -> FloatMap:
    """Return logits of the square of `look` as a map of the whole image, height, width."""
    found = look.fit.paste_back(logits)
    if found.shape == (height, width):
        return found
    whole = np.full((height, width), OUTSIDE, np.float32)
    focus = look.focus
    whole[focus.top : focus.bottom + 1, focus.left : focus.right + 1] = found
    return whole
