"""Masks of a whole image, found by asking at the points of a grid.

Source: automatic mask generation of Segment Anything (arXiv 2304.02643): a grid of single clicks, the expected IoU and
the stability of a mask under another threshold as its quality, duplicates dropped by IoU.
"""

from __future__ import annotations

from collections.abc import Callable

from model.metrics import iou
from model.segmenter import Encoded, Segmenter, predict
from model.types import Click, Prompt, Proposal


def whole_image(
    segmenter: Segmenter,
    encoded: Encoded,
    *,
    grid: int = 6,
    least_score: float = 0.8,
    most_iou: float = 0.7,
    at_most: int = 12,
    until: Callable[[], bool] = lambda: False,
) -> tuple[Proposal, ...]:
    """Return proposals for the things in an image, best first.

    Args:
        segmenter: the family that encoded the image.
        encoded: the image.
        grid: clicks along each side; grid x grid decoder passes.
        least_score: expected IoU below which a mask is not offered.
        most_iou: two masks that agree more than this are one.
        at_most: proposals returned.
        until: asked before each click; once true, what was found so far is returned.
    """
    found: list[Proposal] = []
    for row in range(grid):
        for column in range(grid):
            if until():
                break
            x, y = (column + 0.5) / grid * encoded.width, (row + 0.5) / grid * encoded.height
            if any(p.mask[int(y), int(x)] for p in found):
                continue  # this spot is taken
            best = predict(segmenter, encoded, Prompt(clicks=(Click(x=x, y=y, positive=True),))).best
            if best.score >= least_score and best.mask.any():
                found.append(best)
    kept: list[Proposal] = []
    for proposal in sorted(found, key=lambda p: -p.score):
        if len(kept) < at_most and all(iou(proposal.mask, other.mask) <= most_iou for other in kept):
            kept.append(proposal)
    return tuple(kept)
