"""Photos of mixed sizes and formats with true masks, and as many new ones as a run asks for."""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from model.annotations import read_annotations
from model.types import Mask
from tests.bench.photos import SHARED

_WIDTHS = (640, 1024, 1920, 3000, 4000)
_UPRIGHT, _TURNED = 1, 6  # EXIF orientations
_FORMATS = ("JPEG", "PNG", "JPEG", "WEBP", "JPEG turned", "JPEG grey", "TIFF", "JPEG CMYK")
_MASKS = 4
_LEAST_SHARE = 0.005  # of the photo: what is smaller nobody clicks


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A file in the folder that is served, and the objects in it."""

    name: str
    width: int  # as a browser shows it
    height: int
    truths: tuple[Mask, ...]  # at the resolution they were annotated at


@dataclass(frozen=True, slots=True, eq=False)
class _Base:
    suffix: str
    data: bytes
    width: int
    height: int
    truths: tuple[Mask, ...]


@dataclass(slots=True, eq=False)
class Pictures:
    """Writes new pictures into a folder: few photos, each copy with bytes, and so a digest, of its own."""

    folder: Path
    count: int = 16
    _bases: list[_Base] = field(init=False)
    _numbers: Iterator[int] = field(init=False)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        scenes = itertools.islice(_scenes(), self.count)
        self._bases = [
            _written(image, truths, _WIDTHS[n % len(_WIDTHS)], _FORMATS[n % len(_FORMATS)])
            for n, (image, truths) in enumerate(scenes)
        ]
        self._numbers = itertools.count()

    def new(self) -> Picture:
        """Return a picture nobody has seen."""
        with self._lock:
            number = next(self._numbers)
        base = self._bases[number % len(self._bases)]
        name = f"picture-{number:05}{base.suffix}"
        (self.folder / name).write_bytes(base.data + number.to_bytes(4, "big"))
        return Picture(name, base.width, base.height, base.truths)


def _written(image: Image.Image, truths: tuple[Mask, ...], width: int, form: str) -> _Base:
    height = round(width * image.height / image.width)
    shown = image.resize((width, height), Image.Resampling.BICUBIC)
    kind, _, how = form.partition(" ")
    exif = Image.Exif()
    exif[0x0112] = _TURNED if how == "turned" else _UPRIGHT
    stored = shown.transpose(Image.Transpose.ROTATE_90) if how == "turned" else shown
    stored = stored.convert({"grey": "L", "CMYK": "CMYK"}.get(how, "RGB"))
    file = io.BytesIO()
    options = {
        "JPEG": {"quality": 90, "exif": exif},
        "WEBP": {"quality": 85, "method": 0},
        "PNG": {"compress_level": 1},
    }
    stored.save(file, kind, **options.get(kind, {"compression": "tiff_lzw"}))
    suffix = {"JPEG": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")
    return _Base(suffix, file.getvalue(), width, height, truths)


def _scenes() -> Iterator[tuple[Image.Image, tuple[Mask, ...]]]:
    """Yield photos with one to four objects each, without end; drawn ones where the shared folder is missing."""
    found = []
    for name in ("car-parts", "coco-mval"):
        if (SHARED / name / "annotations.json").is_file():
            for image in read_annotations(SHARED / name).images[:40]:
                large = [mask for mask in image.masks if mask.area > _LEAST_SHARE * image.width * image.height]
                if large:
                    found.append((image.path, tuple(mask.mask() for mask in large[:_MASKS])))
    while found:
        for path, truths in found[::3] + found[1::3] + found[2::3]:
            yield Image.open(path).convert("RGB"), truths
    rng = np.random.default_rng(5)
    while True:
        yield _drawn(rng)


def _drawn(rng: np.random.Generator) -> tuple[Image.Image, tuple[Mask, ...]]:
    y, x = np.mgrid[:400, :600]
    image = Image.fromarray(np.stack([90 + x * 0.03, 140 + y * 0.05, 80 + x * 0.02], axis=-1).astype(np.uint8))
    truths = []
    for colour in ((190, 40, 30), (30, 60, 160)):
        left, top, size = (int(value) for value in rng.integers((0, 0, 80), (300, 150, 240)))
        ImageDraw.Draw(image).ellipse((left, top, left + size, top + size), fill=colour)
        truth = Image.new("1", image.size)
        ImageDraw.Draw(truth).ellipse((left, top, left + size, top + size), fill=1)
        truths.append(np.array(truth))
    return image, (truths[0] & ~truths[1], truths[1])
