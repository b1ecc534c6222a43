"""Corrections written as a folder of COCO JSON and pictures, and read back as any other set."""

import hashlib
import json
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from active_learning.corrections import held_out
from active_learning.exports import write_coco
from active_learning.images import ImageStore
from model.annotations import read_annotations
from model.types import Refusal
from tests.active_learning.corrected import HEIGHT, WIDTH, box, correction


@pytest.fixture
def images(tmp_path):
    return ImageStore(tmp_path / "images")


def photo(images, seed=0, kind="PNG", *, orientation=1, size=(WIDTH, HEIGHT)):
    """Keep a photo and return its id; what shows its top-left corner is red."""
    pixels = np.random.default_rng(seed).integers(0, 60, (size[1], size[0], 3), np.uint8)
    pixels[:8, :8] = (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, exif=exif)
    image_id = hashlib.sha256(file.getvalue()).hexdigest()
    images.put(image_id, file.getvalue())
    return image_id


def test_what_was_exported_is_read_back_mask_for_mask(images, tmp_path):
    ids = [photo(images, seed, "PNG" if seed % 2 else "JPEG") for seed in range(12)]
    given = [
        correction(f"{image_id[:4]}-{n}", box(n, n, n + 9, n + 9), image=image_id, label=label)
        for image_id in ids
        for n, label in ((0, "wheel"), (12, "front door"), (24, ""))
    ]
    assert write_coco(given, images.path, tmp_path / "export") == 36
    found = read_annotations(tmp_path / "export", kind="shared")
    assert sorted(image.digest() for image in found.images) == sorted(ids)
    assert {image.path.suffix for image in found.images} == {".png", ".jpg"}
    for image in found.images:
        assert image.pixels().shape == (HEIGHT, WIDTH, 3)
        assert image.split == ("val" if held_out(image.digest()) else "train")
        expected = [one for one in given if one.image == image.digest()]
        assert [(mask.name, mask.segmentation, mask.granularity) for mask in image.masks] == [
            (one.label, one.mask, 0.3) for one in expected
        ]
        assert all((mask.parent_id, mask.level, mask.origin) == (None, "object", "human") for mask in image.masks)
    assert {image.split for image in found.images} == {"val", "train"}


def test_an_annotation_says_how_it_came_to_be(images, tmp_path):
    given = [correction(image=photo(images)), correction("r2", box(30, 5, 40, 8), image=photo(images), annotator=None)]
    write_coco(given, images.path, tmp_path / "export")
    content = json.loads((tmp_path / "export" / "annotations.json").read_text())
    first, second = content["annotations"]
    said = {"kind": "corrected", "annotator": 4, "phrase": "front wheel", "granularity": 0.3}
    assert first.items() >= (said | {"adapter": "v0001-1a2b3c4d", "area": 400, "iscrowd": 0}).items()
    assert first["bbox"] == [10, 10, 20, 20]
    assert (second["annotator"], second["bbox"]) == (None, [30, 5, 10, 3])
    assert content["images"][0]["digest"] == photo(images)


def test_parts_inside_larger_regions_of_their_image_become_their_parts(images, tmp_path):
    image_id, other = photo(images), photo(images, 1)
    given = [
        correction("handle", box(12, 12, 15, 15), image=image_id),
        correction("door", box(10, 10, 25, 25), image=image_id),
        correction("car", box(5, 5, 50, 35), image=image_id),
        correction("elsewhere", box(11, 11, 14, 14), image=other),
    ]
    write_coco(given, images.path, tmp_path / "export")
    found = {image.digest(): image for image in read_annotations(tmp_path / "export").images}
    handle, door, car = found[image_id].masks
    assert (handle.parent_id, door.parent_id, car.parent_id) == (door.id, car.id, None)
    assert [mask.level for mask in (handle, door, car)] == ["subpart", "part", "object"]
    assert found[other].masks[0].parent_id is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_photo_that_browsers_turn_is_exported_as_annotators_saw_it(images, tmp_path, kind):
    turned = photo(images, kind=kind, orientation=6, size=(HEIGHT, WIDTH))
    assert write_coco([correction(image=turned)], images.path, tmp_path / "export") == 1
    (image,) = read_annotations(tmp_path / "export").images
    pixels = image.pixels()
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels[3, WIDTH - 4, 0] > 200  # turned a quarter clockwise, the top-left corner is at the top right


def test_what_has_no_usable_picture_or_no_pixel_is_left_out_and_logged(images, tmp_path, caplog):
    damaged = hashlib.sha256(b"no photo").hexdigest()
    images.put(damaged, b"no photo")
    given = [
        correction("kept", image=photo(images)),
        correction("empty", box(0, 0, 0, 0), image=photo(images)),
        correction("lost", image="0" * 64),
        correction("damaged", image=damaged),
        correction("other size", image=photo(images, 1, size=(WIDTH + 1, HEIGHT))),
    ]
    assert write_coco(given, images.path, tmp_path / "export") == 1
    assert [len(image.masks) for image in read_annotations(tmp_path / "export").images] == [1]
    assert "is not kept here" in caplog.text
    assert "cannot be read" in caplog.text
    assert "is 61 x 40 pixels, but its masks are 60 x 40" in caplog.text


def test_a_folder_that_holds_something_is_refused_and_a_failure_leaves_no_half_export(images, tmp_path):
    target = tmp_path / "exports" / "one"
    assert write_coco([], images.path, target) == 0
    with pytest.raises(Refusal, match="is not empty; give a folder that does not exist yet"):
        write_coco([correction(image=photo(images))], images.path, target)

    def breaks(_):
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_coco([correction(image=photo(images))], breaks, tmp_path / "exports" / "two")
    assert [path.name for path in target.parent.iterdir()] == ["one"]
