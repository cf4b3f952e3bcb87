"""The parts of a packed weight, compiled by numba: streams of codes, scales, zero points, and codes under a mask."""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from mpfx.nn.kernels.cpu_lanes import shifted, spread
from mpfx.nn.layout import RAW_BITS, SCALE_BITS
from mpfx.nn.scales import FACTORS

BLOCK = 64
"""Rows that a weight with a mask counts its surviving codes by, a multiple of 32."""

TILE = 512
"""Most rows that are computed at once, a multiple of a block."""

STRIDE = TILE + 16
"""From word to word of what :func:`expand` makes: no power of two, or all words of a row would share a cache set."""

_ROOT_0, _ROOT_1, _ROOT_2, _ROOT_3 = (np.float32(factor) for factor in FACTORS[:4])
_STEPS = np.array([0.0] + [1 / ((1 << bits) - 1) for bits in range(1, 9)], np.float32)

jit = njit(cache=True, nogil=True)
inline = njit(cache=True, nogil=True, inline="always")


class Stored(NamedTuple):
    """The arrays of a packed weight; those that it lacks are empty.

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
    symmetric: bool


class Tile(NamedTuple):
    """Scratch for some of the rows: the scales and zero points of one grid, the surviving codes of one segment."""

    unpacked: NDArray[np.int32]
    bases: NDArray[np.float32]
    scales: NDArray[np.float32]
    zeros: NDArray[np.int32]
    planes: NDArray[np.int32]


@jit
def new_tile(weight: Any, first: Any, count: Any) -> Any:
    """Scratch for rows ``first .. first + count - 1``."""
    bases = np.empty(count, np.float32)
    for r in range(min(count, len(weight.row_scales))):
        bases[r] = half(np.int32(weight.row_scales[first + r]))
    return Tile(
        np.empty(8 * max(-(-count // 32), BLOCK + 2), np.int32),
        bases,
        np.empty(count, np.float32),
        np.empty(count, np.int32),
        np.empty(16 * STRIDE if len(weight.mask) else 0, np.int32),
    )


@inline
def half(bits: Any) -> Any:
    """The value of a float16."""
    magnitude = (bits & 0x7FFF) << 13
    value = np.int32(magnitude).view(np.float32) * np.float32(2.0**112)
    if magnitude >= 0x0F800000:  # infinite or NaN
        value = np.int32(magnitude | 0x7F800000).view(np.float32)
    return -value if bits & 0x8000 else value


@inline
def _unpack_plane(words: Any, at: Any, bits: Any, low: Any, blocks: Any, size: Any, out: Any) -> None:
    mask = ((1 << size) - 1) * 0x01010101
    for block in range(blocks):
        for word in range(size):
            packed = words[at + block * bits + word]
            for quad in range(8 // size):
                four = np.int32((shifted(packed, size * quad) & mask) << low)
                place = 8 * block + word * (8 // size) + quad
                out[place] = four if low == 0 else out[place] | four


@jit
def unpack(words: Any, at: Any, bits: Any, blocks: Any, out: Any) -> None:
    """Blocks of 32 codes that lie one after another, as bytes, four in an element of ``out``.

    Of raw codes, the low bytes; the high ones are what lies 8 words further.
    """
    low = 0
    if bits & 8 or bits == RAW_BITS:
        _unpack_plane(words, at, bits, low, blocks, 8, out)
        at += 8
        low += 8
    if bits & 4:
        _unpack_plane(words, at, bits, low, blocks, 4, out)
        at += 4
        low += 4
    if bits & 2:
        _unpack_plane(words, at, bits, low, blocks, 2, out)
        at += 2
        low += 2
    if bits & 1:
        _unpack_plane(words, at, bits, low, blocks, 1, out)


@inline
def _factor(code: Any) -> Any:
    """What the code of a scale stands for, computed: reads from a table would not be done for several rows at once."""
    low = _ROOT_1 if code & 1 else _ROOT_0
    high = _ROOT_3 if code & 1 else _ROOT_2
    return (high if code & 2 else low) * np.int32((127 - (code >> 2)) << 23).view(np.float32)


@jit
def _widen(codes: Any, out: Any) -> None:
    for r in range(len(out)):
        out[r] = codes[r]


@jit
def _scale(codes: Any, bases: Any, base: Any, step: Any, scales: Any) -> None:
    for r in range(len(scales)):  # the products of `scale_values`, in their order
        scales[r] = bases[r] * base * _factor(np.int32(codes[r])) * step


@jit
def load_grid(weight: Any, tile: Any, segment: Any, first: Any) -> None:
    """Scales and zero points of the grid that a segment belongs to, for rows from ``first`` on."""
    bits, grid = np.int64(weight.table[segment, 0]), np.int64(weight.table[segment, 2])
    blocks = -(-len(tile.zeros) // 32)
    codes, unpacked = tile.unpacked.view(np.uint8), tile.unpacked
    if weight.symmetric:
        tile.zeros[:] = 1 << (bits - 1)
    else:
        unpack(weight.zeros, np.int64(weight.table[segment, 3]) + first // 32 * bits, bits, blocks, unpacked)
        _widen(codes, tile.zeros)
    if len(weight.row_scales):
        at = (grid * -(-weight.rows // 32) + first // 32) * SCALE_BITS
        unpack(weight.scale_codes, at, np.int64(SCALE_BITS), blocks, unpacked)
        _scale(codes, tile.bases, half(np.int32(weight.group_scales[grid])), _STEPS[bits], tile.scales)
    else:
        _copy_scales(weight.scales, first, grid, tile.scales)


@jit
def _copy_scales(halves: Any, first: Any, grid: Any, scales: Any) -> None:
    for r in range(len(scales)):
        scales[r] = half(np.int32(halves[first + r, grid]))


@jit
def expand(weight: Any, tile: Any, segment: Any, first: Any) -> None:
    """Move surviving codes to their channels: planes of 8 bits, word w of a row at ``planes[w * STRIDE + row]``."""
    bits, rows = np.int64(weight.table[segment, 0]), len(tile.zeros)
    words, starts, unpacked, planes = weight.codes, weight.starts[segment], tile.unpacked, tile.planes
    mask, codes = weight.mask[segment, first : first + rows], unpacked.view(np.uint8)
    for start in range(0, rows, BLOCK):
        index, end = starts[(first + start) // BLOCK], starts[(first + start) // BLOCK + 1]
        at, blocks = weight.streams[segment] + index // 32 * bits, (end + 31) // 32 - index // 32
        for byte in range(2 if bits == RAW_BITS else 1):
            unpack(words, at + 8 * byte, bits, blocks, unpacked)
            _spread_rows(mask, start, min(start + BLOCK, rows), codes, index % 32, planes, 8 * byte * STRIDE)


@jit
def _spread_rows(mask: Any, start: Any, stop: Any, codes: Any, position: Any, planes: Any, at: Any) -> None:
    for r in range(start, stop):
        word = np.uint64(np.uint32(mask[r]))
        for pair in range(4):
            low = (word >> np.uint64(2 * pair)) & np.uint64(0x01010101)
            high = (word >> np.uint64(2 * pair + 1)) & np.uint64(0x01010101)
            kept = low | (high << np.uint64(32))
            eight = np.int64(spread(codes, position, kept))
            planes[at + 2 * pair * STRIDE + r] = np.int32(eight)
            planes[at + (2 * pair + 1) * STRIDE + r] = np.int32(eight >> 32)
            position += np.int64((kept * np.uint64(0x0101010101010101)) >> np.uint64(56))


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
