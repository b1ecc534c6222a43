"""A click of SimpleClick ViT-B, against the published way: python -m tests.bench.graco [--photos N] [--clicks N]

The published way is two fp32 passes of torch, one for the image and one for its mirror image, attention written out and
maps joined before the head's convolution. All ways are timed in turns on the same clicks, which the light model's robot
chose on photos of ../shared/data, at levels in turn. Weights are the synthetic ones of ../shared/parity (scaled so that
masks are neither all nor nothing), with the published adapter: speed and rounding do not depend on what they mean.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from model.adapter import write_adapter
from model.annotations import read_annotations
from model.evaluation.protocol import ClickChain
from model.graco import weights
from model.graco.inputs import LowRank
from model.graco.pickles import read_checkpoint
from model.graco.runtime import load_network, make_runtime
from model.graco.segmenter import GracoSegmenter
from model.metrics import iou
from model.segmenter import BUNDLED, digest_of, load_segmenter
from model.types import Click, Granularity, Prompt
from tests.bench.stage import ROOT
from tests.model.graco.synthetic import published_adapter, synthetic_base


class PublishedWay:
    """A runtime as the published code computes: each half of a pair by itself."""

    name = "published way"

    def __init__(self, base: Path) -> None:
        self.network, self.architecture = load_network(base)
        self.network = copy.deepcopy(self.network)
        for block in self.network.backbone.blocks:
            block.attn.forward = MethodType(_attention, block.attn)
        self.network.head.forward = MethodType(_head, self.network.head)  # type: ignore[method-assign]

    def __call__(self, image: Tensor, maps: Tensor, signals: Tensor, low_rank: LowRank) -> Tensor:
        """Return the logits of a batch, row by row."""
        with torch.inference_mode():
            rows = zip(image, maps, signals, strict=True)
            return torch.cat([self.network(i[None], m[None], s[None], low_rank) for i, m, s in rows])


def _attention(self: Any, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
    qkv = F.linear(x, weight, torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]))
    delta = torch.cat([up[0] @ down[0], torch.zeros_like(self.k_proj.weight), up[1] @ down[1]])
    batch, tokens, width = x.shape
    qkv = (qkv + x @ delta.T).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
    attention = (qkv[0] @ qkv[1].transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
    out: Tensor = self.proj((attention @ qkv[2]).transpose(1, 2).reshape(batch, tokens, width))
    return out


def _head(self: Any, maps: list[Tensor]) -> Tensor:
    size = maps[0].shape[2:]
    resized = [
        F.interpolate(F.relu(conv(x)), size, mode="bilinear", align_corners=False)
        for x, conv in zip(maps, self.convs, strict=True)
    ]
    out: Tensor = self.conv_seg(F.relu(self.fusion_conv(torch.cat(resized, 1))))
    return out


def base_and_adapter(folder: Path) -> tuple[Path, Path]:
    """Write the synthetic base, its masks neither all nor nothing, and the published adapter for it."""
    tensors = synthetic_base()
    architecture = weights.architecture_of(tensors)
    base, adapter = folder / "weights.safetensors", folder / "adapter.safetensors"
    weights.write_base(base, weights.ours(tensors), architecture)
    found = weights.adapter_from_published(
        read_checkpoint(published_adapter()).tensors, architecture, digest_of(base.read_bytes())
    )
    write_adapter(adapter, card=found.card, plain=found.plain, lora=found.lora, exact=True)
    return base, adapter


def real_clicks(photos: int, clicks: int) -> list[tuple[np.ndarray[Any, Any], tuple[Click, ...]]]:
    """Return photos, and on each the clicks of the light model's robot on one of its objects."""
    light = load_segmenter("light", BUNDLED, device="cpu", encoder="exact")
    sets = [read_annotations(ROOT.parent / "shared" / "data" / name) for name in ("coco-mval", "car-parts")]
    found = []
    for image in [image for each in sets for image in each.images[:: max(1, len(each.images) * 2 // photos)]][:photos]:
        pixels = image.pixels()
        chain = ClickChain(
            segmenter=light, encoded=light.encode(pixels), truth=max(image.masks, key=lambda m: m.area).mask()
        )
        chain.run(clicks)
        found.append((pixels, chain._clicks))
    return found


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.graco", description=__doc__)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--clicks", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, adapter = base_and_adapter(folder)
        digest = digest_of(base.read_bytes())
        work = real_clicks(options.photos, options.clicks)

        def runtime(speed: Any, compiled: Path | None) -> Any:
            where = {"device": torch.device("cpu"), "size": 448, "threads": 0}
            return make_runtime(base, digest=digest, speed=speed, compiled=compiled, **where)  # type: ignore[arg-type]

        ways: dict[str, Any] = {
            "published way": PublishedWay(base),
            "exact (OpenVINO fp32)": runtime("exact", folder / "compiled"),
            "fast (OpenVINO, ViT in bf16)": runtime("fast", folder / "compiled"),
            "torch fp32": runtime("exact", None),
        }
        segmenters = {way: GracoSegmenter(run, digest, 448).with_adapter(adapter) for way, run in ways.items()}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        agreement: dict[str, list[float]] = {way: [] for way in ways}
        least: dict[str, float] = {}
        for number, (pixels, clicks) in enumerate(work):
            level = Granularity(1 + number % 10)
            states: dict[str, Any] = dict.fromkeys(ways)
            for n in range(1, len(clicks) + 1):
                prompt = Prompt(clicks=clicks[:n], granularity=level)
                exact = None
                for way, segmenter in segmenters.items():
                    encoded = segmenter.encode(pixels)
                    start = time.perf_counter()
                    states[way] = segmenter.step(encoded, prompt, states[way])
                    mask = segmenter.render(encoded, prompt, states[way]).best.mask
                    seconds[way].append(time.perf_counter() - start)
                    exact = mask if exact is None else exact
                    agreement[way].append(iou(mask, exact) if mask.any() or exact.any() else 1.0)
                    if agreement[way][-1] == min(agreement[way]):
                        least[way] = float(exact.mean())
        reference = float(np.median(seconds["published way"]))
        print(f"{len(seconds['published way'])} clicks on {len(work)} photos")
        for way in ways:
            figures = np.array(seconds[way])
            print(
                f"{way}: {np.median(figures):.3f} s, {np.median(figures) / reference:.2f} x; IoU to the published "
                f"mask: mean {np.mean(agreement[way]):.4f}, median {np.median(agreement[way]):.4f}, "
                f"least {min(agreement[way]):.4f} (of a mask of {least[way]:.2%} of the photo)"
            )


if __name__ == "__main__":
    main()
