"""Encoded photos on disk."""

import os

import pytest
import torch

from model.embeddings import EmbeddingFolder
from model.segmenter import Encoded


class Encoder:
    """Encodes to a number that says how often it was asked."""

    costly_to_encode = True

    def __init__(self, encoding: str = "counted") -> None:
        self.encoding, self.times = encoding, 0

    def encode(self, image):
        self.times += 1
        return Encoded({"embedding": torch.tensor([float(self.times)])}, 4, 6)


def value_of(folder: EmbeddingFolder, encoder: Encoder) -> float:
    encoded = folder.encoded(encoder, "photo", lambda: None, height=4, width=6)
    assert (encoded.height, encoded.width) == (4, 6)
    return float(encoded.tensors["embedding"])


def test_a_photo_is_encoded_once_and_anew_for_another_encoding(tmp_path):
    one, other = Encoder(), Encoder("another")
    folder = EmbeddingFolder(tmp_path / "new" / "folder")
    assert [value_of(folder, one), value_of(folder, one), value_of(folder, other)] == [1, 1, 1]
    assert (one.times, other.times) == (1, 1)


def test_a_damaged_file_is_made_anew(tmp_path, caplog):
    folder, encoder = EmbeddingFolder(tmp_path), Encoder()
    value_of(folder, encoder)
    path = folder.path(encoder, "photo")
    path.write_bytes(path.read_bytes()[:20])
    assert value_of(folder, encoder) == 2
    assert "damaged" in caplog.text
    assert value_of(folder, encoder) == 2


def test_a_file_that_cannot_be_written_is_an_error_of_the_system_as_everywhere(tmp_path):
    folder, encoder = EmbeddingFolder(tmp_path), Encoder()
    path = folder.path(encoder, "photo")
    path.with_name(f".{path.name}.{os.getpid()}").mkdir(parents=True)  # in the way
    with pytest.raises(OSError, match=f"{path.parent} cannot be written to"):
        value_of(folder, encoder)
    assert not path.exists()


def test_without_a_folder_nothing_is_kept():
    encoder = Encoder()
    assert [value_of(EmbeddingFolder(None), encoder) for _ in range(2)] == [1, 2]


def test_what_is_sooner_made_than_read_is_not_kept(tmp_path):
    encoder = Encoder()
    encoder.costly_to_encode = False
    assert [value_of(EmbeddingFolder(tmp_path), encoder) for _ in range(2)] == [1, 2]
    assert not [*tmp_path.iterdir()]
