"""What tests of all rooms share: the shared folder, the bundled model, a photo."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image, ImageDraw

from model.segmenter import Segmenter, load_segmenter
from model.types import RGBImage

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "model" / "weights" / "light.safetensors"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes ten minutes and more, unless it is asked for: pytest -m soak."""
    if "soak" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what room was left, so that a full disk does not look like failing tests; what passed is cleared by now."""
    place = Path(tempfile.gettempdir())
    free, memory = shutil.disk_usage(place).free / 2**30, psutil.virtual_memory().available / 2**30
    terminalreporter.write_line(f"left at the end: {free:.1f} GiB of disk in {place}, {memory:.1f} GiB of memory")


def missing(what: str) -> None:
    """Skip with the reason; in CI, where everything must be there, fail with it."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = ROOT.parent / "shared"
    if not (folder / "weights").is_dir():
        missing(f"{folder} is not there: it holds recorded numbers and photos that this test compares with")
    return folder


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    """The bundled model as torch runs it, the reference."""
    return load_segmenter("light", WEIGHTS, device="cpu", encoder="exact")


def lawn(height: int, width: int, shades: tuple[float, float, float]) -> Image.Image:
    """Return a noisy lawn to draw on; `shades` say how much its red, green and blue grow with each pixel."""
    y, x = np.mgrid[:height, :width]
    red, green, blue = shades
    grass = np.stack([90 + x * red, 140 + y * green, 80 + x * blue], axis=-1)
    noise = np.random.default_rng(7).normal(0, 6, (height, width, 1))
    return Image.fromarray(np.clip(grass + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def scene() -> RGBImage:
    """A drawn photo, 640 x 480: a red disc on a shaded lawn, a blue door with a handle."""
    image = lawn(480, 640, (0.03, 0.05, 0.02))
    draw = ImageDraw.Draw(image)
    draw.ellipse((100, 120, 300, 320), fill=(190, 40, 30))
    draw.rectangle((420, 100, 560, 400), fill=(30, 60, 160))
    draw.ellipse((530, 240, 550, 260), fill=(220, 200, 60))
    return np.asarray(image)
