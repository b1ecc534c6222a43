"""A task's image: RGB pixels as the annotator's browser shows them, and an id that is the digest of its bytes.

Pixels are uint8 H x W x 3, turned the way Chromium turns them, because Label Studio's percentages and `original_width`
are those of the picture in the browser. Measured with Chromium 156: EXIF orientation counts in JPEG, and in PNG when it
comes before the pixels; rotation boxes count in AVIF; EXIF in WebP and orientation in XMP do not count.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from model.types import Refusal, RGBImage

log = logging.getLogger(__name__)

_PLUGINS = (  # imported, these stand in Image.OPEN; no other format is ever tried
    *(JpegImagePlugin, PngImagePlugin, WebPImagePlugin, BmpImagePlugin),
    *(GifImagePlugin, TiffImagePlugin, AvifImagePlugin),
)
_FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF") if name in Image.OPEN)
_TURNED = ("JPEG", "MPO", "PNG", "AVIF")  # Pillow turns TIFF by itself
_ORIENTATION = 0x0112  # EXIF tag, 1..8
_BAND = 2**18  # pixels converted at a time, so that a large image is never held twice
_WHITE = (255, 255, 255)
_ONE_AT_A_TIME = threading.Lock()  # memory of one image, and warnings filters belong to the whole process

_Levels = npt.NDArray[np.float64]


class Fetches(Protocol):
    """Where an image's bytes come from; `ml_backend.fetch.Fetcher` outside of tests."""

    def fetch(self, uri: str, task_id: int | None) -> bytes:
        """Return the bytes behind an address."""


@dataclass(frozen=True, slots=True)
class TaskImage:
    """Where a task's image is: the task (for storages that Label Studio resolves) and the address in its data."""

    task_id: int | None
    uri: str


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What is remembered of an image: its id and its size in pixels, as shown."""

    id: str
    width: int
    height: int


@dataclass(frozen=True, slots=True, eq=False)
class LoadedImage:
    """An image's id (hex SHA-256 of its bytes), its bytes and its pixels."""

    id: str
    data: bytes  # as received
    pixels: RGBImage  # H, W, 3; not to be written into

    @property
    def width(self) -> int:
        """Pixels from left to right."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Pixels from top to bottom."""
        return int(self.pixels.shape[0])


def decode_image(data: bytes, *, max_pixels: int) -> RGBImage:
    """Return the pixels of an image file, uint8, contiguous, H x W x 3, turned as a browser shows them.

    Transparent pixels are laid on white, as on Label Studio's page. 16 bits become 8 by their upper half; other numbers
    (32 bits, floating point), which no browser shows, are stretched from their smallest to their largest value. Of an
    animation it is the first picture. Colour profiles are not applied.

    Args:
        data: a JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF file.
        max_pixels: width x height above which nothing is decoded.

    Raises:
        Refusal: it is no such file, damaged, or too large.
    """
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged metadata, mostly; what matters is whether pixels come out
        try:
            image = _open(data)
            _check_pixels(image, max_pixels)
            orientation = _orientation(image)  # before the pixels: what a browser has read by then
            image.load()
            _check_pixels(image, max_pixels)  # a first frame may widen the canvas
            return _turn(_pixels(image), orientation)
        except Refusal:
            raise
        except Image.DecompressionBombError:  # some formats ask Pillow's own limit, 179 megapixels
            raise Refusal(
                f"the image has more than {min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels)) / 1e6:.0f} "
                "megapixels; make it smaller"
            ) from None
        except Exception as error:  # decoders raise all kinds for bytes they do not like
            log.debug("an image of %d bytes cannot be decoded", len(data), exc_info=True)
            raise Refusal(
                f"the image file is damaged or incomplete ({type(error).__name__}: {str(error)[:100]}); "
                "open and save it again with an image editor, and import that"
            ) from None


def is_plain(data: bytes) -> bool:
    """Whether any program reads the pixels of an image file as we do: JPEG or PNG, upright, 8 bits of grey or RGB.

    Args:
        data: a file that `decode_image` reads.
    """
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data)
        return (
            image.format in ("JPEG", "PNG")
            and image.mode in ("RGB", "L")
            and not image.has_transparency_data
            and _orientation(image) == 1
        )


def to_png(pixels: RGBImage) -> bytes:
    """Return pixels, uint8 H, W, 3, as a PNG file."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def check_size(image: LoadedImage | ImageInfo, original_width: int, original_height: int) -> None:
    """Refuse an image whose size is not the one the editor shows.

    Raises:
        Refusal: the sizes differ; clicks would land elsewhere.
    """
    if (image.width, image.height) == (original_width, original_height):
        return
    if (image.height, image.width) == (original_width, original_height):
        cause = "one of them is turned, as by an orientation (EXIF) that not all programs heed: save the image upright"
    else:
        cause = "the file was probably replaced after the task was opened, or differs by who asks: reload the task"
    raise Refusal(
        f"the image has {image.width} x {image.height} pixels here, but {original_width} x {original_height} "
        f"in Label Studio; {cause}"
    )


class ImageSource:
    """Loads images for tasks and remembers which image stands behind which address."""

    def __init__(
        self,
        fetcher: Fetches,
        *,
        max_pixels: int,
        ttl_s: float,
        remember: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take where bytes come from, and the limits.

        Args:
            fetcher: gives bytes for an address.
            max_pixels: width x height above which nothing is decoded.
            ttl_s: how long an address is taken to lead to the same image; 0: never.
            remember: addresses remembered; the one unused for longest goes first.
            clock: seconds that only grow.
        """
        self._fetcher = fetcher
        self._max_pixels = max_pixels
        self._ttl_s = ttl_s
        self._remember = remember
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[int | None, str], tuple[ImageInfo, float]] = OrderedDict()

    def identify(self, task_id: int | None, uri: str) -> ImageInfo | None:
        """Return id and size of a task's image if it was loaded not long ago, without asking anybody."""
        key = _key(task_id, uri)
        with self._lock:
            if key not in self._known:
                return None
            info, until = self._known[key]
            if self._clock() >= until:
                del self._known[key]
                return None
            self._known.move_to_end(key)
            return info

    def load(self, task_id: int | None, uri: str) -> LoadedImage:
        """Fetch and decode a task's image.

        Raises:
            Refusal: it cannot be had, or cannot be read.
        """
        asked = self._clock()
        data = self._fetcher.fetch(uri, task_id)
        image = LoadedImage(hashlib.sha256(data).hexdigest(), data, decode_image(data, max_pixels=self._max_pixels))
        key = _key(task_id, uri)
        with self._lock:
            self._known[key] = ImageInfo(image.id, image.width, image.height), asked + self._ttl_s
            self._known.move_to_end(key)
            while len(self._known) > self._remember:
                self._known.popitem(last=False)
        return image

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._known.clear()


def _key(task_id: int | None, uri: str) -> tuple[int | None, str]:
    """Two projects may give one storage address two meanings, hence the task; an image inside its address is long."""
    if uri[:5].lower() == "data:":
        uri = "data:" + hashlib.sha256(uri.encode("utf-8", "surrogatepass")).hexdigest()
    return task_id, uri


def _open(data: bytes) -> ImageFile.ImageFile:
    """Read a file's header; by our own list, since Pillow's `open` has its own limit of pixels, global and fixed."""
    for name in _FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(data[:16]) is True:
            return factory(BytesIO(data), "")
    raise Refusal(
        f"the file is {_guess(data)}, not an image we read ({', '.join(_FORMATS)}); convert it and import that"
    )


def _guess(data: bytes) -> str:
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data:
        return "empty"
    if b"<svg" in head:
        return "an SVG drawing"
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page, perhaps one to log in"
    if head.startswith(b"%pdf"):
        return "a PDF"
    if head[4:8] == b"ftyp":
        return "HEIC or a video"
    if data[128:132] == b"DICM":
        return "DICOM"
    return "of another kind" if b"\0" in data[:1024] else "text"


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise Refusal(
            f"the image has {image.width} x {image.height} pixels, more than {max_pixels / 1e6:g} megapixels; "
            "make it smaller or raise GRACO_IMAGE_MAX_MEGAPIXELS"
        )


def _orientation(image: ImageFile.ImageFile) -> int:
    """Return the orientation a browser heeds, 1..8; not Pillow's `exif_transpose`, which heeds more."""
    if image.format not in _TURNED or not isinstance(exif := image.info.get("exif"), bytes):
        return 1
    tags = Image.Exif()
    try:
        tags.load(exif)
        value = tags.get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(pixels: RGBImage, orientation: int) -> RGBImage:
    """Undo how the camera was held: EXIF orientation 1..8 to upright."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _pixels(image: Image.Image) -> RGBImage:
    pixels = np.empty((image.height, image.width, 3), np.uint8)  # H, W, 3
    convert = _stretch(image) if image.mode in ("I", "F") else _upper_half if image.mode.startswith("I;16") else _flat
    for top, band in _bands(image):
        converted = convert(band)
        pixels[top : top + band.height] = converted if converted.ndim == 3 else converted[..., None]
    return pixels


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _flat(band: Image.Image) -> npt.NDArray[np.uint8]:
    """Return 8-bit colours, H, W, 3, of any mode Pillow converts; what is transparent lies on white."""
    if not band.has_transparency_data:
        return np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    colours = band.convert("RGBA")
    page = Image.new("RGB", band.size, _WHITE)
    page.paste(colours, mask=colours.getchannel("A"))
    return np.asarray(page)


def _upper_half(band: Image.Image) -> npt.NDArray[np.uint8]:
    return (np.asarray(band) >> 8).astype(np.uint8)  # H, W


def _stretch(image: Image.Image) -> Callable[[Image.Image], npt.NDArray[np.uint8]]:
    """Return a conversion that takes the smallest number of the whole image to 0 and its largest to 255."""
    low, high = np.inf, -np.inf
    for _, band in _bands(image):
        numbers = np.asarray(band, np.float64)
        numbers = numbers[np.isfinite(numbers)]
        if numbers.size:
            low, high = min(low, float(numbers.min())), max(high, float(numbers.max()))

    def convert(band: Image.Image) -> npt.NDArray[np.uint8]:
        numbers: _Levels = np.asarray(band, np.float64)  # H, W
        if not high > low:
            return np.zeros(numbers.shape, np.uint8)
        finite = np.nan_to_num(numbers, nan=low, posinf=high, neginf=low)
        return np.rint((finite - low) / (high - low) * 255).astype(np.uint8)

    return convert
