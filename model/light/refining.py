"""What the light family asks at a first click once more: the middle of what it found there, and a box around it.

A click near the border of a thing says less of it than one in its middle, and a click says less than a box. What a
first pass finds gives both, so the decoder is asked again with them; a pass costs a tenth of an encoding.

Source: a network that reads its own answer again, as FocalClick (arXiv 2204.02574) does and as Segment Anything
(2304.02643) is trained; that the answer also gives a click and a box is ours (docs/adr/0016-refining.md).
"""

from __future__ import annotations

import cv2
import numpy as np

from model.geometry import Fit, depth, extent
from model.light.focus import filled
from model.light.ladder import LOGITS_PER_CELL
from model.light.network import LOW_RES, SIDE
from model.types import Click, Mask

_OFF_CENTRE = 0.6
"""Of the depth of what was found in its middle: a click less deep is helped by another, in the middle."""
_PIXELS = SIDE / LOW_RES  # of the square, along one side of a logit
_WIDER = 1.5  # sides of what is read again, over those of the box around what was found
_FEWEST = 8  # cells along a side of what is read again


def around(found: Mask) -> tuple[slice, slice]:
    """Return the rows and columns of the embedding's cells around what was found, to be read again.

    Args:
        found: mask of the logits that the image fills, rows, columns, not empty.
    """
    sides = []
    for held, count in zip(extent(found), found.shape, strict=True):
        first, end, cells = held.start / LOGITS_PER_CELL, held.stop / LOGITS_PER_CELL, -(-count // LOGITS_PER_CELL)
        half = max(_WIDER * (end - first), _FEWEST) / 2
        centre = (first + end) / 2
        sides.append(slice(max(0, int(centre - half)), min(cells, int(np.ceil(centre + half)))))
    return sides[0], sides[1]


def logit_at(click: Click, fit: Fit) -> tuple[int, int]:
    """Return row and column of the logit under a click; of one outside the image, of the nearest that it fills."""
    x, y = fit.to_square(np.array([click.x, click.y])) / _PIXELS
    rows, columns = filled(fit)
    return int(np.clip(y, 0, rows - 1)), int(np.clip(x, 0, columns - 1))


def middle(found: Mask, click: Click, fit: Fit) -> Click | None:
    """Return a click in the middle of what a positive click found, None where that click is near enough to it.

    Args:
        found: mask of the logits that the image fills, rows, columns.
        click: on the image.
        fit: how the image sits in the square.
    """
    row, column = logit_at(click, fit)
    _, pieces = cv2.connectedComponents(found.astype(np.uint8))
    clicked = pieces == pieces[row, column] if found[row, column] else found
    deep = depth(clicked)
    if deep[row, column] >= _OFF_CENTRE * deep.max():
        return None
    place = np.array(np.unravel_index(int(deep.argmax()), deep.shape))[::-1] + 0.5  # x and y, logits
    x, y = fit.from_square(place * _PIXELS).tolist()
    return Click(x=min(x, fit.width - 0.5), y=min(y, fit.height - 0.5), positive=True)
