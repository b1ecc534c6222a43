"""What tests of the learning room share: a drawn set, and its one photo encoded once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from active_learning.dataset import TrainingPhoto, photos_of
from model.annotations import read_annotations
from tests.active_learning.drawn import write_strip


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sets that holds one, `strip`."""
    folder = tmp_path_factory.mktemp("data")
    write_strip(folder / "strip")
    return folder


@pytest.fixture(scope="session")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="session")
def photo(data: Path) -> TrainingPhoto:
    (photo,) = photos_of(read_annotations(data / "strip"))
    return photo


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in a fixed order: what is compared bit for bit must not depend on how many cores are free."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
