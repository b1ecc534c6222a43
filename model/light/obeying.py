"""What a click says holds where it lies: a positive one is in the mask, a negative one is not.

The decoder weighs clicks and sometimes decides against one: from the fourth on, against every sixth. What it answers
is bent around the clicks that it went against, just far enough, and stays as it is elsewhere. A positive click only
adds to the mask, a negative one only takes from it. Nothing the network reads is changed.

Source: ours (docs/adr/0019-clicks-hold.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.geometry import FloatMap
from model.light.focus import Look
from model.light.network import LOW_RES, SIDE
from model.types import Click

_REACH = 6.0  # logits along one side: standard deviation of what bends them around a click, at most
_LEAST_REACH = 1.0
_NEAREST = 3.0  # reaches that the nearest opposite click is away at least, so that one does not undo the other
_HELD = 0.1  # a logit under a click this far on its side holds in the image's own pixels, too
_SURE = 0.5  # what a bent one gets
_ROUNDS = 4  # each click is looked at so often, as one that is bent may bend its neighbour


def obeyed(logits: FloatMap, clicks: Sequence[Click], look: Look) -> FloatMap:
    """Return logits that have the sign that each click says at its pixel.

    Opposite clicks within three logits of each other, or in one pixel, are met as nearly as it goes; clicks outside
    the look are passed over.

    Args:
        logits: of a mask, 256, 256, in the square of `look`; returned as they are where no click is against them.
        clicks: on the image.
        look: what was seen of the image.
    """
    seen = [click for click in clicks if look.focus.covers(click.x, click.y)]
    if not seen:
        return logits
    pixels = np.array([(click.x, click.y) for click in seen]) // 1 + 0.5  # their middles, on the image
    corner = look.focus.left, look.focus.top
    places = look.fit.to_square(pixels - corner) * (LOW_RES / SIDE) - 0.5  # x and y, logits
    places = places.clip(0, LOW_RES - 1)
    signs = np.array([1.0 if click.positive else -1.0 for click in seen])
    reaches = _reaches(places, signs)
    bent = logits
    for _ in range(_ROUNDS):
        before = bent
        for place, sign, reach in zip(places, signs, reaches, strict=True):
            there = _at(bent, place)
            if there * sign < _HELD:
                across, down = (np.exp(-((np.arange(LOW_RES) - middle) ** 2) / (2 * reach**2)) for middle in place)
                bump = down[:, None] * across
                bent = bent + bump * ((_SURE * sign - there) / _at(bump, place))
        if bent is before:
            break
    return np.asarray(bent, np.float32)


def _reaches(places: FloatMap, signs: FloatMap) -> FloatMap:
    """Return how far each click bends, in logits; `places` are N, 2, `signs` 1 or -1."""
    apart = np.sqrt(((places[:, None] - places[None]) ** 2).sum(axis=-1))
    nearest = np.where(signs[:, None] != signs[None], apart, np.inf).min(axis=1)
    return np.asarray((nearest / _NEAREST).clip(_LEAST_REACH, _REACH), np.float32)


def _at(logits: FloatMap, place: FloatMap) -> float:
    """Return the logit at a place, x and y, between the four around it."""
    x, y = np.minimum(place.astype(int), LOW_RES - 2)
    right, down = place - (x, y)
    above, below = logits[y : y + 2, x : x + 2] @ np.array([1 - right, right])
    return float(above * (1 - down) + below * down)
