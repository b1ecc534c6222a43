"""The training of a `graco` adapter's level branch: one loop, from lessons to LoRA matrices and a level embedding.

The base stays as it is, and so does the phrase branch. A step takes a few lessons: a part of a photo, squeezed to the
network's input as its predictor squeezes what it looks at, with a click in one of its masks; in most passes the answer
is corrected by up to three further clicks on the network's own errors, and the answer to the last of them counts.
Lessons run in small passes whose gradients make the step, and blocks keep no activations but make them anew, so that
ViT-B trains in 2.5 GB (python -m tests.bench.graco_training).

Sources: GraCo (arXiv 2405.00587) and its published training: LoRA on Q and V, Adam at 5e-4, the normalised focal loss
alone, three further clicks; SimpleClick (arXiv 2210.11006) and RITM (arXiv 2102.06583) for iterative clicks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from active_learning.dataset import Sampler, soft_levels
from active_learning.training_run import Course, Figures, Progress, TrainingRun, seeded
from model.adapter import AdapterFile, attach, load_lora, lora_state
from model.geometry import extent
from model.graco.inputs import click_disks, normalise
from model.graco.network import SimpleClick
from model.graco.weights import ALPHA, LEVEL, LEVEL_EMBEDDING, RANK
from model.losses import normalised_focal
from model.robot import next_click, sample_click
from model.types import LEVELS, Click, Mask


@dataclass(frozen=True, slots=True, kw_only=True)
class GracoCourse(Course):
    """How the level branch is trained; every value is part of the recipe."""

    clicks: int = 2  # lessons of one pass
    batch: int = 4  # lessons of a step
    size: int = 448  # pixels, side of the network's input
    further: int = 3  # clicks on errors at most
    whole: float = 0.5  # share of lessons that show the whole photo, as the predictor looks for a first click
    widest: float = 3.0  # of the others: the part that is seen, in sides of the mask's box
    rank: int = RANK
    alpha: int = ALPHA
    learning_rate: float = 5e-4
    weight_decay: float = 0.0


class SteeredNetwork(nn.Module):
    """SimpleClick's network with the level branch attached to it and the level embedding beside it."""

    def __init__(self, network: SimpleClick, adapter: AdapterFile, config: GracoCourse) -> None:
        """Freeze `network`, attach the branch to it in place, and begin where `adapter` is.

        Raises:
            Refusal: the adapter does not fit the network.
        """
        super().__init__()
        self.network = network.requires_grad_(False)
        with seeded(config.seed):
            attach(network, LEVEL, rank=config.rank, alpha=config.alpha)
        load_lora(network, LEVEL, adapter.lora[LEVEL])
        self.levels = nn.Parameter(adapter.plain[LEVEL_EMBEDDING].clone())  # 10, width

    def forward(self, image: Tensor, maps: Tensor, level: Tensor) -> Tensor:
        """Return logits B, H, W; `level` (B) is 0 .. 9, the others as `SimpleClick.forward` takes them."""
        logits: Tensor = self.network(image, maps, self.levels[level], checkpointed=True)[:, 0]
        return logits

    def adapter(self, begun: AdapterFile) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Return plain tensors and matrices of what was trained, with all that `begun` has beside."""
        plain = begun.plain | {LEVEL_EMBEDDING: self.levels.detach().float().cpu().clone()}
        return plain, begun.lora | {LEVEL: lora_state(self.network, LEVEL)}


def untrained(width: int, depth: int, base: str, *, seed: int = 0) -> AdapterFile:
    """Return the adapter that changes nothing, to begin from where a base has none.

    Args:
        width: of the base's tokens.
        depth: its blocks.
        base: digest of its weights.
        seed: draws the matrices that are not zero.
    """
    draw, lora = torch.Generator().manual_seed(seed), {}
    for block in range(depth):
        for part in ("q_proj", "v_proj"):
            name = f"backbone.blocks.{block}.attn.{part}"
            lora[f"{name}.lora_A.weight"] = torch.randn(RANK, width, generator=draw) / math.sqrt(3 * width)
            lora[f"{name}.lora_B.weight"] = torch.zeros(width, RANK)
    card = {"base": base, "rank": RANK, "alpha": ALPHA}
    return AdapterFile(card, {LEVEL_EMBEDDING: torch.zeros(LEVELS, width)}, {LEVEL: lora})


def fine_tune(
    config: GracoCourse,
    network: SteeredNetwork,
    sampler: Sampler,
    folder: Path,
    *,
    recipe: str = "",
    before_step: Callable[[], None] = lambda: None,
    report: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Train `network` in place; at the end it holds the averaged weights.

    Args:
        config: the recipe.
        network: where to begin.
        sampler: where lessons come from.
        folder: gets `checkpoint.pt` and TensorBoard's files; a checkpoint that is there is gone on from.
        recipe: names what decides the lessons beside `config`; a checkpoint of another one is refused.
        before_step: called before every pass; may wait, and what it raises is raised.
        report: called after every `log_every` steps.

    Raises:
        BadCheckpoint: the checkpoint is damaged, or belongs to another recipe.
    """
    accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision=config.precision)
    run = TrainingRun(config, network, accelerator, recipe)
    start = run.resume(folder / "checkpoint.pt")
    with closing(Figures(config, folder, start=start, name=LEVEL, writes=accelerator.is_main_process)) as figures:
        for step in range(start, config.steps):
            seen = {"loss": 0.0, "IoU": 0.0}
            for first in range(0, config.batch, config.clicks):
                before_step()
                lessons = [_lesson(config, sampler, run.rng) for _ in range(min(config.clicks, config.batch - first))]
                share = len(lessons) / config.batch
                with accelerator.autocast():
                    loss, iou = _teach(config, run.model, lessons, run.rng, accelerator.device)
                accelerator.backward(loss * share)
                seen["loss"] += share * float(loss.detach())
                seen["IoU"] += share * iou
            seen["gradient"] = run.update(step)
            if (progress := figures.add(step, config.batch, seen)) is not None:
                report(progress)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                run.save(folder / "checkpoint.pt", step + 1)
    run.keep_average()


@dataclass(frozen=True, slots=True, eq=False)
class _Lesson:
    """A click in a mask of what is seen of a photo."""

    image: Tensor  # 3, size, size, as the network takes it
    truth: Mask  # size, size
    level: int  # row of the level embedding, 0 .. 9
    clicks: list[Click]


def _lesson(config: GracoCourse, sampler: Sampler, rng: np.random.Generator) -> _Lesson:
    photo, index = sampler.draw_mask(rng)
    mask, pixels = photo.mask(index), photo.pixels()
    part = _whole(mask) if rng.random() < config.whole else _around(mask, config.widest, rng)
    square = (config.size, config.size)
    seen = cv2.resize(pixels[part], square, interpolation=cv2.INTER_LINEAR)
    covered = cv2.resize(mask[part].astype(np.float32), square, interpolation=cv2.INTER_AREA)
    truth = covered > 0.5
    if not truth.any():  # as fine as a hair
        truth = covered > 0
    if rng.random() < 0.5:
        seen, truth = seen[:, ::-1], truth[:, ::-1]
    seen, truth = np.ascontiguousarray(seen), np.ascontiguousarray(truth)
    levels, weights = zip(*soft_levels(float(photo.shares[index])), strict=True)
    level = int(rng.choice(levels, p=np.array(weights) / sum(weights)))
    click = _click(config, truth, np.zeros_like(truth), rng, [])
    assert click is not None  # the mask is not empty
    image = normalise(torch.from_numpy(seen).permute(2, 0, 1).float() / 255)
    return _Lesson(image, truth, level, [click])


def _click(
    config: GracoCourse, truth: Mask, mask: Mask, rng: np.random.Generator, earlier: list[Click]
) -> Click | None:
    if rng.random() < config.central:
        return next_click(truth, mask, earlier)
    return sample_click(truth, mask, rng, earlier)


Part = tuple[slice, slice]  # rows and columns of a photo


def _whole(mask: Mask) -> Part:
    return slice(0, mask.shape[0]), slice(0, mask.shape[1])


def _around(mask: Mask, widest: float, rng: np.random.Generator) -> Part:
    """Return a part of the photo with the mask somewhere in it: its box, wider by a factor drawn up to `widest`."""
    wider = math.exp(rng.uniform(0, math.log(widest)))

    def along(held: slice, size: int) -> slice:
        length = min(size, math.ceil((held.stop - held.start) * wider))
        start = int(rng.integers(max(0, held.stop - length), min(held.start, size - length) + 1))
        return slice(start, start + length)

    rows, columns = extent(mask)
    return along(rows, mask.shape[0]), along(columns, mask.shape[1])


def _teach(
    config: GracoCourse, model: nn.Module, lessons: list[_Lesson], rng: np.random.Generator, device: torch.device
) -> tuple[Tensor, float]:
    """Return the loss of the answers to the last clicks, and their mean IoU."""
    images = torch.stack([lesson.image for lesson in lessons]).to(device)
    levels = torch.tensor([lesson.level for lesson in lessons], device=device)
    truth = torch.stack([torch.from_numpy(lesson.truth) for lesson in lessons]).to(device)
    clicks = [list(lesson.clicks) for lesson in lessons]
    previous = torch.zeros(len(lessons), 1, config.size, config.size)
    for _ in range(int(rng.integers(config.further + 1))):
        with torch.no_grad():
            logits = model(images, _maps(config, previous, clicks).to(device), levels).float().cpu()
        previous = logits.sigmoid()[:, None]
        for lesson, answer, placed in zip(lessons, logits, clicks, strict=True):
            click = _click(config, lesson.truth, (answer > 0).numpy(), rng, placed)
            if click is not None:
                placed.append(click)
    logits = model(images, _maps(config, previous, clicks).to(device), levels).float()
    loss = normalised_focal(logits, truth.float(), torch.ones_like(logits[:1])).mean()
    found = logits.detach() > 0
    ious = (found & truth).sum((-1, -2)) / (found | truth).sum((-1, -2))
    return loss, float(ious.mean())


def _maps(config: GracoCourse, previous: Tensor, clicks: list[list[Click]]) -> Tensor:
    """Return the previous masks and the disks of the clicks, B, 3, size, size."""
    places = [[(click.y - 0.5, click.x - 0.5, click.positive) for click in placed] for placed in clicks]
    disks = torch.stack([click_disks(placed, config.size, config.size) for placed in places])
    return torch.cat([previous, disks], dim=1)
