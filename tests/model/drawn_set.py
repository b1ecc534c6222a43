"""A drawn set on disk, and a segmenter that draws: what tests of the evaluation need, without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model.annotations import encode
from model.geometry import FloatMap
from model.segmenter import Encoded
from model.types import Mask, Prediction, Prompt, Proposal, Refusal, RGBImage

RADII = (12, 30, 60)  # of the painter's three masks


def disc(height: int, width: int, x: float, y: float, radius: float) -> Mask:
    rows, columns = np.mgrid[:height, :width]
    return (columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 <= radius**2


def scene_masks() -> dict[str, Mask]:
    """The true masks of the `scene` of conftest: disc, door, and the door's handle."""
    door = np.zeros((480, 640), bool)
    door[100:401, 420:561] = True
    rows, columns = np.mgrid[:480, :640]
    handle = ((columns - 540) / 10) ** 2 + ((rows - 250) / 10) ** 2 <= 1
    return {"disc": disc(480, 640, 200.5, 220.5, 100), "door": door, "handle": handle}


def write_set(folder: Path, scene: RGBImage, *, split: str = "val") -> Path:
    """Write the scene as a set in the shape of ../shared/data: two objects, one of them with a part."""
    (folder / "images").mkdir(parents=True)
    Image.fromarray(scene).save(folder / "images" / "scene.png")
    names = ["disc", "door", "handle"]
    masks = scene_masks()
    notes = []
    for number, name in enumerate(names, 1):
        counts = encode(masks[name])["counts"].decode()
        notes.append(
            {
                "id": number,
                "image_id": 1,
                "category_id": number,
                "parent_id": 2 if name == "handle" else None,
                "level": "part" if name == "handle" else "object",
                "origin": "human",
                "area": int(masks[name].sum()),
                "bbox": [0, 0, 1, 1],
                "iscrowd": 0,
                "segmentation": {"size": [480, 640], "counts": counts},
                "support": 1 if name == "disc" else 3,
            }
        )
    content = {
        "images": [{"id": 1, "file_name": "scene.png", "width": 640, "height": 480, "split": split}],
        "categories": [{"id": n, "name": name, "supercategory": ""} for n, name in enumerate(names, 1)],
        "annotations": notes,
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@dataclass
class Painter:
    """Paints a disc around the last positive click: larger for a higher level; a phrase may be refused."""

    steps: int = 0
    knows: tuple[str, ...] = ("disc", "door", "handle")
    version: str = "painter-1"
    encoding: str = "painter-1-none"
    adapter: str | None = None
    first_step_serves_all_levels: bool = True
    phrases_are_names: bool = True
    costly_to_encode: bool = True

    def with_adapter(self, adapter: Path | None) -> Painter:
        return self

    def understood(self, prompt: Prompt) -> Prompt:
        return prompt

    def probability(self, encoded: Encoded, prompt: Prompt, state: object) -> FloatMap:
        return self.render(encoded, prompt, state).best.mask.astype(np.float32)

    def refine(self, encoded: Encoded, prompt: Prompt, state: object) -> object:
        return state

    def foresee(self, encoded: Encoded, prompt: Prompt, state: object) -> None:
        return None

    def base_offers(self, encoded: Encoded, prompt: Prompt, state: object) -> Iterator[Proposal]:
        yield from self.render(encoded, prompt, state, proposals=len(RADII)).proposals

    def encode(self, image: RGBImage) -> Encoded:
        return Encoded({"embedding": torch.zeros(1, 1, 1, 1)}, image.shape[0], image.shape[1])

    def step(self, encoded: Encoded, prompt: Prompt, state: object) -> object:
        self.steps += 1
        if prompt.phrase is not None and prompt.phrase not in self.knows:
            raise Refusal("no such word")
        return "painted"

    def render(self, encoded: Encoded, prompt: Prompt, state: object, *, proposals: int = 1) -> Prediction:
        click = next(click for click in reversed(prompt.clicks) if click.positive)
        radii = RADII[:proposals] if prompt.granularity is None else (prompt.granularity.level * 10,)
        if proposals == 1 and prompt.granularity is None:
            radii = (RADII[1],)
        return Prediction(
            proposals=tuple(
                Proposal(mask=disc(encoded.height, encoded.width, click.x, click.y, radius), score=0.5)
                for radius in radii
            )
        )
