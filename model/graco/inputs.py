"""What SimpleClick's network takes, and the sizes that tell one from another; the network itself is not loaded here.

Sources: RITM (arXiv 2102.06583) for disks of clicks, SimpleClick (arXiv 2210.11006), GraCo (arXiv 2405.00587).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW = 224
"""Side of an attention window in pixels."""
RADIUS = 5
"""Radius of a click's disk in pixels of the network's input."""

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes that tell one published network from another."""

    name: str  # vit_b, vit_l, vit_h, vit_xtiny, or vit_<width>x<depth>
    width: int
    depth: int
    heads: int
    patch: int  # pixels
    size: int  # side of the input in pixels that the position embedding was made for
    neck: tuple[int, int, int, int]  # channels at 1/4, 1/8, 1/16 and 1/32
    head: int  # channels in which the four are joined
    doublings: int = 0  # of the resolution inside the head: 0, or 1 or 2 where it was trained so

    @property
    def global_every(self) -> int:
        """Every how many blocks one looks at the whole image."""
        return 6 if self.depth == 12 else self.depth // 4


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The LoRA matrices of one branch for all blocks, scale included in `up`; zeros change nothing."""

    down: Tensor  # depth, 2 (Q, V), rank, width
    up: Tensor  # depth, 2, width, rank


def normalise(image: Tensor) -> Tensor:
    """Return RGB in [0, 1], ..., 3, H, W, as the network takes it: ImageNet's mean and deviation taken out."""
    mean, deviation = (torch.tensor(value, device=image.device).reshape(3, 1, 1) for value in (_MEAN, _STD))
    return (image - mean) / deviation


def click_disks(clicks: Sequence[tuple[float, float, bool]], height: int, width: int) -> Tensor:
    """Return the maps of positive and of negative clicks, 2, height, width: 1 within `RADIUS` of one, else 0.

    Args:
        clicks: row, column (pixels of the map, not rounded) and whether it is positive.
        height: of the map.
        width: of the map.
    """
    disks = torch.zeros(2, height, width)
    rows, columns = torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32)
    for row, column, positive in clicks:
        if max(row, column) < 0:  # as the published code, which marks a click that is none so
            continue
        near = (rows - row)[:, None].square() + (columns - column).square() <= RADIUS**2
        disks[0 if positive else 1][near] = 1.0
    return disks


def row_of(level: int) -> int:
    """Return the row of the granularity embedding that a level 1 .. 10 has.

    The published code truncates `clamp(10 g - 1, 0, 9)` in float32, which gives the same for g = level / 10.

    >>> [row_of(level) for level in (1, 3, 10)]
    [0, 2, 9]
    """
    return level - 1
