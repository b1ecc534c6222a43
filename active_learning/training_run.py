"""What a training of any family has: its course, the weights it moves, checkpoints to go on from, and its figures.

The loops are the families' own (`active_learning.train`, `active_learning.train_graco`).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from model.types import Refusal

log = logging.getLogger(__name__)


class BadCheckpoint(Refusal):
    """A checkpoint is damaged, or of another training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What the recipes of all families hold; every value is part of the recipe."""

    steps: int = 2000
    clicks: int = 6  # first clicks of one pass; fewer where memory runs out
    central: float = 0.5  # share of clicks at the middle of their mask or error; the others lie anywhere in it
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 1e-3  # of LoRA and tokens
    head_learning_rate: float = 3e-4  # of what the base has already: heads, upscaling
    weight_decay: float = 1e-4
    warmup: int = 100  # steps
    clip: float = 1.0  # largest norm of a step's gradient
    average: float = 0.998  # of the moving average of the weights, which is what is kept
    level_power: float = 0.5
    kind_weights: dict[str, float] = field(default_factory=lambda: {"object": 1.0, "part": 1.0, "subpart": 0.5})
    precision: str = "bf16"  # or no: fp32
    device: str = "auto"  # or cpu
    seed: int = 0
    checkpoint_every: int = 200  # steps
    log_every: int = 20


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training stands, for a progress bar."""

    step: int
    steps: int
    figures: dict[str, float]  # means since the last one


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Have torch draw first weights by `seed` for a while, and go on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class TrainingRun:
    """What changes while a training runs: weights, their average, the optimiser, and the source of randomness."""

    def __init__(
        self,
        config: Course,
        network: nn.Module,
        accelerator: Accelerator,
        recipe: str,
        *,
        slow: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """Take a network whose thawed parameters train.

        Args:
            config: the recipe.
            network: moved to the device of `accelerator`.
            accelerator: how to run.
            recipe: names what decides the lessons beside `config`.
            slow: whether a parameter, by its name, trains at `head_learning_rate`.
        """
        self.config = config
        self.recipe = json.dumps([recipe, asdict(config)], sort_keys=True)
        self.accelerator = accelerator
        self.rng = np.random.default_rng([config.seed, accelerator.process_index])
        self.named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        parts = [[p for n, p in self.named.items() if slow(n) == part] for part in (False, True)]
        peaks = config.learning_rate, config.head_learning_rate
        groups = [{"params": part, "peak": peak} for part, peak in zip(parts, peaks, strict=True) if part]
        network.to(accelerator.device)
        optimiser = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        self.model, self.optimiser = accelerator.prepare(network, optimiser)
        self.average = {name: p.detach().clone() for name, p in self.named.items()}

    def update(self, step: int) -> float:
        """Take one step of the optimiser and of the average; return the gradient's norm."""
        warm = min(1.0, (step + 1) / max(1, self.config.warmup))
        rest = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / self.config.steps))
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * warm * rest
        norm = self.accelerator.clip_grad_norm_(list(self.named.values()), self.config.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        keep = min(self.config.average, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, parameter in self.named.items():
                self.average[name].lerp_(parameter.detach(), 1 - keep)
        return float(norm)

    def save(self, path: Path, step: int) -> None:
        """Write everything a later run needs to go on exactly; the file appears whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        states = gather_object([json.dumps(self.rng.bit_generator.state)])  # of each process
        if not self.accelerator.is_main_process:
            return
        content = {
            "step": step,
            "recipe": self.recipe,
            "rng": states,
            "torch_rng": torch.get_rng_state(),
            "weights": {name: p.detach().cpu() for name, p in self.named.items()},
            "average": {name: value.cpu() for name, value in self.average.items()},
            "optimiser": self.optimiser.state_dict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft")
        try:
            torch.save(content, draft)
            draft.replace(path)
        except BaseException as error:
            with suppress(OSError):  # what is left of it would take room on a full disk
                draft.unlink(missing_ok=True)
            if "inline_container" in str(error):  # torch's own words for a file that cannot be written
                said = str(error).partition("\n")[0]
                raise OSError(f"checkpoint {path} cannot be written ({said})") from error
            raise

    def resume(self, path: Path) -> int:
        """Take over a checkpoint, if there is one; return the number of steps done.

        Raises:
            BadCheckpoint: it is damaged, or belongs to another recipe, other data or another base.
        """
        if not path.is_file():
            return 0
        try:
            content = torch.load(path, weights_only=True, map_location=self.accelerator.device)
            recipe = content["recipe"]
        except Exception as error:  # whatever torch's parser stumbles over
            said = str(error).partition("\n")[0]
            raise BadCheckpoint(f"checkpoint {path} cannot be read ({said}); delete it to begin anew") from error
        if recipe != self.recipe:
            raise BadCheckpoint(
                f"{path} belongs to another recipe, other data or another base; "
                "name another output folder, or delete it"
            )
        if len(content["rng"]) != self.accelerator.num_processes:
            raise BadCheckpoint(
                f"{path} was written by {len(content['rng'])} processes; go on with as many, or delete it"
            )
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(content["weights"][name])
                self.average[name].copy_(content["average"][name])
        self.optimiser.load_state_dict(content["optimiser"])
        self.rng.bit_generator.state = json.loads(content["rng"][self.accelerator.process_index])
        torch.set_rng_state(content["torch_rng"].cpu())
        log.info("going on from step %d of %s", content["step"], path)
        return int(content["step"])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the averaged weights in the network for a while."""
        kept = {name: p.detach().clone() for name, p in self.named.items()}
        self.keep_average()
        try:
            yield
        finally:
            self._set(kept)

    def keep_average(self) -> None:
        """Leave the averaged weights in the network."""
        self._set(self.average)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.named.items():
            parameter.copy_(values[name])


class Figures:
    """What the steps of a training say of themselves: means for TensorBoard and for whoever looks on."""

    def __init__(self, config: Course, folder: Path, *, start: int, name: str, writes: bool) -> None:
        """Begin at a step; only one process of several writes.

        Args:
            config: the recipe.
            folder: gets TensorBoard's files.
            start: steps that are done.
            name: of the figures' group.
            writes: whether this process does.
        """
        self._config, self._start, self._name = config, start, name
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._board = SummaryWriter(str(folder), purge_step=start) if writes else None
        self._began = time.monotonic()

    def add(self, step: int, clicks: int, figures: dict[str, float]) -> Progress | None:
        """Take the figures of a step of so many clicks; return the means where they are due."""
        for name, value in figures.items():
            self._sums[name].append(value)
        done = step + 1
        if done % self._config.log_every and done != self._config.steps:
            return None
        means = {name: float(np.mean(values)) for name, values in self._sums.items()}
        means["clicks a second"] = (done - self._start) * clicks / (time.monotonic() - self._began)
        self._sums.clear()
        if self._board is None:
            return None
        for name, value in means.items():
            self._board.add_scalar(f"{self._name}/{name}", value, done)
        return Progress(done, self._config.steps, means)

    def close(self) -> None:
        """Write what is left."""
        if self._board is not None:
            self._board.close()
