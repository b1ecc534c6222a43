"""How good a mask is: IoU, and the clicks it took. Numbers only; nothing here knows a network."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from model.types import Mask


def iou(a: Mask, b: Mask) -> float:
    """Return intersection over union of two masks of one shape; two empty masks agree fully.

    >>> iou(np.array([[True, True]]), np.array([[True, False]]))
    0.5
    """
    if a.shape != b.shape:
        raise ValueError(f"masks of different shapes: {a.shape} and {b.shape}")
    union = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / union if union else 1.0


def number_of_clicks(ious: npt.NDArray[np.floating], target: float, budget: int = 20) -> int | None:
    """Return the clicks needed to reach a target IoU (NoC), or None for a miss.

    Args:
        ious: IoU after each click, shape (clicks,), each in [0, 1].
        target: the IoU that counts as done, 0.90 for NoC@90.
        budget: clicks to look at; later ones are ignored.

    Raises:
        ValueError: `ious` is empty.

    Source: the RITM evaluation protocol (arXiv 2102.06583), which scores a miss as `budget`; here it is None,
    so that reaching the target on the last click stays a success.

    >>> number_of_clicks(np.array([0.61, 0.88, 0.93]), target=0.90)
    3
    """
    if ious.size == 0:
        raise ValueError("no IoU to score: pass the IoU after each click, at least one")
    reached = np.flatnonzero(ious[:budget] >= target)
    return int(reached[0]) + 1 if reached.size else None
