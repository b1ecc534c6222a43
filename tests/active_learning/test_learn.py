"""Adapters between the one a training began from and what it made of it; from what lessons are drawn."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from active_learning.learn import LearningConfig, _groups, blended, graco_learning, thorough
from model.adapter import ENCODER, read_adapter
from model.light.adapter import LEVEL
from model.light.tail import moved_by
from tests.active_learning.drawn import strip, strip_masks, write_photos
from tests.model.random_adapter import write_random_adapter


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_tail_that_its_parent_did_not_move_is_moved_by_a_share_of_what_was_learned(segmenter, tmp_path, share):
    parent = write_random_adapter(tmp_path / "parent.safetensors", segmenter, seed=1)
    trained = write_random_adapter(tmp_path / "trained.safetensors", segmenter, seed=2, tail=0.05)
    candidate = read_adapter(blended(parent, trained, share, tmp_path / "candidate.safetensors"))
    learned, found = moved_by(read_adapter(trained)), moved_by(candidate)
    for name, delta in learned.items():
        torch.testing.assert_close(found[name], share * delta)
    old, new = (read_adapter(path).lora[LEVEL] for path in (parent, trained))
    for name, value in candidate.lora[LEVEL].items():
        torch.testing.assert_close(value, torch.lerp(old[name], new[name], share))


def test_between_two_that_move_it_lie_the_means_of_their_matrices(segmenter, tmp_path):
    paths = [write_random_adapter(tmp_path / f"{seed}.safetensors", segmenter, seed=seed, tail=0.05) for seed in (1, 2)]
    candidate = read_adapter(blended(*paths, 0.5, tmp_path / "candidate.safetensors"))
    old, new = (read_adapter(path).lora[ENCODER] for path in paths)
    for name, value in candidate.lora[ENCODER].items():
        torch.testing.assert_close(value, (old[name] + new[name]) / 2)


def test_lessons_of_light_are_mostly_corrections_and_of_graco_half():
    photos, replay = [SimpleNamespace()], [SimpleNamespace()]
    share = LearningConfig().replay
    assert 0.25 < share < 0.5
    assert _groups(LearningConfig(), photos, replay) == [(1 - share, photos), (share, replay)]
    assert _groups(graco_learning("cpu"), photos, replay) == [(0.5, photos), (0.5, replay)]


@pytest.mark.parametrize(("most", "crops"), [(400, 8), (24, 4), (1, 2)])
def test_a_thorough_training_sees_more_crops_and_of_many_photos_fewer_of_each(tmp_path, most, crops):
    found = write_photos(tmp_path, [strip(number) for number in range(6)], strip_masks())
    photos = replace(thorough(LearningConfig(smallest_view=0.95)), most_views=most).photos(found)
    assert len(photos) == 6 * (1 + crops)
    assert len({photo.embedding for photo in photos}) == len(photos)
    assert len(LearningConfig().photos(found)) == 6 * 3
