import contextlib
import time
import tracemalloc
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import pytest
from label_studio_sdk.converter import brush as sdk

from ml_backend.brush import decode, encode
from model.types import Mask, Refusal


def sdk_encode(mask: Mask) -> list[int]:
    return sdk.mask2rle(mask.astype(np.uint8) * 255)


def sdk_decode(rle: list[int], height: int, width: int) -> Mask:
    return sdk.decode_rle(rle).reshape(height, width, 4)[..., 3] > 127


def random_masks(count: int, seed: int) -> Iterator[Mask]:
    """Sizes 1 x 1 to 64 x 64; from noise over streaks to all false and all true."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        height, width = rng.integers(1, 65, size=2)
        density = rng.choice([0.0, 1.0, 0.01, 0.5, 0.99, rng.random()])
        streak = rng.integers(1, 80)
        noise = rng.random(height * width // streak + 1) < density
        yield np.repeat(noise, streak)[: height * width].reshape(height, width)


def pixels(*runs: int) -> Mask:
    """One row of runs, off first."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)[None]


def smooth_mask(height: int, width: int) -> Mask:
    mask = np.zeros((height, width), np.uint8)
    for x, y, radius in ((0.3, 0.3, 0.2), (0.72, 0.65, 0.25), (0.62, 0.2, 0.08)):
        cv2.circle(mask, (int(x * width), int(y * height)), int(radius * height), 1, thickness=-1)
    return mask > 0


def ragged_mask(height: int, width: int) -> Mask:
    noise = np.random.default_rng(5).standard_normal((height, width), dtype=np.float32)
    return cv2.GaussianBlur(noise, (0, 0), 3) > 0


def bit_string(rle_sizes: tuple[int, int, int, int], tokens: str, *, values: int, word_bits: int = 8) -> list[int]:
    """A stream written by hand: header, then tokens of 0 and 1; blanks are for the eye."""
    bits = f"{values:032b}{word_bits - 1:05b}" + "".join(f"{size - 1:04b}" for size in rle_sizes)
    bits += tokens.replace(" ", "")
    bits += "0" * (-len(bits) % 8)
    return [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]


def editor_like(values: list[int], rng: np.random.Generator, sizes: tuple[int, int, int, int]) -> list[int]:
    """A stream with literal runs of several values, any run size that fits and runs cut anywhere."""
    tokens, at = [], 0
    while at < len(values):
        alike = next((i for i in range(at, len(values)) if values[i] != values[at]), len(values)) - at
        name = int(rng.integers(4))
        most = min(1 << sizes[name], len(values) - at)
        if alike > 1 and rng.random() < 0.8:
            count = int(rng.integers(1, min(alike, most) + 1))
            tokens.append(f"1{name:02b}{count - 1:0{sizes[name]}b}{values[at]:08b}")
        else:
            count = int(rng.integers(1, min(40, most) + 1))
            tokens.append(f"0{name:02b}{count - 1:0{sizes[name]}b}")
            tokens.extend(f"{value:08b}" for value in values[at : at + count])
        at += count
    return bit_string(sizes, "".join(tokens), values=len(values))


def best_of(times: int, what: Callable[[], object]) -> float:
    durations = []
    for _ in range(times):
        begin = time.perf_counter()
        what()
        durations.append(time.perf_counter() - begin)
    return min(durations)


def test_ten_thousand_masks_are_written_as_the_sdk_writes_them_and_come_back():
    for mask in random_masks(10_000, seed=1):
        rle = encode(mask)
        assert rle == sdk_encode(mask)
        np.testing.assert_array_equal(decode(rle, height=mask.shape[0], width=mask.shape[1]), mask)


@pytest.mark.parametrize(
    "runs",
    [
        (16_384,),  # 65536 values: one full token
        (16_385,),  # one value pixel more
        (0, 16_385),
        (32_768,),
        (0, 32_768),
        (5, 32_769, 7),
        (16_383, 16_384, 16_385, 1),
        (100_000, 3, 100_000, 65_536, 1, 49_153),
        (1, 2, 3, 4, 5, 63, 64, 65, 66),  # both sides of every change of run size
    ],
)
def test_runs_around_each_run_size_are_written_as_the_sdk_writes_them(runs):
    mask = pixels(*runs)
    rle = encode(mask)
    assert rle == sdk_encode(mask)
    np.testing.assert_array_equal(decode(rle, height=1, width=mask.size), mask)


def test_every_length_of_the_stream_modulo_eight_is_padded_as_the_sdk_pads_it():
    seen = set()
    token_bits = {1: 14, 3: 15, 5: 19, 65: 27}
    for fours in range(8):
        for ones in range(8):
            runs = (1,) * ones + (3,) * fours + (5, 65)
            seen.add((53 + sum(token_bits[run] for run in runs)) % 8)
            assert encode(pixels(*runs)) == sdk_encode(pixels(*runs))
    assert seen == set(range(8))


@pytest.mark.parametrize("make", [smooth_mask, ragged_mask])
def test_a_large_mask_is_written_as_the_sdk_writes_it_and_comes_back(make):
    mask = make(700, 900)
    rle = encode(mask)
    assert rle == sdk_encode(mask)
    np.testing.assert_array_equal(decode(rle, height=700, width=900), mask)
    np.testing.assert_array_equal(sdk_decode(rle, 700, 900), mask)


def test_a_mask_that_is_a_view_into_another_array_is_written_as_its_copy():
    mask = ragged_mask(60, 80)
    for view in (mask.T, mask[::2, 1::3], mask[:, ::-1]):
        assert encode(view) == encode(view.copy())


def test_a_mask_with_nothing_in_it_or_of_other_numbers_is_not_written():
    for wrong in (np.zeros((0, 4), bool), np.zeros((4, 4), np.uint8), np.zeros(4, bool)):
        with pytest.raises(ValueError, match="mask"):
            encode(wrong)


def test_colours_and_soft_edges_are_read_as_the_sdk_reads_them():
    rng = np.random.default_rng(2)
    for _ in range(300):
        height, width = rng.integers(1, 40, size=2)
        rgba = rng.integers(0, 256, size=(height, width, 4))
        rgba[rng.random((height, width)) < 0.5] = rng.choice([0, 127, 128, 255])
        rle = sdk.encode_rle(rgba.ravel())
        np.testing.assert_array_equal(decode(rle, height=height, width=width), rgba[..., 3] > 127)
        np.testing.assert_array_equal(decode(rle, height=height, width=width), sdk_decode(rle, height, width))


def test_literal_runs_and_other_run_sizes_are_read_as_the_sdk_reads_them():
    rng = np.random.default_rng(3)
    for _ in range(300):
        height, width = rng.integers(1, 30, size=2)
        rgba = np.repeat(rng.integers(0, 256, size=height * width), rng.integers(1, 9))[: height * width * 4]
        rgba = np.resize(rgba, height * width * 4)
        sizes = tuple(int(size) for size in rng.integers(1, 17, size=4))
        rle = editor_like(rgba.tolist(), rng, sizes)
        np.testing.assert_array_equal(decode(rle, height=height, width=width), sdk_decode(rle, height, width))


def test_literal_runs_that_reach_over_many_blocks_of_the_stream_are_read():
    rng = np.random.default_rng(4)
    rgba = rng.integers(0, 256, size=(300, 500, 4))
    values = rgba.ravel().tolist()
    tokens = []
    for at in range(0, len(values), 65_536):
        part = values[at : at + 65_536]
        tokens.append(f"011{len(part) - 1:016b}" + "".join(f"{value:08b}" for value in part))
    rle = bit_string((3, 4, 8, 16), "".join(tokens), values=len(values))
    np.testing.assert_array_equal(decode(rle, height=300, width=500), rgba[..., 3] > 127)


def test_only_alpha_decides_not_the_colours():
    red_but_clear, black_but_solid = [255, 0, 0, 127], [0, 0, 0, 128]
    rle = sdk.encode_rle(np.array(red_but_clear + black_but_solid))
    assert decode(rle, height=1, width=2).tolist() == [[False, True]]


def test_bytes_after_the_last_value_are_ignored():
    mask = ragged_mask(20, 30)
    np.testing.assert_array_equal(decode([*encode(mask), 0, 255, 7], height=20, width=30), mask)


def test_a_stream_may_come_as_bytes():
    mask = ragged_mask(20, 30)
    np.testing.assert_array_equal(decode(bytes(encode(mask)), height=20, width=30), mask)


GOOD = encode(smooth_mask(30, 40))
HEADER = bit_string((3, 4, 8, 16), "", values=4 * 30 * 40)
MALFORMED = {
    "nothing": [],
    "None": None,
    "a number": 10**9,
    "text": "0000",
    "a mapping": {0: 1},
    "a short header": GOOD[:6],
    "a header alone": HEADER,
    "text inside": [*GOOD[:-1], "7"],
    "fractions": [float(byte) for byte in GOOD],
    "a missing byte": [*GOOD[:-1], None],
    "truth values": [*GOOD[:-1], False],
    "a negative byte": [*GOOD[:-1], -1],
    "a byte of 256": [*GOOD[:-1], 256],
    "a huge number": [*GOOD[:-1], 10**30],
    "one value too few": bit_string((3, 4, 8, 16), "1 11 0001001010111110 00000000", values=4799),
    "a claim of a billion pixels": bit_string((3, 4, 8, 16), "1 11 1111111111111111 11111111", values=4 * 10**9),
    "a claim of nothing": bit_string((3, 4, 8, 16), "", values=0),
    "a billion pixels in the image's own terms": bit_string((16, 16, 16, 16), "1 11" + "1" * 24, values=4800),
    "words of 16 bits": bit_string((3, 4, 8, 16), "1 11 0001001010111111 0000000011111111", values=4800, word_bits=16),
    "a run over the end": bit_string((3, 4, 8, 16), "1 11 0001001011000000 11111111", values=4800),
    "a run short of the end": bit_string((3, 4, 8, 16), "1 11 0001001010111110 11111111", values=4800),
    "a last value cut off": bit_string((3, 4, 8, 16), "1 11 0001001010111111", values=4800),
    "literals cut off": bit_string((3, 4, 8, 16), "0 11 0001001010111111" + "1" * 8 * 4700, values=4800),
    "half of it": GOOD[: len(GOOD) // 2],
    "all but two bytes": GOOD[:-2],
    "far more than it can need": GOOD + [0] * 100_000,
    "noise": [*HEADER, *np.random.default_rng(6).integers(0, 256, size=20).tolist()],
}


@pytest.mark.parametrize("rle", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_stream_is_refused_at_once_and_in_little_memory(rle):
    begin = time.perf_counter()
    with pytest.raises(Refusal, match="brush RLE"):
        decode(rle, height=30, width=40)
    assert time.perf_counter() - begin < 0.05

    tracemalloc.start()
    try:
        with pytest.raises(Refusal):
            decode(rle, height=30, width=40)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_billion_pixels_are_not_allocated_before_the_stream_has_shown_them():
    rle = bit_string((3, 4, 8, 16), "1 11 1111111111111111 11111111" * 3, values=4 * 10**9)
    tracemalloc.start()
    try:
        with pytest.raises(Refusal):
            decode(rle, height=25_000, width=40_000)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_an_image_without_pixels_has_no_mask():
    for height, width in ((0, 4), (4, 0), (-1, -4)):
        with pytest.raises(Refusal):
            decode(GOOD, height=height, width=width)


def test_cutting_a_stream_anywhere_is_refused_or_harmless():
    rle = encode(ragged_mask(12, 17))
    for length in range(len(rle)):
        try:
            mask = decode(rle[:length], height=12, width=17)
        except Refusal:
            continue
        np.testing.assert_array_equal(mask, ragged_mask(12, 17))
        assert length == len(rle) - 1  # the byte the SDK adds when the last one is full


def test_flipping_bits_gives_a_mask_or_a_refusal_never_another_error():
    rng = np.random.default_rng(7)
    good = encode(ragged_mask(40, 50))
    for _ in range(300):
        rle = list(good)
        for at in rng.integers(0, len(rle), size=rng.integers(1, 4)):
            rle[at] ^= 1 << int(rng.integers(8))
        with contextlib.suppress(Refusal):
            assert decode(rle, height=40, width=50).shape == (40, 50)


@pytest.mark.parametrize("make", [smooth_mask, ragged_mask])
def test_twelve_megapixels_are_written_at_least_eight_times_as_fast_as_by_the_sdk(make):
    mask = make(3000, 4000)
    ours, theirs = best_of(3, lambda: encode(mask)), best_of(3, lambda: sdk_encode(mask))
    assert theirs / ours >= 8


@pytest.mark.parametrize(("make", "height", "width"), [(smooth_mask, 3000, 4000), (ragged_mask, 750, 1000)])
def test_a_stream_is_read_at_least_five_times_as_fast_as_by_the_sdk(make, height, width):
    rle = encode(make(height, width))
    ours = best_of(3, lambda: decode(rle, height=height, width=width))
    theirs = best_of(3, lambda: sdk_decode(rle, height, width))
    assert theirs / ours >= 5


def test_without_the_surplus_byte_a_stream_ends_with_its_last_value_as_the_editor_stores_it():
    rng = np.random.default_rng(11)
    shorter = 0
    for _ in range(300):
        mask = rng.random((rng.integers(1, 20), rng.integers(1, 20))) < 0.5
        full, bare = encode(mask), encode(mask, surplus=False)
        assert full in (bare, [*bare, 0])
        shorter += len(full) > len(bare)
        np.testing.assert_array_equal(decode(bare, height=mask.shape[0], width=mask.shape[1]), mask)
    assert 0 < shorter < 150, "about one in eight"
