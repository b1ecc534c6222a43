"""Masks that nobody drew: of a whole image, and of the parts of an object at any granularity.

Sources: automatic mask generation of Segment Anything (arXiv 2304.02643), a grid of single clicks, the expected IoU as
a mask's quality, duplicates dropped by IoU; and the any-granularity generator of GraCo (Zhao et al., CVPR 2024), which
clicks an object and then takes pieces away with negative clicks, each step a finer mask. All of it asks `predict` only,
so any family serves; chance comes in as a generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np

from model.geometry import extent
from model.granularity import estimate
from model.metrics import iou
from model.robot import next_click
from model.segmenter import Encoded, Memo, MemoKey, Segmenter, predict
from model.types import Click, Mask, Prompt, Proposal, Refusal

Source = Literal["agg", "decoder", "grid"]
SOURCES: tuple[Source, ...] = get_args(Source)
_AS_GOOD = 0.05  # expected IoU: masks of one click that differ less are equally good


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorOptions:
    """How parts of an object are looked for, and which are kept."""

    sources: tuple[Source, ...] = ("agg", "decoder")  # negative clicks, the decoder's several masks, both on a grid
    points: int = 2  # positive clicks in each object: the first at its centre, the others anywhere in it
    walks: int = 1  # of these, how many are followed by negative clicks
    least_negatives: int = 3  # negative clicks of a walk; how many is drawn anew for each
    most_negatives: int = 6
    distance: float = 0.15  # least distance between two clicks, fraction of the square root of the mask's area
    grid: int = 4  # `grid` clicks this many points along each side of the object's box, instead of `points`
    least_of_object: float = 0.02  # area; finer masks are specks
    least_of_image: float = 0.0005  # area
    least_inside: float = 0.6  # of a mask's area that lies in the object; the rest is cut away
    least_score: float = 0.6  # IoU that the network expects of a mask
    most_iou: float = 0.85  # two masks that agree more than this are one
    most_iou_with_object: float = 0.9  # a mask that agrees more than this with the object is the object
    per_object: int = 6  # masks kept, spread over all sizes

    def __post_init__(self) -> None:
        unknown = [source for source in self.sources if source not in SOURCES]
        if unknown or not self.sources:
            raise Refusal(f"sources {', '.join(unknown) or 'none'} are unknown; choose from {', '.join(SOURCES)}")
        if min(self.points, self.grid, self.per_object) < 1 or not 0 <= self.walks <= self.points:
            raise Refusal("points, grid and masks of an object must be 1 or more, and walks at most as many as points")
        if not 1 <= self.least_negatives <= self.most_negatives:
            raise Refusal("a walk needs 1 or more negative clicks, and its least must not be above its most")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GradedMask:
    """A mask found in an object, and how fine it is."""

    mask: Mask  # H, W of the source image, within its object
    score: float  # what the network expects its IoU to be, 0..1
    granularity: float  # 0..1, by model.granularity
    origin: str  # proposal-agg, proposal-decoder or proposal-grid


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    mask: Mask
    score: float
    source: Source


def generate(
    segmenter: Segmenter,
    encoded: Encoded,
    whole: Mask,
    rng: np.random.Generator,
    options: GeneratorOptions | None = None,
    *,
    known: Sequence[Mask] = (),
) -> tuple[GradedMask, ...]:
    """Return masks of the parts of an object at any granularity, small to large.

    Each lies within the object, is one piece without holes (a complement may have some) and differs from the others.

    Args:
        segmenter: the family that encoded the image.
        encoded: the image.
        whole: the object, bool H, W.
        rng: decides where is clicked and how often.
        options: how to look and what to keep; None: the defaults.
        known: masks that need no finding, such as the object's annotated parts.

    Raises:
        Refusal: the object is empty.
    """
    options = options or GeneratorOptions()
    if whole.shape != (encoded.height, encoded.width):
        raise ValueError(f"an object of shape {whole.shape} in an image of {(encoded.height, encoded.width)}")
    if not whole.any():
        raise Refusal("the object holds no pixel, so it has no parts; leave empty masks out")
    memo: dict[MemoKey, object] = {}
    clicks = _clicks_in(whole, rng, options.points)
    found: list[_Candidate] = []
    if "decoder" in options.sources:
        found += _several(segmenter, encoded, whole, clicks, "decoder", options, memo)
    if "grid" in options.sources:
        found += _several(segmenter, encoded, whole, _grid_in(whole, options.grid), "grid", options, memo)
    if "agg" in options.sources:
        for click in clicks[: options.walks]:
            found += _walk(segmenter, encoded, whole, click, rng, options, memo)
    return tuple(
        GradedMask(
            mask=one.mask,
            score=one.score,
            granularity=estimate(segmenter, encoded, one.mask, whole),
            origin=f"proposal-{one.source}",
        )
        for one in _choose(found, whole, options, known)
    )


def _clicks_in(whole: Mask, rng: np.random.Generator, count: int) -> list[Click]:
    """Return positive clicks: the object's centre, then any of its pixels."""
    centre = next_click(whole, np.zeros_like(whole))
    assert centre is not None, "an object with a pixel has a deepest one"
    rows, columns = np.nonzero(whole)
    picked = rng.integers(rows.size, size=count - 1)
    return [centre, *(_click(rows[i], columns[i], positive=True) for i in picked)]


def _grid_in(whole: Mask, grid: int) -> list[Click]:
    places = (np.arange(grid) + 0.5) / grid
    down, across = ((held.start + places * (held.stop - held.start)).astype(int) for held in extent(whole))
    return [_click(row, column, positive=True) for row in down for column in across if whole[row, column]]


def _click(row: int, column: int, *, positive: bool) -> Click:
    return Click(x=float(column) + 0.5, y=float(row) + 0.5, positive=positive)


def _several(
    segmenter: Segmenter,
    encoded: Encoded,
    whole: Mask,
    clicks: Sequence[Click],
    source: Source,
    options: GeneratorOptions,
    memo: Memo,
) -> Iterator[_Candidate]:
    """Yield the decoder's several masks at each click, cut to the object."""
    for click in clicks:
        for proposal in predict(segmenter, encoded, Prompt(clicks=(click,)), memo=memo, proposals=3).proposals:
            yield from _piece(proposal, whole, click, source, options)


def _walk(
    segmenter: Segmenter,
    encoded: Encoded,
    whole: Mask,
    first: Click,
    rng: np.random.Generator,
    options: GeneratorOptions,
    memo: Memo,
) -> Iterator[_Candidate]:
    """Yield the mask at a positive click and after each negative click inside it, and what they leave of the object."""
    clicks: tuple[Click, ...] = (first,)
    for _ in range(1 + int(rng.integers(options.least_negatives, options.most_negatives + 1))):
        best = predict(segmenter, encoded, Prompt(clicks=clicks), memo=memo).best
        pieces = list(_piece(best, whole, first, "agg", options))
        yield from pieces
        current = pieces[0].mask if pieces else best.mask & whole
        if pieces:
            rest = cv2.morphologyEx((whole & ~current).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
            yield _Candidate(_largest(rest.astype(np.bool_)), best.score, "agg")  # without the rim two borders leave
        free = current.copy()
        radius = options.distance * float(np.count_nonzero(current)) ** 0.5
        y, x = np.ogrid[: whole.shape[0], : whole.shape[1]]
        for click in clicks:
            free &= (x + 0.5 - click.x) ** 2 + (y + 0.5 - click.y) ** 2 > radius**2
        rows, columns = np.nonzero(free)
        if rows.size == 0:
            return
        picked = int(rng.integers(rows.size))
        clicks = (*clicks, _click(rows[picked], columns[picked], positive=False))


def _piece(
    proposal: Proposal, whole: Mask, click: Click, source: Source, options: GeneratorOptions
) -> Iterator[_Candidate]:
    """Yield the piece of a mask that holds the click, cut to the object and filled; nothing for a mask of another."""
    inside = proposal.mask & whole
    share = np.count_nonzero(inside) / max(1, np.count_nonzero(proposal.mask))
    if share < options.least_inside or not inside[int(click.y), int(click.x)]:
        return
    _, labels = cv2.connectedComponents(inside.astype(np.uint8), connectivity=4)
    piece = _filled(labels == labels[int(click.y), int(click.x)]) & whole
    yield _Candidate(piece, proposal.score, source)


def _filled(mask: Mask) -> Mask:
    """Return the mask with its holes: pixels that cannot reach the image's edge around it."""
    _, labels = cv2.connectedComponents(np.pad(~mask, 1, constant_values=True).astype(np.uint8), connectivity=4)
    filled: Mask = labels[1:-1, 1:-1] != labels[0, 0]
    return filled


def _largest(mask: Mask) -> Mask:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    areas = stats[1:, cv2.CC_STAT_AREA]
    largest: Mask = labels == 1 + int(areas.argmax()) if areas.size else np.zeros_like(mask)
    return largest


def _choose(
    found: Sequence[_Candidate], whole: Mask, options: GeneratorOptions, known: Sequence[Mask]
) -> list[_Candidate]:
    """Return the candidates to keep, small to large: sound, of some size, all different, spread over all sizes."""
    least = max(options.least_of_object * np.count_nonzero(whole), options.least_of_image * whole.size)
    kept: list[_Candidate] = []
    for one in sorted(found, key=lambda c: -c.score):
        if (
            one.score >= options.least_score
            and np.count_nonzero(one.mask) >= least
            and iou(one.mask, whole) <= options.most_iou_with_object
            and all(iou(one.mask, other) <= options.most_iou for other in (*known, *(k.mask for k in kept)))
        ):
            kept.append(one)
    kept.sort(key=lambda c: int(np.count_nonzero(c.mask)))
    if len(kept) > options.per_object:
        kept = [kept[int(i)] for i in np.linspace(0, len(kept) - 1, options.per_object).round()]
    return kept


def free_chains(
    segmenter: Segmenter,
    encoded: Encoded,
    rng: np.random.Generator,
    points: int,
    wholes: Sequence[Mask],
    *,
    least_score: float = 0.75,
    least_of_image: float = 0.0008,
    most_of_image: float = 0.9,
    most_of_whole: float = 0.85,
) -> list[list[Mask]]:
    """Return what the decoder offers at random points, each a chain of masks within one another, small to large.

    The largest of a chain stands for a whole. Chains whose whole is mostly a known one, or one found before, are left
    out.

    Args:
        segmenter: the family that encoded the image.
        encoded: the image.
        rng: decides where is clicked.
        points: clicks, anywhere in the image.
        wholes: masks of whole objects that are known.
        least_score: expected IoU below which a mask is not taken.
        least_of_image: area below which a mask is a speck, fraction of the image.
        most_of_image: area above which a whole is the background.
        most_of_whole: a part that fills more of its whole, or agrees more with another part, is no part of its own.
    """
    chains: list[list[Mask]] = []
    for x, y in rng.random((points, 2)) * (encoded.width, encoded.height):
        prompt = Prompt(clicks=(Click(x=float(x), y=float(y), positive=True),))
        offered = [
            proposal.mask
            for proposal in predict(segmenter, encoded, prompt, proposals=3).proposals
            if proposal.score >= least_score
            and proposal.mask[int(y), int(x)]
            and np.count_nonzero(proposal.mask) >= least_of_image * proposal.mask.size
        ]
        if not offered:
            continue
        *parts, whole = sorted(offered, key=np.count_nonzero)
        area = np.count_nonzero(whole)
        if area > most_of_image * whole.size or any(
            np.count_nonzero(whole & known) > 0.5 * area or iou(whole, known) > most_of_whole for known in wholes
        ):
            continue
        if any(iou(whole, chain[-1]) > most_of_whole for chain in chains):
            continue
        chain: list[Mask] = []
        for part in parts:
            inside = part & whole
            if (
                np.count_nonzero(inside) >= 0.9 * np.count_nonzero(part)
                and np.count_nonzero(inside) <= most_of_whole * area
                and all(iou(inside, other) <= most_of_whole for other in chain)
            ):
                chain.append(inside)
        chains.append([*chain, whole])
    return chains


def whole_image(
    segmenter: Segmenter,
    encoded: Encoded,
    *,
    grid: int = 6,
    least_score: float = 0.8,
    most_iou: float = 0.7,
    at_most: int = 12,
    largest: bool = False,
    least_of_image: float = 0.0,
    most_of_image: float = 1.0,
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
        largest: take at each point the largest of the decoder's masks that score about as well as its best, which is
            rather an object than a part of one; else the best alone.
        least_of_image: area below which a mask is not offered, fraction of the image.
        most_of_image: area above which it is the background.
        until: asked before each click; once true, what was found so far is returned.
    """
    found: list[Proposal] = []
    for row in range(grid):
        for column in range(grid):
            if until():
                break
            x, y = (column + 0.5) / grid * encoded.width, (row + 0.5) / grid * encoded.height
            if not largest and any(p.mask[int(y), int(x)] for p in found):
                continue  # this spot is taken
            prompt = Prompt(clicks=(Click(x=x, y=y, positive=True),))
            offered = [
                proposal
                for proposal in predict(segmenter, encoded, prompt, proposals=3 if largest else 1).proposals
                if proposal.score >= least_score
                and proposal.mask.any()
                and least_of_image <= np.count_nonzero(proposal.mask) / proposal.mask.size <= most_of_image
            ]
            if offered:
                sure = max(p.score for p in offered) - _AS_GOOD
                found.append(max((p for p in offered if p.score >= sure), key=lambda p: int(np.count_nonzero(p.mask))))
    kept: list[Proposal] = []
    for proposal in sorted(found, key=lambda p: -p.score):
        if len(kept) < at_most and all(iou(proposal.mask, other.mask) <= most_iou for other in kept):
            kept.append(proposal)
    return tuple(kept)
