"""What encodes an image fastest: our encoder against plain torch, and every runtime that is installed."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.light.encoder import EncoderRuntime, OpenVinoEncoder, Seen, Tail, TorchEncoder, load_tail
from model.light.image_encoder import EncoderTail, ImageEncoder
from model.light.network import SIDE, MaskDecoder, PromptEncoder
from model.light.segmenter import LightSegmenter
from model.light.tail import Moved
from model.light.weights import IMAGE_ENCODER, MASK_DECODER, PROMPT_ENCODER, load_part
from model.metrics import iou
from model.segmenter import Segmenter, digest_of, load_segmenter, predict
from model.types import Click, Mask, Prompt, RGBImage
from tests.bench.photos import HEIGHT, WIDTH
from tests.bench.report import Row
from tests.bench.stage import WEIGHTS, Stage

_CPU = torch.device("cpu")
_REACH_S, _REACH_RATIO = 0.8, 1.8


class Runtime:
    """An encoder made of one function to features and an embedding, such as a network or an ONNX session."""

    def __init__(self, name: str, run: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self.name = name
        self._run = run

    def __call__(self, pixels: Tensor) -> Seen:
        """Return what it makes of pixels, in fp32."""
        with torch.inference_mode():
            features, embedding = self._run(pixels)
            return Seen(features.float(), embedding.float())

    def tail(self, moved: Moved) -> Tail:
        """Return the tail as torch runs it."""
        return load_tail(WEIGHTS, moved)

    def plain_tail(self) -> EncoderTail:
        """Return the base's tail."""
        return load_tail(WEIGHTS)


def _plain() -> ImageEncoder:
    """Return the network as loaded: plain torch fp32."""
    return load_part(ImageEncoder(), load_file(WEIGHTS), IMAGE_ENCODER)


def _with(runtime: EncoderRuntime) -> Segmenter:
    """Return the family's segmenter with another encoder in it."""
    tensors = load_file(WEIGHTS)
    prompt_encoder = load_part(PromptEncoder(), tensors, PROMPT_ENCODER)
    mask_decoder = load_part(MaskDecoder(), tensors, MASK_DECODER)
    return LightSegmenter(prompt_encoder, mask_decoder, runtime, digest_of(WEIGHTS.read_bytes()), _CPU)


def against_torch(stage: Stage) -> list[Row]:
    """Encode images by our encoder, by plain torch and by torch as we use it elsewhere, in turns in one process."""
    segmenters = {
        "plain": _with(Runtime("plain", _plain())),
        "exact": load_segmenter("light", WEIGHTS, device="cpu", encoder="exact"),
        "fast": load_segmenter("light", WEIGHTS, device="cpu", encoder="fast", compiled=stage.compiled),
    }
    images = [photo.pixels() for photo in stage.photos[: stage.count(8, 2)]]
    seconds = _in_turns(segmenters, images)
    plain, exact, fast = (float(np.median(seconds[name])) for name in ("plain", "exact", "fast"))
    return [
        Row(
            what=f"encode a new photo's pixels: ours against plain torch fp32, medians of {len(images)} in turns",
            reach=f"{_REACH_RATIO} times faster, under {_REACH_S} s",
            measured=f"{fast:.2f} s against {plain:.2f} s: {plain / fast:.2f} times",
            reached=plain / fast >= _REACH_RATIO and fast < _REACH_S,
        ),
        Row(
            what="against torch fp32 with channels_last (`GRACO_ENCODER=exact`)",
            measured=f"{exact:.2f} s: {exact / fast:.2f} times",
        ),
    ]


def _in_turns(segmenters: dict[str, Segmenter], images: list[RGBImage]) -> dict[str, list[float]]:
    """Return each one's seconds; all see an image before the next one comes, in an order that rotates."""
    names = list(segmenters)
    for segmenter in segmenters.values():
        segmenter.encode(images[0])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn, image in enumerate(images):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            segmenters[name].encode(image)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def runtimes(stage: Stage) -> list[Row]:
    """Compare all runtimes: seconds, and the IoU of their masks against torch fp32."""
    photos = stage.photos[: stage.count(4, 2)]
    images = [photo.pixels() for photo in photos]
    clicks = [_grid(stage.rng, stage.count(24, 6)) for _ in photos]
    segmenters: dict[str, Segmenter] = {}
    skipped = []
    for name, make in _offered(stage.folder):
        try:
            segmenters[name] = _with(make())
        except Exception as error:  # whatever a runtime raises where it is not at home
            skipped.append(Row(what=f"encoder by {name}", measured=f"skipped: {type(error).__name__}: {error}"[:200]))
    seconds = {name: float(np.median(taken)) for name, taken in _in_turns(segmenters, images).items()}
    reference, *_ = segmenters
    truth = _masks(segmenters[reference], images, clicks)
    rows = []
    for name, segmenter in segmenters.items():
        ious = np.array([iou(a, b) for a, b in zip(truth, _masks(segmenter, images, clicks), strict=True)])
        rows.append(
            Row(
                what=f"encoder by {name}",
                measured=f"{seconds[name]:.3f} s, {seconds[reference] / seconds[name]:.2f} times; masks' mean IoU "
                f"{ious.mean():.3f}, {np.mean(ious < 0.99):.1%} under 0.99",
            )
        )
    return rows + skipped


def _grid(rng: np.random.Generator, count: int) -> list[Click]:
    points = rng.uniform((0, 0), (WIDTH, HEIGHT), (count, 2))
    return [Click(x=float(x), y=float(y), positive=True) for x, y in points]


def _masks(segmenter: Segmenter, images: list[RGBImage], clicks: list[list[Click]]) -> list[Mask]:
    masks = []
    for image, here in zip(images, clicks, strict=True):
        encoded = segmenter.encode(image)
        masks += [predict(segmenter, encoded, Prompt(clicks=(click,))).best.mask for click in here]
    return masks


def _offered(folder: Path) -> Iterator[tuple[str, Callable[[], EncoderRuntime]]]:
    """Yield names and makers; the first is the reference."""
    compiled = folder / "compiled"
    yield "torch fp32", lambda: Runtime("plain", _plain())
    yield "torch fp32, channels_last", lambda: TorchEncoder(WEIGHTS, _CPU)
    yield "torch bf16 autocast", lambda: Runtime("bf16", _autocast(_plain()))
    yield "OpenVINO f32", lambda: OpenVinoEncoder(WEIGHTS, digest_of(WEIGHTS.read_bytes()), 0, compiled)
    for precision in ("f16", "bf16"):
        yield f"OpenVINO {precision}", partial(_openvino, compiled, precision)
    yield "onnxruntime f32", lambda: _onnxruntime(_plain())


def _autocast(encoder: ImageEncoder) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            seen: tuple[Tensor, ...] = encoder(pixels)
        return seen

    return run


def _openvino(compiled: Path, precision: str) -> EncoderRuntime:
    import openvino as ov

    exported = next(compiled.glob("*/encoder.xml"))  # the f32 one has written it
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    request = ov.Core().compile_model(exported, "CPU", config).create_infer_request()
    return Runtime(precision, lambda pixels: _tensors(request.infer([pixels.numpy()]).values()))


def _onnxruntime(encoder: ImageEncoder) -> EncoderRuntime:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        path = Path(folder) / "encoder.onnx"
        warnings.simplefilter(
            "ignore"
        )  # tracing speaks of window sizes and caches that become constants, as they shall
        torch.onnx.export(encoder, (torch.zeros(1, 3, SIDE, SIDE),), path, input_names=["pixels"], verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return Runtime("onnxruntime", lambda pixels: _tensors(session.run(None, {"pixels": pixels.numpy()})))


def _tensors(arrays: Iterable[npt.NDArray[np.float32]]) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(np.array(array)) for array in arrays)
