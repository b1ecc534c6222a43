"""The training of a granularity adapter: one loop, from lessons to an adapter file.

The base's own weights stay as they are; what is learned are the level tokens, LoRA on Q and V of the decoder's
attention, the layers that work on its tokens alone, and the small heads that make masks of them; where it is asked for,
LoRA on the encoder's tail as well. Each step shows one photo a few clicks; in some steps the answers are corrected by
further clicks on the network's own errors, and the answer to the last of them counts. Several processes each take a
photo a step and share what they learn (accelerate).

Sources: GraCo (arXiv 2405.00587) for granularity-controllable learning; RITM (arXiv 2102.06583) for iterative clicks,
the previous mask fed back, and the normalised focal loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from active_learning.dataset import EmbeddingFiles, Lesson, Sampler, targets
from active_learning.training_run import Course, Figures, Progress, TrainingRun, seeded
from model.adapter import ENCODER, Q_AND_V, attach, switch_on
from model.geometry import corners
from model.light.adapter import LEVEL, PHRASE
from model.light.ladder import LOGITS_PER_CELL, LadderDecoder, fill_square
from model.light.network import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    GRID,
    POINT_NEGATIVE,
    POINT_PADDING,
    POINT_POSITIVE,
    SIDE,
    PromptEncoder,
)
from model.light.tail import TAIL_LAYERS
from model.losses import normalised_focal, shrinkage, soft_iou
from model.robot import next_click, sample_click
from model.types import LEVELS, Click, Mask

_TARGETS = {LEVEL: Q_AND_V, PHRASE: ("q_proj", "k_proj", "v_proj", "out_proj", "mlp.layers.0", "mlp.layers.1")}
_TAIL = "tail"  # of the encoder, while it is trained beside the decoder
_WRAPPED = ".base_layer"  # in the name of a layer that LoRA was added to
_ON_TOKENS = (
    ".mlp."  # of the transformer, what works on the few tokens alone: cheap to train, and it decides what is asked
)
Indices = npt.NDArray[np.int64]
_LOGIT_PIXELS = SIDE // (GRID * LOGITS_PER_CELL)  # of the square, along one side of a logit


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig(Course):
    """How one branch is trained; every value is part of the recipe."""

    branch: str = LEVEL
    further: float = 0.4  # share of steps that count the answer to a later click than the first
    most_clicks: int = 8  # of one prompt; the later a click, the less often it is the one that counts
    boxed: float = 0.1  # share of lessons that begin with boxes instead of clicks
    refined: float = 0.0  # share of the steps that count a first click's answer which count it after it was refined
    focal: float = 1.0  # weights of the losses
    overlap: float = 1.0
    growth: float = 0.5
    score: float = 0.5


def trainable_names(network: LadderDecoder, branch: str) -> list[str]:
    """Return the parameters beside LoRA that a branch trains."""
    own = ("phrase_token.", "phrase_projection.", "phrase_leaning")
    if branch == PHRASE:
        return [name for name, _ in network.named_parameters() if name.startswith(own)]
    frozen = (*own, "iou_token.", "mask_tokens.", f"{_TAIL}.")
    return [
        name
        for name, _ in network.named_parameters()
        if not name.startswith(frozen) and "lora_" not in name and (_ON_TOKENS in name or "transformer." not in name)
    ]


def prepare(network: LadderDecoder, config: TrainingConfig) -> None:
    """Freeze what stays, attach the LoRA branch as the seed draws it, and thaw what the branch trains."""
    network.requires_grad_(False)
    plain = trainable_names(network, config.branch)
    with seeded(config.seed):
        attach(
            network.transformer,
            config.branch,
            rank=config.rank,
            alpha=config.alpha,
            targets=_TARGETS[config.branch],
        )
    for name, parameter in network.named_parameters():
        if name in plain:
            parameter.requires_grad_(True)


def prepare_tail(tail: nn.Module, config: TrainingConfig) -> None:
    """Attach LoRA to a frozen tail of the encoder as the seed draws it; only its matrices will train."""
    tail.to(memory_format=torch.channels_last)
    for module in tail.modules():
        if hasattr(module, "fused_attn"):
            module.__dict__["fused_attn"] = False  # with it a step takes a fifth longer on CPUs
    with seeded(config.seed):
        attach(tail, ENCODER, rank=config.rank, alpha=config.alpha, targets=list(TAIL_LAYERS))


def fine_tune(
    config: TrainingConfig,
    network: LadderDecoder,
    prompts: PromptEncoder,
    sampler: Sampler,
    embeddings: EmbeddingFiles,
    folder: Path,
    *,
    tail: nn.Module | None = None,
    recipe: str = "",
    phrases: Callable[[list[str]], Tensor] | None = None,
    before_step: Callable[[], None] = lambda: None,
    report: Callable[[Progress], None] = lambda _: None,
    each_checkpoint: Callable[[int], None] = lambda _: None,
) -> None:
    """Train one branch of `network` in place; at the end it holds the averaged weights.

    Args:
        config: the recipe.
        network: prepared by `prepare`; branches attached earlier stay on and as they are.
        prompts: the base's prompt encoder, frozen.
        sampler: where lessons come from.
        embeddings: of the sampler's photos.
        folder: gets `checkpoint.pt` and TensorBoard's files; a checkpoint that is there is gone on from.
        tail: the encoder's, prepared by `prepare_tail`, to train too; None: embeddings are taken as they are.
        recipe: names what decides the lessons beside `config`; a checkpoint of another one is refused.
        phrases: names to embeddings N, width; needed for the phrase branch.
        before_step: called before every step; may wait, and what it raises is raised.
        report: called after every `log_every` steps.
        each_checkpoint: called after each checkpoint with its step, while `network` holds the averaged weights.

    Raises:
        BadCheckpoint: the checkpoint is damaged, or belongs to another recipe.
    """
    accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision=config.precision)
    if tail is not None:
        network.add_module(_TAIL, tail)  # so that its weights are among those that the run moves and keeps
    run = TrainingRun(config, network, accelerator, recipe, slow=_is_pretrained)
    start = run.resume(folder / "checkpoint.pt")
    prompts = copy.deepcopy(prompts).to(accelerator.device)  # the segmenter's own may be in use elsewhere
    position = prompts.grid_position()
    branches = [LEVEL] if config.branch == LEVEL else [LEVEL, PHRASE]
    switch_on(network.transformer, branches)
    main = accelerator.is_main_process
    with closing(Figures(config, folder, start=start, name=config.branch, writes=main)) as figures:
        for step in range(start, config.steps):
            before_step()
            lesson = sampler.draw(run.rng, config.clicks)
            seen_as = embeddings.encoded(lesson.photo).tensors["embedding" if tail is None else "features"]
            seen_as = seen_as.to(accelerator.device).float()
            named = None
            if config.branch == PHRASE:
                assert phrases is not None
                named = phrases([lesson.photo.names[i] for i in lesson.primaries]).to(accelerator.device)
            with accelerator.autocast():
                embedding = seen_as if tail is None else tail(seen_as)
                loss, seen = _teach(config, run.model, prompts, position, embedding, lesson, run.rng, named)
            accelerator.backward(loss)
            seen["gradient"] = run.update(step)
            if (progress := figures.add(step, config.clicks, seen)) is not None:
                report(progress)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                run.save(folder / "checkpoint.pt", step + 1)
                if main:
                    with run.averaged():
                        each_checkpoint(step + 1)
    run.keep_average()
    if tail is not None:
        delattr(network, _TAIL)


def _is_pretrained(name: str) -> bool:
    """Whether a parameter begins as the base has it, rather than at nothing."""
    return "lora_" not in name and name.startswith(("heads.", "output_upscaling.", "transformer."))


def _teach(
    config: TrainingConfig,
    model: nn.Module,
    prompts: PromptEncoder,
    position: Tensor,
    embedding: Tensor,
    lesson: Lesson,
    rng: np.random.Generator,
    phrases: Tensor | None,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of the pass of a lesson that counts, and figures of it.

    What is refined is nearly so as `LightSegmenter.refine` does it: no second click is added, specks count for the box,
    and all cells are read. Only the mask that was meant counts then, at its level.
    """
    rows, columns = lesson.photo.rows // LOGITS_PER_CELL, lesson.photo.columns // LOGITS_PER_CELL
    seen = embedding[:, :, :rows, :columns]
    position = position[:, :, :rows, :columns]
    inside = _inside(lesson).to(embedding.device)
    truths = [lesson.masks[i] for i in lesson.primaries]
    boxes = _boxes(truths, rng) if rng.random() < config.boxed else None
    clicks = [[] if boxes is not None else [Click(x=float(x), y=float(y), positive=True)] for x, y in lesson.clicks]
    active: Indices = np.arange(len(clicks))
    asked = _asked_levels(lesson, rng)
    previous: Tensor | None = None
    counted = _counted_turn(config, rng)
    refining = config.refined > 0 and counted == 0 and boxes is None and rng.random() < config.refined
    if refining:
        counted = 1
    for turn in range(max(config.most_clicks, counted + 1)):
        added = prompts.dense(previous)[..., :rows, :columns]
        image = (seen + added).expand(len(active), -1, -1, -1)
        vectors = _vectors(prompts, [clicks[i] for i in active], None if boxes is None else boxes[active])
        chosen = None if phrases is None else phrases[torch.from_numpy(active)]
        with torch.set_grad_enabled(turn == counted):
            ladder = model(image, position, vectors, chosen)
        if turn == counted:
            break
        level = asked[active] if phrases is None else np.full(len(active), ladder.logits.shape[1] - 1)
        answers = ladder.logits[torch.arange(len(active)), torch.from_numpy(level)].float()
        masks = ((answers > 0) & (inside > 0)).cpu().numpy()
        if refining:
            going = [place for place, mask in enumerate(masks) if mask.any()]
        else:
            going = []
            for place, (i, mask) in enumerate(zip(active, masks, strict=True)):
                if rng.random() < config.central:
                    click = next_click(truths[i], mask, clicks[i])
                else:
                    click = sample_click(truths[i], mask, rng, clicks[i])
                if click is not None:
                    clicks[i].append(click)
                    going.append(place)
        if going:
            previous = fill_square(answers[going][:, None])
            active = active[going]
            if refining:
                boxes = np.zeros((len(clicks), 2, 2), np.float32)
                boxes[active] = [corners(masks[place]) for place in going]
        else:  # nothing is left to correct: what was answered counts, seen once more
            counted = turn + 1
    loss, ious = _loss(
        config,
        ladder.logits.float(),
        ladder.scores.float(),
        lesson,
        active,
        asked,
        inside,
        first=previous is None and boxes is None,
        with_phrase=phrases is not None,
    )
    turns = "1" if counted == 0 or refining else "2 and 3" if counted < 3 else "4 and more"
    return loss, {"loss": float(loss.detach()), f"IoU after {turns}": float(ious.mean())}


def _counted_turn(config: TrainingConfig, rng: np.random.Generator) -> int:
    """Return the turn whose answer counts: 0 for the first click, else the less likely the later."""
    if config.most_clicks == 1 or rng.random() >= config.further:
        return 0
    later = np.arange(1, config.most_clicks)
    weights = 1 / (later + 1)
    return int(rng.choice(later, p=weights / weights.sum()))


def _inside(lesson: Lesson) -> Tensor:
    """Return 1 where a logit lies in the photo, 0 in the rest of its last cells: 1, rows, columns."""
    scale = SIDE / max(lesson.photo.height, lesson.photo.width) / _LOGIT_PIXELS
    inside = torch.zeros(1, lesson.photo.rows, lesson.photo.columns)
    inside[:, : math.ceil(lesson.photo.height * scale), : math.ceil(lesson.photo.width * scale)] = 1
    return inside


def _asked_levels(lesson: Lesson, rng: np.random.Generator) -> Indices:
    """Return a level for each click, 0 .. 9: that of the mask it was placed for, drawn by weight."""
    asked = np.zeros(len(lesson.primaries), np.int64)
    for click in range(len(asked)):
        own = np.flatnonzero((lesson.pair_click == click) & lesson.pair_primary)
        weights = lesson.pair_weight[own].astype(np.float64)
        asked[click] = lesson.pair_level[rng.choice(own, p=weights / weights.sum())]
    return asked


def _boxes(truths: list[Mask], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Return boxes as people draw them, sides off by up to a twentieth: B, 2, 2, corners in pixels of the logits."""
    boxes = []
    for truth in truths:
        box = corners(truth)
        moved = box + rng.uniform(-0.05, 0.05, (2, 2)) * (box[1] - box[0])
        boxes.append(np.clip(moved, 0, truth.shape[::-1]))
    return np.stack(boxes).astype(np.float32)


def _vectors(prompts: PromptEncoder, clicks: list[list[Click]], boxes: npt.NDArray[np.float32] | None) -> Tensor:
    """Return the prompt vectors of clicks and boxes in pixels of the logits, B, N, 256; all hold as many clicks."""
    xy = torch.tensor([[(c.x, c.y) for c in one] for one in clicks]).reshape(len(clicks), -1, 2)
    kinds = torch.tensor([[POINT_POSITIVE if c.positive else POINT_NEGATIVE for c in one] for one in clicks])
    kinds = kinds.reshape(len(clicks), -1).long()
    if boxes is None:
        xy, kinds = F.pad(xy, (0, 0, 0, 1)), F.pad(kinds, (0, 1), value=POINT_PADDING)
    else:
        ends = torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]).expand(len(clicks), -1)
        xy, kinds = torch.cat([xy, torch.from_numpy(boxes)], dim=1), torch.cat([kinds, ends], dim=1)
    device = prompts.frequencies.device
    vectors: Tensor = prompts.points((xy * _LOGIT_PIXELS).to(device), kinds.to(device))
    return vectors


def _loss(
    config: TrainingConfig,
    logits: Tensor,
    scores: Tensor,
    lesson: Lesson,
    active: Indices,
    asked: Indices,
    inside: Tensor,
    *,
    first: bool,
    with_phrase: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss of one pass over the clicks `active`, and the IoU of the answers asked for.

    After a first click all that is known of it counts, later on what the clicks were placed for: their previous mask
    was that level's.
    """
    device = logits.device
    place = {int(click): i for i, click in enumerate(active)}
    kept = [i for i, c in enumerate(lesson.pair_click) if int(c) in place and (first or lesson.pair_primary[i])]
    click = [place[int(lesson.pair_click[i])] for i in kept]
    level = [int(lesson.pair_level[i]) for i in kept]
    mask = [int(lesson.pair_mask[i]) for i in kept]
    weight = [float(lesson.pair_weight[i]) for i in kept]
    if with_phrase:
        for i, one in enumerate(active):
            click.append(i)
            level.append(logits.shape[1] - 1)
            mask.append(int(lesson.primaries[one]))
            weight.append(2.0)
    answers = logits[torch.tensor(click), torch.tensor(level)]  # P, rows, columns
    truth = targets(lesson, np.array(mask)).to(device)
    weights = torch.tensor(weight, device=device)
    weights = weights / weights.sum()
    overlap = soft_iou(answers, truth, inside)
    shape = config.focal * normalised_focal(answers, truth, inside) + config.overlap * overlap
    loss = (weights * shape).sum()
    with torch.no_grad():
        found = (answers > 0) & (inside > 0)
        both = (found & (truth > 0)).sum((-1, -2))
        ious = both / (found | (truth > 0)).sum((-1, -2)).clamp(min=1)
    expected = scores[torch.tensor(click), torch.tensor(level)]
    loss = loss + config.score * (weights * F.binary_cross_entropy_with_logits(expected, ious, reduction="none")).sum()
    if config.growth and first:
        loss = loss + config.growth * shrinkage(logits[:, :LEVELS], inside).mean()
    own = np.full(len(active), logits.shape[1] - 1) if with_phrase else asked[active]
    answered = [
        i
        for i, (c, at, m) in enumerate(zip(click, level, mask, strict=True))
        if at == own[c] and m == lesson.primaries[active[c]]
    ]
    return loss, ious[torch.tensor(answered)]


def plain_state(network: LadderDecoder) -> dict[str, Tensor]:
    """Return all tensors beside LoRA that any branch trains."""
    names = trainable_names(network, LEVEL) + trainable_names(network, PHRASE)
    parameters = dict(network.named_parameters())
    return {name.replace(_WRAPPED, ""): parameters[name].detach().float().cpu().clone() for name in names}
