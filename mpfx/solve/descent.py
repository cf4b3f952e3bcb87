"""One panel of the refinement in one launch, in Triton; rows are lanes, as in :mod:`mpfx.solve.panels`."""

import triton
import triton.language as tl

from mpfx.solve.panels import LEFT_OUT, RAW_BITS, SEGMENT, make_up, nearest

_LARGEST = tl.constexpr(65504.0)  # float16 value


@triton.jit
def value_of(code, scale, zero, bits, out):
    """What codes stand for."""
    raw = code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(out, 0.0, tl.where(bits == RAW_BITS, raw, (code.to(tl.float32) - zero) * scale))


@triton.jit
def descend_few(
    pull_ptr, off_ptr, codes_ptr, pruned_ptr, hessian_ptr, inverse_ptr, changed_ptr,
    at, rows, stride, scale, zero, bits, live, MASKED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Move ``COUNT`` channels to their best codes; returns by how much, and how much lower the error of the rows is.

    Weights of the first one lie at ``at``, and its pull, row of H, and ``1 / H'_jj`` where the pointers point.
    """
    off_ptr += at
    codes_ptr += at
    inverse_scale, top = 1 / scale, tl.cast((1 << bits) - 1, tl.float32)
    limit = tl.where(bits == RAW_BITS, _LARGEST, float("inf"))
    pulls, offs, before = (), (), ()
    for i in tl.static_range(COUNT):
        pulls += (tl.load(pull_ptr + i * rows, mask=live, other=0.0),)
        offs += (tl.load(off_ptr + i * rows, mask=live, other=0.0),)
        before += (tl.load(codes_ptr + i * rows, mask=live, other=0),)
    moves, codes, changed, lower = (), (), live & False, tl.zeros(live.shape, dtype=tl.float32)
    for j in tl.static_range(COUNT):  # pulls are those of channel j and later ones
        out = live & False
        if MASKED:
            out = tl.load(pruned_ptr + at + j * rows, mask=live, other=0) != 0
        value, inverse = value_of(before[j], scale, zero, bits, out), tl.load(inverse_ptr + j)
        target = tl.minimum(tl.maximum(value + pulls[0] * inverse, -limit), limit)
        code, best = nearest(target, scale, inverse_scale, zero, top, bits, out)
        code = tl.where(inverse > 0, code, before[j])
        move = tl.where(inverse > 0, best - value, 0.0)
        lower += move * (2 * pulls[0] - tl.where(inverse > 0, move / inverse, 0.0))
        later = ()
        for k in tl.static_range(1, COUNT - j):
            later += (pulls[k] - move * tl.load(hessian_ptr + j * stride + (j + k)),)
        pulls = later
        moves += (move,)
        codes += (code,)
        changed = changed | (code != before[j])
    for i in tl.static_range(COUNT):  # stores come last: loads behind them would have to wait
        tl.store(off_ptr + i * rows, offs[i] - moves[i], mask=live)
        tl.store(codes_ptr + i * rows, codes[i], mask=live)
    tl.store(changed_ptr + tl.zeros(live.shape, dtype=tl.int32), 1, mask=live & changed)
    return moves, lower


@triton.jit(do_not_specialize=["first", "last", "rows", "stride"])
def descent_kernel(
    pull_ptr, off_ptr, codes_ptr, pruned_ptr, hessian_ptr, inverse_ptr, table_ptr, scale_ptr, zero_ptr, changed_ptr,
    lowered_ptr, first, last, rows, stride,
    MASKED: tl.constexpr, COUNT: tl.constexpr, AHEAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Refine segments ``first .. last-1``; the pull ``(channels, rows)`` is that on their channels.

    Arguments are those of :class:`mpfx.solve.cuda.KernelDescent`. ``COUNT`` channels are moved at a time, and ``AHEAD``
    later ones, a divisor of ``COUNT``, hear of it at a time.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    pull_ptr += row
    lowered = tl.load(lowered_ptr + row, mask=live, other=0.0)
    for start in range(first * SEGMENT, last * SEGMENT, COUNT):
        bits = tl.load(table_ptr + start // SEGMENT * 4)
        grid = tl.load(table_ptr + start // SEGMENT * 4 + 1)
        if bits != LEFT_OUT:
            at = tl.cast(grid, tl.int64) * rows + row
            scale = tl.load(scale_ptr + at, mask=live & (grid >= 0), other=1.0)
            zero = tl.load(zero_ptr + at, mask=live & (grid >= 0), other=0.0)
            hessian = hessian_ptr + tl.cast(start, tl.int64) * stride
            moves, lower = descend_few(
                pull_ptr + (start - first * SEGMENT) * rows, off_ptr, codes_ptr, pruned_ptr, hessian + start,
                inverse_ptr + start, changed_ptr, tl.cast(start, tl.int64) * rows + row, rows, stride, scale, zero,
                bits, live, MASKED, COUNT,
            )  # fmt: skip
            lowered += lower.to(tl.float64)
            for channel in range(start + COUNT, last * SEGMENT, AHEAD):
                make_up(
                    pull_ptr + (channel - first * SEGMENT) * rows, hessian + channel, moves, rows, stride, live,
                    COUNT, AHEAD,
                )  # fmt: skip
            tl.debug_barrier()
    tl.store(lowered_ptr + row, lowered, mask=live)
