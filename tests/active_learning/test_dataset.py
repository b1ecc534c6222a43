"""Annotated photos as lessons."""

import itertools
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from active_learning.dataset import PLAIN, EmbeddingFiles, Sampler, View, embedding_id, photos_of, soft_levels, views_of
from model.annotations import encode, read_annotations
from model.metrics import iou
from model.types import LEVELS, Refusal
from tests.active_learning.drawn import BLUE, HEIGHT, WIDTH, strip, strip_masks, write_strip
from tests.model.drawn_set import Painter, write_set

DOOR, WINDOW, HANDLE, BALL = range(4)


def sampler(*photos, level_power=0.5, kind_weights=None, central=0.5):
    return Sampler([(1.0, photos)], level_power=level_power, kind_weights=kind_weights or {}, central=central)


# --- photos and views ---


def test_a_photo_is_prepared_at_the_resolution_of_its_logits_with_shares_wholes_and_names(photo):
    assert (photo.height, photo.width, photo.rows, photo.columns) == (HEIGHT, WIDTH, 64, 256)
    assert photo.names == ("door", "window", "handle", "ball")
    assert photo.kinds == ("object", "part", "part", "object")
    assert photo.wholes.tolist() == [DOOR, DOOR, DOOR, BALL]
    true = strip_masks()
    door = true["door"].sum()
    np.testing.assert_allclose(
        photo.shares, [1, true["window"].sum() / door, true["handle"].sum() / door, 1], rtol=1e-6
    )
    masks = photo.masks()
    assert masks.shape == (4, 64, 256)
    for mask, name in zip(masks, photo.names, strict=True):
        assert mask.mean() == pytest.approx(true[name].mean(), rel=0.1)
    np.testing.assert_array_equal(photo.pixels(), strip())


def test_the_set_of_the_other_rooms_tests_is_prepared_too(scene, tmp_path):
    (photo,) = photos_of(read_annotations(write_set(tmp_path / "drawn", scene, split="train")))
    assert (photo.rows, photo.columns) == (192, 256)
    assert photo.wholes.tolist() == [0, 1, 1]
    assert 0 < photo.shares[2] < 0.01


def test_a_mirrored_photo_and_its_masks_agree(data, photo):
    (_, mirrored) = photos_of(read_annotations(data / "strip"), lambda _: (PLAIN, View(mirrored=True)))
    np.testing.assert_array_equal(mirrored.pixels(), strip()[:, ::-1])
    for mask, plain in zip(mirrored.masks(), photo.masks(), strict=True):
        assert iou(mask, plain[:, ::-1]) > 0.97
    shown = (mirrored.pixels() == BLUE).all(-1)
    assert iou(shown, strip_masks()["door"][:, ::-1] & shown) > 0.97
    np.testing.assert_array_equal(mirrored.shares, photo.shares)


def test_in_a_crop_a_part_is_measured_by_what_is_seen_of_its_whole(data):
    lower = View(top=0.5, bottom=1.0)  # the door without its window
    (photo,) = photos_of(read_annotations(data / "strip"), lambda _: (lower,))
    assert photo.names == ("door", "handle", "ball")
    true = strip_masks()
    seen = true["door"][60:].sum()
    np.testing.assert_allclose(photo.shares, [1, true["handle"].sum() / seen, 1], rtol=1e-6)
    np.testing.assert_array_equal(photo.pixels(), strip()[60:])


def test_a_part_whose_whole_is_hardly_seen_keeps_its_share_of_all_of_it_and_its_kin(data):
    (photo,) = photos_of(read_annotations(data / "strip"), lambda _: (View(left=0.32, right=0.37, top=0.2),))
    assert photo.names == ("handle",)
    true = strip_masks()
    assert photo.shares[0] == pytest.approx(true["handle"].sum() / true["door"].sum())
    assert photo.wholes[0] < 0, "the whole is not among the masks"


def test_a_view_in_which_no_mask_is_left_gives_no_photo(data):
    assert photos_of(read_annotations(data / "strip"), lambda _: (View(left=0.9, top=0.9),)) == []


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(1, 300), st.floats(0.05, 1))
def test_every_view_lies_in_its_photo_and_holds_a_pixel(seed, height, width, smallest):
    view = View.random(np.random.default_rng(seed), smallest)
    left, top, right, bottom = view.box(height, width)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert view.of(np.zeros((height, width), bool)).shape == (bottom - top, right - left)


def test_every_view_of_a_photo_has_an_embedding_of_its_own():
    views = [PLAIN, View(mirrored=True), View(right=0.5), View(right=0.5, mirrored=True)]
    assert len({embedding_id("ab" * 32, view) for view in views}) == 4
    assert embedding_id("ab" * 32, PLAIN) == "ab" * 32


def test_a_mask_whose_parent_is_missing_is_a_whole_of_its_own(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (photo,) = photos_of(read_annotations(write_strip(tmp_path / "set", window={"parent_id": 99})))
    assert photo.shares[WINDOW] == 1
    assert photo.wholes.tolist() == [DOOR, WINDOW, DOOR, BALL]


def test_a_photo_that_is_damaged_is_refused_by_name_when_it_is_encoded(tmp_path):
    folder = write_strip(tmp_path / "set")
    path = folder / "images" / "strip.png"
    path.write_bytes(path.read_bytes()[:200])
    (photo,) = photos_of(read_annotations(folder))
    files = EmbeddingFiles(tmp_path / "embeddings", Painter())
    with pytest.raises(Refusal, match=r"strip\.png"):
        files.encoded(photo)


def test_views_other_than_the_plain_one_may_be_kept_in_a_folder_of_their_own(tmp_path, data):
    digest = "ab" * 32
    assert views_of(digest, 0, smallest=0.6, seed=0) == [PLAIN]
    views = views_of(digest, 2, smallest=0.6, seed=0)
    assert views == views_of(digest, 2, smallest=0.6, seed=0) != views_of(digest, 2, smallest=0.6, seed=1)
    photos = photos_of(read_annotations(data / "strip"), lambda _: views)
    files = EmbeddingFiles(tmp_path / "plain", Painter(), views=tmp_path / "others")
    assert files.missing(photos) == photos
    for photo in photos:
        files.encoded(photo)
    assert files.missing(photos) == []
    assert {path.stem for path in (tmp_path / "plain").glob("*/*/*")} == {photos[0].embedding}
    assert {path.stem for path in (tmp_path / "others").glob("*/*/*")} == {photo.embedding for photo in photos[1:]}


def test_views_leave_a_disk_that_is_nearly_full_alone_and_are_read_where_they_are(tmp_path, data, monkeypatch):
    views = views_of("ab" * 32, 2, smallest=0.6, seed=0)
    plain, kept, late = photos_of(read_annotations(data / "strip"), lambda _: views)
    painter = Painter()
    files = EmbeddingFiles(tmp_path / "plain", painter, views=tmp_path / "others")
    files.encoded(kept)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**30 - 1))
    for photo in (plain, late):
        assert files.encoded(photo).height == photo.height
    assert files.missing([plain, kept, late]) == [late]
    assert len(list((tmp_path / "others").glob("*/*/*"))) == 1
    monkeypatch.setattr(Painter, "encode", lambda *_: pytest.fail("it is on disk"))
    assert files.encoded(kept).height == kept.height


def test_a_view_is_encoded_once_and_a_damaged_file_of_it_anew(tmp_path, photo, data):
    painter = Painter()
    files = EmbeddingFiles(tmp_path, painter)
    twice = [photo, *photos_of(read_annotations(data / "strip"))]
    assert files.missing(twice) == [twice[1]], "one photo for each view"
    first = files.encoded(photo)
    assert files.missing(twice) == []
    assert (first.height, first.width) == (HEIGHT, WIDTH)
    (path,) = (tmp_path / painter.encoding).glob("*/*")
    path.write_bytes(path.read_bytes()[:30])
    assert files.encoded(photo).tensors["embedding"].shape == first.tensors["embedding"].shape
    assert len(path.read_bytes()) > 30


# --- levels ---


@given(st.floats(0, 1))
def test_a_share_is_shared_out_between_the_two_nearest_levels(share):
    levels = soft_levels(share)
    assert sum(weight for _, weight in levels) == pytest.approx(1)
    assert all(0 <= level < LEVELS and weight > 0 for level, weight in levels)
    expected = sum((level + 1) * weight for level, weight in levels)
    assert expected == pytest.approx(np.clip(share * 10, 1, 10))
    assert all(b - a == 1 for (a, _), (b, _) in itertools.pairwise(levels))


# --- lessons ---


@pytest.mark.parametrize("parent", [1, 4], ids=["window of the door", "window of the ball, seen in the door"])
def test_every_click_lies_in_its_mask_and_all_it_teaches_holds_the_click_and_is_of_the_same_whole(tmp_path, parent):
    (photo,) = photos_of(read_annotations(write_strip(tmp_path / "set", window={"parent_id": parent})))
    drawn, rng = sampler(photo), np.random.default_rng(0)
    for clicks in (1, 2, 6, 6, 6):
        lesson = drawn.draw(rng, clicks)
        assert len(lesson.primaries) == len(lesson.clicks) == clicks
        columns, rows = lesson.clicks.astype(int).T
        assert lesson.masks[lesson.primaries, rows, columns].all()
        assert lesson.masks[lesson.pair_mask, rows[lesson.pair_click], columns[lesson.pair_click]].all()
        primary_of_pair = lesson.primaries[lesson.pair_click]
        np.testing.assert_array_equal(photo.wholes[lesson.pair_mask], photo.wholes[primary_of_pair])
        np.testing.assert_array_equal(lesson.pair_primary, lesson.pair_mask == primary_of_pair)
        for click in range(clicks):
            own = lesson.pair_click == click
            for mask in set(lesson.pair_mask[own]):
                pairs = own & (lesson.pair_mask == mask)
                assert lesson.pair_weight[pairs].sum() == pytest.approx(1)
                asked = list(zip(lesson.pair_level[pairs].tolist(), lesson.pair_weight[pairs].tolist(), strict=True))
                assert [level for level, _ in asked] == [level for level, _ in soft_levels(float(photo.shares[mask]))]


def test_no_level_of_a_click_is_taught_two_masks_and_the_clicked_mask_comes_first(tmp_path):
    """The window's share is 0.2 of the door; a second pane over it has nearly the same."""
    window = strip_masks()["window"].copy()
    window[20:24] = False
    counts = encode(window)["counts"].decode()
    pane = {"segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}, "area": int(window.sum())}
    (photo,) = photos_of(read_annotations(write_strip(tmp_path / "set", handle=pane)))
    drawn, rng, seen = sampler(photo), np.random.default_rng(0), set()
    for _ in range(30):
        lesson = drawn.draw(rng, 2)
        pairs = list(zip(lesson.pair_click.tolist(), lesson.pair_level.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        for click, primary in enumerate(lesson.primaries):
            masks = lesson.pair_mask[lesson.pair_click == click].tolist()
            assert masks[0] == primary
            assert len({WINDOW, HANDLE} & set(masks)) <= 1, "both stand at one level: the clicked one keeps it"
            seen.add((int(primary), *sorted({*masks} - {primary})))
    assert {(WINDOW, DOOR), (HANDLE, DOOR)} <= seen


def test_central_clicks_lie_in_the_middle_and_the_others_anywhere(photo):
    middles, rng = sampler(photo, central=1.0), np.random.default_rng(0)
    found = {tuple(spot) for _ in range(20) for spot in middles.draw(rng, 4).clicks.tolist()}
    assert len(found) == 4
    anywhere = sampler(photo, central=0.0)
    assert len({tuple(spot) for _ in range(20) for spot in anywhere.draw(rng, 4).clicks.tolist()}) > 40


def test_masks_of_rarer_levels_are_drawn_more_often_the_higher_the_power(tmp_path):
    ball = {"parent_id": None}
    (photo,) = photos_of(read_annotations(write_strip(tmp_path / "set", window={"parent_id": None}, ball=ball)))

    def share_of_the_handle(power):
        drawn, rng = sampler(photo, level_power=power), np.random.default_rng(0)
        return np.mean([drawn.draw(rng, 1).primaries[0] == HANDLE for _ in range(400)])

    # three wholes at level 10, one part at level 1: a quarter of the masks, half of the levels
    assert share_of_the_handle(0) == pytest.approx(1 / 4, abs=0.06)
    assert share_of_the_handle(1) == pytest.approx(1 / 2, abs=0.06)


def test_kinds_are_drawn_by_their_weights_and_no_mask_twice_where_there_are_enough(photo):
    drawn, rng = sampler(photo, level_power=0, kind_weights={"part": 0.0}), np.random.default_rng(0)
    assert {int(i) for _ in range(20) for i in drawn.draw(rng, 2).primaries} == {DOOR, BALL}
    drawn = sampler(photo)
    assert all(len(set(drawn.draw(rng, 4).primaries.tolist())) == 4 for _ in range(10))


def test_groups_are_drawn_by_their_shares_and_empty_ones_not_at_all(photo, tmp_path):
    (other,) = photos_of(read_annotations(write_strip(tmp_path / "set")))
    groups = [(1.0, [photo]), (3.0, [other]), (5.0, []), (0.0, [photo])]
    drawn = Sampler(groups, level_power=0.5, kind_weights={}, central=0.5)
    rng = np.random.default_rng(0)
    assert np.mean([drawn.draw(rng, 1).photo is other for _ in range(400)]) == pytest.approx(0.75, abs=0.06)


def test_the_seed_decides_the_lessons(photo):
    def clicks(seed):
        drawn, rng = sampler(photo), np.random.default_rng(seed)
        return np.stack([drawn.draw(rng, 3).clicks for _ in range(5)])

    np.testing.assert_array_equal(clicks(1), clicks(1))
    assert not np.array_equal(clicks(1), clicks(2))


def test_without_a_mask_there_is_nothing_to_learn_from():
    with pytest.raises(Refusal, match="no mask to learn from"):
        sampler()
