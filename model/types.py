"""The words every room shares: clicks, boxes, granularity, prompts, proposals.

Values only: nothing here loads weights, opens files or talks to a server.
Coordinates are pixels of the source image, x right and y down, origin at its top-left corner,
so that pixel (row, column) covers [column, column + 1) x [row, row + 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt

RGBImage = npt.NDArray[np.uint8]  # H, W, 3
Mask = npt.NDArray[np.bool_]  # H, W

MAX_CLICKS = 100
"""Clicks one prompt may hold; more is a script, not a person, and each costs a decoder pass."""

MAX_PROPOSALS = 12
"""Masks one click may be answered by, where all levels are asked for."""

MAX_PHRASE = 500
"""Characters a phrase may hold; more is a text, not the name of a thing."""

LEVELS = 10
"""Granularity levels: 0.1, 0.2 ... 1.0 of the whole."""


class Refusal(ValueError):
    """We understood the request and decline; the message is for the person who made it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Click:
    """One point an annotator placed: keep this region, or leave it out."""

    x: float  # pixels, to the right
    y: float  # pixels, downwards
    positive: bool

    def __post_init__(self) -> None:
        if not (isfinite(self.x) and isfinite(self.y)):
            raise Refusal(f"click ({self.x}, {self.y}) is not a point: x and y must be finite numbers of pixels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """An axis-parallel rectangle around what the mask shall hold."""

    left: float  # pixels
    top: float
    right: float
    bottom: float

    def __post_init__(self) -> None:
        corners = (self.left, self.top, self.right, self.bottom)
        if not all(isfinite(c) for c in corners):
            raise Refusal(f"box {corners} is not a rectangle: its corners must be finite numbers of pixels")
        if self.right <= self.left or self.bottom <= self.top:
            raise Refusal(f"box {corners} is empty: draw it wider and higher than nothing")


@dataclass(frozen=True, slots=True)
class Granularity:
    """How much of the scene a click claims: one of ten levels, for each of which GraCo learns an embedding.

    Or the share of the whole's area that the mask shall have, which may lie between two of them.
    """

    level: int  # 1 a small part ... 10 the whole object; of a share, the nearest (of two as near, the even one)
    share: float | None = None  # 0..1; None: it is the level itself

    def __post_init__(self) -> None:
        if not 1 <= self.level <= LEVELS:
            raise Refusal(
                f"granularity level {self.level} is outside 1..10 (1 finest part, 10 whole object); "
                "for a value such as 0.3 use Granularity.from_value(0.3)"
            )
        if self.share is not None and not (0 < self.share < 1 and _nearest(self.share) == self.level):
            raise Refusal(
                f"share {self.share} is not near level {self.level} of 1..10; use Granularity.from_share({self.share})"
            )

    @classmethod
    def from_value(cls, value: float) -> Granularity:
        """Return the level of a value in [0, 1]: the nearest tenth, 0 counting as the finest level.

        Raises:
            Refusal: `value` is not a number in [0, 1].

        >>> Granularity.from_value(0.29).level, Granularity.from_value(0.0).level
        (3, 1)
        """
        if not (isfinite(value) and 0 <= value <= 1):
            raise Refusal(f"granularity {value} is outside 0..1 (0 finest part, 1 whole object)")
        return cls(_nearest(value))

    @classmethod
    def from_share(cls, value: float) -> Granularity:
        """Return a share in [0, 1] of the whole; 0 is the finest level, 1 the whole.

        Raises:
            Refusal: `value` is not a number in [0, 1].

        >>> Granularity.from_share(0.13)
        Granularity(level=1, share=0.13)
        """
        nearest = cls.from_value(value)
        return nearest if value in (0, 1) else cls(nearest.level, value)

    @property
    def value(self) -> float:
        """As the slider shows it, 0..1."""
        return self.level / LEVELS if self.share is None else self.share


def _nearest(value: float) -> int:
    return max(1, round(value * LEVELS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """All an annotator gave for one object: clicks in order, a box, a granularity, a phrase.

    An empty prompt (no click, no box) is allowed as a value; a segmenter refuses it.
    """

    clicks: tuple[Click, ...] = ()
    box: Box | None = None
    granularity: Granularity | None = None
    phrase: str | None = None

    def __post_init__(self) -> None:
        if len(self.clicks) > MAX_CLICKS:
            raise Refusal(
                f"{len(self.clicks)} clicks on one object; at most {MAX_CLICKS} are answered: "
                "accept or reject the mask and begin a new region"
            )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Proposal:
    """One mask offered for a prompt."""

    mask: Mask  # H, W of the source image; not to be written into
    score: float  # what the network expects its IoU to be, 0..1
    granularity: Granularity | None = None  # what was asked for, or where this proposal stands


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Prediction:
    """Our answer to a prompt: one proposal; or several, all levels small to large, or without an adapter best first."""

    proposals: tuple[Proposal, ...]
    adapter: str | None = None  # id of the adapter that answered; None: base weights

    @property
    def best(self) -> Proposal:
        """The proposal to show when only one is wanted: the one with the highest score."""
        return max(self.proposals, key=lambda proposal: proposal.score)
