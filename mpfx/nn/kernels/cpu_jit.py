"""Packed weights on the CPU, compiled by numba: times a few rows of activations, or expanded row by row.

Lanes are rows of the weight. Activations become integers of 16 bits relative to the largest of their segment, in
pairs; codes masked in place are pairs of 16 bits too, and one instruction multiplies and adds both, of eight rows.
Sums of integers are exact, so scale and zero point are applied once per segment, and a result does not depend on how
rows are shared out. A mask costs one more step: surviving codes are moved to their channels, as planes of 8 bits.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpfx.nn.kernels.cpu_codes import STRIDE, TILE, expand, half, inline, jit, load_grid, new_tile
from mpfx.nn.kernels.cpu_lanes import LANES, products_1, products_2, products_4, products_8, shifted
from mpfx.nn.layout import LEFT_OUT, RAW_BITS

_LARGEST = 32767.0


class Activations(NamedTuple):
    """Rows of activations, as :func:`activations` makes them.

    ``values`` are float32 ``(count, segments * 32)``, in the weight's order; ``pairs`` are int32 ``(count, segments *
    16)``, two integers each; an integer is worth ``units[row, segment]``, and ``sums`` are those of the integers.
    """

    values: NDArray[np.float32]
    pairs: NDArray[np.int32]
    units: NDArray[np.float32]
    sums: NDArray[np.int32]


@jit
def activations(x: Any, order: Any, made: Any) -> None:
    """Fill ``made`` with rows ``x``, float32 ``(count, in)``; channel ``order[k]`` meets channel k of the weight."""
    integers = np.empty(32, np.int32)
    for n in range(len(x)):
        for k in range(made.values.shape[1]):
            made.values[n, k] = 0.0 if k >= x.shape[1] else x[n, order[k]] if len(order) else x[n, k]
        for segment in range(made.units.shape[1]):
            made.units[n, segment] = _to_integers(made.values[n, 32 * segment : 32 * segment + 32], integers)
            made.sums[n, segment] = integers.sum()
            for pair in range(16):
                k = pair // 2 * 4 + pair % 2
                made.pairs[n, 16 * segment + pair] = (integers[k] & 0xFFFF) | (integers[k + 2] << 16)


@jit
def _to_integers(values: Any, integers: Any) -> Any:
    """Round activations to integers; return what one of these is worth: NaN if an activation is not finite."""
    largest = np.float32(0.0)
    for value in values:
        if not abs(value) <= largest:  # lets NaN through
            largest = abs(value)
        if np.isnan(largest):
            break
    integers[:] = 0
    if not 0.0 < largest < np.inf:
        return largest * np.float32(0.0)
    factor = _LARGEST / np.float64(largest)
    for k in range(32):
        integers[k] = np.int32(np.rint(values[k] * factor))
    return np.float32(1.0 / factor)


@jit
def multiply(weight: Any, x: Any, first: Any, last: Any, y: Any) -> None:
    """Rows ``first .. last-1`` of a weight of at least 8 rows times activations: ``y[:, first : last]``.

    ``first`` is a multiple of a block of rows, and there are at most as many as in a tile.
    """
    count, segments, masked = last - first, len(weight.table), len(weight.mask) > 0
    tile = new_tile(weight, first, count)
    totals = np.empty(LANES + -(-count // LANES) * LANES, np.int32)
    kept = np.empty_like(totals)
    sums = np.zeros((len(y), count), np.float32)  # of a grid, before its scale
    # Arrays by names of their own: taken from the tuples in every turn, they would cost more than a segment does.
    table, pairs, mask = weight.table, x.pairs.reshape(-1), weight.mask.reshape(-1)
    zeros, scales, values, units, integers = tile.zeros, tile.scales, x.values, x.units, x.sums
    words = tile.planes if masked else weight.codes
    stride, there = (STRIDE, TILE) if masked else (weight.rows, weight.rows - first)
    y[:, first:last] = 0.0
    for segment in range(segments):
        bits, grid = np.int64(table[segment, 0]), table[segment, 2]
        if bits == LEFT_OUT:
            continue
        at, width = table[segment, 1] * weight.rows + first, bits
        if masked:
            expand(weight, tile, segment, first)
            at, width = 0, (bits if bits == RAW_BITS else np.int64(8))
        if bits == RAW_BITS:
            _add_raw(words, at, stride, values, segment, first, last, y)
            continue
        if segment == 0 or table[segment - 1, 2] != grid:
            load_grid(weight, tile, segment, first)
            sums[:] = 0.0
        for n in range(len(y)):
            pair = (n * segments + segment) * 16
            _products(words, at, stride, width, pairs, pair, there, totals)
            if masked:
                place = segment * weight.rows + first
                _products(mask, place, weight.rows, np.int64(1), pairs, pair, weight.rows - first, kept)
            else:
                kept[:] = integers[n, segment]
            _add_segment(totals, zeros, kept, units[n, segment], n, sums)
        if segment + 1 == segments or table[segment + 1, 2] != grid:
            _add_grid(sums, scales, first, y)


@jit
def _products(words: Any, at: Any, stride: Any, bits: Any, pairs: Any, pair: Any, there: Any, totals: Any) -> None:
    """Sums of codes times integers, exact, of a row per element of ``totals`` behind its first eight.

    No row beyond those that are ``there`` is read: the last eight may start earlier, hence the room in front.
    """
    for r in range(0, len(totals) - LANES, LANES):
        row = min(r, there - LANES)
        lane = row + LANES
        place, low = at + row, 0
        for k in range(LANES):
            totals[lane + k] = 0
        if bits & 8:
            products_8(words, place, stride, pairs, pair, totals, lane, low)
            place += 8 * stride
            low += 8
        if bits & 4:
            products_4(words, place, stride, pairs, pair, totals, lane, low)
            place += 4 * stride
            low += 4
        if bits & 2:
            products_2(words, place, stride, pairs, pair, totals, lane, low)
            place += 2 * stride
            low += 2
        if bits & 1:
            products_1(words, place, stride, pairs, pair, totals, lane, low)


@jit
def _add_segment(totals: Any, zeros: Any, kept: Any, unit: Any, n: Any, sums: Any) -> None:
    for r in range(sums.shape[1]):
        total = np.int32(totals[r + LANES] - zeros[r] * kept[r + LANES])
        sums[n, r] += np.float32(total) * unit


@jit
def _add_grid(sums: Any, scales: Any, first: Any, y: Any) -> None:
    for n in range(len(y)):
        for r in range(len(scales)):
            y[n, first + r] += sums[n, r] * scales[r]


@inline
def _raw(words: Any, at: Any, stride: Any, channel: Any) -> Any:
    """The weight of a raw channel in the row at ``at``."""
    place, shift = at + channel // 4 * stride, channel % 4 * 8
    low = shifted(words[place], shift) & 0xFF
    high = shifted(words[place + 8 * stride], shift) & 0xFF
    return half(np.int32(low | (high << 8)))


@jit
def _add_raw(words: Any, at: Any, stride: Any, x: Any, segment: Any, first: Any, last: Any, y: Any) -> None:
    for n in range(len(y)):
        for channel in range(32):
            for r in range(last - first):
                y[n, first + r] += _raw(words, at + r, stride, channel) * x[n, 32 * segment + channel]


@jit
def dequantize(weight: Any, first: Any, last: Any, out: Any, column: Any) -> None:
    """Rows ``first .. last-1`` of a weight in float32, channels first, to the columns of ``out`` from one on.

    ``first`` is a multiple of a block of rows, and there are at most as many as in a tile.
    """
    tile, masked = new_tile(weight, first, last - first), len(weight.mask) > 0
    words = tile.planes if masked else weight.codes
    stride = STRIDE if masked else weight.rows
    for segment in range(len(weight.table)):
        bits, grid = np.int64(weight.table[segment, 0]), weight.table[segment, 2]
        part = out[32 * segment : 32 * segment + 32]
        if bits == LEFT_OUT:
            part[:, column : column + last - first] = 0.0
            continue
        at, width = weight.table[segment, 1] * weight.rows + first, bits
        if masked:
            expand(weight, tile, segment, first)
            at, width = 0, (bits if bits == RAW_BITS else np.int64(8))
        if bits == RAW_BITS:
            for channel in range(32):
                for r in range(last - first):
                    part[channel, column + r] = _raw(words, at + r, stride, channel)
            continue
        if segment == 0 or weight.table[segment - 1, 2] != grid:
            load_grid(weight, tile, segment, first)
        _codes(words, at, stride, width, part, column, last - first)
        _to_values(tile.zeros, tile.scales, part, column)
        if masked:
            _leave_out(weight.mask[segment, first:last], part, column)


@inline
def _codes_of_plane(words: Any, at: Any, stride: Any, low: Any, size: Any, part: Any, column: Any, rows: Any) -> None:
    for channel in range(32):
        code = channel % (32 // size)
        place, shift = at + channel // (32 // size) * stride, code % 4 * 8 + code // 4 * size
        _add_field(words[place : place + rows], shift, size, low, part[channel, column : column + rows])


@jit
def _add_field(words: Any, shift: Any, size: Any, low: Any, out: Any) -> None:
    mask, add = (1 << size) - 1, low > 0
    worth = np.float32(1 << low)
    for r in range(len(out)):  # slices, not offsets: an index that may be negative is not computed for several rows
        code = np.float32(np.int32(shifted(words[r], shift) & mask)) * worth
        out[r] = out[r] + code if add else code


@jit
def _codes(words: Any, at: Any, stride: Any, bits: Any, part: Any, column: Any, rows: Any) -> None:
    low = 0
    if bits & 8:
        _codes_of_plane(words, at, stride, low, 8, part, column, rows)
        at += 8 * stride
        low += 8
    if bits & 4:
        _codes_of_plane(words, at, stride, low, 4, part, column, rows)
        at += 4 * stride
        low += 4
    if bits & 2:
        _codes_of_plane(words, at, stride, low, 2, part, column, rows)
        at += 2 * stride
        low += 2
    if bits & 1:
        _codes_of_plane(words, at, stride, low, 1, part, column, rows)


@inline
def _to_values(zeros: Any, scales: Any, part: Any, column: Any) -> None:
    for channel in range(32):
        _scale(zeros, scales, part[channel, column : column + len(zeros)])


@jit
def _scale(zeros: Any, scales: Any, out: Any) -> None:
    for r in range(len(out)):
        out[r] = (out[r] - np.float32(zeros[r])) * scales[r]


@inline
def _leave_out(mask: Any, part: Any, column: Any) -> None:
    for channel in range(32):
        _zero_where(mask, channel % 4 * 8 + channel // 4, part[channel, column : column + len(mask)])


@jit
def _zero_where(mask: Any, shift: Any, out: Any) -> None:
    for r in range(len(out)):
        out[r] = out[r] if shifted(mask[r], shift) & 1 else np.float32(0.0)
