"""Annotated photos of many sources, read into one shape: masks with a name, a level and a parent.

Masks stay compressed (COCO's run lengths) until they are asked for. Everything is checked on reading, so that a mask
that was read can be decoded: a file that cannot be used is refused with its name and the annotation's id. Two things
are mended instead, and counted in the log: a mask without any pixel is left out, and so is a crowd (COCO's `iscrowd`),
which is many objects in one mask and no answer to a click. A mask whose parent is not in the file counts as its own
whole. Photos are taken as they are stored: a rotation named in their EXIF data is not applied, since masks do not know
it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco

from model.types import Granularity, Mask, Refusal, RGBImage

log = logging.getLogger(__name__)

Level = Literal["object", "part", "subpart"]
Kind = Literal["shared", "coco", "sbd", "pascalpart", "partimagenet", "sa1b", "folder", "pairs"]
Source = Literal["auto", Kind]

_LEVELS: tuple[Level, ...] = get_args(Level)
_PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_PAIRS = (("data_GT", "boundary_GT"), ("img", "gt"), ("img", "masks"), ("images", "masks"), ("Images", "Masks"))
_VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog"),
    *("horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"),
)
_UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)  # what Pillow raises


class Rle(TypedDict):
    """A mask as COCO compresses it: run lengths column by column."""

    size: list[int]  # height, width
    counts: bytes


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AnnotatedMask:
    """One mask of an image and where it stands among the others."""

    id: int  # unique in its set
    image_id: int
    name: str  # category as the source writes it, underscores as spaces; empty if it has none
    level: Level
    parent_id: int | None  # the mask that contains this one; may name one that is not there
    origin: str  # human, derived-... where a program made it, proposal-... where a model did
    area: int  # pixels
    segmentation: Rle
    granularity: float | None = None  # 0..1 where the source states it, as proposals do
    support: int | None = None  # annotators who drew it, where the source counts them
    undecided: Rle | None = None  # pixels that count neither as inside nor as outside, as GrabCut's band

    def mask(self) -> Mask:
        """Return the mask, bool H, W, decoded anew each time."""
        return decode(self.segmentation)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AnnotatedImage:
    """A photo and its masks."""

    id: int
    path: Path
    height: int  # pixels
    width: int
    split: str | None  # None where the source names none
    masks: tuple[AnnotatedMask, ...] = ()
    known_digest: str | None = None  # where the file is kept under an id of its own
    by_id: dict[int, AnnotatedMask] = field(init=False, repr=False)  # its masks by their ids

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_id", {mask.id: mask for mask in self.masks})

    def pixels(self) -> RGBImage:
        """Return the decoded photo, uint8 H, W, 3.

        Raises:
            Refusal: the file is missing, damaged or of another size than annotated.
        """
        try:
            with Image.open(self.path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except _UNREADABLE as error:
            raise Refusal(f"image {self.path} cannot be read ({error}); copy it again from its source") from error
        if pixels.shape[:2] != (self.height, self.width):
            raise Refusal(
                f"image {self.path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, but annotated as {self.width} x "
                f"{self.height}; the annotations belong to another file"
            )
        return pixels

    def digest(self) -> str:
        """Return the SHA-256 of the file's bytes in hex, or the digest it is kept under: how its embedding is known.

        Raises:
            Refusal: the file cannot be read.
        """
        if self.known_digest is not None:
            return self.known_digest
        try:
            return hashlib.sha256(self.path.read_bytes()).hexdigest()
        except OSError as error:
            raise Refusal(f"image {self.path} cannot be read ({error}); copy it again from its source") from error

    def children(self, mask: AnnotatedMask) -> tuple[AnnotatedMask, ...]:
        """Return the masks whose parent is `mask`."""
        return tuple(other for other in self.masks if other.parent_id == mask.id)

    def whole(self, mask: AnnotatedMask) -> AnnotatedMask:
        """Return the root of the mask's parents, as `whole_of` does."""
        return whole_of(mask, self.by_id)

    def granularity_of(self, mask: AnnotatedMask) -> Granularity:
        """Return where a mask stands in its whole: its area over that of its whole."""
        return Granularity.from_share(min(1.0, mask.area / self.whole(mask).area))

    def level_of(self, mask: AnnotatedMask) -> Granularity:
        """Return where a mask stands in its whole as the nearest of ten levels."""
        return Granularity(self.granularity_of(mask).level)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AnnotationSet:
    """Annotated photos of one source."""

    name: str
    licence: str  # as the source states it; empty if it does not
    images: tuple[AnnotatedImage, ...]

    def fingerprint(self) -> str:
        """Return a digest of all that is annotated, hex: photos by name and size, masks by all that is said of them."""
        digest = hashlib.sha256(self.name.encode())
        for image in self.images:
            digest.update(f"|{image.path.name} {image.height} {image.width} {image.masks}".encode())
        return digest.hexdigest()


def whole_of(mask: AnnotatedMask, by_id: Mapping[int, AnnotatedMask]) -> AnnotatedMask:
    """Return the root of a mask's parents: itself where it has none, and where its parent is not there.

    Parents that form a ring have no root; the first one met again stands for it.
    """
    seen = {mask.id}
    while mask.parent_id is not None and mask.parent_id in by_id:
        mask = by_id[mask.parent_id]
        if mask.id in seen:
            break
        seen.add(mask.id)
    return mask


def decode(segmentation: Rle) -> Mask:
    """Return a mask of COCO's compressed run lengths, bool H, W.

    >>> decode({"size": [2, 3], "counts": b"132"})
    array([[False,  True, False],
           [ True,  True, False]])
    """
    runs = _runs(segmentation["counts"])  # pycocotools decodes too, but warns with numpy 2 and trusts its input
    height, width = segmentation["size"]
    mask: Mask = np.ascontiguousarray(np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape(width, height).T)
    return mask


def encode(mask: Mask) -> Rle:
    """Return a mask, bool H, W, as COCO's compressed run lengths; the inverse of `decode`.

    >>> encode(np.array([[False, True, False], [True, True, False]]))
    {'size': [2, 3], 'counts': b'132'}
    """
    found = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in found["size"]], "counts": found["counts"]}


def overlaps(masks: Sequence[Rle]) -> npt.NDArray[np.float64]:
    """Return the IoU of each of N masks of one photo with each, N, N, from their run lengths, which `encode` made.

    >>> overlaps([encode(np.array([[True, True]])), encode(np.array([[True, False]]))]).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    plain = [dict(mask) for mask in masks]
    return np.array(coco.iou(plain, plain, [0] * len(plain)), np.float64).reshape(len(plain), len(plain))


def unite(segmentations: Sequence[Rle]) -> Rle:
    """Return the union of masks of one size, at least one.

    >>> decode(unite([encode(np.array([[True, False]])), encode(np.array([[False, True]]))]))
    array([[ True,  True]])
    """
    found = coco.merge(list(segmentations))
    return {"size": [int(side) for side in found["size"]], "counts": found["counts"]}


def read_annotations(source: Path, *, kind: Source = "auto", split: str | None = None) -> AnnotationSet:
    """Return the annotated photos of a file or folder.

    Args:
        source: what the kind needs, see below.
        kind: `auto` looks at what is there and takes the first that fits:

            - `shared`: a folder with `annotations.json` and `images/`, as ../shared/data has them;
            - `coco`: a JSON file; its photos lie beside it, in `images/`, in the folder that the end of its name gives
              (`annotations/instances_val2017.json`: `val2017/` or `images/val2017/`), or where its `info.images_root`
              says;
            - `partimagenet`: such a file whose categories are parts and name their whole as supercategory;
            - `sbd`: a folder with `inst/*.mat` and `img/` (Semantic Boundaries Dataset);
            - `pascalpart`: a folder with `Annotations_Part/*.mat`, and `JPEGImages/` in it or beside it;
            - `sa1b`: a folder with one JSON file for each photo (Segment Anything 1B);
            - `pairs`: a folder with photos and masks of the same stems in two folders (GrabCut, Berkeley, DAVIS);
            - `folder`: photos without any mask.
        split: only images of this split; those whose source names no split are in every one.

    Raises:
        Refusal: something is missing, damaged or contradicts itself, or no image is in the split.
    """
    if not source.exists():
        raise Refusal(f"{source} does not exist; give a folder of photos or annotations, or a COCO JSON file")
    if kind == "auto":
        kind = _kind_of(source)
    elif kind not in get_args(Kind):
        raise Refusal(f"kind {kind!r} is unknown; use auto or one of {', '.join(get_args(Kind))}")
    found = _READERS[kind](source)
    if split is not None:
        kept = tuple(image for image in found.images if image.split in (None, split))
        if not kept:
            there = sorted({str(image.split) for image in found.images})
            raise Refusal(f"{source} has no image of split {split!r}; its splits are: {', '.join(there) or 'none'}")
        found = replace(found, images=kept)
    return found


def _kind_of(source: Path) -> Kind:
    if source.is_file():
        named = [category for category in _objects(_read_json(source), "categories", source) if _is_part(category)]
        return "partimagenet" if named else "coco"
    if (source / "annotations.json").is_file():
        return "shared"
    if (source / "inst").is_dir():
        return "sbd"
    if (source / "Annotations_Part").is_dir():
        return "pascalpart"
    if _pair(source) is not None:
        return "pairs"
    if any(photo.with_suffix(".json").is_file() for photo in _photos(source)):
        return "sa1b"
    return "folder"


# --- COCO's JSON, our own shape included -----------------------------------------------------------------------------


def _read_shared(source: Path) -> AnnotationSet:
    return _read_coco(source / "annotations.json" if source.is_dir() else source)


def _read_coco(path: Path) -> AnnotationSet:
    content = _read_json(path)
    names = {c["id"]: _spaced(str(c.get("name", ""))) for c in _objects(content, "categories", path, ("id",))}
    info = content["info"] if isinstance(content.get("info"), dict) else {}
    roots = _roots(path, info)
    masks: dict[int, list[AnnotatedMask]] = {}
    sizes: dict[int, tuple[int, int]] = {}
    shots = _objects(content, "images", path, ("id", "file_name", "height", "width"))
    for shot in shots:
        if shot["id"] in sizes:
            raise Refusal(f"{path}: two images have the id {shot['id']}; ids must differ")
        sizes[shot["id"]] = _sides(shot, f"{path}: image {shot['id']}")
        masks[shot["id"]] = []
    dropped: Counter[str] = Counter()
    seen: set[int] = set()
    for note in _objects(content, "annotations", path, ("id", "image_id", "segmentation")):
        where = f"{path}: annotation {note['id']}"
        if note["image_id"] not in sizes:
            raise Refusal(f"{where} is on image {note['image_id']}, which is not among the images")
        if note["id"] in seen:
            raise Refusal(f"{where} is there twice; ids must differ")
        seen.add(note["id"])
        segmentation = _checked(note["segmentation"], *sizes[note["image_id"]], where)
        area = int(coco.area(segmentation))
        if note.get("iscrowd"):
            dropped["crowds"] += 1
        elif area == 0:
            dropped["empty masks"] += 1
        else:
            masks[note["image_id"]].append(_annotated(note, names, segmentation, area, where))
    _report(path, dropped, [mask for found in masks.values() for mask in found])
    images = tuple(
        AnnotatedImage(
            id=shot["id"],
            path=_find(str(shot["file_name"]), roots, f"{path}: image {shot['id']}"),
            height=shot["height"],
            width=shot["width"],
            split=str(shot["split"]) if shot.get("split") else None,
            masks=tuple(masks[shot["id"]]),
        )
        for shot in shots
    )
    name = str(info.get("name") or (path.parent.name if path.name == "annotations.json" else path.stem))
    return AnnotationSet(name=name, licence=_licence(content, info), images=images)


def _annotated(note: dict[str, Any], names: dict[Any, str], rle: Rle, area: int, where: str) -> AnnotatedMask:
    level, granularity, parent = note.get("level", "object"), note.get("granularity"), note.get("parent_id")
    category = note.get("category_id")
    if level not in _LEVELS:
        raise Refusal(f"{where} has level {level!r}; it must be one of {', '.join(_LEVELS)}")
    if granularity is not None and not (isinstance(granularity, int | float) and 0 <= granularity <= 1):
        raise Refusal(f"{where} has granularity {granularity!r}; it must be a number in 0..1")
    if not (parent is None or isinstance(parent, int)):
        raise Refusal(f"{where} has parent_id {parent!r}; it must be the id of an annotation, or null")
    if not (category is None or isinstance(category, int)):
        raise Refusal(f"{where} has category_id {category!r}; it must be the id of a category, or null")
    return AnnotatedMask(
        id=note["id"],
        image_id=note["image_id"],
        name=names.get(category, ""),
        level=level,
        parent_id=parent,
        origin=str(note.get("origin", "human")),
        area=area,
        segmentation=rle,
        granularity=None if granularity is None else float(granularity),
        support=note["support"] if isinstance(note.get("support"), int) else None,
    )


def _read_part_image_net(path: Path) -> AnnotationSet:
    """Parts get the object of their supercategory that holds most of them, or the union of them all as their object."""
    wholes = {
        _spaced(str(category["name"])): _spaced(str(category["supercategory"]))
        for category in _objects(_read_json(path), "categories", path)
        if _is_part(category)
    }
    found = _read_coco(path)
    following = 1 + max((mask.id for image in found.images for mask in image.masks), default=0)
    images = []
    for image in found.images:
        masks = [mask for mask in image.masks if mask.name not in wholes]
        for whole in sorted({wholes[mask.name] for mask in image.masks if mask.name in wholes}):
            parts = [mask for mask in image.masks if wholes.get(mask.name) == whole]
            objects = [mask for mask in masks if mask.name == whole]
            if not objects:
                rle = _compact(coco.merge([part.segmentation for part in parts]))
                made = replace(
                    parts[0],
                    id=following,
                    name=whole,
                    origin="derived-union",
                    area=int(coco.area(rle)),
                    segmentation=rle,
                )
                following += 1
                objects = [made]
                masks.append(made)
            shares = _shares(parts, objects)
            masks += [
                replace(part, level="part", parent_id=objects[int(row.argmax())].id)
                for part, row in zip(parts, shares, strict=True)
            ]
        images.append(replace(image, masks=tuple(masks)))
    return replace(found, images=tuple(images))


def _is_part(category: dict[str, Any]) -> bool:
    """PartImageNet writes `Quadruped Head` of `Quadruped`."""
    name, whole = str(category.get("name", "")), str(category.get("supercategory", ""))
    return bool(whole) and name.lower().startswith(f"{whole.lower()} ")


def _roots(path: Path, info: dict[str, Any]) -> list[Path]:
    """Where a COCO file's photos may lie, likely places first."""
    stated = info.get("images_root")
    ending = path.stem.rpartition("_")[2]
    folder = path.parent
    roots = [folder / stated] if isinstance(stated, str) else []
    roots += [folder, folder / "images", folder / ending, folder.parent / ending]
    return [*roots, folder.parent / "images", folder.parent / "images" / ending]


def _licence(content: dict[str, Any], info: dict[str, Any]) -> str:
    if info.get("license"):
        return str(info["license"])
    listed = content.get("licenses")
    listed = listed if isinstance(listed, list) else []
    return "; ".join(str(one["name"]) for one in listed if isinstance(one, dict) and "name" in one)


def _sides(shot: dict[str, Any], where: str) -> tuple[int, int]:
    """Return height and width of an image as a JSON file states them; run lengths hold 32 bits."""
    height, width = shot["height"], shot["width"]
    if not all(isinstance(side, int) and side > 0 for side in (height, width)) or height * width >= 1 << 32:
        raise Refusal(f"{where} has no size; its height and width must be whole pixels, fewer than 2^32 in all")
    return height, width


def _checked(segmentation: object, height: int, width: int, where: str) -> Rle:
    """Return polygons or run lengths, compressed or not, as compressed run lengths that fill the image exactly."""
    if isinstance(segmentation, list):
        return _from_polygons(segmentation, height, width, where)
    if not (isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys()):
        raise Refusal(
            f"{where} has no segmentation that can be read; give polygons, or run lengths with size and counts"
        )
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width]:
        raise Refusal(f"{where} has a mask of size {size}, but its image is [{height}, {width}] (height, width)")
    if isinstance(counts, list):
        if not all(isinstance(run, int) and run >= 0 for run in counts) or sum(counts) != height * width:
            raise Refusal(f"{where} has run lengths that do not add up to the {height * width} pixels of its image")
        return _compact(coco.frPyObjects({"size": size, "counts": counts}, height, width))
    data = counts.encode() if isinstance(counts, str) and counts.isascii() else b""
    if not _fills(data, height * width):
        raise Refusal(f"{where} has run lengths that do not add up to the {height * width} pixels of its image")
    return {"size": [height, width], "counts": data}


def _fills(counts: bytes, pixels: int) -> bool:
    """Whether compressed runs are sound and cover `pixels`; pycocotools reads past the end of those that are not."""
    digits = np.frombuffer(counts, np.uint8)
    if digits.size == 0 or digits.min() < 48 or digits.max() > 111 or digits[-1] > 79:
        return False
    if re.search(rb"[P-o]{7}", counts):  # a run of more than 35 bits
        return False
    runs = _runs(counts)
    return bool(runs.min() >= 0 and runs.sum() == pixels)


def _runs(counts: bytes) -> npt.NDArray[np.int64]:
    """Return the lengths of compressed runs, background first.

    Each is written in base 32, lowest digits first, one character a digit: 48 + digit, 32 more when others follow; the
    fifth bit of the last is the sign. From the fourth run on it is the difference to the run two before.
    """
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(digits < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    place = np.arange(digits.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 31) << 5 * place, starts)
    runs -= np.where(digits[ends] & 16, 1 << 5 * lengths, 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return np.asarray(runs, dtype=np.int64)


def _from_polygons(polygons: list[Any], height: int, width: int, where: str) -> Rle:
    for polygon in polygons:
        if not (
            isinstance(polygon, list)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and all(isinstance(v, int | float) and abs(v) < 1e6 for v in polygon)
        ):
            raise Refusal(
                f"{where} has a polygon that is none; each is a list of x, y, x, y, ... of three points or more"
            )
    if not polygons:
        return encode(np.zeros((height, width), np.bool_))
    return _compact(coco.merge(coco.frPyObjects(polygons, height, width)))


def _compact(found: dict[str, Any]) -> Rle:
    return {"size": [int(side) for side in found["size"]], "counts": bytes(found["counts"])}


# --- one file of masks for each photo --------------------------------------------------------------------------------


class _Region(NamedTuple):
    mask: Mask
    name: str
    parent: int | None = None  # its place in the list
    origin: str = "human"
    undecided: Mask | None = None


def _read_sbd(source: Path) -> AnnotationSet:
    splits = {
        stem.strip(): split
        for split in ("train", "val")
        if (source / f"{split}.txt").is_file()
        for stem in (source / f"{split}.txt").read_text().split()
    }

    def regions(path: Path) -> Iterator[_Region]:
        content = _read_mat(path, "GTinst")
        instances = np.atleast_2d(content["Segmentation"])
        for index, category in enumerate(np.atleast_1d(content["Categories"]), 1):
            name = _VOC[int(category) - 1] if 1 <= int(category) <= len(_VOC) else ""
            yield _Region(instances == index, name)

    annotated = sorted((source / "inst").glob("*.mat"))
    return _collect(source, "SBD", annotated, [source / "img", source / "images"], regions, splits)


def _read_pascal_part(source: Path) -> AnnotationSet:
    def regions(path: Path) -> Iterator[_Region]:
        place = 0
        for thing in _listed(_read_mat(path, "anno")["objects"]):
            whole = place
            yield _Region(np.atleast_2d(thing["mask"]) > 0, _spaced(str(thing["class"])))
            place += 1
            for part in _listed(thing.get("parts")):
                yield _Region(np.atleast_2d(part["mask"]) > 0, _spaced(str(part["part_name"])), whole)
                place += 1

    folders = [source / "JPEGImages", source.parent / "JPEGImages", source / "images"]
    return _collect(source, "PASCAL-Part", sorted((source / "Annotations_Part").glob("*.mat")), folders, regions, {})


def _read_pairs(source: Path) -> AnnotationSet:
    pair = _pair(source)
    if pair is None:
        raise Refusal(
            f"{source} has no folder of photos beside a folder of masks, such as {', '.join(map('/'.join, _PAIRS))}"
        )
    photos, masks = pair

    def regions(path: Path) -> Iterator[_Region]:
        try:
            with Image.open(path) as image:
                values = np.asarray(image if image.mode in ("L", "P", "1", "I;16", "I") else image.convert("RGB"))
        except _UNREADABLE as error:
            raise Refusal(f"mask {path} cannot be read ({error}); copy it again from its source") from error
        values = values if values.ndim == 2 else values.max(axis=2)
        if (values == 128).any() and (values == 255).any():  # GrabCut: 128 is a band nobody scores
            yield _Region(values > 128, "", undecided=values == 128)
        else:
            yield _Region(values > 0, "")

    return _collect(source, source.name, _photos(masks), [photos], regions, {})


def _read_sa1b(source: Path) -> AnnotationSet:
    images: list[AnnotatedImage] = []
    dropped: Counter[str] = Counter()
    following = 1
    for path in sorted(source.glob("*.json")):
        content = _read_json(path)
        shot = content.get("image")
        if not (isinstance(shot, dict) and {"file_name", "height", "width"} <= shot.keys()):
            raise Refusal(f"{path} names no image; a file of SA-1B holds `image` with file_name, height and width")
        photo = _find(str(shot["file_name"]), [source], str(path))
        height, width = _sides(shot, f"{path}: its image")
        masks: list[AnnotatedMask] = []
        for note in _objects(content, "annotations", path, ("id", "segmentation")):
            rle = _checked(note["segmentation"], height, width, f"{path}: annotation {note['id']}")
            area = int(coco.area(rle))
            if area == 0:
                dropped["empty masks"] += 1
                continue
            masks.append(
                AnnotatedMask(
                    id=following,
                    image_id=len(images) + 1,
                    name="",
                    level="object",
                    parent_id=None,
                    origin="derived-sam",
                    area=area,
                    segmentation=rle,
                )
            )
            following += 1
        images.append(
            AnnotatedImage(
                id=len(images) + 1,
                path=photo,
                height=height,
                width=width,
                split=None,
                masks=_nested(masks),
            )
        )
    if not images:
        raise Refusal(f"{source} holds no JSON file; SA-1B has one beside each photo")
    _report(source, dropped, [])
    return AnnotationSet(name="SA-1B", licence="SA-1B Dataset Research Licence", images=tuple(images))


def _nested(masks: list[AnnotatedMask]) -> tuple[AnnotatedMask, ...]:
    """Return masks with their parents: the smallest one at least 1.25 times larger that holds 92 % of it."""
    if not masks:
        return ()
    held = _shares(masks, masks)
    areas = np.array([mask.area for mask in masks])
    parents: dict[int, int] = {}
    for index, mask in enumerate(masks):
        around = np.flatnonzero((held[index] >= 0.92) & (areas >= 1.25 * mask.area))
        if around.size:
            parents[index] = int(around[areas[around].argmin()])

    def depth(index: int) -> int:
        return 1 + depth(parents[index]) if index in parents else 0  # parents are larger: no rings

    return tuple(
        replace(
            mask,
            parent_id=masks[parents[index]].id if index in parents else None,
            level=_LEVELS[min(2, depth(index))],
        )
        for index, mask in enumerate(masks)
    )


def _shares(masks: Sequence[AnnotatedMask], others: Sequence[AnnotatedMask]) -> npt.NDArray[np.float64]:
    """Return how much of each mask (row) lies in each other one (column), 0..1."""
    inside = coco.iou([m.segmentation for m in masks], [o.segmentation for o in others], [1] * len(others))
    return np.asarray(inside, dtype=np.float64).reshape(len(masks), len(others))


def _read_folder(source: Path) -> AnnotationSet:
    photos = _photos(source)
    if not photos:
        raise Refusal(f"{source} holds no photo; expected files ending in {', '.join(_PHOTOS)}")
    images = []
    for index, path in enumerate(photos, 1):
        try:
            height, width = _size(path)
        except Refusal:  # damaged: whoever reads its pixels hears of it, the other photos can be used
            height, width = 0, 0
        images.append(AnnotatedImage(id=index, path=path, height=height, width=width, split=None))
    return AnnotationSet(name=source.name, licence="", images=tuple(images))


def _collect(
    source: Path,
    name: str,
    annotated: Iterable[Path],
    folders: Sequence[Path],
    regions: Callable[[Path], Iterator[_Region]],
    splits: dict[str, str],
) -> AnnotationSet:
    """Return a set of one file of masks a photo; photos have the stem of their masks' file."""
    images: list[AnnotatedImage] = []
    dropped: Counter[str] = Counter()
    following = 1
    for path in annotated:
        candidates = [folder / f"{path.stem}{suffix}" for folder in folders for suffix in _any_case(_PHOTOS)]
        photo = next((candidate for candidate in candidates if candidate.is_file()), None)
        if photo is None:
            looked = ", ".join(map(str, dict.fromkeys(folders)))
            raise Refusal(f"{path}: there is no photo of that name; looked in {looked}")
        height, width = _size(photo)
        masks = []
        try:
            found = list(regions(path))
        except (KeyError, TypeError, IndexError) as error:
            raise Refusal(f"{path} is not laid out as {name} files are ({error!r}); check --kind") from error
        ids = {place: following + place for place in range(len(found))}
        following += len(found)
        for place, region in enumerate(found):
            if region.mask.shape != (height, width):
                raise Refusal(
                    f"{path}: annotation {ids[place]} has a mask of size {list(region.mask.shape)}, but "
                    f"{photo.name} is [{height}, {width}] (height, width)"
                )
            if not region.mask.any():
                dropped["empty masks"] += 1
                continue
            masks.append(
                AnnotatedMask(
                    id=ids[place],
                    image_id=len(images) + 1,
                    name=region.name,
                    level="object" if region.parent is None else "part",
                    parent_id=None if region.parent is None else ids[region.parent],
                    origin=region.origin,
                    area=int(np.count_nonzero(region.mask)),
                    segmentation=encode(region.mask),
                    undecided=None if region.undecided is None else encode(region.undecided),
                )
            )
        images.append(
            AnnotatedImage(
                id=len(images) + 1,
                path=photo,
                height=height,
                width=width,
                split=splits.get(path.stem),
                masks=tuple(masks),
            )
        )
    if not images:
        raise Refusal(f"{source} holds no annotation file of kind {name}; check --kind")
    _report(source, dropped, [mask for image in images for mask in image.masks])
    return AnnotationSet(name=name, licence="", images=tuple(images))


# --- small things ----------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise Refusal(f"{path} cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path} is not JSON ({error}); copy it again from its source") from error
    if not isinstance(content, dict):
        raise Refusal(f"{path} holds a {type(content).__name__}; expected an object with images and annotations")
    return content


def _objects(content: dict[str, Any], key: str, path: Path, fields: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return a list of a JSON file, each item an object with these fields; a missing list of categories is empty."""
    items = content.get(key, [] if key == "categories" else None)
    if not isinstance(items, list):
        raise Refusal(f"{path} has no list of {key}; expected COCO's images, categories and annotations")
    for place, item in enumerate(items):
        missing = [name for name in fields if not isinstance(item, dict) or name not in item]
        if missing or not isinstance(item, dict):
            raise Refusal(f"{path}: {key}[{place}] has no {' and no '.join(missing) or 'fields'}")
        if any(not isinstance(item[name], int) for name in ("id", "image_id") if name in fields):
            raise Refusal(f"{path}: {key}[{place}] has an id that is no whole number")
    return items


def _read_mat(path: Path, name: str) -> Any:
    from scipy.io import loadmat  # not held by processes that read no MATLAB file
    from scipy.io.matlab import MatReadError

    try:
        return loadmat(str(path), simplify_cells=True)[name]
    except KeyError as error:
        raise Refusal(f"{path} has no variable {name}; check --kind") from error
    except (OSError, ValueError, TypeError, NotImplementedError, MatReadError, struct.error, zlib.error) as error:
        raise Refusal(
            f"{path} is not a MATLAB file that can be read ({error}); copy it again from its source"
        ) from error


def _listed(value: Any) -> list[Any]:
    """MATLAB's struct arrays of none, one and several come as an empty array, a dict and a list."""
    return [value] if isinstance(value, dict) else [item for item in ([] if value is None else value)]


def _pair(source: Path) -> tuple[Path, Path] | None:
    for photos, masks in _PAIRS:
        if (source / photos).is_dir() and (source / masks).is_dir():
            return source / photos, source / masks
    return None


def _photos(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _PHOTOS and path.is_file())


def _any_case(suffixes: Iterable[str]) -> list[str]:
    return [version for suffix in suffixes for version in (suffix, suffix.upper())]


def _find(file_name: str, roots: Sequence[Path], where: str) -> Path:
    for root in roots:
        if os.path.isfile(root / file_name):  # false, too, for what can be no name of a file
            return root / file_name
    looked = ", ".join(map(str, dict.fromkeys(roots)))
    raise Refusal(f"{where}: photo {file_name} is missing; looked in {looked}")


def _size(path: Path) -> tuple[int, int]:
    """Return height and width of a photo."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except _UNREADABLE as error:
        raise Refusal(f"image {path} cannot be read ({error}); copy it again from its source") from error


def _spaced(name: str) -> str:
    return re.sub(r"[_\s]+", " ", name).strip()


def _report(path: Path, dropped: Counter[str], masks: Sequence[AnnotatedMask]) -> None:
    known = {mask.id for mask in masks}
    orphans = sum(mask.parent_id is not None and mask.parent_id not in known for mask in masks)
    if orphans:
        dropped["masks without their parent (each its own whole)"] = orphans
    for what, count in dropped.items():
        log.info("%s: %d %s%s", path, count, what, "" if what.startswith("masks") else " left out")


_READERS: dict[str, Callable[[Path], AnnotationSet]] = {
    "shared": _read_shared,
    "coco": _read_coco,
    "partimagenet": _read_part_image_net,
    "sbd": _read_sbd,
    "pascalpart": _read_pascal_part,
    "sa1b": _read_sa1b,
    "pairs": _read_pairs,
    "folder": _read_folder,
}
