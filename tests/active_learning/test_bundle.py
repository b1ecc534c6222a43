"""The sets that ship: that they are there and sound, and that the command makes these very files."""

from collections import Counter

import numpy as np
import pytest
from typer.testing import CliRunner

from active_learning.__main__ import app
from active_learning.bundle import BUNDLED_SETS, bundle, bundled_sets
from active_learning.gate import Margins, objects_of
from model.types import Refusal


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sets():
    return bundled_sets()


def test_what_ships_is_small_and_comes_with_its_licence():
    for name, most in (("replay", 4e6), ("reference", 3e6)):
        assert sum(map(len, files(BUNDLED_SETS / name).values())) < most
    assert "Apache License" in (BUNDLED_SETS / "LICENSE").read_text()
    readme = (BUNDLED_SETS / "README.md").read_text()
    for said in ("bearpaw/clothing-co-parsing", "may carry other rights", "they show people"):
        assert said in readme


def test_every_photo_and_mask_that_ships_can_be_read(sets):
    for found in sets:
        assert "Apache" in found.licence
        for image in found.images:
            assert image.pixels().shape == (image.height, image.width, 3)
            assert max(image.height, image.width) <= 640
            assert all(mask.mask().shape == (image.height, image.width) for mask in image.masks)
            assert all(mask.parent_id is None or mask.parent_id in image.by_id for mask in image.masks)


def test_no_photo_of_the_reference_set_is_trained_on(sets):
    replay, reference = sets
    assert {image.split for image in replay.images} == {"train"}
    assert {image.split for image in reference.images} == {"val"}
    assert {image.digest() for image in replay.images}.isdisjoint(image.digest() for image in reference.images)


def test_the_replay_set_brings_many_names_and_levels(sets):
    replay, _ = sets
    assert len({mask.name for image in replay.images for mask in image.masks}) >= 50
    assert {image.level_of(mask).level for image in replay.images for mask in image.masks} == set(range(1, 11))


def test_the_gate_finds_persons_and_parts_of_many_levels_in_the_reference_set(sets):
    chosen = objects_of(sets[1], Margins().limit)
    levels = Counter(image.level_of(mask).level for image, masks in chosen for mask in masks)
    assert len(chosen) == 20
    assert levels.total() == Margins().limit
    assert levels[10] == 20
    assert set(range(1, 8)) <= levels.keys()


def test_the_command_makes_the_files_that_ship(shared, tmp_path):
    result = CliRunner().invoke(app, ["bundle", "--data", str(shared / "data"), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for name in ("replay", "reference"):
        assert files(tmp_path / name) == files(BUNDLED_SETS / name)


def test_photos_that_are_shrunk_take_their_masks_along(shared, tmp_path):
    bundle(shared / "data", tmp_path, replay=1, reference=2, side=200)
    for image in bundled_sets(tmp_path)[1].images:
        assert max(image.pixels().shape) == 200
        whole, part = image.masks
        assert part.parent_id == whole.id
        inside = np.count_nonzero(part.mask() & whole.mask())
        assert inside >= 0.95 * part.area
    assert files(tmp_path)["reference/annotations.json"].startswith(b'{"info"')


def test_what_cannot_be_made_or_read_is_refused_with_a_remedy(shared, tmp_path):
    with pytest.raises(Refusal, match="make it: python -m active_learning bundle"):
        bundled_sets(tmp_path)
    with pytest.raises(Refusal, match="81 photos are asked for"):
        bundle(shared / "data", tmp_path, reference=81)
    result = CliRunner().invoke(app, ["bundle", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()
