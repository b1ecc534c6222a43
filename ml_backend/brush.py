"""Label Studio's brush RLE to a boolean mask and back; pure.

This is not COCO's RLE. The stream is thi-ng's rle-pack of the flattened RGBA image, so each pixel counts four values;
we write the mask into all four channels as 0 or 255, and read the alpha channel only. Rows follow each other (C order).

The stream, most significant bit first: 32 bits number of values, 5 bits word size - 1, four times 4 bits run size - 1;
then tokens: 1 bit flag, 2 bits naming one of the four run sizes, that many bits count - 1, and either one value that
repeats (flag 1) or as many values as counted (flag 0). Zero bits fill the last byte; whatever follows the last value
is ignored.

Sources: the format, `packages/rle-pack` of github.com/thi-ng/umbrella; the bytes to agree with,
`label_studio_sdk.converter.brush` (`mask2rle`, `decode_rle`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.types import Mask, Refusal

_CHANNELS = 4
_WORD_BITS = 8
_RUN_BITS = (3, 4, 8, 16)  # what the SDK and the editor write; a reader takes the sizes from the header
_HEADER_BITS = 32 + 5 + 4 * 4
_HEADER_BYTES = -(-_HEADER_BITS // 8)
_LONGEST_RUN = 1 << _RUN_BITS[-1]  # values one token can hold
_LONGEST_TOKEN = 3 + 16 + _WORD_BITS  # bits of one token with one value, whatever the header says
_MOST_VALUES = (1 << 32) - 1  # the header counts values in 32 bits

# One run of n pixels is 4n equal values. For n up to 64 the token depends on n alone, so it is looked up; entry 65
# stands for every longer run. A token is its prefix (flag and size name, shifted to place) + (4n - 1 << 8) + value.
_CLASS = np.array([next((i for i in range(3) if 4 * n <= 1 << _RUN_BITS[i]), 3) for n in range(66)])
_TOKEN_BITS = np.array([3 + size + _WORD_BITS for size in _RUN_BITS])[_CLASS]
_TOKEN_PREFIX = np.array([(4 + i) << (size + _WORD_BITS) for i, size in enumerate(_RUN_BITS)])[_CLASS]

_BLOCK_BYTES = 1 << 16  # of the stream looked at together: its bits, one byte each, stay in the processor's cache
_PADDING = 8  # zero bytes after the stream, so that a window may reach over its end

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
RunBits = tuple[int, int, int, int]


def encode(mask: Mask, *, surplus: bool = True) -> list[int]:
    """Return the mask as Label Studio's brush RLE, the value of `rle` in a brushlabels region.

    The bytes are those of the SDK's `mask2rle(mask.astype(np.uint8) * 255)`, some twenty times sooner.

    Args:
        mask: bool, shape (H, W), at least one pixel.
        surplus: after a last byte that is full the SDK writes a zero byte more, one mask in eight; the editor does not,
            and stores an accepted mask without it. False: as the editor writes it, so that it comes back unchanged.

    Returns:
        Bytes as integers 0..255, ready for JSON.

    Raises:
        ValueError: `mask` is not a boolean H, W array, is empty, or holds more values than 32 bits can count.

    >>> encode(np.array([[True, False]]))
    [0, 0, 0, 8, 57, 27, 252, 127, 241, 128, 0]
    """
    if mask.dtype != np.bool_ or mask.ndim != 2:
        raise ValueError(f"a mask is a boolean H, W array, not {mask.dtype} of shape {mask.shape}")
    values = _CHANNELS * mask.size
    if not 0 < values <= _MOST_VALUES:
        raise ValueError(
            f"a mask of shape {mask.shape} cannot be written: the stream counts 4 to {_MOST_VALUES} values"
        )
    lengths, first_is_on = _runs(mask.ravel())
    tokens, bits = _tokens(lengths, first_is_on=first_is_on)
    header = np.array([values, _header_tail()], dtype=np.int64)
    tokens = np.concatenate((header, tokens))
    bits = np.concatenate((np.array([32, _HEADER_BITS - 32]), bits))
    return list(_pack(tokens, bits, surplus=surplus))


def decode(rle: Sequence[int], *, height: int, width: int) -> Mask:
    """Return the mask a brush RLE paints: every pixel whose alpha is above 127.

    Reads what Label Studio's editor writes (literal runs, other run sizes) as well as what the SDK and `encode` write.
    Time and memory grow with `height * width` and with the stream, which may be no longer than such a mask can need.

    Args:
        rle: the bytes as integers 0..255, as they stand in the JSON.
        height: rows of the image, `original_height` of the region.
        width: columns of the image, `original_width`.

    Returns:
        The mask, shape (height, width).

    Raises:
        Refusal: the stream is malformed, cut short, or is not of an image of that size.

    >>> decode(encode(np.array([[True, False]])), height=1, width=2)
    array([[ True, False]])
    """
    if height < 1 or width < 1:
        raise Refusal(f"an image of {width} x {height} pixels holds no brush mask; send its original width and height")
    values = _CHANNELS * height * width
    data = _checked_bytes(rle, values)
    run_bits = _read_header(data, values, height=height, width=width)
    tokens = _read_tokens(data, _token_starts(data, run_bits), run_bits)
    ends = np.cumsum(tokens.counts)  # in values; what comes after the last value is padding
    last = int(np.searchsorted(ends, values))
    if last == ends.size or ends[last] != values or tokens.end_bit(last) > 8 * len(data):
        raise Refusal(
            f"brush RLE of {len(data)} bytes does not end with the last of its {values} values: "
            "it was cut short or damaged; send the region again as Label Studio exported it"
        )
    return _paint(data, tokens.up_to(last), ends[: last + 1]).reshape(height, width)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Tokens:
    """The tokens of a stream, one entry each."""

    repeats: npt.NDArray[np.bool_]  # one value for all that are counted, or (False) as many values
    counts: Integers  # values the token stands for, 1 and up
    on: npt.NDArray[np.bool_]  # whether its first value is above 127
    values_at: Integers  # bit at which its value or values begin

    def end_bit(self, index: int) -> int:
        """Return the bit after one token's last."""
        written = 1 if self.repeats[index] else int(self.counts[index])
        return int(self.values_at[index]) + _WORD_BITS * written

    def up_to(self, last: int) -> _Tokens:
        """Return the tokens up to and with this one."""
        keep = slice(last + 1)
        return _Tokens(
            repeats=self.repeats[keep], counts=self.counts[keep], on=self.on[keep], values_at=self.values_at[keep]
        )


def _runs(flat: Mask) -> tuple[Integers, bool]:
    """Return the run lengths in pixels, and whether the first run is on."""
    last = np.flatnonzero(flat[1:] != flat[:-1])  # last pixel of each run but the final one
    return np.diff(last, prepend=-1, append=flat.size - 1), bool(flat[0])


def _tokens(lengths: Integers, *, first_is_on: bool) -> tuple[Integers, Integers]:
    """Return one token a run with its number of bits; runs alternate, longer ones than a token holds become several."""
    looked_up = np.minimum(lengths, 65)
    tokens = lengths * (_CHANNELS << _WORD_BITS)
    tokens += (_TOKEN_PREFIX - (1 << _WORD_BITS))[looked_up]
    tokens[0 if first_is_on else 1 :: 2] += 255
    bits = _TOKEN_BITS[looked_up]
    too_long = np.flatnonzero(lengths > _LONGEST_RUN // _CHANNELS)
    if not too_long.size:
        return tokens, bits

    # The SDK writes full tokens first and the rest last, always with the longest run size.
    full = (lengths[too_long] * _CHANNELS - 1) // _LONGEST_RUN
    tokens[too_long] -= full * (_LONGEST_RUN << _WORD_BITS)
    copies = np.ones(lengths.size, dtype=np.int64)
    copies[too_long] += full
    tokens, bits = np.repeat(tokens, copies), np.repeat(bits, copies)
    is_full = np.ones(tokens.size, dtype=np.bool_)
    is_full[np.cumsum(copies) - 1] = False
    tokens[is_full] |= (_LONGEST_RUN - 1) << _WORD_BITS
    return tokens, bits


def _header_tail() -> int:
    """Return what follows the number of values: word size and the four run sizes."""
    tail = _WORD_BITS - 1
    for size in _RUN_BITS:
        tail = tail << 4 | (size - 1)
    return tail


def _pack(tokens: Integers, bits: Integers, *, surplus: bool) -> bytes:
    """Return the tokens as bytes, most significant bit first, each taking its number of bits (at most 32).

    A token begins in one 32-bit word and may reach into the next. As none is longer than a word, every word has a
    token that begins there, and only the last of them can reach out of it.
    """
    ends = np.cumsum(bits)
    starts = ends - bits
    word = starts >> 5
    wide = tokens.astype(np.uint64) << (64 - (starts & 31) - bits).astype(np.uint64)
    changes = np.flatnonzero(word[1:] != word[:-1])
    first = np.concatenate(([0], changes + 1))
    last = np.append(changes, tokens.size - 1)
    packed = np.zeros(first.size + 1, dtype=np.uint32)
    packed[:-1] = np.bitwise_or.reduceat((wide >> np.uint64(32)).astype(np.uint32), first)
    packed[1:] |= wide[last].astype(np.uint32)  # the lower half, what reaches out
    length = int(ends[-1]) // 8 + 1 if surplus else -(-int(ends[-1]) // 8)
    return packed.astype(">u4").tobytes().ljust(length, b"\0")[:length]


def _checked_bytes(rle: Sequence[int], values: int) -> bytes:
    """Return the stream as bytes, once its length makes sense for so many values and all are bytes."""
    if not isinstance(rle, Sequence) or isinstance(rle, str):
        raise Refusal(f"brush RLE is a list of bytes 0..255, not {type(rle).__name__}; send the region's value.rle")
    if len(rle) < _HEADER_BYTES:
        raise Refusal(f"brush RLE of {len(rle)} bytes is shorter than its header of {_HEADER_BYTES} bytes")
    most = _HEADER_BYTES + values * _LONGEST_TOKEN // 8 + 1 + 64  # 64: whatever padding somebody's encoder leaves
    if len(rle) > most:
        raise Refusal(f"brush RLE of {len(rle)} bytes is longer than the {most} bytes an image of its size can need")
    if isinstance(rle, bytes):
        return rle
    try:
        data = bytes(rle)
        if set(map(type, rle)) == {int}:  # bytes() takes True for 1
            return data
    except (TypeError, ValueError):
        pass
    raise Refusal("brush RLE holds something else than whole numbers 0..255; send the region's value.rle as it was")


def _read_header(data: bytes, values: int, *, height: int, width: int) -> RunBits:
    """Return the four run sizes in bits, once the header fits an RGBA image of that size."""
    header = int.from_bytes(data[:_HEADER_BYTES], "big") >> (8 * _HEADER_BYTES - _HEADER_BITS)
    claimed, word_bits = header >> 21, (header >> 16 & 31) + 1
    if claimed != values:
        raise Refusal(
            f"brush RLE claims {claimed} values, but an image of {width} x {height} pixels has {values} "
            "(four a pixel); send original_width and original_height of the image it was painted on"
        )
    if word_bits != _WORD_BITS:
        raise Refusal(
            f"brush RLE has values of {word_bits} bits; Label Studio's brush writes {_WORD_BITS} bits a channel"
        )
    a, b, c, d = ((header >> shift & 15) + 1 for shift in (12, 8, 4, 0))
    return a, b, c, d


def _token_starts(data: bytes, run_bits: RunBits) -> Integers:
    """Return the bit at which each token starts, as far as the stream goes.

    Where a token starts is known only once the one before was read. So each bit position is asked beforehand, a block
    at a time, how many bits a token would take that started there; what remains is a walk of additions.
    """
    steps = bytes(4) + bytes(3 + size + _WORD_BITS for size in run_bits)  # 0: literal values, the count is to be read
    steps += bytes(256 - len(steps))
    padded = np.frombuffer(data + bytes(_PADDING), dtype=np.uint8)
    found = []
    at = _HEADER_BITS
    for block_at in range(0, len(data), _BLOCK_BYTES):
        bits = np.unpackbits(padded[block_at : block_at + min(_BLOCK_BYTES, len(data) - block_at) + 1])
        names = bits[:-8] << 2
        names |= bits[1:-7] << 1
        names |= bits[2:-6]
        name = names.tobytes()
        step = name.translate(steps)
        starts = bytearray(len(step))
        origin = 8 * block_at
        at -= origin
        while at < len(step):
            starts[at] = 1
            at += step[at] or _literal_bits(data, origin + at, run_bits[name[at]])
        at += origin
        found.append(np.flatnonzero(np.frombuffer(starts, dtype=np.bool_)) + origin)
    return np.concatenate(found)


def _literal_bits(data: bytes, at: int, size: int) -> int:
    """Return how many bits the literal token at this bit takes; its count has `size` bits."""
    count_at = at + 3
    window = int.from_bytes(data[count_at >> 3 : (count_at >> 3) + 3].ljust(3, b"\0"), "big")
    count = (window >> (24 - (count_at & 7) - size) & ((1 << size) - 1)) + 1
    return 3 + size + count * _WORD_BITS


def _read_tokens(data: bytes, starts: Integers, run_bits: RunBits) -> _Tokens:
    """Return what the tokens say that start at these bits."""
    # Eight bytes from each token's first: 7 bits before it and 3 + 16 + 8 of its own are always among them.
    padded = data + bytes(_PADDING)
    windows: Words = np.ndarray(shape=(len(data),), dtype=">u8", buffer=padded, strides=(1,))
    window = windows[starts >> 3].astype(np.uint64) << (starts & 7).astype(np.uint64)
    name = (window >> np.uint64(61)).astype(np.intp)  # flag and name of the run size, 0..7
    size = np.array(run_bits * 2, dtype=np.uint64)[name]
    rest = window << np.uint64(3)
    counts = (rest >> (np.uint64(64) - size)).astype(np.int64) + 1
    return _Tokens(
        repeats=name > 3,
        counts=counts,
        on=(rest << size) >> np.uint64(63) == 1,
        values_at=starts + 3 + size.astype(np.int64),
    )


def _paint(data: bytes, tokens: _Tokens, ends: Integers) -> Mask:
    """Return the mask the tokens paint, flat; `ends` counts the values up to and with each token."""
    # Pixel k has its alpha at value 4k + 3, so a token from value `begin` to `end` holds pixels begin // 4 .. end // 4.
    end_pixels = ends // _CHANNELS
    pixels = np.diff(end_pixels, prepend=0)
    mask: Mask = np.repeat(tokens.on, pixels)
    literal = np.flatnonzero(~tokens.repeats & (pixels > 0))
    if not literal.size:
        return mask

    # Each alpha of a literal token stands for itself; above 127 means that its first bit is set.
    pixels = pixels[literal]
    within = np.arange(pixels.sum()) - np.repeat(np.cumsum(pixels) - pixels, pixels)
    pixel = np.repeat(end_pixels[literal] - pixels, pixels) + within
    begins = ends[literal] - tokens.counts[literal]
    at = np.repeat(tokens.values_at[literal] - _WORD_BITS * begins, pixels)
    at += _WORD_BITS * (_CHANNELS * pixel + _CHANNELS - 1)
    byte = np.frombuffer(data, dtype=np.uint8)[at >> 3]
    mask[pixel] = byte >> (7 - (at & 7)).astype(np.uint8) & 1
    return mask
