"""Annotated photos as training samples: masks at the decoder's resolution, and clicks to teach by.

A photo's masks are kept as bits at the resolution of the logits, 4 x 4 per cell of the embedding and only for the cells
that hold the photo. A sample is a click in one of its masks and, for each level that something is known of, the mask
that a click there shall give at that level: the clicked mask and, at the same spot, the larger and smaller ones of the
same whole. Photos may be seen in further views (mirrored, cropped), each with an embedding of its own.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.annotations import AnnotatedImage, AnnotatedMask, AnnotationSet
from model.embeddings import EmbeddingFolder
from model.geometry import Fit
from model.light.ladder import LOGITS_PER_CELL, cells, standing
from model.light.network import SIDE
from model.segmenter import Encoded, Segmenter
from model.types import LEVELS, Mask, Refusal, RGBImage

_LEAST_PIXELS = 6  # of a mask at the logits' resolution; smaller ones teach nothing
_SPARED = 2**30  # bytes of a disk that views leave free: four hundred take as much
_LEAST_VISIBLE = 0.4  # share of a mask that a cropped view must still hold


@dataclass(frozen=True, slots=True)
class View:
    """How a photo is looked at: a crop, in shares of its sides, then perhaps mirrored."""

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0
    mirrored: bool = False

    @classmethod
    def random(cls, rng: np.random.Generator, smallest: float) -> View:
        """Return a mirrored or plain crop with sides of `smallest` .. 1 of the photo's."""
        height, width = rng.uniform(smallest, 1, 2)
        top, left = rng.uniform(0, 1 - height), rng.uniform(0, 1 - width)
        return cls(float(left), float(top), float(left + width), float(top + height), bool(rng.random() < 0.5))

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return left, top, right, bottom in pixels of a photo of this size; at least one pixel."""
        left, top = int(self.left * width), int(self.top * height)
        return left, top, max(left + 1, round(self.right * width)), max(top + 1, round(self.bottom * height))

    def of(self, pixels: RGBImage | Mask) -> npt.NDArray[np.generic]:
        """Return the photo or mask as this view shows it."""
        left, top, right, bottom = self.box(*pixels.shape[:2])
        seen = pixels[top:bottom, left:right]
        return np.ascontiguousarray(seen[:, ::-1] if self.mirrored else seen)


PLAIN = View()


def views_of(digest: str, further: int, *, smallest: float, seed: int) -> list[View]:
    """Return the views of a photo: the plain one, then random ones, the same for each call.

    Args:
        digest: of the photo, hex.
        further: views besides the plain one.
        smallest: side of a crop at least, as a share of the photo's.
        seed: for other views.
    """
    rng = np.random.default_rng([seed, *bytes.fromhex(digest[:16])])
    return [PLAIN, *(View.random(rng, smallest) for _ in range(further))]


@dataclass(frozen=True, slots=True, eq=False)
class TrainingPhoto:
    """A view of a photo and its masks, all arrays over masks in the same order."""

    embedding: str  # id of its embedding
    image: AnnotatedImage
    view: View
    height: int  # of the view, pixels
    width: int
    rows: int  # of the logits
    columns: int
    bits: npt.NDArray[np.uint8]  # N, ceil(rows * columns / 8)
    shares: npt.NDArray[np.float32]  # N, area over that of the whole, 0..1
    wholes: npt.NDArray[np.int64]  # N, index of the whole; masks of one whole belong together
    human: npt.NDArray[np.bool_]  # N, drawn by people
    names: tuple[str, ...]
    kinds: tuple[str, ...]  # object, part, subpart
    drawn: tuple[AnnotatedMask, ...]  # N, as the set has them

    def mask(self, index: int) -> Mask:
        """Return one mask at the view's own size, bool H, W."""
        return self.view.of(self.drawn[index].mask()).astype(bool)

    def masks(self) -> npt.NDArray[np.bool_]:
        """Return all masks, N, rows, columns."""
        flat = np.unpackbits(self.bits, axis=1, count=self.rows * self.columns)
        return flat.reshape(-1, self.rows, self.columns).view(np.bool_)

    def pixels(self) -> RGBImage:
        """Return what the encoder sees, uint8 H, W, 3."""
        return self.view.of(self.image.pixels()).astype(np.uint8)


def embedding_id(digest: str, view: View) -> str:
    """Return the id of a view's embedding: the photo's digest, or one of digest and view."""
    return digest if view == PLAIN else hashlib.sha256(f"{digest} {view}".encode()).hexdigest()


def photos_of(
    found: AnnotationSet,
    views: Callable[[str], Sequence[View]] = lambda _: (PLAIN,),
    *,
    stated: bool = False,
) -> list[TrainingPhoto]:
    """Return the photos of a set that have masks.

    Args:
        found: the set.
        views: names the views of a photo by its digest.
        stated: take a mask's granularity where the set states it, as annotators do; else its area over its whole's.
    """
    made = []
    for image in found.images:
        if image.masks:
            digest = image.digest()
            seen = [_prepare(image, digest, view, stated=stated) for view in views(digest)]
            made += [photo for photo in seen if photo is not None]
    return made


def _prepare(image: AnnotatedImage, digest: str, view: View, *, stated: bool) -> TrainingPhoto | None:
    left, top, right, bottom = view.box(image.height, image.width)
    fit = Fit(bottom - top, right - left, SIDE)
    rows, columns = (LOGITS_PER_CELL * count for count in cells(*fit.resized))
    kept, bits, areas = [], [], {}
    for mask in image.masks:
        full = mask.mask()
        seen = view.of(full)
        area = np.count_nonzero(seen)
        if area < _LEAST_VISIBLE * mask.area:
            continue
        small = _shrink(seen.view(np.uint8), fit, rows, columns)
        if np.count_nonzero(small) < _LEAST_PIXELS:
            continue
        kept.append(mask)
        bits.append(np.packbits(small.reshape(-1)))
        areas[mask.id] = area
    if not kept:
        return None
    index = {mask.id: i for i, mask in enumerate(kept)}
    wholes = [image.whole(mask) for mask in kept]
    seen_of = zip(kept, wholes, strict=True)  # in a crop a part is measured by what the crop shows of its whole
    shares = [min(1.0, areas[m.id] / areas[w.id]) if w.id in areas else m.area / w.area for m, w in seen_of]
    if stated:
        shares = [s if m.granularity is None else m.granularity for m, s in zip(kept, shares, strict=True)]
    return TrainingPhoto(
        embedding=embedding_id(digest, view),
        image=image,
        view=view,
        height=fit.height,
        width=fit.width,
        rows=rows,
        columns=columns,
        bits=np.stack(bits),
        shares=np.array(shares, np.float32),
        wholes=np.array([index.get(w.id, -1 - w.id) for w in wholes], np.int64),
        human=np.array([not m.origin.startswith("proposal") for m in kept]),
        names=tuple(m.name for m in kept),
        kinds=tuple(m.level for m in kept),
        drawn=tuple(kept),
    )


def _shrink(mask: npt.NDArray[np.uint8], fit: Fit, rows: int, columns: int) -> npt.NDArray[np.bool_]:
    """Return a mask of the photo at the resolution of the logits: pixels of which more than half are covered."""
    height, width = fit.resized
    square = np.zeros((rows * 4, columns * 4), np.float32)
    square[:height, :width] = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(cv2.resize(square, (columns, rows), interpolation=cv2.INTER_AREA) > 0.5)


class EmbeddingFiles:
    """Encoded views of photos, each kept in a file of its own."""

    def __init__(self, folder: Path, segmenter: Segmenter, *, views: Path | None = None) -> None:
        """Keep files in `folder`, as `segmenter` encodes.

        Args:
            folder: gets the files.
            segmenter: encodes.
            views: gets those of views other than the plain one, while its disk has a gigabyte to spare, else they are
                encoded each time; None: `folder` does.
        """
        self._files = EmbeddingFolder(folder)
        self._views = views
        self._segmenter = segmenter

    def _folder(self, photo: TrainingPhoto) -> EmbeddingFolder:
        if self._views is None or photo.view == PLAIN:
            return self._files
        path = EmbeddingFolder(self._views).path(self._segmenter, photo.embedding)
        known = path is not None and path.is_file()
        full = not known and shutil.disk_usage(self._views.parent).free < _SPARED
        return EmbeddingFolder(None if full else self._views)

    def missing(self, photos: Iterable[TrainingPhoto]) -> list[TrainingPhoto]:
        """Return one photo for each view that is not encoded yet."""
        named = {photo.embedding: photo for photo in photos}
        paths = {name: self._folder(photo).path(self._segmenter, name) for name, photo in named.items()}
        return [named[name] for name, path in paths.items() if path is None or not path.is_file()]

    def encoded(self, photo: TrainingPhoto) -> Encoded:
        """Return a view as the encoder left it, encoding it where that was not done yet.

        Raises:
            Refusal: its photo cannot be read.
        """
        return self._folder(photo).encoded(
            self._segmenter, photo.embedding, photo.pixels, height=photo.height, width=photo.width
        )


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """Clicks on one view, and what they shall give.

    Pairs (click, level, mask, weight) are four arrays of one length; the first pairs of each click are those of the
    mask it was placed for.
    """

    photo: TrainingPhoto
    masks: npt.NDArray[np.bool_]  # N, rows, columns: all masks of the photo
    primaries: npt.NDArray[np.int64]  # B, the mask each click was placed for
    clicks: npt.NDArray[np.float32]  # B, 2, x and y in pixels of the logits
    pair_click: npt.NDArray[np.int64]  # P
    pair_level: npt.NDArray[np.int64]  # P, 0 .. 9
    pair_mask: npt.NDArray[np.int64]  # P
    pair_weight: npt.NDArray[np.float32]  # P
    pair_primary: npt.NDArray[np.bool_]  # P


def soft_levels(share: float) -> list[tuple[int, float]]:
    """Return the levels (0 .. 9) a share of the whole belongs to, with weights that sum to 1: the two nearest tenths.

    >>> soft_levels(1.0), soft_levels(0.02), [(i, round(w, 2)) for i, w in soft_levels(0.34)]
    ([(9, 1.0)], [(0, 1.0)], [(2, 0.6), (3, 0.4)])
    """
    place = standing(share)
    low = int(place)
    upper = place - low
    return [(low, 1 - upper)] + ([(low + 1, upper)] if upper > 0 else [])


class Sampler:
    """Draws lessons: photos by group, masks the more often the rarer their level is.

    What a model proposed as a whole is never the lesson: where things end, people say.
    """

    def __init__(
        self,
        groups: Sequence[tuple[float, Sequence[TrainingPhoto]]],
        *,
        level_power: float,
        kind_weights: dict[str, float],
        central: float,
    ) -> None:
        """Count levels over all groups.

        Args:
            groups: photos and the share of lessons they get; shares need not sum to 1.
            level_power: 0 draws masks as they come, 1 draws all ten levels alike.
            kind_weights: how much more often masks of a kind (object, part, subpart) are drawn.
            central: share of clicks at the middle of their mask; the others lie anywhere in it.

        Raises:
            Refusal: there is no photo.
        """
        groups = [(share, list(photos)) for share, photos in groups if photos and share > 0]
        if not groups:
            raise Refusal("there is no mask to learn from; check the sets and splits that the configuration names")
        counts = np.zeros(LEVELS)
        for _, photos in groups:
            for photo in photos:
                for share in photo.shares:
                    counts[soft_levels(float(share))[0][0]] += 1
        rarity = (counts.sum() / np.maximum(counts, 1)) ** level_power
        self._central = central
        weighted = []
        for share, photos in groups:
            group = []
            for photo in photos:
                levels = [soft_levels(float(place))[0][0] for place in photo.shares]
                weights = np.array(
                    [
                        0.0 if kind == "object" and not human else rarity[level] * kind_weights.get(kind, 1.0)
                        for level, kind, human in zip(levels, photo.kinds, photo.human, strict=True)
                    ]
                )
                if weights.sum() > 0:
                    group.append((photo, weights))
            if group:
                weighted.append((share, group))
        if not weighted:
            raise Refusal(
                "every mask has weight 0 (wholes that a model proposed never count); raise a kind's weight above 0"
            )
        self._groups = [group for _, group in weighted]
        self._shares = np.array([share for share, _ in weighted], np.float64)
        self._shares /= self._shares.sum()

    def draw(self, rng: np.random.Generator, clicks: int) -> Lesson:
        """Return a lesson of `clicks` first clicks on one photo."""
        photo, weights = self._photo(rng)
        again = np.count_nonzero(weights) < clicks  # else no mask is clicked twice
        primaries = rng.choice(len(weights), size=clicks, replace=again, p=weights / weights.sum()).astype(np.int64)
        masks = photo.masks()
        places = np.stack([_place(rng, masks[i], central=rng.random() < self._central) for i in primaries])
        return _lesson(rng, photo, masks, primaries, places)

    def draw_mask(self, rng: np.random.Generator) -> tuple[TrainingPhoto, int]:
        """Return a photo and the index of one of its masks."""
        photo, weights = self._photo(rng)
        return photo, int(rng.choice(len(weights), p=weights / weights.sum()))

    def _photo(self, rng: np.random.Generator) -> tuple[TrainingPhoto, npt.NDArray[np.float64]]:
        group = self._groups[rng.choice(len(self._groups), p=self._shares)]
        return group[rng.integers(len(group))]


def _place(rng: np.random.Generator, mask: Mask, *, central: bool) -> npt.NDArray[np.float32]:
    """Return a pixel of the mask, x and y of its centre: its middle or any."""
    if central:
        depth = cv2.distanceTransform(np.pad(mask.view(np.uint8), 1), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    else:
        rows, columns = np.nonzero(mask)
        chosen = rng.integers(rows.size)
        row, column = rows[chosen], columns[chosen]
    return np.array([column + 0.5, row + 0.5], np.float32)


def _lesson(
    rng: np.random.Generator,
    photo: TrainingPhoto,
    masks: npt.NDArray[np.bool_],
    primaries: npt.NDArray[np.int64],
    places: npt.NDArray[np.float32],
) -> Lesson:
    pairs: list[tuple[int, int, int, float, bool]] = []
    for click, (primary, (x, y)) in enumerate(zip(primaries, places, strict=True)):
        under = masks[:, int(y), int(x)] & (photo.wholes == photo.wholes[primary])
        others = [int(i) for i in np.flatnonzero(under) if i != primary]
        rng.shuffle(others)
        others.sort(key=lambda i: (not photo.human[i], i != photo.wholes[primary]))
        taken = np.zeros(LEVELS, bool)
        for mask in (int(primary), *others):
            levels = soft_levels(float(photo.shares[mask]))
            if photo.kinds[mask] == "object" and not photo.human[mask]:
                continue
            if mask != primary and any(taken[level] for level, _ in levels):
                continue  # two masks of one size lie here: the click was placed for the other
            for level, weight in levels:
                taken[level] = True
                pairs.append((click, level, mask, weight, mask == primary))
    columns = list(zip(*pairs, strict=True))
    return Lesson(
        photo,
        masks,
        primaries,
        places,
        np.array(columns[0], np.int64),
        np.array(columns[1], np.int64),
        np.array(columns[2], np.int64),
        np.array(columns[3], np.float32),
        np.array(columns[4], np.bool_),
    )


def targets(lesson: Lesson, chosen: npt.NDArray[np.int64]) -> Tensor:
    """Return masks of a lesson as fp32, len(chosen), rows, columns."""
    return torch.from_numpy(lesson.masks[chosen].astype(np.float32))
