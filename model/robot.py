"""Simulated annotators: where a person who knows the true mask would click next.

Source: the evaluation rule of RITM (arXiv 2102.06583): the middle of the larger error, missed or wrongly taken. It
differs from RITM's code, which GraCo's evaluation uses unchanged, in two cases: of two errors of one depth ours clicks
the missed one, that code the wrongly taken one; where nothing is left to click ours stops, that code clicks pixel 0, 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from model.geometry import depth
from model.types import Click, Mask


def next_click(truth: Mask, mask: Mask, earlier: Iterable[Click] = (), *, as_ritm: bool = False) -> Click | None:
    """Return the click that corrects the deepest error of `mask`, or None when there is no error left to click.

    The click lies on the pixel farthest from the border of the missed or of the wrongly taken pixels (whichever is
    deeper; the image's edge counts as a border), never on a pixel clicked before. It points at the pixel's centre.

    Args:
        truth: what the mask shall be, bool H, W.
        mask: what it is, bool H, W.
        earlier: clicks already placed.
        as_ritm: of two errors of one depth click the wrongly taken one, as RITM's code does.
    """
    deep, positive = _larger_error(truth, mask, earlier, as_ritm=as_ritm)
    if deep.max() <= 0:
        return None
    row, column = np.unravel_index(int(deep.argmax()), deep.shape)
    return Click(x=float(column) + 0.5, y=float(row) + 0.5, positive=positive)


def sample_click(
    truth: Mask, mask: Mask, rng: np.random.Generator, earlier: Iterable[Click] = (), *, inner: float = 0.5
) -> Click | None:
    """Return a click somewhere inside the error that `next_click` would click the middle of, to train by.

    Args:
        truth: as for `next_click`, as are `mask` and `earlier`.
        mask: what it is.
        rng: where the randomness comes from.
        earlier: clicks already placed.
        inner: pixels nearer to the error's border than this share of its depth are not clicked, 0..1.

    Source: iterative training of RITM (arXiv 2102.06583), which clicks a random point of the eroded error.
    """
    deep, positive = _larger_error(truth, mask, earlier)
    if deep.max() <= 0:
        return None
    rows, columns = np.nonzero((deep >= inner * deep.max()) & (deep > 0))
    chosen = int(rng.integers(rows.size))
    return Click(x=float(columns[chosen]) + 0.5, y=float(rows[chosen]) + 0.5, positive=positive)


def _larger_error(
    truth: Mask, mask: Mask, earlier: Iterable[Click], *, as_ritm: bool = False
) -> tuple[npt.NDArray[np.float32], bool]:
    """Return the depth of the deeper error in each pixel, 0 outside it and where clicked, and whether it was missed."""
    if truth.shape != mask.shape:
        raise ValueError(f"masks of different shapes: {truth.shape} and {mask.shape}")
    missed = depth(truth & ~mask)
    taken = depth(~truth & mask)
    for click in earlier:
        if 0 <= click.y < truth.shape[0] and 0 <= click.x < truth.shape[1]:
            missed[int(click.y), int(click.x)] = taken[int(click.y), int(click.x)] = 0
    positive = bool(missed.max() > taken.max() or (not as_ritm and missed.max() == taken.max()))
    return (missed if positive else taken), positive
