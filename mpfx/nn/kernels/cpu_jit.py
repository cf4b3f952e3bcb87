"""Packed weights on the CPU, compiled by numba: times a few rows of activations, or expanded row by row.

Lanes are rows of the weight. Activations become integers of 16 bits relative to the largest of their segment, and one
instruction multiplies four codes with them, or two. Sums of integers are exact, so scale and zero point are applied
once per segment, and a result does not depend on how rows are shared out. A mask costs one more step: surviving codes
are moved to their channels, as bytes, and what is pruned becomes the zero point, which adds nothing.
"""

from typing import Any

import numpy as np

from mpfx.nn.kernels.cpu_codes import (
    array,
    codes_of,
    inline,
    is_left_out,
    jit,
    last_lanes,
    load_grid,
    new_grid,
    new_tile,
    raw_value,
    stored,
    whole_lanes,
)
from mpfx.nn.kernels.cpu_lanes import (
    BYTES,
    COUNT,
    LANES,
    PAIRS,
    RECORD,
    STRIDE,
    TILE,
    add_product,
    add_products,
    finish,
    taken,
    write_values,
)
from mpfx.nn.layout import RAW_BITS

_LARGEST = 32639.0  # so that the upper byte does not overflow when the lower one is negative


@jit
def multiply(fields: Any, x: Any, count: Any, order: Any, wide: Any, bias: Any, y: Any, task: Any, step: Any) -> None:
    """Multiply ``count`` rows of activations with a weight, together with all threads that have the same ``task``.

    Args:
        fields: address of what :func:`mpfx.nn.kernels.cpu_codes.stored` takes.
        x: address of float32 ``(count, in)``.
        count: rows of activations.
        order: address of the permutation, or 0: channel ``order[k]`` of ``x`` meets channel k of the weight.
        wide: whether the permutation is of 32 bits, not 16.
        bias: address of float32 ``(out,)``, or 0.
        y: address of float32 ``(count, out)``.
        task: address of the first row of the weight that no thread has taken.
        step: rows to take, a multiple of a block.
    """
    weight = stored(fields)
    first = taken(task, step)
    if first >= weight.rows:
        return
    values = np.zeros((count, 32 * len(weight.table)), np.float32)
    _load(array(x, (count, weight.channels), np.float32), order, wide, values)
    records = _records(values)
    out = array(y, (count, weight.rows), np.float32)
    while first < weight.rows:
        stop = min(first + step, weight.rows)
        for n in range(count):
            out[n, first:stop] = 0.0
        if bias:
            _set(array(bias, weight.rows, np.float32), first, stop, out)
        for start in range(first, stop, TILE):
            _multiply_tile(weight, values, records, start, min(start + TILE, stop), out)
        first = taken(task, step)


@jit
def _set(bias: Any, first: Any, stop: Any, y: Any) -> None:
    for n in range(len(y)):
        y[n, first:stop] = bias[first:stop]


@jit
def _load(x: Any, order: Any, wide: Any, values: Any) -> None:
    """Activations in the weight's order; the last segment stays filled up with zeros."""
    for n in range(len(x)):
        if order == 0:
            values[n, : x.shape[1]] = x[n]
        elif wide:
            _gather(x[n], array(order, x.shape[1], np.int32), values[n])
        else:
            _gather(x[n], array(order, x.shape[1], np.uint16), values[n])


@inline
def _gather(x: Any, order: Any, values: Any) -> None:
    for k in range(len(order)):
        values[k] = x[order[k]]


@jit
def _records(values: Any) -> Any:
    """Activations as the products take them, ``(segments, rows, words)``, rows filled up to what goes together."""
    count, segments = len(values), values.shape[1] // 32
    padded = count if count == 1 else -(-count // COUNT) * COUNT
    records = np.zeros((segments, padded, RECORD), np.int32)
    integers = np.empty(32, np.int32)
    for segment in range(segments):
        for n in range(count):
            record = records[segment, n]
            unit = _to_integers(values[n, 32 * segment : 32 * segment + 32], integers)
            record[PAIRS : PAIRS + 1].view(np.float32)[0] = unit
            record[PAIRS + 1] = integers.sum()
            _to_pairs(integers, record)
    return records


@jit
def _to_pairs(integers: Any, record: Any) -> None:
    """Words that meet four codes: their upper and their lower bytes, or halves for codes 0 and 2, and 1 and 3."""
    if BYTES:
        bytes_of = record.view(np.int8)
        for quad in range(8):
            for k in range(4):
                value = integers[4 * quad + k]
                upper = (value + 128) >> 8
                bytes_of[8 * quad + k] = upper
                bytes_of[8 * quad + 4 + k] = value - (upper << 8)
    else:
        for pair in range(PAIRS):
            k = pair // 2 * 4 + pair % 2
            record[pair] = (integers[k] & 0xFFFF) | (integers[k + 2] << 16)


@jit
def _to_integers(values: Any, integers: Any) -> Any:
    """Round activations to integers; return what one of these is worth: NaN if an activation is not finite."""
    bits, largest = values.view(np.int32), np.int32(0)
    for k in range(32):  # compared as integers, which orders magnitudes and what is not finite as well
        largest = max(largest, np.int32(bits[k] & np.int32(0x7FFFFFFF)))
    integers[:] = 0
    if largest == 0 or largest >= 0x7F800000:
        return np.float32(0.0 if largest == 0 else np.nan)
    factor = _LARGEST / np.float64(np.int32(largest).view(np.float32))
    for k in range(32):
        integers[k] = np.int32(np.rint(values[k] * factor))
    return np.float32(1.0 / factor)


@inline
def _multiply_tile(weight: Any, values: Any, records: Any, first: Any, stop: Any, y: Any) -> None:
    """Add what rows ``first .. stop-1`` of a weight, from a block of rows on, make to ``y[:, first : stop]``."""
    count, table = stop - first, weight.table
    tile = new_tile(weight, first, count)
    sums = np.zeros((2, records.shape[1], STRIDE), np.float32)  # of a grid, before its scale, and of all
    for segment in range(len(table)):
        if is_left_out(table, segment):
            continue
        if table[segment, 0] == RAW_BITS:
            words, stride, _ = codes_of(weight, tile, segment, first, count)
            _add_raw(array(words, 15 * (stride // 4) + count, np.int32), stride // 4, values, segment, count, sums[1])
            continue
        if new_grid(table, segment):
            load_grid(weight, tile, segment, first, count)
        words, stride, bits = codes_of(weight, tile, segment, first, count)
        zeros, totals, x = tile.zeros.ctypes.data, sums.ctypes.data, records[segment].ctypes.data
        for row in range(0, count, whole_lanes(count)):  # whole lanes, and what is left
            groups = max((count - row) // LANES, 1)
            if count - row < LANES:
                words, stride = last_lanes(weight, tile, words, stride, bits, row, count)
            _products(words, stride, bits, x, zeros + row, totals + 4 * row, groups, records.shape[1])
        if segment + 1 == len(table) or new_grid(table, segment + 1):
            for n in range(len(y)):
                finish(sums[0, n].ctypes.data, tile.scales.ctypes.data, sums[1, n].ctypes.data, -(-count // LANES))
    for n in range(len(y)):
        _add(sums[1, n], y[n, first:stop])


@jit
def _add(sums: Any, y: Any) -> None:
    for r in range(len(y)):
        y[r] += sums[r]


@inline
def _products(words: Any, stride: Any, bits: Any, x: Any, zeros: Any, sums: Any, groups: Any, count: Any) -> None:
    """Add the products of a segment's codes and all rows of activations to ``sums``, :data:`COUNT` rows at a time."""
    if count == 1:
        add_product(bits, words, stride, x, zeros, sums, groups)
    else:
        for n in range(0, count, COUNT):
            add_products(bits, words, stride, x + 4 * RECORD * n, zeros, sums + 4 * STRIDE * n, groups)


@jit
def _add_raw(words: Any, stride: Any, x: Any, segment: Any, count: Any, y: Any) -> None:
    for n in range(len(x)):
        for channel in range(32):
            for r in range(count):
                y[n, r] += raw_value(words, stride, channel, r) * x[n, 32 * segment + channel]


@jit
def dequantize(fields: Any, begin: Any, end: Any, out: Any, width: Any, task: Any, step: Any) -> None:
    """Rows ``begin .. end-1`` of a weight in float32, channels first, together with all threads of the same ``task``.

    Args:
        fields: address of what :func:`mpfx.nn.kernels.cpu_codes.stored` takes.
        begin: a multiple of a block of rows.
        end: of the rows.
        out: address of float32 ``(channels, width)``, channels in whole segments.
        width: at least the rows, in whole lanes.
        task: address of the first row of the weight that no thread has taken.
        step: rows to take, a multiple of a block and at most as many as in a tile.
    """
    weight = stored(fields)
    first = taken(task, step)
    while first < end:
        _dequantize_tile(weight, first, min(first + step, end), out + 4 * (first - begin), width)
        first = taken(task, step)


@inline
def _dequantize_tile(weight: Any, first: Any, stop: Any, out: Any, width: Any) -> None:
    count, table = stop - first, weight.table
    tile = new_tile(weight, first, count)
    for segment in range(len(table)):
        part = out + 4 * 32 * segment * width
        if is_left_out(table, segment) or table[segment, 0] == RAW_BITS:
            _raw_or_zero(weight, tile, segment, first, count, array(part, 31 * width + count, np.float32), width)
            continue
        if new_grid(table, segment):
            load_grid(weight, tile, segment, first, count)
        words, stride, bits = codes_of(weight, tile, segment, first, count)
        zeros, scales = tile.zeros.ctypes.data, tile.scales.ctypes.data
        for row in range(0, count, whole_lanes(count)):
            groups = max((count - row) // LANES, 1)
            if count - row < LANES:
                words, stride = last_lanes(weight, tile, words, stride, bits, row, count)
            write_values(bits, words, stride, zeros + row, scales + 4 * row, part + 4 * row, 4 * width, groups)


@jit
def _raw_or_zero(weight: Any, tile: Any, segment: Any, first: Any, count: Any, out: Any, width: Any) -> None:
    if is_left_out(weight.table, segment):
        for channel in range(32):
            out[channel * width : channel * width + count] = 0.0
        return
    words, stride, _ = codes_of(weight, tile, segment, first, count)
    codes = array(words, 15 * (stride // 4) + count, np.int32)
    for channel in range(32):
        for r in range(count):
            out[channel * width + r] = raw_value(codes, stride // 4, channel, r)
