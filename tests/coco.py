"""Masks of COCO-style annotation files, as ../shared/data has them."""

from __future__ import annotations

import numpy as np

from model.types import Mask


def decode_coco(counts: str, *, height: int, width: int) -> Mask:
    """Return the mask of COCO's compressed run lengths (column by column, not Label Studio's).

    Each run is written in base 32, lowest digits first, one character a digit: 48 + digit, 32 more when others follow;
    the fifth bit of the last is the sign. From the fourth run on it is the difference to the run two before.

    >>> decode_coco("132", height=2, width=3)
    array([[False,  True, False],
           [ True,  True, False]])
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        digit = ord(character) - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    on = np.arange(len(runs)) % 2 == 1
    mask: Mask = np.repeat(on, runs).reshape(width, height).T
    return mask
