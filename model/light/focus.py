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
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from model.geometry import Fit, FloatMap, Focus, corners
from model.light.ladder import OUTSIDE
from model.light.network import LOW_RES, SIDE
from model.types import Mask, RGBImage

Image.preinit()  # loads what reads and writes JPEG: now, not while an annotator waits

FIRST_CLICK = 4
"""The first click that may be answered in a focus, which costs an encoding: most things need no more than three."""
_EXPANSION = 2.0  # of the long side of what was found, to a side of the focus
_SMALLEST = 64  # pixels of the photo as it is kept
_SPECK = 0.05  # of the largest piece of what was found; smaller ones do not say where to look
_LARGEST = 0.6  # of the image's long side; a focus larger than this shows little more
_KEPT_SIDE = 2048  # pixels of the photo's long side that are kept
_QUALITY = 95


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What the encoder saw: all of an image or a focus in it."""

    focus: Focus
    embedding: Tensor | None = None  # 1, 256, 64, 64, as the encoder left it; None: the image's own
    adapted: Tensor | None = None  # the same as the adapter sees it; None: it sees what the encoder left, or the image

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its own embeddings take."""
        return sum(one.nbytes for one in (self.embedding, self.adapted) if one is not None)

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
    """Return where to look at the next click: where the last one looked, unless a click or what was found leaves that.

    Args:
        found: logits of what earlier clicks found, 256, 256, in the square of `look`.
        look: what they were answered on.
        places: x and y of positive clicks and of a box's corners, pixels of the image.
        whole: the image.
    """
    old = look.focus
    edge = np.array([[0, 0], [whole.right + 1, whole.bottom + 1]], np.float32)
    wanted = np.array(list(places), np.float32).reshape(-1, 2).clip(*edge)
    mask = what_was_found(found, look.fit)
    held = old != whole and all(old.covers(x, y) for x, y in wanted)
    if not mask.any():
        return old if held else whole
    borders = np.array([[old.left, old.top], [old.right + 1, old.bottom + 1]], np.float32)
    seen = (corners_of(mask, look.fit) + borders[0]).clip(*borders)
    cut = ((seen == borders) & (borders != edge)).any()  # at a border of the focus inside the photo
    if held and not cut:
        return old
    reached = np.concatenate([seen, wanted])
    (left, top), (right, bottom) = reached.min(axis=0), reached.max(axis=0)
    smallest = _SMALLEST * max(1.0, max(whole.shape) / _KEPT_SIDE)
    side = max(_EXPANSION * max(bottom - top, right - left), smallest)
    focus = Focus(
        top=max(0, int((top + bottom - side) / 2)),
        bottom=min(whole.bottom, int((top + bottom + side) / 2)),
        left=max(0, int((left + right - side) / 2)),
        right=min(whole.right, int((left + right + side) / 2)),
    )
    return focus if max(focus.shape) < _LARGEST * max(whole.shape) else whole


def corners_of(mask: Mask, fit: Fit) -> npt.NDArray[np.float32]:
    """Return the corners of the box around a mask of logits that is not empty: 2, 2, x and y, pixels of the image.

    Args:
        mask: of the logits that the image fills, rows, columns.
        fit: how the image sits in the square.
    """
    return fit.from_square(corners(mask) * (SIDE / LOW_RES))


def what_was_found(logits: FloatMap, fit: Fit) -> Mask:
    """Return the mask of logits, 256, 256, where the image fills them, without specks beside its largest piece."""
    rows, columns = filled(fit)
    mask = logits[:rows, :columns] > 0
    count, pieces, facts, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    areas = facts[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0  # all that is not in the mask
    large = areas >= max(1.0, _SPECK * areas.max()) if count > 1 else np.zeros(1, bool)
    return np.asarray(large[pieces])


def moved(logits: FloatMap, old: Look, new: Look) -> FloatMap:
    """Return logits 256, 256 of the square of one look in the square of another; what was not seen is outside.

    As in a decoder's answer, the border of what is seen goes on into the rest of the square.
    """
    middles = (np.arange(LOW_RES, dtype=np.float32) + 0.5) * (SIDE / LOW_RES)  # of logits, pixels of a square
    square = np.stack([middles, middles], axis=-1)
    height, width = new.fit.resized
    corner = np.array([new.focus.left, new.focus.top], np.float32)
    places = new.fit.from_square(square.clip(0, (width, height))) + corner  # x and y, pixels of the image
    seen_x = (old.focus.left <= places[:, 0]) & (places[:, 0] <= old.focus.right + 1)
    seen_y = (old.focus.top <= places[:, 1]) & (places[:, 1] <= old.focus.bottom + 1)
    rows, columns = filled(old.fit)
    there = old.fit.to_square(places - (old.focus.left, old.focus.top)) * (LOW_RES / SIDE) - 0.5
    x, y = there.clip(0, (columns - 1, rows - 1)).astype(np.float32).T
    across, down = np.meshgrid(x, y)
    found = cv2.remap(logits, across, down, interpolation=cv2.INTER_LINEAR)
    found[~(seen_y[:, None] & seen_x)] = OUTSIDE
    return np.asarray(found, np.float32)


def filled(fit: Fit) -> tuple[int, int]:
    """Return how many rows and columns of the square's 256 x 256 logits an image fills."""
    height, width = (-(-size * LOW_RES // SIDE) for size in fit.resized)
    return height, width


def pasted(logits: FloatMap, look: Look, height: int, width: int) -> FloatMap:
    """Return logits of the square of `look` as a map of the whole image, height, width."""
    found = look.fit.paste_back(logits)
    if found.shape == (height, width):
        return found
    whole = np.full((height, width), OUTSIDE, np.float32)
    whole[look.focus.slices] = found
    return whole
