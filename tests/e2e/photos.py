"""The photos that the journeys click on.

The bear is of COCO val2017 (000000361180): its mask was drawn by hand, and the photo stays outside this repository.
The car is drawn by this module, so pictures of it may be published: it is what docs/images show.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from model.annotations import read_annotations
from model.types import Mask
from tests.e2e.masks import Spot, deepest

_COCO = "coco_000000361180"
_WHEELS = (290, 640)
_PAINT, _SHADED = (38, 84, 168), (30, 68, 142)
_SCENE = (
    ("polygon", (0, 330, 150, 250, 330, 320, 520, 230, 700, 310, 900, 260, 900, 420, 0, 420), (96, 130, 90)),  # hills
    ("rectangle", (0, 400, 900, 600), (98, 98, 102)),  # road
    ("rectangle", (0, 396, 900, 412), (170, 165, 155)),
    ("ellipse", (180, 478, 740, 524), (60, 60, 64)),  # shadow
    (
        "polygon",
        (190, 440, 196, 380, 225, 352, 300, 340, 650, 338, 715, 352, 738, 380, 742, 452, 735, 470, 195, 470),
        _PAINT,
    ),
    ("polygon", (300, 340, 372, 268, 400, 258, 560, 258, 590, 266, 650, 338), _PAINT),
    ("polygon", (196, 420, 742, 420, 742, 452, 735, 470, 195, 470), _SHADED),
    ("polygon", (322, 340, 384, 282, 402, 274, 462, 274, 462, 340), (150, 190, 205)),  # windows
    ("polygon", (476, 274, 556, 274, 578, 280, 622, 340, 476, 340), (136, 178, 196)),
    ("rectangle", (468, 274, 470, 462), (22, 50, 108)),  # doors
    ("rectangle", (486, 366, 520, 374), (210, 205, 205)),
    ("rectangle", (392, 366, 426, 374), (210, 205, 205)),
    ("ellipse", (196, 376, 228, 400), (250, 240, 190)),  # lights
    ("rectangle", (722, 380, 740, 404), (240, 120, 40)),
    ("rectangle", (80, 180, 96, 420), (90, 70, 52)),  # tree
    ("ellipse", (10, 70, 166, 240), (52, 110, 58)),
    ("ellipse", (50, 40, 150, 150), (66, 126, 70)),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Photo:
    """A JPEG as it is uploaded, in the size at which a browser shows it; places are fractions of that size."""

    name: str
    data: bytes
    width: int
    height: int
    click: Spot  # well inside the object
    box: tuple[float, float, float, float]  # left, top, right, bottom of an object
    truth: Mask | None = None  # drawn by hand; the object of both click and box


def find_photo(shared: Path) -> Photo:
    """Return the bear with its mask where the shared folder has it, else the car."""
    folder = shared / "data" / "coco-mval"
    return read_coco(folder, _COCO) if (folder / "images" / f"{_COCO}.jpg").is_file() else drawn()


def drawn() -> Photo:
    """Return a car we drew: hub, wheel and car lie in each other, so a level has something to choose among."""
    size, fine = (900, 600), 2  # drawn twice as large, then made smaller: soft edges
    shade = np.linspace(0, 1, size[1] * fine)[:, None, None]
    sky = np.array([120, 170, 220]) * (1 - shade) + np.array([225, 235, 245]) * shade
    image = Image.fromarray(np.repeat(sky, size[0] * fine, axis=1).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for shape, points, colour in _SCENE:
        getattr(draw, shape)([point * fine for point in points], fill=colour)
    for x in _WHEELS:
        for radius, colour in ((58, (28, 28, 30)), (36, (190, 192, 198))):
            draw.ellipse([v * fine for v in (x - radius, 470 - radius, x + radius, 470 + radius)], fill=colour)
        for turn in np.arange(5) * 2 * np.pi / 5 - 1.2:
            spoke = (x, 470, x + 32 * np.cos(turn), 470 + 32 * np.sin(turn))
            draw.line([v * fine for v in spoke], fill=(90, 92, 98), width=9 * fine)
    pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS), dtype=np.float64)
    noise = np.random.default_rng(5).normal(0, 5, (size[1], size[0], 1))  # as a camera's
    with io.BytesIO() as buffer:
        Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
        data = buffer.getvalue()
    return Photo(name="car", data=data, width=900, height=600, click=(0.711, 0.733), box=(0.19, 0.4, 0.85, 0.9))


def read_coco(folder: Path, name: str) -> Photo:
    """Return a photo of a COCO-style folder whose single object fills a good part of it."""
    (image,) = (image for image in read_annotations(folder).images if image.path.stem == name)
    truth = image.masks[0].mask()
    rows, columns = np.flatnonzero(truth.any(axis=1)), np.flatnonzero(truth.any(axis=0))
    return Photo(
        name=name,
        data=image.path.read_bytes(),
        width=image.width,
        height=image.height,
        click=deepest(truth),
        box=(
            float(columns[0] / image.width),
            float(rows[0] / image.height),
            float((columns[-1] + 1) / image.width),
            float((rows[-1] + 1) / image.height),
        ),
        truth=truth,
    )


def turned(photo: Photo) -> Photo:
    """Return the photo as a phone held upright stores it: pixels lying on their side, and EXIF orientation 6."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise, before it is shown
    with Image.open(io.BytesIO(photo.data)) as upright, io.BytesIO() as buffer:
        upright.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", quality=92, exif=exif)
        return replace(photo, name=f"{photo.name}-turned", data=buffer.getvalue())
