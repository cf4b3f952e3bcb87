"""The parts of a packed weight, compiled by numba: scales, zero points, and codes under a mask."""

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from mpfx.nn.kernels.cpu_lanes import (
    LANES,
    MOVES,
    STRIDE,
    TILE,
    moved,
    pointer,
    scales,
    shifted,
    spread,
    write_bytes,
)
from mpfx.nn.layout import LEFT_OUT, RAW_BITS, SCALE_BITS

BLOCK = 64
"""Rows that a weight with a mask counts its surviving codes by, a multiple of 32 and of lanes."""

_STEPS = np.array([0.0] + [1 / ((1 << bits) - 1) for bits in range(1, 9)], np.float32)

jit = numba.njit(cache=True, nogil=True)
inline = numba.njit(cache=True, nogil=True, inline="always")

FIELDS = ("codes", "table", "scales", "scale_codes", "row_scales", "group_scales", "zeros", "mask", "starts", "streams")
"""Arrays of a packed weight in the order of their addresses."""


class Stored(NamedTuple):
    """The arrays of a packed weight, flat; those that it lacks are empty.

    ``table`` is that of :func:`mpfx.nn.kernels.tables.segment_table`; ``starts`` are, per segment and block of rows,
    the index of the first surviving code in the stream of its width, and the end; ``streams`` that stream's first word.
    """

    codes: NDArray[np.int32]
    table: NDArray[np.int32]
    scales: NDArray[np.int16]
    scale_codes: NDArray[np.int32]
    row_scales: NDArray[np.int16]
    group_scales: NDArray[np.int16]
    zeros: NDArray[np.int32]
    mask: NDArray[np.int32]
    starts: NDArray[np.int64]
    streams: NDArray[np.int64]
    rows: int
    channels: int


@inline
def array(address: Any, count: Any, dtype: Any) -> Any:
    """An array of memory that something else keeps."""
    return numba.carray(pointer(address), count, dtype)  # type: ignore[attr-defined]


@jit
def stored(address: Any) -> Any:
    """The arrays of a weight; at ``address`` are theirs and their lengths, then the rows and channels of the weight."""
    fields = array(address, 2 * len(FIELDS) + 2, np.int64)
    return Stored(
        array(fields[0], fields[1], np.int32),
        array(fields[2], fields[3], np.int32).reshape(-1, 4),
        array(fields[4], fields[5], np.int16),
        array(fields[6], fields[7], np.int32),
        array(fields[8], fields[9], np.int16),
        array(fields[10], fields[11], np.int16),
        array(fields[12], fields[13], np.int32),
        array(fields[14], fields[15], np.int32),
        array(fields[16], fields[17], np.int64),
        array(fields[18], fields[19], np.int64),
        fields[20],
        fields[21],
    )


class Tile(NamedTuple):
    """Scratch for some of the rows, whole groups of lanes: of one grid, and the surviving codes of one segment.

    ``zeros`` are bytes, ``fills`` these four times; ``words`` are surviving codes, or those of the last lanes where
    rows do not fill these; ``kept`` is the mask of one segment, zero for rows that are not there.
    """

    bytes: NDArray[np.int32]
    rows: NDArray[np.float32]
    bases: NDArray[np.float32]
    zeros: NDArray[np.int32]
    scales: NDArray[np.float32]
    words: NDArray[np.int32]
    kept: NDArray[np.int32]
    fills: NDArray[np.int32]


@jit
def new_tile(weight: Any, first: Any, count: Any) -> Any:
    """Scratch for rows ``first .. first + count - 1``."""
    padded, masked = -(-count // LANES) * LANES, len(weight.mask) > 0
    rows = np.zeros(padded, np.float32)
    for r in range(min(count, len(weight.row_scales))):
        rows[r] = half(np.int32(weight.row_scales[first + r]))
    return Tile(
        np.zeros(8 * (2 * BLOCK + 2), np.int32),
        rows,
        np.zeros(2, np.float32),
        np.zeros(TILE // 4, np.int32),
        np.zeros(padded, np.float32),
        np.zeros(16 * (STRIDE if masked else LANES), np.int32),
        np.zeros(padded if masked else 0, np.int32),
        np.zeros(padded if masked else 0, np.int32),
    )


@inline
def half(bits: Any) -> Any:
    """The value of a float16."""
    magnitude = (bits & 0x7FFF) << 13
    value = np.int32(magnitude).view(np.float32) * np.float32(2.0**112)
    if magnitude >= 0x0F800000:  # infinite or NaN
        value = np.int32(magnitude | 0x7F800000).view(np.float32)
    return -value if bits & 0x8000 else value


@jit
def unpack(words: Any, at: Any, bits: Any, blocks: Any, out: Any) -> None:
    """Blocks of 32 codes that lie one after another, as bytes, four in an element of ``out``.

    Of raw codes, the low bytes; the high ones are what lies 8 words further.
    """
    write_bytes(bits, words.ctypes.data + 4 * at, out.ctypes.data, blocks)


@jit
def load_grid(weight: Any, tile: Any, segment: Any, first: Any, count: Any) -> None:
    """Scales and zero points of the grid that a segment belongs to, for ``count`` rows from ``first`` on."""
    bits, grid = np.int64(weight.table[segment, 0]), np.int64(weight.table[segment, 2])
    blocks, zeros = -(-count // 32), tile.zeros.view(np.uint8)
    if len(weight.zeros):
        unpack(weight.zeros, np.int64(weight.table[segment, 3]) + first // 32 * bits, bits, blocks, tile.zeros)
    else:
        zeros[:] = 1 << (bits - 1)
    for r in range(len(tile.fills)):
        tile.fills[r] = zeros[r] * 0x01010101
    if len(weight.row_scales):
        at = (grid * -(-weight.rows // 32) + first // 32) * SCALE_BITS
        unpack(weight.scale_codes, at, np.int64(SCALE_BITS), blocks, tile.bytes)
        tile.bases[0], tile.bases[1] = half(np.int32(weight.group_scales[grid])), _STEPS[bits]
        places = tile.bytes.ctypes.data, tile.rows.ctypes.data, tile.bases.ctypes.data, tile.scales.ctypes.data
        scales(*places, len(tile.scales) // LANES)
    else:
        grids = len(weight.scales) // weight.rows
        for r in range(count):
            tile.scales[r] = half(np.int32(weight.scales[(first + r) * grids + grid]))


@jit
def codes_of(weight: Any, tile: Any, segment: Any, first: Any, count: Any) -> Any:
    """Where the codes of rows from ``first`` on are: the address, the bytes from word to word, and their width.

    Under a mask they are moved to where they belong, as bytes, or raw; what is pruned there is its row's zero point.
    """
    bits, at = np.int64(weight.table[segment, 0]), np.int64(weight.table[segment, 1])
    if len(weight.mask):
        _expand(weight, tile, segment, first, count)
        return tile.words.ctypes.data, 4 * STRIDE, bits if bits == RAW_BITS else 8
    return weight.codes.ctypes.data + 4 * (at * weight.rows + first), 4 * weight.rows, bits


@jit
def last_lanes(weight: Any, tile: Any, words: Any, stride: Any, bits: Any, start: Any, count: Any) -> Any:
    """Where all lanes of rows from ``start`` on can be read, of which fewer are there; and the bytes between words."""
    if len(weight.mask):
        return words + 4 * start, stride
    for word in range(bits):
        source = array(words + word * stride + 4 * start, count - start, np.int32)
        for r in range(count - start):
            tile.words[word * LANES + r] = source[r]
    return tile.words.ctypes.data, 4 * LANES


@jit
def _expand(weight: Any, tile: Any, segment: Any, first: Any, count: Any) -> None:
    bits, raw = np.int64(weight.table[segment, 0]), weight.table[segment, 0] == RAW_BITS
    starts = weight.starts[segment * (-(-weight.rows // BLOCK) + 1) :]
    tile.kept[count:] = 0
    tile.kept[:count] = weight.mask[segment * weight.rows + first : segment * weight.rows + first + count]
    if raw:
        tile.fills[:] = 0
    for start in range(0, count, BLOCK):
        index, end = starts[(first + start) // BLOCK], starts[(first + start) // BLOCK + 1]
        at, blocks = weight.streams[segment] + index // 32 * bits, (end + 31) // 32 - index // 32
        for byte in range(2 if raw else 1):
            unpack(weight.codes, at + 8 * byte, bits, blocks, tile.bytes)
            _move(tile, start, min(start + BLOCK, count), index % 32, 8 * byte)


@jit
def _move(tile: Any, start: Any, stop: Any, position: Any, word: Any) -> None:
    codes = tile.bytes.ctypes.data + position
    if MOVES:
        for r in range(start, stop, LANES):
            out = tile.words.ctypes.data + 4 * (word * STRIDE + r)
            codes = moved(codes, tile.kept.ctypes.data + 4 * r, tile.fills.ctypes.data + 4 * r, out, 4 * STRIDE)
    else:
        _spread_rows(tile, start, stop, codes, word)


@jit
def _spread_rows(tile: Any, start: Any, stop: Any, codes: Any, word: Any) -> None:
    for r in range(start, stop):
        bits, fill = np.uint64(np.uint32(tile.kept[r])), np.uint64(tile.fills[r] & 0xFF)
        for pair in range(4):
            each = (bits >> np.uint64(8 * pair) & np.uint64(0xFF)) * np.uint64(0x0101010101010101)  # bit k in byte k
            kept = ((each & np.uint64(0x8040201008040201)) + np.uint64(0x7F7F7F7F7F7F7F7F)) >> np.uint64(7)
            kept &= np.uint64(0x0101010101010101)
            eight = spread(codes, kept) | (kept ^ np.uint64(0x0101010101010101)) * fill
            tile.words[(word + 2 * pair) * STRIDE + r] = np.int32(eight)
            tile.words[(word + 2 * pair + 1) * STRIDE + r] = np.int32(eight >> np.uint64(32))
            codes += np.int64((kept * np.uint64(0x0101010101010101)) >> np.uint64(56))


@inline
def count_bits(word: Any) -> Any:
    """Set bits of an int32."""
    bits = np.int64(word) & 0xFFFFFFFF
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) & 0xFFFFFFFF) >> 24


@jit
def count_survivors(mask: Any, counts: Any) -> None:
    """Surviving codes of every segment and block of rows, ``counts[segment, block]``."""
    counts[:] = 0
    for segment in range(mask.shape[0]):
        for r in range(mask.shape[1]):
            counts[segment, r // BLOCK] += count_bits(mask[segment, r])


@inline
def raw_value(words: Any, stride: Any, channel: Any, row: Any) -> Any:
    """The weight of a raw channel, in float32; ``stride`` elements from word to word."""
    place, shift = channel // 4 * stride + row, channel % 4 * 8
    low = shifted(words[place], shift) & 0xFF
    high = shifted(words[place + 8 * stride], shift) & 0xFF
    return half(np.int32(low | (high << 8)))


@inline
def new_grid(table: Any, segment: Any) -> Any:
    """Whether a segment is the first of its grid."""
    return segment == 0 or table[segment - 1, 2] != table[segment, 2]


@inline
def is_left_out(table: Any, segment: Any) -> Any:
    """Whether nothing is stored for a segment."""
    return table[segment, 0] == LEFT_OUT


@inline
def whole_lanes(count: Any) -> Any:
    """How many of ``count`` rows fill lanes; all, if none do."""
    return count // LANES * LANES if count >= LANES else count
