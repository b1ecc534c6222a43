"""Photos to click on, 3000 x 2000, with a true mask in each; and Label Studio's part in serving them.

They are photos of ../shared/data enlarged, with grain so that their files are as heavy to decode as a camera's; drawn
scenes where that folder is missing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from model.annotations import read_annotations
from model.robot import next_click
from model.types import Click, Mask, RGBImage

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
WIDTH, HEIGHT = 3000, 2000
_UPLOADS = "/data/upload/1/"
_COPY = "~"  # between a photo's name and the number of its copy


@dataclass(frozen=True, slots=True, eq=False)
class Photo:
    """A JPEG of WIDTH x HEIGHT and one object in it."""

    path: Path
    truth: Mask  # at the resolution it was annotated at

    def uri(self, copy: int = 0) -> str:
        """Return its address as a Label Studio upload; each `copy` is a file with a digest of its own."""
        return f"{_UPLOADS}{self.path.stem}{_COPY}{copy}{self.path.suffix}"

    def pixels(self) -> RGBImage:
        """Return the decoded photo."""
        return np.asarray(Image.open(self.path))

    def click_inside(self, rng: np.random.Generator) -> Click:
        """Return a positive click somewhere on the object, in pixels of the photo."""
        rows, columns = np.nonzero(self.truth)
        index = rng.integers(rows.size)
        return self._enlarged(columns[index] + rng.random(), rows[index] + rng.random(), positive=True)

    def correction(self, mask: Mask, earlier: list[Click]) -> Click | None:
        """Return what an annotator would click next, seeing `mask` (HEIGHT x WIDTH); None: nothing is left to mend."""
        rows, columns = self.truth.shape
        small = np.asarray(Image.fromarray(mask).resize((columns, rows), Image.Resampling.NEAREST))
        before = [Click(x=c.x * columns / WIDTH, y=c.y * rows / HEIGHT, positive=c.positive) for c in earlier]
        click = next_click(self.truth, small, before)
        return None if click is None else self._enlarged(click.x, click.y, positive=click.positive)

    def _enlarged(self, x: float, y: float, *, positive: bool) -> Click:
        rows, columns = self.truth.shape
        return Click(x=float(x) * WIDTH / columns, y=float(y) * HEIGHT / rows, positive=positive)


@dataclass(frozen=True, slots=True, eq=False)
class Annotated:
    """A true mask and the photo it belongs to."""

    photo: Path
    mask: Mask


def annotated(data_set: str, *, split: str | None = None, level: str = "object") -> Iterator[Annotated]:
    """Yield the masks of a data set under ../shared/data, in the order of its file; nothing where it is missing."""
    folder = SHARED / data_set
    if not (folder / "annotations.json").is_file():
        return
    for image in read_annotations(folder, split=split).images:
        yield from (Annotated(image.path, mask.mask()) for mask in image.masks if mask.level == level)


def make_photos(folder: Path, count: int) -> list[Photo]:
    """Write `count` different photos into `folder`."""
    rng = np.random.default_rng(3)
    grain = rng.normal(0, 5, (HEIGHT, WIDTH, 1)).astype(np.float32)
    photos = []
    for index, (image, truth) in enumerate(islice(_scenes(rng), count)):
        enlarged = np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        enlarged = enlarged + np.roll(grain, (37 * index, 91 * index), axis=(0, 1))
        photo = Photo(folder / f"photo-{index:03}.jpg", truth)
        Image.fromarray(np.clip(enlarged, 0, 255).astype(np.uint8)).save(photo.path, quality=92)
        photos.append(photo)
    return photos


def _scenes(rng: np.random.Generator) -> Iterator[tuple[Image.Image, Mask]]:
    """Yield pictures of about 3:2 with one object each, without end: the same ones come again a little shifted."""
    known = {
        one.photo: one
        for one in annotated("coco-mval")
        if 1.4 < one.mask.shape[1] / one.mask.shape[0] < 1.6 and one.mask.mean() > 0.02
    }
    shift = 0
    while known:
        for one in known.values():
            image = Image.open(one.photo).convert("RGB")
            yield image.crop((shift, 0, *image.size)), one.mask[:, shift:]
        shift += 8
    while True:
        yield _drawn(rng)


def _drawn(rng: np.random.Generator) -> tuple[Image.Image, Mask]:
    """Return a disc on a lawn."""
    y, x = np.mgrid[:400, :600]
    image = Image.fromarray(np.stack([90 + x * 0.03, 140 + y * 0.05, 80 + x * 0.02], axis=-1).astype(np.uint8))
    left, top, size = rng.integers(0, 300), rng.integers(0, 150), rng.integers(80, 240)
    box = (int(left), int(top), int(left + size), int(top + size))
    ImageDraw.Draw(image).ellipse(box, fill=(190, 40, 30))
    truth = Image.new("1", image.size)
    ImageDraw.Draw(truth).ellipse(box, fill=1)
    return image, np.array(truth)


class FileServer:
    """Stands for Label Studio where the backend fetches images."""

    def __init__(self, folder: Path) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                name, _, copy = self.path.removeprefix(_UPLOADS).removesuffix(".jpg").partition(_COPY)
                path = folder / f"{Path(name).name}.jpg"
                data = path.read_bytes() + copy.encode() if path.is_file() else b""
                self.send_response(200 if data else 404)
                self.send_header("Content-Type", "image/jpeg")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @cached_property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
