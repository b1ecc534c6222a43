"""Corrections as tests need them: a box, drawn by hand, and what may differ."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from typing import Any

import numpy as np

from active_learning.corrections import Correction
from model.annotations import encode
from model.types import Click, Mask

HEIGHT, WIDTH = 40, 60


def box(left: int, top: int, right: int, bottom: int) -> Mask:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


def image(name: str = "a photo") -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def correction(region: str = "r1", mask: Mask | None = None, **changes: Any) -> Correction:
    mask = box(10, 10, 30, 30) if mask is None else mask
    given = {
        **{"project": "1", "annotation": 7, "region": region, "task": 3, "image": image()},
        **{"height": mask.shape[0], "width": mask.shape[1], "mask": encode(mask), "label": "wheel"},
        **{"granularity": 0.3, "phrase": "front wheel", "clicks": (Click(x=20.5, y=19.25, positive=True),)},
        **{"kind": "corrected", "proposed": encode(~mask), "adapter": "v0001-1a2b3c4d", "annotator": 4},
        **{"ground_truth": False, "updated_s": 1000.0},
    }
    return Correction(**(given | changes))


def annotation(number: int, version: int) -> list[Correction]:
    """Return three regions that say which version of the annotation they are of."""
    return [
        correction(
            f"r{place}",
            box(place, number % 30, place + 8, number % 30 + 2 + version),
            annotation=number,
            task=number,
            label=f"version {version}",
            updated_s=1000.0 + version,
        )
        for place in range(3)
    ]


def values(one: Correction) -> dict[str, Any]:
    return {field.name: getattr(one, field.name) for field in fields(one)}
