"""Time and memory of a step of graco training on this CPU: python -m tests.bench.graco_training [vit_l] [--fp32]

The base is a synthetic one of the published sizes; what a step costs does not depend on the values.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

from active_learning.bundle import bundled_sets
from active_learning.dataset import Sampler, photos_of
from active_learning.train_graco import GracoCourse, SteeredNetwork, fine_tune, untrained
from active_learning.training_run import Progress
from model.graco.inputs import Architecture
from model.graco.network import SimpleClick

_SIZES = {
    "vit_b": Architecture(
        **{"name": "vit_b", "width": 768, "depth": 12, "heads": 12, "patch": 16, "size": 448},
        **{"neck": (128, 256, 512, 1024), "head": 256},
    ),
    "vit_l": Architecture(
        **{"name": "vit_l", "width": 1024, "depth": 24, "heads": 16, "patch": 16, "size": 448},
        **{"neck": (192, 384, 768, 1536), "head": 256},
    ),
}
_STEPS = 2


def main(size: str, precision: str) -> None:
    """Print the figures."""
    a = _SIZES[size]
    replay, _ = bundled_sets()
    for clicks in (1, 2, 4):
        config = GracoCourse(
            **{"steps": _STEPS, "clicks": clicks, "device": "cpu", "precision": precision},
            **{"log_every": 1, "checkpoint_every": _STEPS},
        )
        steered = SteeredNetwork(SimpleClick(a).eval(), untrained(a.width, a.depth, ""), config)
        sampler = Sampler([(1.0, photos_of(replay))], level_power=0.5, kind_weights={}, central=0.5)
        began_s = time.perf_counter()

        def show(progress: Progress) -> None:
            print(f"  step {progress.step}: {time.perf_counter() - began_s:.1f} s, {progress.figures}", flush=True)  # noqa: B023

        with tempfile.TemporaryDirectory() as folder:
            fine_tune(config, steered, sampler, Path(folder), report=show)
        seconds = (time.perf_counter() - began_s) / _STEPS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{size}, {precision}, {config.batch} clicks a step, {clicks} at a time:", end=" ")
        print(f"{seconds:.1f} s a step, {peak:.2f} GiB at most so far", flush=True)


if __name__ == "__main__":
    main("vit_l" if "vit_l" in sys.argv else "vit_b", "no" if "--fp32" in sys.argv else "bf16")
