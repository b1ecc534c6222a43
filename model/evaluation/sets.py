"""Which masks of which sets are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from model.annotations import AnnotatedImage, AnnotatedMask, Source, read_annotations
from model.evaluation.protocol import phrase_of, supported
from model.types import Refusal

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Selection:
    """The masks of one set that are measured, image by image."""

    name: str  # of its folder, or of its file where that says more
    licence: str
    fingerprint: str  # of the whole set as read: its rows are stale when this changes
    chosen: tuple[tuple[AnnotatedImage, tuple[AnnotatedMask, ...]], ...]
    of: int  # masks that could have been chosen, before the limit

    @property
    def masks(self) -> int:
        """How many masks are measured."""
        return sum(len(masks) for _, masks in self.chosen)


def evenly_spaced(values: Sequence[T], limit: int | None) -> list[T]:
    """Return at most `limit` of the values, spread over all of them, always the same ones.

    >>> evenly_spaced("abcdefgh", 3)
    ['a', 'c', 'f']
    """
    if limit is None or limit >= len(values):
        return list(values)
    return [values[i * len(values) // limit] for i in range(limit)]


def select(
    source: Path,
    *,
    kind: Source,
    split: str | None,
    levels: Sequence[str],
    limit: int | None,
    support: int,
    names: Sequence[str] = (),
    wholes: Sequence[str] = (),
) -> Selection:
    """Return what is measured of a set.

    Args:
        source: what `model.annotations.read_annotations` reads.
        kind: its format, or `auto`.
        split: the split to take, where the set names splits.
        levels: `object`, `part`, `subpart`; empty: all of them.
        limit: masks of each level at most.
        support: annotators who drew a mask at least, where the set says so.
        names: names of the masks to take, as `model.evaluation.protocol.phrase_of` has them; empty: any.
        wholes: names of what the masks are part of; empty: any.

    Raises:
        Refusal: the set cannot be read, or holds no mask to measure.
    """
    annotations = read_annotations(source, kind=kind, split=split)
    masks: dict[str, list[tuple[AnnotatedImage, AnnotatedMask]]] = {}
    for image in annotations.images:
        for mask in supported(image.masks, support):
            if mask.area and (not levels or mask.level in levels) and _named(image, mask, names, wholes):
                masks.setdefault(mask.level, []).append((image, mask))
    if not masks:
        raise Refusal(
            f"{source} holds no mask to measure (split {split or 'any'}, level {', '.join(levels) or 'any'}, "
            f"support {support} or more, name {', '.join(names) or 'any'}, part of {', '.join(wholes) or 'any'}, "
            f"{len(annotations.images)} images); choose another split, level or name"
        )
    wanted = {mask.id for of_level in masks.values() for _, mask in evenly_spaced(of_level, limit)}
    by_image = [(image, tuple(mask for mask in image.masks if mask.id in wanted)) for image in annotations.images]
    return Selection(
        name=_name_of(source),
        licence=annotations.licence,
        fingerprint=annotations.fingerprint(),
        chosen=tuple((image, chosen) for image, chosen in by_image if chosen),
        of=sum(len(of_level) for of_level in masks.values()),
    )


def _named(image: AnnotatedImage, mask: AnnotatedMask, names: Sequence[str], wholes: Sequence[str]) -> bool:
    return (not names or phrase_of(image, mask) in names) and (not wholes or image.whole(mask).name in wholes)


def _name_of(source: Path) -> str:
    source = source.resolve()
    if source.name == "annotations.json":
        source = source.parent
    return source.name if source.is_dir() else source.stem
