import base64
import contextlib
import io
import struct
import time
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from ml_backend.outlines import (
    MAX_POINTS,
    MAX_POLYGONS,
    Polygon,
    from_png_data_url,
    from_polygon,
    from_rectangle,
    to_png_data_url,
    to_polygons,
    to_rectangle,
)
from model.types import Mask, Refusal


def filled(polygons: list[Polygon], mask: Mask) -> Mask:
    union = np.zeros_like(mask)
    for polygon in polygons:
        union |= from_polygon(polygon, height=mask.shape[0], width=mask.shape[1])
    return union


def filled_nonzero(polygon: Polygon, height: int, width: int) -> Mask:
    """The other fill rule, slowly: a pixel is inside when the polygon winds around its centre."""
    winding = np.zeros((height, width), int)
    columns = np.arange(width) + 0.5
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        for row in range(height):
            y = row + 0.5
            if (y0 <= y) != (y1 <= y):
                winding[row] += np.where(columns >= x0 + (y - y0) / (y1 - y0) * (x1 - x0), 1 if y1 > y0 else -1, 0)
    return winding != 0


def iou(one: Mask, other: Mask) -> float:
    return np.count_nonzero(one & other) / np.count_nonzero(one | other)


def disks(height: int, width: int, *spec: tuple[int, int, int, int]) -> Mask:
    """Drawn in turn: x, y, radius, and 1 to add or 0 to take away."""
    image = np.zeros((height, width), np.uint8)
    for x, y, radius, value in spec:
        cv2.circle(image, (x, y), radius, value, thickness=-1)
    return image > 0


def blob(rng: np.random.Generator, size: int, detail: float) -> Mask:
    """Smoothed noise, denser in the middle: bays, holes, islands, several components."""
    noise = cv2.GaussianBlur(rng.standard_normal((size, size), dtype=np.float32), (0, 0), detail)
    y, x = np.mgrid[:size, :size] / size - 0.5
    return (noise - noise.mean()) / noise.std() + 2 - 16 * (x**2 + y**2) > 0


def signed_area(polygon: Polygon) -> float:
    x, y = polygon.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


# Polygons


def test_small_masks_of_any_shape_come_back_exactly_without_tolerance():
    rng = np.random.default_rng(1)
    for _ in range(1500):
        height, width = rng.integers(1, 17, size=2)
        mask = rng.random((height, width)) < rng.random()
        polygons = to_polygons(mask, tolerance=0)
        np.testing.assert_array_equal(filled(polygons, mask), mask)
        assert all(3 <= len(polygon) <= MAX_POINTS for polygon in polygons)


def test_small_masks_of_any_shape_come_back_exactly_when_filled_nonzero():
    rng = np.random.default_rng(2)
    for _ in range(40):
        mask = rng.random((9, 11)) < rng.uniform(0.3, 0.95)
        union = np.zeros_like(mask)
        for polygon in to_polygons(mask, tolerance=0):
            union |= filled_nonzero(polygon, 9, 11)
        np.testing.assert_array_equal(union, mask)


@pytest.mark.parametrize("detail", [6, 8, 12, 20])
def test_blobs_with_holes_islands_and_several_parts_come_back_with_an_iou_of_98_percent(detail):
    rng = np.random.default_rng(detail)
    for _ in range(15):
        mask = blob(rng, int(rng.integers(80, 300)), detail)
        assert mask.sum() > 2000
        polygons = to_polygons(mask)
        assert iou(filled(polygons, mask), mask) >= 0.98
        assert all(len(polygon) <= MAX_POINTS for polygon in polygons)


@pytest.mark.parametrize("hole", [3, 10, 20, 25])
def test_a_ring_keeps_its_hole_by_either_fill_rule(hole):
    mask = disks(80, 80, (40, 40, 30, 1), (38, 42, hole, 0))
    (polygon,) = to_polygons(mask)
    assert iou(from_polygon(polygon, height=80, width=80), mask) >= 0.98
    assert iou(filled_nonzero(polygon, 80, 80), mask) >= 0.98
    assert not filled_nonzero(polygon, 80, 80)[42, 38]


def test_several_holes_are_all_kept_and_the_bridges_to_them_take_no_area():
    holes = [(30, 30, 8, 0), (90, 35, 12, 0), (60, 80, 15, 0), (62, 45, 4, 0)]
    mask = disks(120, 120, (60, 60, 55, 1), *holes)
    (polygon,) = to_polygons(mask)
    assert iou(from_polygon(polygon, height=120, width=120), mask) >= 0.98
    assert iou(filled_nonzero(polygon, 120, 120), mask) >= 0.98
    assert abs(abs(signed_area(polygon)) - mask.sum()) < 0.02 * mask.sum()


def test_of_more_holes_than_an_editor_can_handle_the_largest_are_kept():
    holes = [(x, y, 8 if x < 200 else 16, 0) for x in range(40, 400, 40) for y in range(40, 400, 40)]
    mask = disks(440, 440, (220, 220, 300, 1), *holes)
    (polygon,) = to_polygons(mask)
    again = from_polygon(polygon, height=440, width=440)
    assert len(polygon) <= MAX_POINTS
    assert not any(again[y, x] for x, y, radius, _ in holes if radius == 16)


def test_an_island_in_a_hole_is_a_polygon_of_its_own():
    mask = disks(100, 100, (50, 50, 45, 1), (50, 50, 30, 0), (50, 50, 15, 1))
    ring, island = to_polygons(mask)
    assert abs(signed_area(ring)) > abs(signed_area(island))
    assert iou(filled([ring, island], mask), mask) >= 0.98
    assert not from_polygon(ring, height=100, width=100)[50, 50]


def test_components_come_largest_first():
    mask = disks(100, 300, (40, 50, 20, 1), (120, 50, 35, 1), (240, 50, 28, 1))
    areas = [abs(signed_area(polygon)) for polygon in to_polygons(mask)]
    assert areas == sorted(areas, reverse=True)
    np.testing.assert_allclose(areas, [np.pi * radius**2 for radius in (35, 28, 20)], rtol=0.05)


def test_a_full_mask_runs_along_the_edges_of_the_image():
    (polygon,) = to_polygons(np.ones((8, 10), bool))
    assert sorted(map(tuple, polygon)) == [(0, 0), (0, 8), (10, 0), (10, 8)]


def test_one_pixel_is_a_square_of_one_pixel():
    mask = np.zeros((5, 7), bool)
    mask[3, 6] = True
    (polygon,) = to_polygons(mask)
    assert sorted(map(tuple, polygon)) == [(6, 3), (6, 4), (7, 3), (7, 4)]
    np.testing.assert_array_equal(filled([polygon], mask), mask)


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (2, 40)])
def test_a_thin_line_does_not_vanish(shape):
    mask = np.zeros((60, 60), bool)
    mask[10 : 10 + shape[0], 5 : 5 + shape[1]] = True
    np.testing.assert_array_equal(filled(to_polygons(mask), mask), mask)
    diagonal = np.eye(60, dtype=bool)
    np.testing.assert_array_equal(filled(to_polygons(diagonal), diagonal), diagonal)


def test_masks_that_touch_the_border_of_the_image_reach_it():
    mask = disks(90, 120, (0, 0, 60, 1), (119, 89, 50, 1))
    polygons = to_polygons(mask)
    assert iou(filled(polygons, mask), mask) >= 0.98
    points = np.concatenate(polygons)
    assert points.min(axis=0).tolist() == [0, 0]
    assert points.max(axis=0).tolist() == [120, 90]


def test_an_empty_mask_has_no_polygon_and_no_rectangle():
    for mask in (np.zeros((6, 9), bool), np.zeros((0, 9), bool)):
        assert to_polygons(mask) == []
        assert to_rectangle(mask) is None


def test_specks_and_pinholes_of_a_large_mask_go_but_not_those_of_a_small_one():
    large = disks(200, 200, (100, 100, 80, 1))
    large[100, 100] = False
    large[3, 3] = True
    (polygon,) = to_polygons(large)
    assert from_polygon(polygon, height=200, width=200)[100, 100]
    small = np.zeros((20, 20), bool)
    small[2:12, 2:12] = True
    small[6, 6], small[18, 18] = False, True
    np.testing.assert_array_equal(filled(to_polygons(small), small), small)


def test_many_equal_components_are_not_taken_for_specks():
    mask = np.zeros((90, 90), bool)
    for top in range(0, 90, 10):
        for left in range(0, 90, 10):
            mask[top : top + 6, left : left + 6] = True
    np.testing.assert_array_equal(filled(to_polygons(mask), mask), mask)


def test_a_view_into_another_array_gives_the_polygons_of_its_copy():
    mask = blob(np.random.default_rng(3), 120, 8)
    for view in (mask.T, mask[::2, ::2], mask[:, ::-1]):
        for one, other in zip(to_polygons(view), to_polygons(view.copy()), strict=True):
            np.testing.assert_array_equal(one, other)
        assert to_rectangle(view) == to_rectangle(view.copy())


def test_more_tolerance_gives_fewer_points():
    mask = disks(700, 700, (350, 350, 300, 1))
    counts = [len(to_polygons(mask, tolerance=tolerance)[0]) for tolerance in (0.75, 1.5, 3)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 2 * counts[-1]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.65, 0.9])
def test_salt_and_pepper_gives_few_polygons_of_few_points_in_bearable_time(density):
    mask = np.random.default_rng(4).random((1000, 1500)) < density
    begin = time.perf_counter()
    polygons = to_polygons(mask)
    assert time.perf_counter() - begin < 5
    assert 1 <= len(polygons) <= MAX_POLYGONS
    assert all(3 <= len(polygon) <= MAX_POINTS for polygon in polygons)


def test_six_megapixels_of_a_smooth_mask_are_traced_within_60_milliseconds():
    mask = disks(2000, 3000, (1200, 900, 700, 1), (1200, 900, 300, 0), (2500, 1500, 300, 1))
    durations = []
    for _ in range(5):
        begin = time.perf_counter()
        polygons = to_polygons(mask)
        durations.append(time.perf_counter() - begin)
    assert min(durations) < 0.06
    assert iou(filled(polygons, mask), mask) >= 0.99


def test_a_tolerance_that_is_none_and_a_mask_of_other_numbers_are_errors():
    for tolerance in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="tolerance"):
            to_polygons(np.ones((3, 3), bool), tolerance=tolerance)
    with pytest.raises(ValueError, match="boolean"):
        to_polygons(np.ones((3, 3), np.uint8))


def test_polygons_that_share_an_edge_share_no_pixel_and_leave_none_out():
    rng = np.random.default_rng(5)
    for _ in range(100):
        apex = rng.uniform(0, 20, size=2)
        corners = [(0, 0), (20, 0), (20, 20), (0, 20)]
        parts = [
            from_polygon([corners[i], corners[(i + 1) % 4], apex], height=20, width=20).astype(int) for i in range(4)
        ]
        np.testing.assert_array_equal(sum(parts), 1)


def test_a_polygon_is_cut_off_at_the_border_of_the_image():
    assert from_polygon([(-50, -50), (50, -50), (50, 50), (-50, 50)], height=4, width=5).all()
    assert not from_polygon([(10, 10), (20, 10), (20, 20)], height=4, width=5).any()
    assert not from_polygon([(-9, 0), (-1, 0), (-1, 4)], height=4, width=5).any()
    half = from_polygon([(-10, -10), (2, -10), (2, 10), (-10, 10)], height=4, width=5)
    assert half[:, :2].all()
    assert not half[:, 2:].any()


def test_a_polygon_of_many_long_edges_is_filled_as_its_parts_are():
    teeth = [(x, 3000 * (x % 2)) for x in range(1200)]
    whole = from_polygon([*teeth, (1199, 3001), (0, 3001)], height=3000, width=1200)
    assert abs(whole.mean() - 0.5) < 0.01


@pytest.mark.parametrize(
    "points",
    [
        [],
        None,
        [(0, 0), (1, 1)],
        [1, 2, 3],
        [(0, 0, 0), (1, 1, 1), (2, 0, 0)],
        [(0, 0), (1, 1), (2,)],
        [(0, 0), (1, "x"), (2, 0)],
        {"x": 1},
        [(0, 0), (1, float("nan")), (2, 0)],
        [(0, 0), (1, float("inf")), (2, 0)],
        [(0, 0), (1, 1e300), (2, 0)],
        [(0, 0), (1, 10**400), (2, 0)],
        [(x % 7, 4000 * (x % 2)) for x in range(4000)],
    ],
)
def test_points_that_are_no_polygon_are_refused(points):
    with pytest.raises(Refusal, match="polygon"):
        from_polygon(points, height=4000, width=10)


# Rectangles


def test_a_rectangle_encloses_the_mask_along_pixel_edges():
    mask = np.zeros((8, 10), bool)
    mask[2, 3] = mask[6, 7] = True
    assert to_rectangle(mask) == (3, 2, 8, 7)
    assert to_rectangle(np.ones((8, 10), bool)) == (0, 0, 10, 8)


def test_rectangles_come_back_exactly():
    rng = np.random.default_rng(6)
    for _ in range(200):
        left, right = sorted(rng.choice(31, size=2, replace=False).tolist())
        top, bottom = sorted(rng.choice(21, size=2, replace=False).tolist())
        mask = from_rectangle((left, top, right, bottom), height=20, width=30)
        assert mask.sum() == (right - left) * (bottom - top)
        assert to_rectangle(mask) == (left, top, right, bottom)


@pytest.mark.parametrize(
    ("rotation", "expected"),
    [
        (0, (10, 10, 16, 14)),
        (90, (6, 10, 10, 16)),  # clockwise: what was right of the corner is below it now
        (180, (4, 6, 10, 10)),
        (270, (10, 4, 14, 10)),
        (-90, (10, 4, 14, 10)),
        (450, (6, 10, 10, 16)),
    ],
)
def test_quarter_turns_go_clockwise_about_the_top_left_corner(rotation, expected):
    mask = from_rectangle((10, 10, 16, 14), height=20, width=20, rotation=rotation)
    assert to_rectangle(mask) == expected
    assert mask.sum() == 24


def test_a_turned_rectangle_keeps_its_area_and_its_corner():
    for rotation in range(0, 90, 7):
        mask = from_rectangle((60, 10, 110, 40), height=120, width=150, rotation=rotation)
        assert abs(mask.sum() - 1500) < 30
        middle = np.argwhere(mask).mean(axis=0)[::-1] + 0.5 - (60, 10)
        angle = np.radians(rotation)
        turned = (25 * np.cos(angle) - 15 * np.sin(angle), 25 * np.sin(angle) + 15 * np.cos(angle))
        np.testing.assert_allclose(middle, turned, atol=0.3)


@pytest.mark.parametrize("rectangle", [(3, 0, 3, 5), (5, 0, 3, 5), (0, 5, 3, 5), (0, 0, float("nan"), 5)])
def test_a_rectangle_without_area_is_refused(rectangle):
    with pytest.raises(Refusal, match="rectangle"):
        from_rectangle(rectangle, height=9, width=9)


def test_a_rectangle_turned_by_no_number_is_refused():
    with pytest.raises(Refusal, match="rectangle"):
        from_rectangle((0, 0, 3, 3), height=9, width=9, rotation=float("inf"))


# PNG data URLs


def png_bytes(url: str) -> bytes:
    return base64.b64decode(url.removeprefix("data:image/png;base64,"))


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def saved(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_mask_comes_back_from_its_png_and_other_readers_see_the_same():
    rng = np.random.default_rng(7)
    for _ in range(100):
        height, width = rng.integers(1, 50, size=2)
        mask = rng.random((height, width)) < rng.random()
        url = to_png_data_url(mask, colour=(10, 200, 30))
        np.testing.assert_array_equal(from_png_data_url(url, height=height, width=width), mask)
        expected = np.where(mask[..., None], (10, 200, 30, 255), (0, 0, 0, 0))
        with Image.open(io.BytesIO(png_bytes(url))) as image:
            assert image.mode == "RGBA"
            np.testing.assert_array_equal(np.asarray(image), expected)
        by_opencv = cv2.imdecode(np.frombuffer(png_bytes(url), np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(by_opencv, expected[..., [2, 1, 0, 3]])


def test_only_alpha_decides_above_127():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 127, 128, 255
    url = data_url(saved(Image.fromarray(rgba)))
    assert from_png_data_url(url, height=1, width=3).tolist() == [[False, True, True]]


def test_grey_and_palette_images_with_transparency_are_read():
    mask = blob(np.random.default_rng(8), 40, 3)
    grey = Image.fromarray(np.dstack([mask, mask * 255]).astype(np.uint8))
    palette = Image.fromarray(mask.astype(np.uint8)).convert("P")
    palette.info["transparency"] = 0
    for image in (grey, palette):
        np.testing.assert_array_equal(from_png_data_url(data_url(saved(image)), height=40, width=40), mask)


def test_an_image_without_transparency_is_refused_not_taken_for_a_full_mask():
    for mode in ("RGB", "L", "1"):
        with pytest.raises(Refusal, match="transparen"):
            from_png_data_url(data_url(saved(Image.new(mode, (4, 3)))), height=3, width=4)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


GOOD = to_png_data_url(np.eye(30, 40, dtype=bool))
JPEG = base64.b64encode(cv2.imencode(".jpg", np.zeros((30, 40), np.uint8))[1].tobytes()).decode()
BOMB = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 6, 0, 0, 0))
STREAM_BOMB = (
    png_bytes(GOOD)[:33] + chunk(b"IDAT", zlib.compress(bytes(50_000_000), 9)) + chunk(b"IEND", b"")
)  # 30 x 40 by its header, 50 MB by its pixels
TEXT_BOMB = png_bytes(GOOD)[:33] + chunk(b"zTXt", b"t\0\0" + zlib.compress(bytes(50_000_000), 9)) + png_bytes(GOOD)[33:]


@pytest.mark.parametrize(
    "url",
    [
        None,
        "",
        7,
        "https://example.org/mask.png",
        "data:image/jpeg;base64," + JPEG,
        "data:image/png;base64," + JPEG,
        "data:image/png;base64,",
        GOOD[:60],
        GOOD[:-40],
        GOOD[:-8] + "*" * 8,
        GOOD + "ä",
        GOOD[:100] + "AAAA" + GOOD[104:],
        to_png_data_url(np.eye(40, 30, dtype=bool)),
        to_png_data_url(np.eye(300, 400, dtype=bool)),
        data_url(png_bytes(GOOD)[:33]),
        data_url(BOMB),
        data_url(BOMB + bytes(100)),
        GOOD + "A" * 10_000_000,
    ],
    ids=lambda url: None,
)
def test_what_is_no_png_of_the_image_is_refused_before_it_is_decoded(url):
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        with pytest.raises(Refusal, match="bitmask"):
            from_png_data_url(url, height=30, width=40)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - begin < 0.1


@pytest.mark.parametrize("png", [STREAM_BOMB, TEXT_BOMB], ids=["pixels", "text"])
def test_a_png_that_unpacks_to_more_than_its_header_says_is_not_unpacked(png):
    tracemalloc.start()
    try:
        try:
            mask = from_png_data_url(data_url(png), height=30, width=40)
        except Refusal:
            mask = np.zeros((30, 40), bool)
        assert mask.shape == (30, 40)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_an_image_without_pixels_has_no_bitmask():
    for height, width in ((0, 4), (4, 0), (-1, 4)):
        with pytest.raises(Refusal, match="bitmask"):
            from_png_data_url(GOOD, height=height, width=width)


def test_flipping_bytes_gives_a_mask_or_a_refusal_never_another_error():
    rng = np.random.default_rng(9)
    for _ in range(300):
        png = bytearray(png_bytes(GOOD))
        for at in rng.integers(0, len(png), size=2):
            png[at] ^= 1 << int(rng.integers(8))
        with contextlib.suppress(Refusal):
            assert from_png_data_url(data_url(bytes(png)), height=30, width=40).shape == (30, 40)


def test_a_mask_without_pixels_and_a_colour_that_is_none_are_errors():
    with pytest.raises(ValueError, match="pixel"):
        to_png_data_url(np.zeros((0, 3), bool))
    for colour in ((1, 2), (0, 0, 256), (-1, 0, 0)):
        with pytest.raises(ValueError, match="colour"):
            to_png_data_url(np.ones((2, 2), bool), colour=colour)
