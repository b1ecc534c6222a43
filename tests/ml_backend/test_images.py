import contextlib
import hashlib
import io
import resource
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from ml_backend.images import ImageInfo, ImageSource, LoadedImage, check_size, decode_image
from model.types import Refusal

LIMIT = 1_000_000  # pixels
ORIENTATION = 0x0112
TURNS = {  # how an upright picture must be stored so that the tag brings it back
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def corners():
    """A picture whose corners all differ, in blocks a JPEG keeps apart."""
    pixels = np.zeros((48, 96, 3), np.uint8)
    pixels[:16, :16] = 255, 0, 0
    pixels[:16, -16:] = 0, 255, 0
    pixels[-16:, :16] = 0, 0, 255
    pixels[-16:, -16:] = 255, 255, 255
    return Image.fromarray(pixels)


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, *chunks, depth=8, colour=2):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_every_format_gives_contiguous_rgb(kind):
    pixels = decode_image(saved(corners(), kind), max_pixels=LIMIT)
    assert pixels.shape == (48, 96, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable  # torch warns about others
    np.testing.assert_allclose(pixels[24, 48], 0, atol=8)
    np.testing.assert_allclose(pixels[3, -4], (0, 255, 0), atol=24)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_all_eight_orientations_give_the_upright_picture(kind, orientation):
    upright = corners()
    stored = upright.transpose(TURNS[orientation]) if TURNS[orientation] is not None else upright
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    pixels = decode_image(saved(stored, kind, exif=exif(orientation), **options), max_pixels=LIMIT)
    if kind == "JPEG":  # compare with what JPEG makes of the upright one
        expected = decode_image(saved(upright, kind, **options), max_pixels=LIMIT)
        np.testing.assert_allclose(pixels.astype(int), expected, atol=2)
    else:
        np.testing.assert_array_equal(pixels, upright)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_orientation_and_an_upright_copy_of_the_same_coefficients_are_identical(orientation):
    stored = saved(corners(), "JPEG", quality=100, subsampling=0)
    tagged = saved(corners(), "JPEG", quality=100, subsampling=0, exif=exif(orientation))
    inverse = {6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}.get(orientation, TURNS[orientation])
    expected = np.asarray(Image.open(io.BytesIO(stored)).transpose(inverse))
    np.testing.assert_array_equal(decode_image(tagged, max_pixels=LIMIT), expected)


def test_what_chromium_does_not_turn_is_not_turned():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert decode_image(saved(corners(), "JPEG", xmp=xmp), max_pixels=LIMIT).shape == (48, 96, 3)
    assert decode_image(saved(corners(), "WEBP", exif=exif(6)), max_pixels=LIMIT).shape == (48, 96, 3)
    data = saved(corners(), "PNG", exif=exif(6))
    start = data.index(b"eXIf") - 4
    block = data[start : start + 12 + struct.unpack(">I", data[start : start + 4])[0]]
    late = data.replace(block, b"")[:-12] + block + data[-12:]
    assert decode_image(late, max_pixels=LIMIT).shape == (48, 96, 3)


def test_avif_is_turned_by_its_own_boxes():
    assert decode_image(saved(corners(), "AVIF", exif=exif(6)), max_pixels=LIMIT).shape == (96, 48, 3)


@pytest.mark.parametrize("block", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_exif_does_not_cost_the_picture(block):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(saved(corners(), "JPEG", exif=block), max_pixels=LIMIT).shape == (48, 96, 3)


@pytest.mark.parametrize("value", [0, 9, 255])
def test_an_orientation_that_does_not_exist_is_ignored(value):
    assert decode_image(saved(corners(), "JPEG", exif=exif(value)), max_pixels=LIMIT).shape == (48, 96, 3)


def test_sixteen_bit_grey_keeps_its_whole_range():
    grey = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        pixels = decode_image(saved(Image.fromarray(grey), kind), max_pixels=LIMIT)
        np.testing.assert_array_equal(pixels[0], [[v] * 3 for v in (0, 0, 1, 128, 255)])


def test_big_endian_sixteen_bit_tiff_is_read_alike():
    entries = [(256, 3, 3), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1)]
    entries += [(273, 4, 8), (277, 3, 1), (278, 3, 1), (279, 4, 6)]
    strip = struct.pack(">HHH", 0, 32768, 65535)
    fields = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", v, 0) if kind == 3 else struct.pack(">I", v))
        for tag, kind, v in entries
    )
    data = b"MM\0*" + struct.pack(">I", 14) + strip + struct.pack(">H", len(entries)) + fields + b"\0\0\0\0"
    np.testing.assert_array_equal(decode_image(data, max_pixels=LIMIT)[0, :, 0], [0, 128, 255])


def test_sixteen_bit_colour_png_becomes_eight():
    row = b"\0" + struct.pack(">6H", 0, 32768, 65535, 256, 512, 1024)
    data = png(2, 1, chunk(b"IDAT", zlib.compress(row)), depth=16)
    np.testing.assert_array_equal(decode_image(data, max_pixels=LIMIT), [[[0, 128, 255], [1, 2, 4]]])


def test_integers_and_floats_are_stretched_from_smallest_to_largest():
    floats = np.array([[-1.0, 0.0, 1.0, np.nan, np.inf]], np.float32)
    pixels = decode_image(saved(Image.fromarray(floats), "TIFF"), max_pixels=LIMIT)
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 128, 255, 0, 255])
    integers = np.array([[100_000, 200_000, 300_000]], np.int32)
    pixels = decode_image(saved(Image.fromarray(integers), "TIFF"), max_pixels=LIMIT)
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 128, 255])
    flat = decode_image(saved(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"), max_pixels=LIMIT)
    assert not flat.any()


def test_cmyk_jpeg_keeps_light_light_and_dark_dark():
    cmyk = np.zeros((32, 64, 4), np.uint8)
    cmyk[:, 32:, 3] = 255  # right half black
    pixels = decode_image(saved(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100), max_pixels=LIMIT)
    np.testing.assert_allclose(pixels[16, 8], 255, atol=4)
    np.testing.assert_allclose(pixels[16, 56], 0, atol=4)


def test_transparent_pixels_lie_on_white():
    for image in (
        Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], np.uint8), "RGBA"),
        Image.fromarray(np.array([[[90, 255], [90, 0], [0, 128]]], np.uint8), "LA"),
    ):
        pixels = decode_image(saved(image, "PNG"), max_pixels=LIMIT)
        np.testing.assert_array_equal(pixels[0, 0], np.asarray(image.convert("RGB"))[0, 0])
        np.testing.assert_array_equal(pixels[0, 1], 255)
        np.testing.assert_allclose(pixels[0, 2], 127, atol=1)


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\x80"])
def test_a_palette_with_transparency_lies_on_white(transparency):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 0, 0, 0])
    pixels = decode_image(saved(image, "PNG", transparency=transparency), max_pixels=LIMIT)
    np.testing.assert_array_equal(pixels[0, :2], [[10, 20, 30], [255, 255, 255]])
    np.testing.assert_allclose(pixels[0, 2], 0 if transparency == 1 else 127, atol=1)


def test_one_bit_is_black_and_white():
    image = Image.fromarray(np.array([[True, False, True]]))
    for kind in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(decode_image(saved(image, kind), max_pixels=LIMIT)[0, :, 1], [255, 0, 255])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_it_is_the_first_picture(kind):
    first, second = (Image.new("RGB", (20, 10), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(first, kind, save_all=True, append_images=[second], **options)
    np.testing.assert_array_equal(decode_image(data, max_pixels=LIMIT)[5, 10], (255, 0, 0))


def test_a_phone_photo_with_a_second_picture_inside_is_turned_too():
    data = saved(corners(), "MPO", save_all=True, append_images=[corners()], exif=exif(6))
    assert decode_image(data, max_pixels=LIMIT).shape == (96, 48, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_a_truncated_file_is_refused(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = saved(noise, kind)
    with pytest.raises(Refusal, match=r"damaged|not an image"):
        decode_image(data[: len(data) // 2], max_pixels=LIMIT)


def test_a_png_bomb_is_refused_before_it_is_decoded():
    zeros = zlib.compressobj(9)
    packed = b"".join(zeros.compress(bytes(2**20)) for _ in range(64)) + zeros.flush()
    data = png(50_000, 50_000, chunk(b"IDAT", packed))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with pytest.raises(Refusal, match=r"50000 x 50000 pixels, more than 100 megapixels; .*GRACO_IMAGE_MAX_MEGAPIXELS"):
        decode_image(data, max_pixels=100_000_000)
    assert time.perf_counter() - start < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_text_bomb_inside_a_png_is_refused():
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200 * 2**20), 9))
    row = zlib.compress(b"\0" + bytes(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Refusal):
        decode_image(png(1, 1, text, chunk(b"IDAT", row)), max_pixels=LIMIT)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_the_limit_of_pixels_holds_for_every_format(kind):
    data = saved(corners(), kind)
    assert decode_image(data, max_pixels=48 * 96).shape == (48, 96, 3)
    with pytest.raises(Refusal, match="megapixels"):
        decode_image(data, max_pixels=48 * 96 - 1)


def test_the_limit_is_ours_not_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode_image(saved(corners(), "JPEG"), max_pixels=LIMIT).shape == (48, 96, 3)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "empty"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"\xef\xbb\xbf  <SVG></SVG>", "SVG"),
        (b"<!DOCTYPE html><title>Log in</title>", "log in"),
        (b'{"detail": "Not found."}', "text"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0" * 128 + b"DICM", "DICOM"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "text"),
        (b"P6 1 1 255\n\0\0\0", "another kind"),
    ],
)
def test_what_is_no_image_is_refused_by_name(data, what):
    with pytest.raises(Refusal, match=what):
        decode_image(data, max_pixels=LIMIT)


def test_damaged_files_never_raise_anything_but_a_refusal():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"):
        data = saved(corners(), kind, **({"exif": exif(6)} if kind not in ("BMP", "GIF") else {}))
        for _ in range(60):
            broken = bytearray(data)
            for place in rng.integers(0, len(data), 4):
                broken[place] = rng.integers(0, 256)
            with contextlib.suppress(Refusal):
                assert decode_image(bytes(broken), max_pixels=LIMIT).ndim == 3


def test_large_images_are_converted_in_bands_without_seams():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (700, 900, 4), dtype=np.uint8)
    expected = Image.new("RGB", (900, 700), "white")
    image = Image.fromarray(pixels, "RGBA")
    expected.paste(image, mask=image.getchannel("A"))
    np.testing.assert_array_equal(decode_image(saved(image, "PNG"), max_pixels=LIMIT), np.asarray(expected))


def test_sizes_that_agree_pass_and_others_name_both():
    image = LoadedImage("0" * 64, b"", np.zeros((30, 40, 3), np.uint8))
    check_size(image, 40, 30)
    check_size(ImageInfo("0" * 64, 40, 30), 40, 30)
    with pytest.raises(Refusal, match=r"40 x 30 pixels here, but 30 x 40 in Label Studio; .*EXIF"):
        check_size(image, 30, 40)
    with pytest.raises(Refusal, match=r"40 x 30 .* 80 x 60 .*replaced"):
        check_size(image, 80, 60)


class Files:
    """A fetcher that gives prepared bytes, and counts."""

    def __init__(self, **files):
        self.files = files
        self.asked = []

    def fetch(self, uri, task_id):
        self.asked.append((uri, task_id))
        return self.files[uri]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_loaded_image_is_known_until_its_time_is_over():
    data, clock = saved(corners(), "PNG"), Clock()
    files = Files(a=data)
    source = ImageSource(files, max_pixels=LIMIT, ttl_s=60, clock=clock)
    assert source.identify(1, "a") is None
    loaded = source.load(1, "a")
    assert (loaded.id, loaded.width, loaded.height) == (hashlib.sha256(data).hexdigest(), 96, 48)
    assert source.identify(1, "a") == ImageInfo(loaded.id, 96, 48)
    assert source.identify(2, "a") is None
    clock.now = 59.9
    assert source.identify(1, "a") is not None
    clock.now = 60.0
    assert source.identify(1, "a") is None
    assert files.asked == [("a", 1)]


def test_a_ttl_of_nothing_remembers_nothing():
    source = ImageSource(Files(a=saved(corners(), "PNG")), max_pixels=LIMIT, ttl_s=0)
    source.load(1, "a")
    assert source.identify(1, "a") is None


def test_an_image_loaded_again_is_known_by_its_new_bytes():
    files = Files(a=saved(corners(), "PNG"))
    source = ImageSource(files, max_pixels=LIMIT, ttl_s=60)
    before = source.load(1, "a").id
    files.files["a"] = saved(Image.new("RGB", (5, 4)), "PNG")
    after = source.load(1, "a")
    assert after.id != before
    assert source.identify(1, "a") == ImageInfo(after.id, 5, 4)


def test_the_address_unused_for_longest_is_forgotten_first():
    data = saved(corners(), "PNG")
    source = ImageSource(Files(a=data, b=data, c=data), max_pixels=LIMIT, ttl_s=60, remember=2)
    source.load(1, "a")
    source.load(1, "b")
    assert source.identify(1, "a") is not None
    source.load(1, "c")
    assert [source.identify(1, uri) is not None for uri in "abc"] == [True, False, True]


def test_an_image_inside_its_address_is_remembered_by_digest():
    uri = "data:image/png;base64," + "A" * 10_000
    source = ImageSource(Files(**{uri: saved(corners(), "PNG")}), max_pixels=LIMIT, ttl_s=60)
    source.load(1, uri)
    assert source.identify(1, uri) is not None
    assert sum(len(key[1]) for key in source._known) < 100


def test_an_image_that_is_refused_is_not_remembered():
    source = ImageSource(Files(a=b"text"), max_pixels=LIMIT, ttl_s=60)
    with pytest.raises(Refusal):
        source.load(1, "a")
    assert source.identify(1, "a") is None


def test_closing_forgets():
    source = ImageSource(Files(a=saved(corners(), "PNG")), max_pixels=LIMIT, ttl_s=60)
    source.load(1, "a")
    source.close()
    assert source.identify(1, "a") is None
