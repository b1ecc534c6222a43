"""Fine-tuning: an adapter that serves and a snapshot of corrections to candidates.

Only the level branch learns; the phrase branch's LoRA is handed on as it is. Lessons are drawn half from the
corrections and half from the replay set, a slice of what the shipped adapter was trained on, so that nothing is
forgotten.

A candidate's weights lie between the parent's and the trained ones (`blended`): half of the way keeps most of what was
won, and forgets far less (docs/experiments.md).

Sources: weights between two trainings, Wortsman et al., Robust fine-tuning of zero-shot models (arXiv 2109.01903);
experience replay (Rolnick et al., arXiv 1811.11682); `active_learning.train` for the loop itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from active_learning.dataset import EmbeddingFiles, Sampler, TrainingPhoto
from active_learning.train import BadCheckpoint, Progress, TrainingConfig, fine_tune, plain_state, prepare, seeded
from model.adapter import load_lora, lora_state, read_adapter, write_adapter
from model.light.adapter import LEVEL, VOCABULARY
from model.light.ladder import LadderDecoder
from model.light.segmenter import LightSegmenter
from model.segmenter import digest_of, read_weights
from model.types import Refusal

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningConfig:
    """How corrections are learned from; every value is part of a version's card."""

    replay: float = 0.5  # share of the lessons
    steps_per_mask: float = 4.0  # of the snapshot's masks
    fewest_steps: int = 160
    most_steps: int = 600
    clicks: int = 3  # on the photo of a step; fewer where memory runs out
    blends: tuple[float, ...] = (0.5, 0.25)  # of what was learned in a candidate; the next where one loses too much
    learning_rate: float = 1e-3
    head_learning_rate: float = 5e-4
    seed: int = 0
    checkpoint_every: int = 50  # steps

    def training(self, masks: int, *, rank: int, alpha: int, device: str, precision: str) -> TrainingConfig:
        """Return how to train on this many masks."""
        steps = min(self.most_steps, max(self.fewest_steps, round(self.steps_per_mask * masks)))
        return TrainingConfig(
            branch=LEVEL,
            steps=steps,
            clicks=self.clicks,
            central=0.6,
            rank=rank,
            alpha=alpha,
            learning_rate=self.learning_rate,
            head_learning_rate=self.head_learning_rate,
            warmup=20,
            average=0.99,
            kind_weights={"object": 1.0, "part": 1.0, "subpart": 1.0},
            seed=self.seed,
            device=device,
            precision=precision,
            checkpoint_every=self.checkpoint_every,
            log_every=10,
        )


def learn(
    config: LearningConfig,
    segmenter: LightSegmenter,
    photos: Sequence[TrainingPhoto],
    replay: Sequence[TrainingPhoto],
    embeddings: EmbeddingFiles,
    parent: Path,
    folder: Path,
    *,
    card: dict[str, Any],
    device: str = "cpu",
    precision: str = "bf16",
    before_step: Callable[[], None] = lambda: None,
    report: Callable[[Progress], None] = lambda _: None,
) -> Path:
    """Return the file of what was learned, FOLDER/trained.safetensors; one that was stopped goes on where it was.

    Args:
        config: the recipe.
        segmenter: the base.
        photos: of the corrections that are trained on.
        replay: of the replay set.
        embeddings: of all those photos; what is missing is encoded.
        parent: the adapter to begin from.
        folder: gets the checkpoint, TensorBoard's files and the result.
        card: what else the result's card shall say.
        device: `cpu` or `auto`.
        precision: `bf16`, or `no`: fp32.
        before_step: as `active_learning.train.fine_tune` calls it.
        report: as `active_learning.train.fine_tune` calls it.

    Raises:
        Refusal: there is nothing to learn from, the parent fits another base, or memory does not suffice for one click.
    """
    target = folder / "trained.safetensors"
    if target.is_file():
        return target
    if not photos:
        raise Refusal("no corrected mask is large enough to learn from")
    found = read_adapter(parent, base=segmenter.digest)
    masks = sum(len(photo.kinds) for photo in photos)
    training = config.training(
        masks, rank=found.card["rank"], alpha=found.card["alpha"], device=device, precision=precision
    )
    fewer = folder / "clicks"  # of a step, where memory ran out at an earlier attempt
    if fewer.is_file():
        training = replace(training, clicks=int(fewer.read_text()))
    while True:
        with seeded(config.seed):
            network = LadderDecoder(segmenter.mask_decoder, int(found.card["phrase_width"]))
        prepare(network, training)
        network.load_state_dict({k: v for k, v in found.plain.items() if k != VOCABULARY}, strict=False)
        load_lora(network.transformer, LEVEL, found.lora[LEVEL])
        groups = [(1 - config.replay, photos), (config.replay, replay)]
        sampler = Sampler(
            groups, level_power=training.level_power, kind_weights=training.kind_weights, central=training.central
        )
        try:
            fine_tune(
                training,
                network,
                segmenter.prompt_encoder,
                sampler,
                embeddings,
                folder,
                recipe=f"{card.get('snapshot')} from {digest_of(read_weights(parent))}",
                before_step=before_step,
                report=report,
            )
            break
        except BadCheckpoint as refusal:
            log.warning("training begins anew: %s", refusal)
            (folder / "checkpoint.pt").unlink()
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if training.clicks == 1:
                raise Refusal(
                    "memory does not suffice to learn from one click at a time; raise GRACO_TRAIN_MEMORY_MB, or stop "
                    "other programs on this machine"
                ) from error
            training = replace(training, clicks=max(1, training.clicks // 2))
            log.warning("memory ran out: training begins anew with %d clicks a step", training.clicks)
            (folder / "checkpoint.pt").unlink(missing_ok=True)
            fewer.write_text(str(training.clicks))
            del network
    lora = dict(found.lora) | {LEVEL: lora_state(network.transformer, LEVEL)}
    plain = found.plain | plain_state(network)
    kept = {name: found.card[name] for name in _HANDED_ON if name in found.card}
    write_adapter(target, card=kept | card | {"steps": training.steps, "masks": masks}, plain=plain, lora=lora)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return target


_HANDED_ON = ("base", "rank", "alpha", "phrase_width", "phrase_encoder", "phrase_threshold", "vocabulary")


def blended(parent: Path, trained: Path, share: float, target: Path) -> Path:
    """Write the adapter between two, and return its file.

    Args:
        parent: of which `trained` was made; 0 is this.
        trained: as `learn` left it; 1 is this.
        share: where between them, 0..1.
        target: the file to write.

    Raises:
        Refusal: one of them cannot be read.
    """
    old, new = read_adapter(parent), read_adapter(trained)

    def between(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.lerp(a[name], value, share) for name, value in b.items()}

    lora = {branch: between(old.lora[branch], matrices) for branch, matrices in new.lora.items()}
    card = new.card | {"blend": share}
    write_adapter(target, card=card, plain=between(old.plain, new.plain), lora=lora)
    return target


def _out_of_memory(error: BaseException) -> bool:
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in said
