"""Our brush RLE encoder against the SDK's, on masks of 12 megapixels."""

from __future__ import annotations

import time

import cv2
import numpy as np

from ml_backend import brush
from model.types import Mask
from tests.bench.report import Row
from tests.bench.stage import Stage

_HEIGHT, _WIDTH = 3000, 4000
_REACH = 8.0


def brush_encoding(stage: Stage) -> list[Row]:
    """Encode a smooth and a ragged mask by both, in turns; the bytes must agree."""
    from label_studio_sdk.converter.brush import mask2rle

    rows = []
    for name, mask in (("smooth", _blobs(stage.rng, 400)), ("ragged", _blobs(stage.rng, 12))):
        ours, theirs = [], []
        for _ in range(stage.count(7, 2)):
            start = time.perf_counter()
            rle = brush.encode(mask)
            between = time.perf_counter()
            expected = mask2rle(mask.astype(np.uint8) * 255)
            ours.append(between - start)
            theirs.append(time.perf_counter() - between)
            if rle != expected:
                raise RuntimeError(f"the {name} mask is encoded otherwise than by the SDK: times mean nothing")
        here, there = 1000 * float(np.median(ours)), 1000 * float(np.median(theirs))
        size = f"{_HEIGHT}x{_WIDTH}, {name} ({len(rle) / 1e6:.2f} MB)"
        rows.append(
            Row(
                what=f"brush RLE encode at {size}, against label_studio_sdk",
                reach=f"{_REACH:.0f} times faster",
                measured=f"{here:.1f} ms against {there:.0f} ms: {there / here:.1f} times",
                reached=there / here >= _REACH,
            )
        )
    return rows


def _blobs(rng: np.random.Generator, size: int) -> Mask:
    """Return random blobs of about `size` pixels."""
    coarse = rng.normal(size=(-(-_HEIGHT // size) + 1, -(-_WIDTH // size) + 1)).astype(np.float32)
    field = cv2.resize(coarse, (_WIDTH, _HEIGHT), interpolation=cv2.INTER_CUBIC)
    return np.asarray(field > 0.3)
