"""One panel of the sweep in one launch, in Triton.

Rows of a weight do not meet within a panel, so lanes are rows: a program solves some rows, all channels of the panel
one after the other. Weights lie channels first, so that what the lanes read is adjacent; every entry of U is the same
for all lanes. A few channels at a time are in registers: as tuples, since registers cannot be indexed by what is not
a constant. More of them would mean fewer passes over the panel's later channels, but the code, and what compiling it
takes, grows with their square.
"""

import triton
import triton.language as tl

SEGMENT = tl.constexpr(32)

LEFT_OUT, RAW_BITS = tl.constexpr(0), tl.constexpr(16)

_TOGETHER = tl.constexpr(8)  # channels whose errors are computed side by side while a grid is fitted

_HALFWAY = tl.constexpr(12582912.0)  # 1.5 * 2^23: floats there are whole numbers, so adding it rounds, ties to even


@triton.jit
def rounded(x):
    """The nearest whole numbers, ties to even, of values below 2^22."""
    return (x + _HALFWAY) - _HALFWAY


@triton.jit
def steps_of(w, inverse_scale, zero, top):
    """The nearest code less its zero point."""
    return rounded(tl.minimum(tl.maximum(w * inverse_scale, -zero), top - zero))


@triton.jit
def choose(
    work_ptr, pruned_ptr, inverse_ptr, start, stop, channels, rows, live, KEEP_N: tl.constexpr, GROUP_M: tl.constexpr
):  # fmt: skip
    """Mark the least salient of every ``GROUP_M`` channels, the earlier one of equals; none of a group cut short."""
    for first in range(start, min(stop, channels // GROUP_M * GROUP_M), GROUP_M):
        at = tl.cast(first, tl.int64) * rows
        for i in range(GROUP_M):
            root = tl.load(work_ptr + at + i * rows, mask=live, other=0.0) * tl.load(inverse_ptr + first + i)
            rank = tl.zeros(live.shape, dtype=tl.int32)
            for k in range(GROUP_M):
                other = tl.load(work_ptr + at + k * rows, mask=live, other=0.0) * tl.load(inverse_ptr + first + k)
                before = (other * other < root * root) | ((other * other == root * root) & (k < i))
                rank += before.to(tl.int32)
            tl.store(pruned_ptr + at + i * rows, (rank < GROUP_M - KEEP_N).to(tl.int8), mask=live)


@triton.jit
def unpruned(work_ptr, pruned_ptr, channel, rows, live, MASKED: tl.constexpr):
    """The weights of one channel, zero where they are pruned."""
    at = tl.cast(channel, tl.int64) * rows
    w = tl.load(work_ptr + at, mask=live, other=0.0)
    if MASKED:
        w = tl.where(tl.load(pruned_ptr + at, mask=live, other=0) != 0, 0.0, w)
    return w


@triton.jit
def rounding_error(work_ptr, pruned_ptr, start, stop, rows, live, scale, zero, top, MASKED: tl.constexpr):
    """What the clip search minimises (:func:`mpfx.solve.grid.rounding_error`)."""
    error, inverse = tl.zeros(live.shape, dtype=tl.float32), 1 / scale
    for k in range(start, stop, _TOGETHER):
        for i in tl.static_range(_TOGETHER):
            w = unpruned(work_ptr, pruned_ptr, k + i, rows, live, MASKED)
            off = tl.abs(steps_of(w, inverse, zero, top) * scale - w)
            error += tl.exp2(2.4 * tl.log2(off))
    return error


@triton.jit
def fit(
    work_ptr, pruned_ptr, factors_ptr, steps_ptr, row_base, group_base, scale_ptr, zero_ptr, code_ptr,
    start, stop, rows, bits, live,
    MASKED: tl.constexpr, SYMMETRIC: tl.constexpr, CODED: tl.constexpr, TRIED: tl.constexpr,
):  # fmt: skip
    """Fit a grid per row to channels ``start .. stop-1`` as :mod:`mpfx.solve.grid` and :mod:`mpfx.solve.coded` do."""
    low, high = tl.zeros(live.shape, dtype=tl.float32), tl.zeros(live.shape, dtype=tl.float32)
    for k in range(start, stop, _TOGETHER):
        for i in tl.static_range(_TOGETHER):
            w = unpruned(work_ptr, pruned_ptr, k + i, rows, live, MASKED)
            low, high = tl.minimum(low, w), tl.maximum(high, w)
    if SYMMETRIC:
        high = tl.maximum(high, -low)
        low = -high
    span, top = high - low, tl.cast((1 << bits) - 1, tl.float32)
    base, covering = row_base * group_base, tl.zeros(live.shape, dtype=tl.int32)
    if CODED:
        span = tl.where(span == 0, base, span)
        covering = tl.maximum(tl.floor(4 * tl.log2(base / span)), 0.0).to(tl.int32)
    else:
        span = tl.where(span == 0, 1.0, span)
    zero = rounded(-low / span * top)
    if SYMMETRIC:
        zero = tl.zeros(live.shape, dtype=tl.float32) + tl.cast(1 << (bits - 1), tl.float32)
    least = tl.full(live.shape, float("inf"), dtype=tl.float32)
    best, best_code = tl.zeros(live.shape, dtype=tl.float32), covering
    for candidate in range(TRIED):
        code = tl.maximum(tl.minimum(covering + candidate, 15), 0)  # a weight that is no number has no place in a table
        if CODED:  # the products of mpfx.nn.scales, in their order
            scale = base * tl.load(factors_ptr + code) * tl.load(steps_ptr + bits)
        else:
            scale = tl.maximum(span * ((1 - candidate * 0.025) / top), 2.0**-24).to(tl.float16).to(tl.float32)
        error = rounding_error(work_ptr, pruned_ptr, start, stop, rows, live, scale, zero, top, MASKED)
        better = (error < least) | (candidate == 0)
        least, best = tl.where(better, error, least), tl.where(better, scale, best)
        best_code = tl.where(better, code, best_code)
    tl.store(scale_ptr, best, mask=live)
    tl.store(zero_ptr, zero, mask=live)
    if CODED:
        tl.store(code_ptr, best_code, mask=live)


@triton.jit
def start_group(
    work_ptr, pruned_ptr, inverse_ptr, factors_ptr, steps_ptr, row_base, group_base_ptr,
    scale_ptr, zero_ptr, code_ptr, grid, start, stop, channels, rows, bits, live,
    MASKED: tl.constexpr, KEEP_N: tl.constexpr, GROUP_M: tl.constexpr,
    SYMMETRIC: tl.constexpr, CODED: tl.constexpr, TRIED: tl.constexpr,
):  # fmt: skip
    """Fit the grid of a group; pointers are those of the rows."""
    group_base = 0.0
    if CODED:
        group_base = tl.load(group_base_ptr + grid)
    if GROUP_M > 0:  # the choice is made again, m channels at a time, when the sweep gets there
        choose(work_ptr, pruned_ptr, inverse_ptr, start, stop, channels, rows, live, KEEP_N, GROUP_M)
        tl.debug_barrier()
    at = tl.cast(grid, tl.int64) * rows
    fit(
        work_ptr, pruned_ptr, factors_ptr, steps_ptr, row_base, group_base, scale_ptr + at, zero_ptr + at,
        code_ptr + at, start, stop, rows, bits, live, MASKED, SYMMETRIC, CODED, TRIED,
    )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def base_of_rows(row_base_ptr, row, live, CODED: tl.constexpr):
    """What coded scales of the rows are multiples of."""
    base = tl.zeros(row.shape, dtype=tl.float32)
    if CODED:
        base = tl.load(row_base_ptr + row, mask=live, other=1.0)
    return base


@triton.jit(do_not_specialize=["grid", "start", "stop", "channels", "rows", "bits"])
def fit_kernel(
    work_ptr, pruned_ptr, inverse_ptr, factors_ptr, steps_ptr, row_base_ptr, group_base_ptr,
    scale_ptr, zero_ptr, code_ptr, grid, start, stop, channels, rows, bits,
    MASKED: tl.constexpr, KEEP_N: tl.constexpr, GROUP_M: tl.constexpr, SYMMETRIC: tl.constexpr,
    CODED: tl.constexpr, TRIED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Fit one grid to channels ``start .. stop-1`` of more than one panel."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    start_group(
        work_ptr + row, pruned_ptr + row, inverse_ptr, factors_ptr, steps_ptr,
        base_of_rows(row_base_ptr, row, live, CODED), group_base_ptr, scale_ptr + row, zero_ptr + row, code_ptr + row,
        grid, start, stop, channels, rows, bits, live, MASKED, KEEP_N, GROUP_M, SYMMETRIC, CODED, TRIED,
    )  # fmt: skip


@triton.jit
def nearest(w, scale, inverse_scale, zero, top, bits, out):
    """The nearest codes, and the values that they stand for; zero where weights are ``out``."""
    whole, half = steps_of(w, inverse_scale, zero, top), w.to(tl.float16)
    raw = half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    code = tl.where(out, 0, tl.where(bits == RAW_BITS, raw, (whole + zero).to(tl.int32)))
    return code, tl.where(out, 0.0, tl.where(bits == RAW_BITS, half.to(tl.float32), whole * scale))


@triton.jit
def solve_few(
    work_ptr, pruned_ptr, codes_ptr, errors_ptr, upper_ptr, inverse_ptr, rows, stride, scale, zero, bits, live,
    MASKED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Solve ``COUNT`` channels, to whose first all pointers point; returns their errors ``(w - q) / U_jj``."""
    inverse_scale, top = 1 / scale, tl.cast((1 << bits) - 1, tl.float32)
    weights, errors, codes = (), (), ()
    for i in tl.static_range(COUNT):
        weights += (tl.load(work_ptr + i * rows, mask=live, other=0.0),)
    for j in tl.static_range(COUNT):  # weights are those of channel j and later ones
        w, out = weights[0], (bits == LEFT_OUT) & live
        if MASKED:
            out = out | (tl.load(pruned_ptr + j * rows, mask=live, other=0) != 0)
        code, q = nearest(w, scale, inverse_scale, zero, top, bits, out)
        error = (w - q) * tl.load(inverse_ptr + j)
        later = ()
        for k in tl.static_range(1, COUNT - j):
            later += (weights[k] - error * tl.load(upper_ptr + j * stride + (j + k)),)
        weights = later
        errors += (error,)
        codes += (code,)
    for i in tl.static_range(COUNT):  # stores come last: loads behind them would have to wait
        tl.store(codes_ptr + i * rows, codes[i], mask=live)
        tl.store(errors_ptr + i * rows, errors[i], mask=live)
    return errors


@triton.jit
def make_up(work_ptr, upper_ptr, errors, rows, stride, live, COUNT: tl.constexpr, AHEAD: tl.constexpr):
    """Let ``AHEAD`` channels, to whose first the pointers point, make up for the errors of ``COUNT`` earlier ones."""
    weights = ()
    for i in tl.static_range(AHEAD):
        weights += (tl.load(work_ptr + i * rows, mask=live, other=0.0),)
    for j in tl.static_range(COUNT):
        less = ()
        for i in tl.static_range(AHEAD):
            less += (weights[i] - errors[j] * tl.load(upper_ptr + j * stride + i),)
        weights = less
    for i in tl.static_range(AHEAD):
        tl.store(work_ptr + i * rows, weights[i], mask=live)


@triton.jit(do_not_specialize=["first", "last", "channels", "rows", "stride"])
def panel_kernel(
    work_ptr, pruned_ptr, codes_ptr, errors_ptr, upper_ptr, inverse_ptr, table_ptr,
    factors_ptr, steps_ptr, row_base_ptr, group_base_ptr, scale_ptr, zero_ptr, code_ptr,
    first, last, channels, rows, stride,
    MASKED: tl.constexpr, KEEP_N: tl.constexpr, GROUP_M: tl.constexpr, SYMMETRIC: tl.constexpr,
    CODED: tl.constexpr, TRIED: tl.constexpr, COUNT: tl.constexpr, AHEAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Solve segments ``first .. last-1``: codes, n:m masks, grids, and errors ``(128, rows)`` from the first one on.

    Arguments are those of :class:`mpfx.solve.cuda.KernelSweep`. ``COUNT`` channels are solved at a time, before n of m
    are chosen among the next ones: it divides m. ``AHEAD`` later ones, a divisor of ``COUNT``, make up for the errors
    at a time.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    row_base = base_of_rows(row_base_ptr, row, live, CODED)
    work_ptr += row
    pruned_ptr += row
    for start in range(first * SEGMENT, last * SEGMENT, COUNT):
        bits = tl.load(table_ptr + start // SEGMENT * 4)
        grid = tl.load(table_ptr + start // SEGMENT * 4 + 1)
        begins = tl.load(table_ptr + start // SEGMENT * 4 + 2)
        ends = tl.load(table_ptr + start // SEGMENT * 4 + 3)
        if start == begins:
            start_group(
                work_ptr, pruned_ptr, inverse_ptr, factors_ptr, steps_ptr, row_base, group_base_ptr,
                scale_ptr + row, zero_ptr + row, code_ptr + row, grid, start, ends, channels, rows, bits, live,
                MASKED, KEEP_N, GROUP_M, SYMMETRIC, CODED, TRIED,
            )  # fmt: skip
        if GROUP_M > 0:
            if (bits != LEFT_OUT) & (start % GROUP_M == 0):
                choose(work_ptr, pruned_ptr, inverse_ptr, start, start + GROUP_M, channels, rows, live, KEEP_N, GROUP_M)
                tl.debug_barrier()
        at = tl.cast(grid, tl.int64) * rows + row
        scale = tl.load(scale_ptr + at, mask=live & (grid >= 0), other=1.0)
        zero = tl.load(zero_ptr + at, mask=live & (grid >= 0), other=0.0)
        here, solved = tl.cast(start, tl.int64) * rows, tl.cast(start - first * SEGMENT, tl.int64) * rows
        upper = upper_ptr + tl.cast(start, tl.int64) * stride
        errors = solve_few(
            work_ptr + here, pruned_ptr + here, codes_ptr + row + here, errors_ptr + row + solved, upper + start,
            inverse_ptr + start, rows, stride, scale, zero, bits, live, MASKED, COUNT,
        )  # fmt: skip
        for channel in range(start + COUNT, last * SEGMENT, AHEAD):
            make_up(
                work_ptr + tl.cast(channel, tl.int64) * rows, upper + channel, errors, rows, stride, live, COUNT, AHEAD
            )  # fmt: skip
        tl.debug_barrier()
