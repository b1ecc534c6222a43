"""A mask as the other shapes Label Studio shows: PNG data URL, polygons, rectangle; and back; pure.

Coordinates are pixels of the source image, x right and y down, along pixel edges: a full mask of 10 columns and 8 rows
is the rectangle 0..10 x 0..8. A pixel belongs to a shape when its centre does (even-odd), so shapes that share an edge
share no pixel. Percent is left to `label_studio.py`.

A polygon of Label Studio has no holes. Ours reaches each hole over a bridge of no width (a keyhole), there and back,
and runs around it the other way, so that filling even-odd and filling nonzero both leave the hole open.

Source of the simplification: Douglas and Peucker (1973), as `cv2.approxPolyDP`.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import struct
import zlib

import cv2
import numpy as np
import numpy.typing as npt
from PIL.PngImagePlugin import PngImageFile

from model.types import Mask, Refusal

Polygon = npt.NDArray[np.float64]  # n, 2: x, y; closed, the first point is not repeated
Image = npt.NDArray[np.uint8]  # H, W; 0 or 1
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom

MAX_POINTS = 500
"""Points of one polygon, bridges included; beyond some hundreds the editor's handles can no longer be worked with."""
MAX_POLYGONS = 100
"""Polygons of one mask; of more components the largest are given."""
MAX_HOLES = 60
"""Holes of one polygon; of more all but the largest are filled."""
SPECK_SHARE = 1 / 400
"""The smallest components, together at most this share of the mask, are left out; as much of its smallest holes is
filled. A mask below 400 pixels loses nothing."""

_PNG_PREFIX = "data:image/png;base64,"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_OTHER_BYTES = 1 << 18  # for what a PNG may carry besides pixels, such as a colour profile
_STAIRCASE = 0.5  # pixels; a line that follows its staircase so closely covers the same pixel centres
_SPARING = 0.03  # pixels of tolerance per pixel of area over perimeter: measured, costs about one percent of the area
_MOST_CORNERS = (
    20_000  # of a ring; of more, every second, third ... is looked at, or salt and pepper would take minutes
)
_RAGGED = 50_000  # changes from pixel to pixel along the rows; cv2 needs minutes to trace many more
_MOST_TRACED = 1000  # components, and holes, of a ragged mask
_ELLIPSE_CORNERS = 256  # a ten-thousandth of the area is missing
_FARTHEST = 1e6  # pixels; a point farther out than this is a mistake, not a drawing
_MOST_CROSSINGS = 1 << 23  # edges times rows a polygon may cross; a thousand points on 4000 rows are 4 million
_CROSSINGS_AT_ONCE = 1 << 20

# Freeman's eight directions, counter-clockwise on the screen from east; cv2 follows a border so that what lies outside
# the component is on the right hand. For the four even ones: the corner of a pixel where its edge on that side begins,
# when the border is followed that way.
_DIRECTION = np.array([[3, 2, 1], [4, -1, 0], [5, 6, 7]])  # row dy + 1, column dx + 1
_EDGE_BEGINS = np.array([[1, 1], [1, 0], [0, 0], [0, 1]])  # E, N, W, S; x, y


def to_png_data_url(mask: Mask, *, colour: tuple[int, int, int] = (255, 0, 0)) -> str:
    """Return the mask as a data URL of an RGBA PNG of its size, for `value.imageDataURL` of a bitmasklabels region.

    Args:
        mask: bool, shape (H, W), at least one pixel.
        colour: red, green and blue, 0..255, of the mask; it is opaque, and the rest is 0, 0, 0 and fully transparent.

    Raises:
        ValueError: the mask is empty or not boolean, or the colour is none.

    >>> to_png_data_url(np.array([[True]]))[:30]
    'data:image/png;base64,iVBORw0K'
    """
    _check_mask(mask)
    if mask.size == 0:
        raise ValueError(f"a mask of shape {mask.shape} has no pixel to show")
    if len(colour) != 3 or not all(0 <= channel <= 255 for channel in colour):
        raise ValueError(f"colour {colour} is not red, green, blue, each 0..255")
    height, width = mask.shape
    pixels = np.zeros((height, width, 4), dtype=np.uint8)
    pixels.view(np.uint32)[..., 0][mask] = np.array([*colour, 255], dtype=np.uint8).view(np.uint32)[0]

    # Written here, not by Pillow: rows as differences to the row above (filter 2) are zeros nearly everywhere, which a
    # run-length deflate packs as small and three times as fast.
    rows = pixels.reshape(height, 4 * width)
    filtered = np.empty((height, 1 + 4 * width), dtype=np.uint8)
    filtered[:, 0] = 2
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    deflate = zlib.compressobj(1, strategy=zlib.Z_RLE)
    png = b"".join(
        (
            _PNG_SIGNATURE,
            _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)),  # 8 bits a channel, RGBA
            _png_chunk(b"IDAT", deflate.compress(filtered.data) + deflate.flush()),
            _png_chunk(b"IEND", b""),
        )
    )
    return _PNG_PREFIX + base64.b64encode(png).decode("ascii")


def from_png_data_url(url: str, *, height: int, width: int) -> Mask:
    """Return the mask a PNG data URL shows: every pixel whose alpha is above 127.

    Nothing is decompressed before the PNG's own header has named the expected size.

    Args:
        url: `data:image/png;base64,` and the PNG; it has to have transparency.
        height: rows of the image it lies on.
        width: columns of that image.

    Returns:
        The mask, shape (height, width).

    Raises:
        Refusal: it is no PNG data URL, is damaged, has another size, or no transparency.

    >>> from_png_data_url(to_png_data_url(np.array([[True, False]])), height=1, width=2)
    array([[ True, False]])
    """
    if not isinstance(url, str) or not url.startswith(_PNG_PREFIX):
        raise Refusal(f"a bitmask is a PNG data URL ({_PNG_PREFIX}...); send value.imageDataURL as it was")
    if height < 1 or width < 1:
        raise Refusal(f"an image of {width} x {height} pixels holds no bitmask; send its original width and height")
    most = height * (1 + 8 * width)  # 16 bits a channel, not compressed
    most += most // 1000 + _PNG_OTHER_BYTES
    if len(url) > len(_PNG_PREFIX) + 4 * (most // 3 + 1):
        raise Refusal(f"bitmask of {len(url)} characters is longer than an image of {width} x {height} pixels can need")
    try:
        png = base64.b64decode(url[len(_PNG_PREFIX) :], validate=True)
    except (binascii.Error, ValueError):
        raise Refusal("bitmask is not valid base64; send value.imageDataURL as it was") from None
    if not png.startswith(_PNG_SIGNATURE) or png[12:16] != b"IHDR" or len(png) < 33:
        raise Refusal("bitmask is called a PNG but is none; send value.imageDataURL as it was")
    found = struct.unpack(">II", png[16:24])
    if found != (width, height):
        raise Refusal(
            f"bitmask has {found[0]} x {found[1]} pixels, the image {width} x {height}; "
            "send original_width and original_height of the image it was painted on"
        )
    try:
        with PngImageFile(io.BytesIO(png)) as image:  # not Image.open: the size is known, its warning would be noise
            if not image.has_transparency_data:
                raise Refusal("bitmask PNG has no transparency, so all of it would count; leave the ground transparent")
            rgba = image if image.mode in ("RGBA", "LA") else image.convert("RGBA")
            return np.asarray(rgba.getchannel("A")) > 127
    except Refusal:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as damaged:
        raise Refusal(f"bitmask PNG is damaged ({damaged}); send value.imageDataURL as it was") from damaged


def to_polygons(mask: Mask, *, tolerance: float = 1.5) -> list[Polygon]:
    """Return the mask's components as polygons, the largest first; an empty mask has none.

    Pixels that touch at a corner belong together. An island in a hole is a polygon of its own. To stay workable for a
    person, the answer is not exact; filled again, masks above some 2000 pixels come back with an IoU of at least 0.98
    as long as they keep within the last two limits here:

    - points within `tolerance` of the line between their neighbours go (Douglas-Peucker), with less tolerance where
      the component is small or thin, down to half a pixel;
    - specks and pinholes go (`SPECK_SHARE`);
    - of components and of holes the largest are kept (`MAX_POLYGONS`, `MAX_HOLES`);
    - when more than `MAX_POINTS` points remain, the tolerance grows until they do not, and holes too small for it are
      filled.

    Args:
        mask: bool, shape (H, W).
        tolerance: pixels, 0 or more, at most; 0 follows every pixel edge, within the limits.

    Returns:
        Polygons, each of shape (n, 2), 3 <= n <= `MAX_POINTS`, within 0..W and 0..H.

    Raises:
        ValueError: the mask is not boolean H, W, or the tolerance is not a number from 0 on.

    >>> to_polygons(np.ones((8, 10), dtype=bool))[0].tolist()
    [[0.0, 0.0], [0.0, 8.0], [10.0, 8.0], [10.0, 0.0]]
    """
    _check_mask(mask)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance {tolerance} is not a number of pixels from 0 on")
    return [_keyhole(_simplified(rings, tolerance)) for rings in _components(mask)]


def from_polygon(points: npt.ArrayLike, *, height: int, width: int) -> Mask:
    """Return the pixels whose centres lie in a polygon, filled even-odd; what lies outside the image is cut off.

    Args:
        points: x, y in pixels, shape (n, 2), at least three; the last joins the first.
        height: rows of the image.
        width: columns of the image.

    Returns:
        The mask, shape (height, width).

    Raises:
        Refusal: the points are no polygon, or lie absurdly far out, or zigzag more than a drawing can.

    >>> from_polygon([(0, 0), (3, 0), (3, 2)], height=2, width=3).astype(int)
    array([[0, 1, 1],
           [0, 0, 1]])
    """
    corners = _checked_points(points)
    mask = np.zeros((height, width), dtype=np.bool_)
    begin, end = corners, np.roll(corners, -1, axis=0)
    upward = begin[:, 1] > end[:, 1]
    begin, end = np.where(upward[:, None], end, begin), np.where(upward[:, None], begin, end)

    # The rows whose centre an edge passes, its upper end included and its lower end not.
    first = np.clip(np.ceil(begin[:, 1] - 0.5), 0, height).astype(np.int64)
    rows = np.clip(np.ceil(end[:, 1] - 0.5), 0, height).astype(np.int64) - first
    crossing = rows > 0
    begin, end, first, rows = begin[crossing], end[crossing], first[crossing], rows[crossing]
    if not rows.size:
        return mask
    total = int(rows.sum())
    if total > _MOST_CROSSINGS:
        raise Refusal(
            f"polygon of {len(corners)} points crosses rows of the image {total} times, more than {_MOST_CROSSINGS}; "
            "draw it with fewer points"
        )

    # Every crossing turns the row from there on; turned an odd number of times means inside.
    left = int(np.clip(np.floor(corners[:, 0].min()), 0, width))
    right = int(np.clip(np.ceil(corners[:, 0].max()), left, width))
    top, bottom = int(first.min()), int((first + rows).max())
    turns = np.zeros((bottom - top, right - left + 1), dtype=np.uint8)
    slope = (end[:, 0] - begin[:, 0]) / (end[:, 1] - begin[:, 1])
    parts = np.flatnonzero(np.diff(np.cumsum(rows) // _CROSSINGS_AT_ONCE)) + 1
    for edges in np.split(np.arange(rows.size), parts):
        edge = np.repeat(edges, rows[edges])
        row = np.arange(edge.size) - np.repeat(np.cumsum(rows[edges]) - rows[edges], rows[edges]) + first[edge]
        x = begin[edge, 0] + (row + 0.5 - begin[edge, 1]) * slope[edge]
        column = np.clip(np.ceil(x - 0.5), left, right).astype(np.int64)
        np.bitwise_xor.at(turns, (row - top, column - left), np.uint8(1))
    inside = np.bitwise_xor.accumulate(turns, axis=1)
    mask[top:bottom, left:right] = inside[:, :-1]
    return mask


def to_rectangle(mask: Mask) -> tuple[int, int, int, int] | None:
    """Return left, top, right, bottom of the smallest rectangle that holds the mask; None when it is empty.

    >>> to_rectangle(np.array([[False, True], [False, True]]))
    (1, 0, 2, 2)
    """
    _check_mask(mask)
    if mask.size == 0:
        return None
    left, top, width, height = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
    return (left, top, left + width, top + height) if width else None


def from_rectangle(rectangle: Rectangle, *, height: int, width: int, rotation: float = 0.0) -> Mask:
    """Return the pixels whose centres lie in a rectangle; what lies outside the image is cut off.

    Args:
        rectangle: left, top, right, bottom in pixels, before it is turned.
        height: rows of the image.
        width: columns of the image.
        rotation: degrees, clockwise on the screen about the top-left corner: Label Studio's `value.rotation`. It
            turns in pixels, so translate percents first.

    Raises:
        Refusal: the rectangle is empty or not finite.

    >>> from_rectangle((2, 0, 4, 1), height=3, width=3, rotation=90).astype(int)
    array([[0, 1, 0],
           [0, 1, 0],
           [0, 0, 0]])
    """
    left, top, right, bottom = rectangle
    if not (all(map(math.isfinite, (*rectangle, rotation))) and left < right and top < bottom):
        raise Refusal(f"rectangle {rectangle} turned by {rotation} degrees is empty or not finite: draw it anew")
    angle = math.radians(rotation % 360)
    cosine, sine = math.cos(angle), math.sin(angle)
    if rotation % 90 == 0:  # exactly, so that pixels at the edge do not depend on a rounded sine
        cosine, sine = round(cosine), round(sine)
    across, down = right - left, bottom - top
    corners = [(0.0, 0.0), (across, 0.0), (across, down), (0.0, down)]
    turned = [(left + x * cosine - y * sine, top + x * sine + y * cosine) for x, y in corners]
    return from_polygon(turned, height=height, width=width)


def from_ellipse(
    middle: tuple[float, float],
    radii: tuple[float, float],
    *,
    height: int,
    width: int,
    rotation: float = 0.0,
) -> Mask:
    """Return the pixels whose centres lie in an ellipse; what lies outside the image is cut off.

    Args:
        middle: x and y in pixels.
        radii: across and down in pixels, before it is turned.
        height: rows of the image.
        width: columns of the image.
        rotation: degrees, clockwise on the screen about the middle: Label Studio's `value.rotation`.

    Raises:
        Refusal: the ellipse is empty or not finite.

    >>> from_ellipse((2.5, 1.5), (2.2, 1.2), height=3, width=5).astype(int)
    array([[0, 1, 1, 1, 0],
           [1, 1, 1, 1, 1],
           [0, 1, 1, 1, 0]])
    """
    if not (all(map(math.isfinite, (*middle, *radii, rotation))) and min(radii) > 0):
        raise Refusal(f"the ellipse of radii {radii} about {middle} is empty or not finite: draw it anew")
    angles = np.linspace(0, 2 * np.pi, _ELLIPSE_CORNERS, endpoint=False)
    x, y = radii[0] * np.cos(angles), radii[1] * np.sin(angles)
    turn = math.radians(rotation % 360)
    turned = np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], axis=1)
    return from_polygon(turned + middle, height=height, width=width)


def _check_mask(mask: Mask) -> None:
    if mask.dtype != np.bool_ or mask.ndim != 2:
        raise ValueError(f"a mask is a boolean H, W array, not {mask.dtype} of shape {mask.shape}")


def _checked_points(points: npt.ArrayLike) -> Polygon:
    try:
        corners = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise Refusal("polygon points are not numbers; send them as [[x, y], ...]") from None
    if corners.ndim != 2 or corners.shape[0] < 3 or corners.shape[1] != 2:
        raise Refusal(f"a polygon has three points [x, y] or more, not an array of shape {corners.shape}")
    if not (np.abs(corners) <= _FARTHEST).all():  # false for NaN too
        raise Refusal(f"polygon points have to be numbers within {_FARTHEST:.0f} pixels of the image")
    return corners


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _components(mask: Mask) -> list[list[Polygon]]:
    """Return the rings of each component worth showing, largest first: the outer ring, then its holes."""
    box = to_rectangle(mask)
    if box is None:
        return []
    left, top, right, bottom = box
    crop: Image = np.zeros((bottom - top + 2, right - left + 2), dtype=np.uint8)
    crop[1:-1, 1:-1] = mask[top:bottom, left:right]
    if np.count_nonzero(crop[:, 1:] != crop[:, :-1]) > _RAGGED:
        crop = _without_crumbs(crop)
    borders, hierarchy = cv2.findContours(crop, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=(left - 1, top - 1))
    parent = hierarchy[0, :, 3]  # -1: an outer border
    is_hole = parent >= 0

    # Pick's theorem counts the pixels within a border through pixel centres: with the border's own for a component,
    # without them for a hole (whose border are the pixels around it).
    lengths = np.array([len(border) for border in borders])
    areas = np.array([cv2.contourArea(border) for border in borders], dtype=np.float64)
    areas += 1 + np.where(is_hole, -lengths, lengths) / 2
    areas[lengths == 1] = 1
    holes = np.flatnonzero(is_hole)
    own = areas - np.bincount(parent[holes], weights=areas[holes], minlength=areas.size)  # without its holes

    share = SPECK_SHARE * float(own[~is_hole].sum())
    holes_of: dict[int, list[int]] = {}
    for hole in _largest(holes, areas, share):
        holes_of.setdefault(int(parent[hole]), []).append(hole)
    return [
        [
            _along_pixel_edges(np.asarray(borders[ring], dtype=np.int32)[:, 0])
            for ring in (outer, *holes_of.get(outer, [])[:MAX_HOLES])
        ]
        for outer in _largest(np.flatnonzero(~is_hole), own, share)[:MAX_POLYGONS]
    ]


def _without_crumbs(image: Image) -> Image:
    """Return a ragged image with its `_MOST_TRACED` largest components only, then its so many largest holes."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(image, connectivity=8)
    shown = np.zeros(len(stats), dtype=np.uint8)
    shown[_by_area(np.asarray(stats, dtype=np.int32))[:_MOST_TRACED]] = 1
    image = shown[labels]
    _, labels, stats, _ = cv2.connectedComponentsWithStats(1 - image, connectivity=4)  # the ground, and the holes
    shown = np.ones(len(stats), dtype=np.uint8)
    shown[labels[0, 0]] = 0  # the image has a margin, so this is the ground
    shown[_by_area(np.asarray(stats, dtype=np.int32))[: _MOST_TRACED + 1]] = 0
    smoother: Image = shown[labels]
    return smoother


def _by_area(stats: npt.NDArray[np.int32]) -> npt.NDArray[np.intp]:
    """Return the labels of cv2's connected components, largest first; label 0 stands for all zeros and is left out."""
    return 1 + np.argsort(-stats[1:, cv2.CC_STAT_AREA], kind="stable")


def _largest(which: npt.NDArray[np.intp], areas: npt.NDArray[np.floating], share: float) -> list[int]:
    """Return these indices, largest area first, without the smallest that together have at most `share`."""
    largest = which[np.argsort(-areas[which], kind="stable")]
    kept = np.cumsum(areas[largest][::-1])[::-1] > share
    return [int(index) for index in largest[kept]]


def _along_pixel_edges(border: npt.NDArray[np.int32]) -> Polygon:
    """Return the corners of the pixel edges along a border that leads through the centres of a component's pixels.

    At each pixel the border arrives from one neighbour and leaves to another; those between the two, counter-clockwise,
    lie outside. Towards each of them that shares an edge, that edge is part of the outline.
    """
    if len(border) == 1:
        edges_before = np.array([4])
        directions = np.array([4, 6, 0, 2])
    else:
        leaving = np.roll(border, -1, axis=0) - border
        leave = _DIRECTION[leaving[:, 1] + 1, leaving[:, 0] + 1]
        arrive = (np.roll(leave, 1) + 4) % 8  # where it came from
        between = (leave - arrive - 1) % 8
        first = (arrive + 2) // 2 * 2  # the first even direction after it
        edges_before = (arrive + between - first) // 2 + 1
        nth = np.arange(edges_before.sum()) - np.repeat(np.cumsum(edges_before) - edges_before, edges_before)
        directions = (np.repeat(first, edges_before) + 2 * nth) % 8
    points = np.repeat(border, edges_before, axis=0) + _EDGE_BEGINS[directions // 2]
    corners: Polygon = points[directions != np.roll(directions, 1)].astype(np.float64)
    return corners


def _simplified(rings: list[Polygon], tolerance: float) -> list[Polygon]:
    """Return the rings of one component with fewer points, `MAX_POINTS` with their bridges; holes may vanish."""
    rings = [ring[:: len(ring) // _MOST_CORNERS + 1] for ring in rings]
    area = sum(map(_signed_area, rings))  # holes run the other way and count off
    perimeter = sum(float(np.abs(np.roll(ring, -1, axis=0) - ring).sum()) for ring in rings)
    tolerance = min(tolerance, _STAIRCASE + _SPARING * abs(area) / perimeter)
    simpler = _douglas_peucker(rings, tolerance)
    while (points := sum(len(ring) + 2 for ring in simpler) - 2) > MAX_POINTS:  # a bridge repeats both its ends
        tolerance = max(_STAIRCASE, tolerance * min(2.0, max(1.08, math.sqrt(points / MAX_POINTS))))
        simpler = _douglas_peucker(rings, tolerance)
    if len(simpler[0]) < 3:  # nothing but spikes: its corners
        (left, top), (right, bottom) = rings[0].min(axis=0), rings[0].max(axis=0)
        simpler = [np.array([(left, top), (left, bottom), (right, bottom), (right, top)])]
    return simpler


def _douglas_peucker(rings: list[Polygon], tolerance: float) -> list[Polygon]:
    """Return the rings with fewer points, without the holes of which no area remains."""
    if tolerance == 0:
        return rings
    simpler = []
    for ring in rings:
        kept = cv2.approxPolyDP(ring.astype(np.float32)[:, None], tolerance, closed=True)
        simpler.append(np.asarray(kept, dtype=np.float64)[:, 0])
    return simpler[:1] + [ring for ring in simpler[1:] if len(ring) > 2]


def _signed_area(ring: Polygon) -> float:
    x, y = ring[:, 0], ring[:, 1]
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _keyhole(rings: list[Polygon]) -> Polygon:
    """Return one ring through all: from the outer ring over the shortest bridge to a hole, around it and back."""
    joined, *holes = rings
    for hole in sorted(holes, key=lambda hole: _nearest(joined, hole)[2]):
        leave, enter, _ = _nearest(joined, hole)
        around = np.roll(hole, -enter, axis=0)
        joined = np.concatenate((joined[: leave + 1], around, around[:1], joined[leave:]))
    return joined


def _nearest(ring: Polygon, other: Polygon) -> tuple[int, int, float]:
    """Return which point of one ring and which of another are nearest to each other, and their squared distance."""
    squared = ((ring[:, None] - other) ** 2).sum(axis=2)
    at, other_at = np.unravel_index(int(squared.argmin()), squared.shape)
    return int(at), int(other_at), float(squared[at, other_at])
