"""Sizes and places: how a source image sits in the network's square, and the way back.

Pure functions. Coordinates are pixels, pixel (row, column) covering [column, column + 1) x [row, row + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from model.types import Box, Mask, Refusal, RGBImage

FloatMap = npt.NDArray[np.float32]  # H, W


@dataclass(frozen=True, slots=True)
class Fit:
    """An image of `height` x `width` resized so that its long side is `side`, at the top left of a square."""

    height: int
    width: int
    side: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise Refusal(f"an image of {self.width} x {self.height} pixels holds nothing to segment")

    @property
    def scale(self) -> float:
        """Pixels of the square for one pixel of the image."""
        return self.side / max(self.height, self.width)

    @property
    def resized(self) -> tuple[int, int]:
        """Height and width in the square, at least 1 each."""
        return max(1, int(self.height * self.scale + 0.5)), max(1, int(self.width * self.scale + 0.5))

    def to_square(self, xy: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Return points (..., 2) of the image as points of the square.

        >>> Fit(100, 200, 1024).to_square(np.array([200.0, 100.0])).tolist()
        [1024.0, 512.0]
        """
        height, width = self.resized
        return (np.asarray(xy, dtype=np.float64) * (width / self.width, height / self.height)).astype(np.float32)

    def from_square(self, xy: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Return points (..., 2) of the square as points of the image; the inverse of `to_square`."""
        height, width = self.resized
        return (np.asarray(xy, dtype=np.float64) * (self.width / width, self.height / height)).astype(np.float32)

    def resize(self, image: RGBImage) -> RGBImage:
        """Return `image` (height, width, 3) at its size in the square, antialiased."""
        if image.shape != (self.height, self.width, 3) or image.dtype != np.uint8:
            raise ValueError(f"expected uint8 {(self.height, self.width, 3)}, got {image.dtype} {image.shape}")
        height, width = self.resized
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))

    def paste_back(self, low_res: FloatMap) -> FloatMap:
        """Return a map of the whole square, at any resolution, as a map of the image (height, width).

        Bilinear, first to the square's own resolution and then, without its padding, to the image: what Segment
        Anything does with its logits.
        """
        height, width = self.resized
        square = cv2.resize(low_res, (self.side, self.side), interpolation=cv2.INTER_LINEAR)
        whole = cv2.resize(square[:height, :width], (self.width, self.height), interpolation=cv2.INTER_LINEAR)
        return np.asarray(whole, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Focus:
    """A part of an image: a box of whole pixels, first and last of rows and columns."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.bottom - self.top + 1, self.right - self.left + 1

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns, to index a map of the image."""
        return slice(self.top, self.bottom + 1), slice(self.left, self.right + 1)

    def holds(self, row: int, column: int) -> bool:
        """Whether a pixel lies inside; the last row and column count as outside, as published."""
        return self.top <= row < self.bottom and self.left <= column < self.right

    def covers(self, x: float, y: float) -> bool:
        """Whether a place, in pixels of the image, lies inside or on the border."""
        return self.left <= x <= self.right + 1 and self.top <= y <= self.bottom + 1

    def overlap(self, other: Focus) -> float:
        """Return the product of the IoUs along rows and along columns."""
        rows = _overlap(self.top, self.bottom, other.top, other.bottom)
        return rows * _overlap(self.left, self.right, other.left, other.right)


def clip_box(box: Box, height: int, width: int) -> Box:
    """Return the part of `box` that lies in the image.

    Raises:
        Refusal: nothing of it does.
    """
    left, right = max(0.0, box.left), min(float(width), box.right)
    top, bottom = max(0.0, box.top), min(float(height), box.bottom)
    if left >= right or top >= bottom:
        raise Refusal(f"the box {box} lies outside the image of {width} x {height} pixels")
    return Box(left=left, top=top, right=right, bottom=bottom)


def extent(mask: Mask) -> tuple[slice, slice]:
    """Return the rows and columns that hold all of a mask, H, W, which is not empty.

    >>> extent(np.array([[0, 0, 0], [0, 1, 1], [0, 0, 1]], bool))
    (slice(1, 3, None), slice(1, 3, None))
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def corners(mask: Mask) -> npt.NDArray[np.float32]:
    """Return the corners of the box around a mask, H, W, which is not empty: 2, 2, x and y, pixels.

    >>> corners(np.array([[0, 0, 0], [0, 1, 1]], bool)).tolist()
    [[1.0, 1.0], [3.0, 2.0]]
    """
    rows, columns = extent(mask)
    return np.array([[columns.start, rows.start], [columns.stop, rows.stop]], np.float32)


def depth(mask: Mask) -> FloatMap:
    """Return how far each pixel of a mask, H, W, is from its border in pixels, 0 outside; the image's edge is a border.

    >>> depth(np.ones((3, 5), bool))[1].tolist()
    [1.0, 2.0, 2.0, 2.0, 1.0]
    """
    padded = np.pad(mask.astype(np.uint8), 1)
    return np.array(cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1], dtype=np.float32)


def _overlap(a: int, b: int, c: int, d: int) -> float:
    return max(0, min(b, d) - max(a, c) + 1) / max(1e-6, max(b, d) - min(a, c) + 1)
