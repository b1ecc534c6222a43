"""Which image is worth an annotator's time next: one the network is unsure of, and unlike those already corrected.

Nobody has clicked in these images, so the network is asked at places of a grid: what it expects its masks to be worth,
how far neighbouring levels lie apart, and what a click a few pixels away changes. What an image resembles is told by
its embedding, pooled. Pure functions; chance comes in as a generator.

Sources: query by committee (Seung et al. 1992) with levels and moved clicks as the committee; k-centre greedy of Sener
and Savarese (arXiv 1708.00489); stability of a mask under its prompt as in Segment Anything (arXiv 2304.02643).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from model.geometry import Fit
from model.light.ladder import cells
from model.light.network import SIDE
from model.metrics import iou
from model.segmenter import Encoded, Memo, Segmenter, predict
from model.types import LEVELS, Click, Granularity, Prompt, Proposal

Features = npt.NDArray[np.float32]  # N, D; rows of unit length
K = TypeVar("K")  # names an image

_LOOK = 256  # pixels of the long side at which masks are compared: that of the decoder's logits
_MOVED = 2 / 256  # of the long side, how far a click is moved: 8 pixels of a photo of 1024
WEIGHTS = {"score": 0.5, "levels": 0.25, "moved": 0.25}
"""Of the terms of `Uncertainty`, in its value.

Rank correlation with 1 - IoU of the masks after one true click at their level, on photos that the adapter has not seen:
0.22 on 21 of car-parts and 0.24 on 20 of penn-fudan, by which the weights were chosen, and 0.20 on 28 others of
car-parts; score alone 0.28, 0.16 and 0.21, levels 0.13, 0.17 and 0.21, moved 0.21, 0.11 and 0.16. It is little: each
number is uncertain by 0.2. A click moved by 20 pixels instead of 8 tells nothing (0.06 and -0.05). Asking in the middle
of the objects found instead looked better where it was chosen (0.44) and was not on other photos (0.05).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """How unsure the network is of an image, each 0 (sure) .. 1, averaged over the places it was asked at."""

    score: float  # 1 - IoU that the network expects of its masks, over all levels
    levels: float  # 1 - IoU of the masks of neighbouring levels: where one click has several answers
    moved: float  # 1 - IoU of the masks of a click and of one beside it

    @property
    def value(self) -> float:
        """The three as one number, by `WEIGHTS`."""
        return sum(weight * float(getattr(self, term)) for term, weight in WEIGHTS.items())


def uncertainty(segmenter: Segmenter, encoded: Encoded, rng: np.random.Generator, *, clicks: int = 8) -> Uncertainty:
    """Return how unsure the network is of an image that nobody has clicked in: two decoder passes for each place.

    Args:
        segmenter: encoded the image; with an adapter all ten levels are asked for, without one they choose among three.
        encoded: the image.
        rng: decides where in its cell of the grid each click lies, and to which side it is moved.
        clicks: places at least, spread evenly over the image.

    Raises:
        ValueError: no click is allowed.
    """
    if clicks < 1:
        raise ValueError(f"{clicks} clicks tell nothing; allow at least one")
    small = _smaller(encoded)
    scores, levels, moved = [], [], []
    for x, y in _places(small, rng, clicks):
        angle, far = rng.uniform(0, 2 * np.pi), _MOVED * _LOOK
        here = _ladder(segmenter, small, x, y)
        beside = _ladder(segmenter, small, x + far * np.cos(angle), y + far * np.sin(angle))
        scores += [1 - one.score for one in here]
        levels += [1 - iou(a.mask, b.mask) for a, b in pairwise(here)]
        moved += [1 - iou(a.mask, b.mask) for a, b in zip(here, beside, strict=True)]
    return Uncertainty(score=fmean(scores), levels=fmean(levels), moved=fmean(moved))


def _smaller(encoded: Encoded) -> Encoded:
    """Return the image as if it were small: its embedding is the same, and comparing masks costs next to nothing."""
    scale = _LOOK / max(encoded.height, encoded.width)
    return Encoded(encoded.tensors, max(1, round(encoded.height * scale)), max(1, round(encoded.width * scale)))


def _places(image: Encoded, rng: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
    """Return points (x, y) of the image, one somewhere in the middle half of each cell of a grid about square."""
    rows = max(1, round((count * image.height / image.width) ** 0.5))
    columns = -(-count // rows)
    row, column = np.divmod(np.arange(rows * columns), columns)
    within = rng.uniform(0.25, 0.75, (rows * columns, 2))
    places: npt.NDArray[np.float64] = (np.stack([column, row], axis=1) + within) / (columns, rows)
    return places * (image.width, image.height)


def _ladder(segmenter: Segmenter, image: Encoded, x: float, y: float) -> list[Proposal]:
    """Return the answers of all levels to a click, finest first; one pass."""
    click = Click(x=float(np.clip(x, 0, image.width)), y=float(np.clip(y, 0, image.height)), positive=True)
    memo: Memo = {}
    prompts = (Prompt(clicks=(click,), granularity=Granularity(level)) for level in range(1, LEVELS + 1))
    return [predict(segmenter, image, prompt, memo=memo, refined=False).best for prompt in prompts]


def feature(encoded: Encoded) -> npt.NDArray[np.float32]:
    """Return what an image looks like as a vector of unit length: mean and maximum of its embedding, alike in weight.

    Cells that hold nothing of the photo do not count.
    """
    rows, columns = cells(*Fit(encoded.height, encoded.width, SIDE).resized)
    seen = encoded.tensors["embedding"][0, :, :rows, :columns].float().flatten(1)  # C, cells
    pooled = np.concatenate([_unit(seen.mean(1).numpy()), _unit(seen.amax(1).numpy())])
    return _unit(pooled).astype(np.float32)


def _unit(vector: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector


def k_centre(unlabelled: Features, labelled: Features) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return in which order to take images so that soon none is far from all taken, and how far each then was.

    Greedy: next is the image farthest from all that are labelled or taken; of several the first. With nothing labelled
    the first is the one nearest to the mean of all, and counts as far as the image farthest from it.

    Args:
        unlabelled: features of the images to order, N, D.
        labelled: features of those already corrected, M, D; M may be 0.

    Returns:
        The order (N indices) and, in that order, the distances: never growing.
    """
    points = np.asarray(unlabelled, np.float64)
    order, distances = np.empty(len(points), np.int64), np.empty(len(points))
    nearest = np.full(len(points), np.inf)
    for centre in np.asarray(labelled, np.float64):
        np.minimum(nearest, _squared(points, centre), out=nearest)
    for place in range(len(points)):
        if np.isinf(nearest).all():
            chosen = int(_squared(points, points.mean(0)).argmin())
            distances[place] = _squared(points, points[chosen]).max() ** 0.5
        else:
            chosen = int(nearest.argmax())
            distances[place] = nearest[chosen] ** 0.5
        order[place] = chosen
        np.minimum(nearest, _squared(points, points[chosen]), out=nearest)
        nearest[chosen] = -1  # taken
    return order, distances


def _squared(points: npt.NDArray[np.float64], centre: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    apart = points - centre
    return np.asarray(np.einsum("nd,nd->n", apart, apart))


def priorities(
    uncertain: Mapping[K, float],
    features: Mapping[K, npt.NDArray[np.float32]],
    labelled: Features,
    *,
    novelty: float = 0.5,
) -> dict[K, float]:
    """Return a score for each image, 0 the most useful .. below 1, all different and evenly spread.

    Label Studio's uncertainty sampling serves the lowest score first. An image's usefulness is the mean of two ranks:
    how uncertain it is among the others, and how early `k_centre` takes it. Ranks, since neither number has a unit.

    Args:
        uncertain: of each unlabelled image, `Uncertainty.value`.
        features: of each of them, `feature`.
        labelled: features of the images already corrected, M, D.
        novelty: weight of the second rank, 0..1; that of the first is the rest.

    Returns:
        Scores by image, most useful first.
    """
    keys = list(uncertain)
    if not keys:
        return {}
    order, _ = k_centre(np.stack([features[key] for key in keys]), labelled)
    values = np.array([uncertain[key] for key in keys])
    late, sure = np.empty(len(keys)), np.empty(len(keys))
    late[order] = np.arange(len(keys))
    sure[np.argsort(-values, kind="stable")] = np.arange(len(keys))
    by_use = np.lexsort((late, novelty * late + (1 - novelty) * sure))
    return {keys[index]: place / len(keys) for place, index in enumerate(by_use)}
