"""Fine-tuning: an adapter that serves and a snapshot of corrections to candidates, of the family that serves.

The level branch learns, and in `light` the encoder's tail; the phrase branch's LoRA is handed on as it is. Lessons are
drawn from the corrections (of `light` the photos are seen in crops as well), and from the replay set, a slice of what
the shipped adapter was trained on, so that nothing is forgotten.

A candidate's weights lie between the parent's and the trained ones (`blended`): half of the way keeps most of what was
won, and forgets far less (docs/experiments.md).

Sources: weights between two trainings, Wortsman et al., Robust fine-tuning of zero-shot models (arXiv 2109.01903);
experience replay (Rolnick et al., arXiv 1811.11682); `active_learning.train` and
`active_learning.train_graco` for the loops themselves.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from active_learning.dataset import PLAIN, EmbeddingFiles, Sampler, TrainingPhoto, photos_of, views_of
from active_learning.folders import write_whole
from active_learning.status import SHORT
from active_learning.train import TrainingConfig, fine_tune, plain_state, prepare, prepare_tail
from active_learning.train_graco import GracoCourse, SteeredNetwork, untrained
from active_learning.train_graco import fine_tune as fine_tune_graco
from active_learning.training_run import BadCheckpoint, Course, Progress, seeded
from model import heap
from model.adapter import ENCODER, AdapterFile, load_lora, lora_state, read_adapter, write_adapter
from model.annotations import AnnotationSet
from model.graco.runtime import load_network
from model.graco.segmenter import GracoSegmenter
from model.light.adapter import LEVEL, VOCABULARY
from model.light.ladder import LadderDecoder
from model.light.segmenter import LightSegmenter
from model.segmenter import digest_of_file
from model.types import Refusal

log = logging.getLogger(__name__)

_FEWEST_VIEWS = 2

Trainable = LightSegmenter | GracoSegmenter
"""A base that adapters are trained for."""
Learned = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]  # plain tensors, and matrices by branch
AnyCourse = TypeVar("AnyCourse", bound=Course)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningConfig:
    """How corrections are learned from; every value is part of a version's card."""

    replay: float = 0.375  # share of the lessons
    steps_per_mask: float = 3.5  # of the corrected masks; those merged of siblings do not count
    fewest_steps: int = 160
    most_steps: int = 2400
    clicks: int = 3  # on the photo of a step; fewer where memory runs out
    blends: tuple[float, ...] = (0.5, 0.25)  # of what was learned in a candidate; the next where one loses too much
    learning_rate: float = 1e-3
    head_learning_rate: float = 5e-4
    refined: float = 0.5  # share of first clicks' answers that are taught as they serve, refined
    seed: int = 0
    checkpoint_every: int = 50  # steps
    tail: bool = True  # whether the encoder's tail learns too; it always does where the parent moves it
    views: int = 2  # crops of each corrected photo, beside it
    most_views: int = 400  # crops in all; of many photos each gets fewer, but two
    smallest_view: float = 0.6  # side of a crop, as a share of the photo's

    def photos(self, found: AnnotationSet) -> list[TrainingPhoto]:
        """Return what is learned from in a set of corrections: its photos, and crops of them."""
        further = min(self.views, max(_FEWEST_VIEWS, self.most_views // max(1, len(found.images))))
        views = partial(views_of, further=further, smallest=self.smallest_view, seed=self.seed)
        return photos_of(found, views, stated=True)

    def training(self, masks: int, *, rank: int, alpha: int, device: str, precision: str) -> TrainingConfig:
        """Return how to train `light` on this many masks."""
        return TrainingConfig(
            branch=LEVEL,
            rank=rank,
            alpha=alpha,
            head_learning_rate=self.head_learning_rate,
            refined=self.refined,
            warmup=20,
            log_every=10,
            **self._of_any(masks, device, precision),
        )

    def graco_course(self, masks: int, *, size: int, rank: int, alpha: int, device: str, precision: str) -> GracoCourse:
        """Return how to train `graco` on this many masks, on inputs of `size` pixels."""
        return GracoCourse(
            size=size, rank=rank, alpha=alpha, warmup=5, log_every=1, **self._of_any(masks, device, precision)
        )

    def _of_any(self, masks: int, device: str, precision: str) -> dict[str, Any]:
        return {
            "steps": min(self.most_steps, max(self.fewest_steps, round(self.steps_per_mask * masks))),
            "clicks": self.clicks,
            "central": 0.6,
            "learning_rate": self.learning_rate,
            "average": 0.99,
            "kind_weights": {"object": 1.0, "part": 1.0, "subpart": 1.0},
            "seed": self.seed,
            "device": device,
            "precision": precision,
            "checkpoint_every": self.checkpoint_every,
        }


def _masks_of(photos: Sequence[TrainingPhoto]) -> int:
    """Return how many masks people corrected; those merged of siblings state no granularity."""
    plain = [photo for photo in photos if photo.view == PLAIN]
    return sum(mask.granularity is not None for photo in plain for mask in photo.drawn)


def thorough(config: LearningConfig) -> LearningConfig:
    """Return how to learn where nobody waits for it: four times the steps and crops.

    The most steps stay: by day a training of many corrections takes as many.

    Source: trials on two cores, where a hundred corrections take three to four times as long so (docs/experiments.md).
    """
    return replace(
        config,
        steps_per_mask=4 * config.steps_per_mask,
        fewest_steps=4 * config.fewest_steps,
        views=4 * config.views,
    )


def graco_learning(device: str) -> LearningConfig:
    """Return how `graco` learns; a step takes the whole network on four lessons, a hundred times one of `light`.

    So on a CPU there are few of them: ViT-B takes 10 to 40 s for each, of the time that a training may take.
    """
    # its clicks are not refined; crops, fewer steps and less replay were tried with `light` alone
    config = LearningConfig(
        learning_rate=5e-4, steps_per_mask=4.0, most_steps=600, views=0, replay=0.5, tail=False, refined=0.0
    )
    if _on_gpu(device):
        return replace(config, clicks=4)
    return replace(config, steps_per_mask=1.0, fewest_steps=40, most_steps=60, clicks=2, checkpoint_every=5)


def learn(
    config: LearningConfig,
    segmenter: Trainable,
    photos: Sequence[TrainingPhoto],
    replay: Sequence[TrainingPhoto],
    embeddings: EmbeddingFiles,
    parent: Path,
    folder: Path,
    *,
    card: dict[str, Any],
    weights: Path | None = None,
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
        embeddings: of all those photos; what is missing is encoded. `graco` asks for none.
        parent: the adapter to begin from.
        folder: gets the checkpoint, TensorBoard's files and the result.
        card: what else the result's card shall say.
        weights: the base's file, which `graco` trains from.
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
    masks, groups = _masks_of(photos), _groups(config, photos, replay)
    recipe = f"{card.get('snapshot')} from {digest_of_file(parent)}"
    known: dict[str, Any] = {"rank": found.card["rank"], "alpha": found.card["alpha"], "device": device}
    watched: dict[str, Any] = {"recipe": recipe, "before_step": before_step, "report": report}
    course: GracoCourse | TrainingConfig
    if exact := isinstance(segmenter, GracoSegmenter):
        assert weights is not None
        size, precision = segmenter.architecture.size, precision if _computes_in_bf16(device) else "no"
        course = config.graco_course(masks, size=size, precision=precision, **known)
        teach_graco = partial(_teach_graco, weights, found, groups, folder, watched)
        plain, lora = _as_memory_allows(course, teach_graco, folder)
    else:
        course = config.training(masks, precision=precision, **known)
        with_tail = config.tail or ENCODER in found.lora
        watched["recipe"] += " and the encoder's tail" if with_tail else ""
        teach_light = partial(_teach_light, segmenter, embeddings, found, groups, folder, watched, with_tail)
        plain, lora = _as_memory_allows(course, teach_light, folder)
    kept = {name: found.card[name] for name in _HANDED_ON if name in found.card}
    card = kept | card | {"steps": course.steps, "masks": masks}
    write_adapter(target, card=card, plain=plain, lora=lora, exact=exact)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return target


Groups = Sequence[tuple[float, Sequence[TrainingPhoto]]]


def _groups(config: LearningConfig, photos: Sequence[TrainingPhoto], replay: Sequence[TrainingPhoto]) -> Groups:
    """Return photos of corrections and of the replay set, each with its share of the lessons."""
    return [(1 - config.replay, photos), (config.replay, replay)]


def _teach_light(
    segmenter: LightSegmenter,
    embeddings: EmbeddingFiles,
    found: AdapterFile,
    groups: Groups,
    folder: Path,
    watched: dict[str, Any],
    with_tail: bool,
    training: TrainingConfig,
) -> Learned:
    with seeded(training.seed):
        network = LadderDecoder(segmenter.mask_decoder, int(found.card["phrase_width"]))
    prepare(network, training)
    network.load_state_dict({k: v for k, v in found.plain.items() if k != VOCABULARY}, strict=False)
    load_lora(network.transformer, LEVEL, found.lora[LEVEL])
    tail = segmenter.encoder_tail() if with_tail else None
    if tail is not None:
        prepare_tail(tail, training)
        if ENCODER in found.lora:
            load_lora(tail, ENCODER, found.lora[ENCODER])
    sampler = _sampler(training, groups)
    fine_tune(training, network, segmenter.prompt_encoder, sampler, embeddings, folder, tail=tail, **watched)
    lora = dict(found.lora) | {LEVEL: lora_state(network.transformer, LEVEL)}
    if tail is not None:
        lora[ENCODER] = lora_state(tail, ENCODER)
    return found.plain | plain_state(network), lora


def _teach_graco(
    weights: Path, found: AdapterFile, groups: Groups, folder: Path, watched: dict[str, Any], course: GracoCourse
) -> Learned:
    network = SteeredNetwork(load_network(weights)[0], found, course)
    fine_tune_graco(course, network, _sampler(course, groups), folder, **watched)
    return network.adapter(found)


def _computes_in_bf16(device: str) -> bool:
    """Return whether half precision saves time there; a CPU without it takes several times as long."""
    if _on_gpu(device):
        return True
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _on_gpu(device: str) -> bool:
    return device != "cpu" and torch.cuda.is_available()


def _sampler(course: Course, groups: Groups) -> Sampler:
    return Sampler(groups, level_power=course.level_power, kind_weights=course.kind_weights, central=course.central)


def _as_memory_allows(course: AnyCourse, teach: Callable[[AnyCourse], Learned], folder: Path) -> Learned:
    """Return what was learned, with as many clicks at a time as memory suffices for."""
    fewer = folder / _CLICKS
    if fewer.is_file():
        course = replace(course, clicks=int(fewer.read_text()))
    if (folder / SHORT).is_file():
        course = _with_fewer_clicks(course, folder)
        (folder / SHORT).unlink()
    while True:
        try:
            return teach(course)
        except BadCheckpoint as refusal:
            log.warning("training begins anew: %s", refusal)
            (folder / "checkpoint.pt").unlink()
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            course = _with_fewer_clicks(course, folder, error)
        gc.collect()  # here the error is gone, and with it what its frames held; the network is in a circle
        heap.give_back()


_CLICKS = "clicks"
"""File with the clicks of a step, where memory ran out at an earlier attempt."""


def _with_fewer_clicks(training: AnyCourse, folder: Path, why: Exception | None = None) -> AnyCourse:
    """Return how to train now that memory ran out, and write it down; what was learned so far is dropped."""
    if training.clicks == 1:
        raise Refusal(
            "memory does not suffice to learn from one click at a time; raise GRACO_TRAIN_MEMORY_MB, or stop "
            "other programs on this machine"
        ) from why
    training = replace(training, clicks=training.clicks // 2)
    said = str(why or "").partition("\n")[0]
    reason = f" ({said})" if said else ""
    log.warning("memory ran out%s: training begins anew with %d clicks a step", reason, training.clicks)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    write_whole(folder / _CLICKS, str(training.clicks))
    return training


_HANDED_ON = ("base", "rank", "alpha", "phrase_width", "phrase_encoder", "phrase_threshold", "vocabulary")


def blended(parent: Path, trained: Path, share: float, target: Path, *, exact: bool = False) -> Path:
    """Write the adapter between two, and return its file.

    Args:
        parent: of which `trained` was made; 0 is this.
        trained: as `learn` left it; 1 is this.
        share: where between them, 0..1.
        target: the file to write.
        exact: as `model.adapter.write_adapter` takes it.

    Raises:
        Refusal: one of them cannot be read.
    """
    old, new = read_adapter(parent), read_adapter(trained)

    def between(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.lerp(a[name], value, share) for name, value in b.items()}

    lora = {
        branch: between(old.lora.get(branch) or _nothing(matrices), matrices) for branch, matrices in new.lora.items()
    }
    card = new.card | {"blend": share}
    write_adapter(target, card=card, plain=between(old.plain, new.plain), lora=lora, exact=exact)
    return target


def _nothing(matrices: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return LoRA matrices that add nothing, with the first ones of `matrices`, which alone add nothing either."""
    return {name: torch.zeros_like(value) if ".lora_B." in name else value for name, value in matrices.items()}


def write_untrained(path: Path, segmenter: GracoSegmenter) -> Path:
    """Write the adapter to begin from where none was imported, which changes nothing, and return its file."""
    a = segmenter.architecture
    nothing = untrained(a.width, a.depth, segmenter.digest)
    write_adapter(path, card=nothing.card, plain=nothing.plain, lora=nothing.lora, exact=True)
    return path


_SHORTAGES = ("can't allocate memory", "could not create a primitive", "can't start new thread")
"""How torch, oneDNN and Python say that memory ran out, where they do not say so."""


def _out_of_memory(error: BaseException) -> bool:
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in said for words in _SHORTAGES)
