"""Annotated photos of many sources, read into one shape."""

import json
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from model.annotations import AnnotatedMask, AnnotationSet, decode, encode, read_annotations
from model.types import Granularity, Refusal

HEIGHT, WIDTH = 20, 30


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.bool_)
    mask[top:bottom, left:right] = True
    return mask


def rle(mask: np.ndarray) -> dict:
    found = encode(mask)
    return {"size": found["size"], "counts": found["counts"].decode()}


def photo(path, *, height: int = HEIGHT, width: int = WIDTH) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)


def annotation(id_: int, mask: np.ndarray, **fields) -> dict:
    return {"id": id_, "image_id": 1, "category_id": 1, "segmentation": rle(mask), **fields}


@pytest.fixture
def write(tmp_path):
    """Writes a set as ../shared/data has them: a photo of 30 x 20 and these annotations; returns its folder."""

    def write(*annotations: dict, **content) -> object:
        photo(tmp_path / "images" / "a.jpg")
        described = {
            "info": {"name": "drawn", "license": "none needed"},
            "images": [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH, "split": "train"}],
            "categories": [{"id": 1, "name": "front_left_door", "supercategory": ""}],
            "annotations": list(annotations),
            **content,
        }
        (tmp_path / "annotations.json").write_text(json.dumps(described))
        return tmp_path

    return write


def only(found: AnnotationSet) -> tuple[AnnotatedMask, ...]:
    (image,) = found.images
    return image.masks


@given(st.integers(1, 12), st.integers(1, 12), st.randoms(use_true_random=False))
def test_a_mask_survives_compression(height, width, random):
    mask = np.array([[random.random() < 0.5 for _ in range(width)] for _ in range(height)], np.bool_)
    np.testing.assert_array_equal(decode(encode(mask)), mask)


def test_our_own_format_is_read_with_levels_parents_and_origins(write):
    folder = write(
        annotation(1, box(0, 0, 20, 20), level="object", origin="derived-sam", parent_id=None, support=3),
        annotation(2, box(0, 0, 10, 8), level="part", origin="human", parent_id=1, granularity=0.25),
    )
    found = read_annotations(folder)
    (image,) = found.images
    whole, part = image.masks
    assert (found.name, found.licence, image.split) == ("drawn", "none needed", "train")
    assert (part.name, part.level, part.parent_id, part.origin) == ("front left door", "part", 1, "human")
    assert (part.granularity, part.support, whole.granularity, whole.support) == (0.25, None, None, 3)
    np.testing.assert_array_equal(part.mask(), box(0, 0, 10, 8))
    assert image.children(whole) == (part,)
    assert image.whole(part) is image.whole(whole) is whole
    assert image.level_of(part) == Granularity(2)
    assert image.level_of(whole) == Granularity(10)
    assert image.by_id[2] is part
    assert image.pixels().shape == (HEIGHT, WIDTH, 3)
    assert len(image.digest()) == 64


def test_a_mask_without_its_parent_is_its_own_whole(write, caplog):
    caplog.set_level(logging.INFO)
    folder = write(annotation(2, box(0, 0, 10, 8), level="part", parent_id=77))
    (image,) = read_annotations(folder).images
    assert image.whole(image.masks[0]) is image.masks[0]
    assert image.level_of(image.masks[0]) == Granularity(10)
    assert "1 masks without their parent" in caplog.text


def test_parents_that_form_a_ring_end_somewhere(write):
    folder = write(annotation(1, box(0, 0, 9, 9), parent_id=2), annotation(2, box(0, 0, 9, 8), parent_id=1))
    (image,) = read_annotations(folder).images
    assert all(image.whole(mask) in image.masks for mask in image.masks)


def test_a_part_that_reaches_out_of_its_whole_has_the_level_of_the_whole(write):
    folder = write(annotation(1, box(0, 0, 5, 5)), annotation(2, box(0, 0, 9, 9), parent_id=1))
    (image,) = read_annotations(folder).images
    assert image.level_of(image.masks[1]) == Granularity(10)


def test_empty_masks_and_crowds_are_left_out_and_counted(write, caplog):
    caplog.set_level(logging.INFO)
    folder = write(
        annotation(1, box(0, 0, 0, 0)), annotation(2, box(0, 0, 9, 9), iscrowd=1), annotation(3, box(0, 0, 9, 9))
    )
    assert [mask.id for mask in only(read_annotations(folder))] == [3]
    assert "1 empty masks left out" in caplog.text
    assert "1 crowds left out" in caplog.text


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [HEIGHT + 1, WIDTH], "counts": "1"},
        {"size": [WIDTH, HEIGHT], "counts": rle(np.ones((WIDTH, HEIGHT), np.bool_))["counts"]},
        {"size": [HEIGHT, WIDTH], "counts": rle(box(0, 0, 9, 9))["counts"][:-2]},
        {"size": [HEIGHT, WIDTH], "counts": "o"},
        {"size": [HEIGHT, WIDTH], "counts": "oooooooooooo1"},
        {"size": [HEIGHT, WIDTH], "counts": ""},
        {"size": [HEIGHT, WIDTH], "counts": "häh"},
        {"size": [HEIGHT, WIDTH], "counts": "Yb0é"},  # 585 pixels, and 15 if the last sign were read as "?"
        {"size": [HEIGHT, WIDTH], "counts": 5},
        {"size": [HEIGHT, WIDTH], "counts": [10, 10]},
        {"size": [HEIGHT, WIDTH], "counts": [700, -100]},
        {"counts": "1"},
        "mask",
        None,
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, float("nan")]],
        [["a", "b", "c", "d", "e", "f"]],
        [5],
    ],
    ids=lambda value: json.dumps(value)[:30],
)
def test_a_mask_that_does_not_fit_its_image_is_refused_by_file_and_id(write, segmentation):
    folder = write({"id": 41, "image_id": 1, "category_id": 1, "segmentation": segmentation})
    with pytest.raises(Refusal, match=r"annotations\.json: annotation 41 "):
        read_annotations(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"level": "huge"},
        {"granularity": 2},
        {"granularity": float("nan")},
        {"granularity": "coarse"},
        {"parent_id": "1"},
        {"category_id": [1]},
        {"image_id": 9},
        {"id": 7},
    ],
    ids=str,
)
def test_a_field_that_means_nothing_is_refused_by_file_and_id(write, fields):
    folder = write(annotation(7, box(0, 0, 9, 9)), annotation(8, box(0, 0, 9, 9)) | fields)
    with pytest.raises(Refusal, match=rf"annotations\.json: annotation {fields.get('id', 8)} "):
        read_annotations(folder)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00", '{"images": 3}', '{"images": [{"id": 1}]}', "[" * 100_000])
def test_a_corrupt_annotation_file_is_refused_by_name(write, text):
    folder = write()
    (folder / "annotations.json").write_text(text)
    with pytest.raises(Refusal, match=r"annotations\.json"):
        read_annotations(folder)


@pytest.mark.parametrize("fields", [{"height": 0}, {"width": "30"}, {"height": 1 << 16, "width": 1 << 16}], ids=str)
def test_an_image_whose_size_is_none_is_refused_by_file_and_id(write, fields):
    image = {"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH} | fields
    with pytest.raises(Refusal, match=r"annotations\.json: image 1 has no size"):
        read_annotations(write(images=[image]))


def test_a_file_name_that_is_none_is_refused_and_licences_that_are_none_are_left_out(write):
    image = {"id": 1, "file_name": "a" * 5000, "height": HEIGHT, "width": WIDTH}
    with pytest.raises(Refusal, match="is missing"):
        read_annotations(write(images=[image]))
    assert read_annotations(write(info={}, licenses=5)).licence == ""


def test_missing_files_are_refused_by_name(write, tmp_path):
    with pytest.raises(Refusal, match="nowhere does not exist"):
        read_annotations(tmp_path / "nowhere")
    folder = write()
    (folder / "images" / "a.jpg").unlink()
    with pytest.raises(Refusal, match=r"image 1: photo a\.jpg is missing; looked in"):
        read_annotations(folder)
    with pytest.raises(Refusal, match="no photo"):
        read_annotations(folder / "images")


def test_a_damaged_photo_and_one_of_another_size_are_refused_when_read(write):
    folder = write()
    (image,) = read_annotations(folder).images
    photo(image.path, width=WIDTH + 1)
    with pytest.raises(Refusal, match=r"a\.jpg is 31 x 20 pixels, but annotated as 30 x 20"):
        image.pixels()
    image.path.write_bytes(image.path.read_bytes()[:200])
    with pytest.raises(Refusal, match=r"a\.jpg cannot be read"):
        image.pixels()
    image.path.unlink()
    with pytest.raises(Refusal, match=r"a\.jpg cannot be read"):
        image.digest()


def test_a_split_takes_its_images_and_those_of_no_split_and_one_that_is_not_there_is_refused(write):
    images = [
        {"id": place, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH, "split": split}
        for place, split in enumerate(("train", "val", None))
    ]
    folder = write(images=images)
    assert [image.id for image in read_annotations(folder, split="val").images] == [1, 2]
    folder = write(images=images[:2])
    with pytest.raises(Refusal, match="no image of split 'test'; its splits are: train, val"):
        read_annotations(folder, split="test")


def test_plain_coco_is_read_with_polygons_and_open_run_lengths(tmp_path):
    photo(tmp_path / "val2017" / "a.jpg")
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.parent.mkdir()
    content = {
        "licenses": [{"id": 1, "name": "CC BY"}],
        "images": [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 18, "name": "dog", "supercategory": "animal"}],
        "annotations": [
            {
                **{"id": 4, "image_id": 1, "category_id": 18, "iscrowd": 0},
                "segmentation": [[2, 2, 8, 2, 8, 8, 2, 8], [20, 2, 24, 2, 24, 8, 20, 8]],
            },
            {
                **{"id": 5, "image_id": 1, "category_id": 18, "iscrowd": 0},
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": [40, 20, 540]},
            },
            {"id": 6, "image_id": 1, "category_id": 18, "segmentation": []},
        ],
    }
    path.write_text(json.dumps(content))
    found = read_annotations(path)
    polygons, runs = only(found)
    assert (found.licence, found.images[0].path) == ("CC BY", tmp_path / "val2017" / "a.jpg")
    assert (polygons.name, polygons.level, polygons.parent_id, polygons.origin) == ("dog", "object", None, "human")
    np.testing.assert_array_equal(polygons.mask(), box(2, 2, 8, 8) | box(2, 20, 8, 24))
    np.testing.assert_array_equal(runs.mask(), box(0, 2, 20, 3))


def test_sbd_is_read(tmp_path):
    photo(tmp_path / "img" / "2008_000002.jpg")
    (tmp_path / "inst").mkdir()
    instances = box(0, 0, 10, 10).astype(np.uint8) + 2 * box(10, 10, 20, 20).astype(np.uint8)
    inside = {"Segmentation": instances, "Categories": np.array([[7], [20]], np.uint8)}
    savemat(tmp_path / "inst" / "2008_000002.mat", {"GTinst": inside})
    (tmp_path / "val.txt").write_text("2008_000002\n")
    found = read_annotations(tmp_path, split="val")
    car, screen = only(found)
    assert (car.name, screen.name, car.level, found.images[0].split) == ("car", "tv monitor", "object", "val")
    np.testing.assert_array_equal(screen.mask(), box(10, 10, 20, 20))


def test_a_matlab_file_that_was_damaged_is_refused_by_name(tmp_path):
    photo(tmp_path / "img" / "a.jpg")
    (tmp_path / "inst").mkdir()
    path = tmp_path / "inst" / "a.mat"
    savemat(path, {"GTinst": {"Segmentation": box(0, 0, 9, 9), "Categories": 7}}, do_compression=True)
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:200] + b"?" + whole[201:], b"not MATLAB's"):
        path.write_bytes(damaged)
        with pytest.raises(Refusal, match=r"a\.mat is not a MATLAB file"):
            read_annotations(tmp_path)


def test_pascal_part_is_read_whether_an_object_has_no_part_or_several(tmp_path):
    photo(tmp_path / "JPEGImages" / "2008_000003.jpg")
    (tmp_path / "Annotations_Part").mkdir()

    def structs(*rows: dict) -> np.ndarray:
        array = np.zeros((1, len(rows)), dtype=[(name, object) for name in rows[0]])
        for place, row in enumerate(rows):
            array[0, place] = tuple(row.values())
        return array

    one = structs({"part_name": "lfwheel", "mask": box(8, 0, 10, 3).astype(np.uint8)})
    two = structs(
        {"part_name": "head", "mask": box(10, 10, 14, 20).astype(np.uint8)},
        {"part_name": "torso", "mask": box(14, 10, 20, 20).astype(np.uint8)},
    )
    objects = structs(
        {"class": "car", "class_ind": 7, "mask": box(0, 0, 10, 10).astype(np.uint8), "parts": one},
        {"class": "dog", "class_ind": 12, "mask": box(10, 10, 20, 20).astype(np.uint8), "parts": two},
        {"class": "bottle", "class_ind": 5, "mask": box(0, 25, 5, 30).astype(np.uint8), "parts": np.zeros((0, 0))},
    )
    path = tmp_path / "Annotations_Part" / "2008_000003.mat"
    savemat(path, {"anno": {"imname": "2008_000003", "objects": objects}})
    (image,) = read_annotations(tmp_path).images
    names = {mask.name: mask for mask in image.masks}
    assert list(names) == ["car", "lfwheel", "dog", "head", "torso", "bottle"]
    assert {mask.name for mask in image.children(names["dog"])} == {"head", "torso"}
    assert (names["lfwheel"].parent_id, names["lfwheel"].level) == (names["car"].id, "part")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(Refusal, match=r"2008_000003\.mat is not a MATLAB file"):
        read_annotations(tmp_path)


def test_part_image_net_gets_its_wholes(tmp_path):
    photo(tmp_path / "train" / "n01.JPEG")
    content = {
        "images": [{"id": 1, "file_name": "n01.JPEG", "height": HEIGHT, "width": WIDTH}],
        "categories": [
            {"id": 0, "name": "Quadruped Head", "supercategory": "Quadruped"},
            {"id": 1, "name": "Quadruped Body", "supercategory": "Quadruped"},
            {"id": 2, "name": "Car Tier", "supercategory": "Car"},
            {"id": 3, "name": "Car", "supercategory": ""},
        ],
        "annotations": [
            annotation(1, box(0, 0, 5, 5), category_id=0),
            annotation(2, box(5, 0, 10, 5), category_id=1),
            annotation(3, box(10, 10, 12, 12), category_id=2),
            annotation(4, box(9, 9, 20, 20), category_id=3),
        ],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    (image,) = read_annotations(tmp_path / "train.json").images
    names = {mask.name: mask for mask in image.masks}
    animal = names["Quadruped"]
    assert (animal.origin, animal.level, animal.parent_id, animal.id) == ("derived-union", "object", None, 5)
    np.testing.assert_array_equal(animal.mask(), box(0, 0, 10, 5))
    assert {mask.name for mask in image.children(animal)} == {"Quadruped Head", "Quadruped Body"}
    assert (names["Car Tier"].parent_id, names["Car Tier"].level, names["Car"].level) == (4, "part", "object")


def test_sa1b_is_read_and_masks_inside_others_become_their_parts(tmp_path):
    for name, masks in (
        ("sa_1", (box(0, 0, 20, 20), box(0, 0, 10, 10), box(2, 2, 5, 5), box(0, 25, 5, 30))),
        ("sa_2", ()),
    ):
        photo(tmp_path / f"{name}.jpg")
        content = {
            "image": {"image_id": 3, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH},
            "annotations": [{"id": 500 + place, "segmentation": rle(mask)} for place, mask in enumerate(masks)],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = read_annotations(tmp_path)
    assert [len(image.masks) for image in found.images] == [4, 0]
    whole, part, subpart, other = found.images[0].masks
    assert [mask.level for mask in (whole, part, subpart, other)] == ["object", "part", "subpart", "object"]
    assert (part.parent_id, subpart.parent_id, other.parent_id) == (whole.id, part.id, None)


def test_pairs_are_read_and_what_grabcut_leaves_undecided_is_not_object(tmp_path):
    photo(tmp_path / "data_GT" / "llama.jpg")
    (tmp_path / "boundary_GT").mkdir()
    values = np.where(box(0, 0, 10, 10), 255, np.where(box(0, 0, 12, 12), 128, 0)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "boundary_GT" / "llama.bmp")
    (mask,) = only(read_annotations(tmp_path))
    np.testing.assert_array_equal(mask.mask(), box(0, 0, 10, 10))


def test_pairs_are_read_from_colours_and_small_numbers_too(tmp_path):
    for name, values in (("a", box(0, 0, 10, 10).astype(np.uint8)), ("b", np.dstack([box(0, 0, 10, 10) * 128] * 3))):
        photo(tmp_path / "img" / f"{name}.jpg")
        (tmp_path / "gt").mkdir(exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / "gt" / f"{name}.png")
    for image in read_annotations(tmp_path).images:
        np.testing.assert_array_equal(image.masks[0].mask(), box(0, 0, 10, 10))
    photo(tmp_path / "img" / "a.jpg", width=WIDTH + 1)
    with pytest.raises(Refusal, match=r"a\.png: annotation 1 has a mask of size \[20, 30\], but a\.jpg is \[20, 31\]"):
        read_annotations(tmp_path)
    (tmp_path / "img" / "a.jpg").unlink()
    with pytest.raises(Refusal, match=r"a\.png: there is no photo of that name"):
        read_annotations(tmp_path)


def test_a_folder_of_photos_is_a_set_without_masks_and_a_damaged_one_does_not_hide_the_others(tmp_path):
    photo(tmp_path / "b.JPG")
    photo(tmp_path / "a.png")
    (tmp_path / "c.jpg").write_bytes(b"no photo")
    (tmp_path / "notes.txt").write_text("not a photo")
    found = read_annotations(tmp_path, split="train")
    assert [(image.path.name, image.height, image.masks) for image in found.images] == [
        ("a.png", HEIGHT, ()),
        ("b.JPG", HEIGHT, ()),
        ("c.jpg", 0, ()),
    ]
    with pytest.raises(Refusal, match=r"c\.jpg cannot be read"):
        found.images[2].pixels()


def test_a_kind_that_does_not_fit_is_refused(tmp_path):
    photo(tmp_path / "a.jpg")
    for kind in ("sbd", "pascalpart", "sa1b", "pairs", "shared", "coco"):
        with pytest.raises(Refusal):
            read_annotations(tmp_path, kind=kind)
    with pytest.raises(Refusal, match="kind 'voc' is unknown"):
        read_annotations(tmp_path, kind="voc")


@pytest.mark.parametrize(
    ("name", "images", "masks"),
    [
        *(("ccp-person-clothing", 668, 9809), ("car-parts", 332, 2880), ("bsds500-granularity", 201, 6687)),
        *(("coco-mval", 320, 353), ("coco128-seg", 126, 861), ("penn-fudan", 170, 423), ("ade20k-samples", 3, 138)),
    ],
)
def test_the_shared_sets_are_read_whole(shared, name, images, masks):
    found = read_annotations(shared / "data" / name)
    assert (len(found.images), sum(len(image.masks) for image in found.images)) == (images, masks)
    for image in found.images[:3]:
        assert image.pixels().shape == (image.height, image.width, 3)
        for mask in image.masks:
            assert mask.mask().shape == (image.height, image.width)
            assert int(mask.mask().sum()) == mask.area
            assert image.whole(mask).parent_id is None
