"""What a journey needs of masks: read them from regions, compare them, find places in them.

Read with Label Studio's own decoder, so that the codec under test is not its own judge. A spot is x, y in fractions of
the image, as the editor's mouse takes it.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from label_studio_sdk.converter.brush import decode_rle

from model.types import Mask

Spot = tuple[float, float]


def read_mask(region: dict[str, Any]) -> Mask:
    """Return the mask of a brush region, shape (H, W)."""
    rgba = decode_rle(region["value"]["rle"]).reshape(region["original_height"], region["original_width"], 4)
    return np.asarray(rgba[..., 3] > 127)


def iou(one: Mask, other: Mask) -> float:
    """Return the intersection over union of two masks, not both empty."""
    return float((one & other).sum() / (one | other).sum())


def holds(mask: Mask, spot: Spot) -> bool:
    """Whether the pixel under a spot belongs to the mask."""
    height, width = mask.shape
    return bool(mask[int(spot[1] * height), int(spot[0] * width)])


def deepest(mask: Mask) -> Spot:
    """Return the spot of a mask that is farthest from its border."""
    return _spot(mask, _depth(mask))


def outskirts(mask: Mask, away_from: Spot) -> Spot:
    """Return the spot of a mask that is farthest from another, yet some pixels inside.

    Its lowest fifth is left out: there the editor shows the suggestion's own two buttons, which would take the click.
    """
    height, width = mask.shape
    depth = _depth(mask)
    rows = np.flatnonzero(mask.any(axis=1))
    y, x = np.mgrid[:height, :width]
    allowed = (depth >= min(8.0, depth.max() / 2)) & (y < rows[0] + 0.8 * (rows[-1] - rows[0]))
    distance = np.hypot(x - away_from[0] * width, y - away_from[1] * height)
    return _spot(mask, np.where(allowed, distance, -1.0))


def _depth(mask: Mask) -> Any:
    return cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]


def _spot(mask: Mask, value: Any) -> Spot:
    row, column = np.unravel_index(int(np.argmax(value)), mask.shape)
    return (float(column) + 0.5) / mask.shape[1], (float(row) + 0.5) / mask.shape[0]
