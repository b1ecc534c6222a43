"""Simulated annotators: where a person who knows the true mask would click next.

Source: the evaluation rule of RITM (arXiv 2102.06583): the middle of the larger error, missed or wrongly taken.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
import numpy.typing as npt

from model.types import Click, Mask


def next_click(truth: Mask, mask: Mask, earlier: Iterable[Click] = ()) -> Click | None:
    """Return the click that corrects the deepest error of `mask`, or None when there is no error left to click.

    The click lies on the pixel farthest from the border of the missed or of the wrongly taken pixels (whichever is
    deeper; the image's edge counts as a border), never on a pixel clicked before. It points at the pixel's centre.

    Args:
        truth: what the mask shall be, bool H, W.
        mask: what it is, bool H, W.
        earlier: clicks already placed.
    """
    if truth.shape != mask.shape:
        raise ValueError(f"masks of different shapes: {truth.shape} and {mask.shape}")
    missed = _depth(truth & ~mask)
    taken = _depth(~truth & mask)
    for click in earlier:
        if 0 <= click.y < truth.shape[0] and 0 <= click.x < truth.shape[1]:
            missed[int(click.y), int(click.x)] = taken[int(click.y), int(click.x)] = 0
    positive = bool(missed.max() >= taken.max())
    depth = missed if positive else taken
    if depth.max() <= 0:
        return None
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return Click(x=float(column) + 0.5, y=float(row) + 0.5, positive=positive)


def _depth(region: Mask) -> npt.NDArray[np.float32]:
    padded = np.pad(region.astype(np.uint8), 1)
    return np.array(cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1], dtype=np.float32)
