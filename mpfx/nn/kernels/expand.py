"""Packed weights unpacked tile by tile, in Triton: for many rows of activations, next to a matrix product."""

import triton
import triton.language as tl

from mpfx.nn.kernels.decode import four_zeros, steps, unpacked, zero_word


@triton.jit
def plane_value(words_ptr, live, AT: tl.constexpr, P: tl.constexpr, LOW: tl.constexpr):
    """What a plane of ``P`` bits, after ``LOW`` bits of others, adds to the code at ``AT`` in a word; times 2^-29.

    Bits masked in place are a subnormal float32, ``field * 2^(position - 149)``: one product makes a number of it.
    """
    word = tl.load(words_ptr, mask=live, other=0)
    if AT + P <= 23:  # within the mantissa
        field = word & (((1 << P) - 1) << AT)
        value = field.to(tl.float32, bitcast=True) * (2.0 ** (120 + LOW - AT))
    else:
        field = (word >> 16) & (((1 << P) - 1) << (AT - 16))
        value = field.to(tl.float32, bitcast=True) * (2.0 ** (136 + LOW - AT))
    return value


@triton.jit
def expand_codes(
    words_ptr, stride, live, scale, zero, order_ptr, first, in_features, out_ptr, out_rows,
    BITS: tl.constexpr, ORDERED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write the 32 channels of a segment of ``BITS`` bits, one row of the output each."""
    factor, offset = scale * (2.0**29), zero * scale
    for k in tl.static_range(32):
        whole = tl.zeros(live.shape, dtype=tl.float32)
        for step in tl.static_range(4):
            if BITS & (8 >> step):
                whole += plane_value(
                    words_ptr + ((BITS & (16 - (16 >> step))) + k * (8 >> step) // 32) * stride, live,
                    k % (4 << step) % 4 * 8 + k % (4 << step) // 4 * (8 >> step), 8 >> step, BITS & (16 - (16 >> step)),
                )  # fmt: skip
        write(whole * factor - offset, k, live, order_ptr, first, in_features, out_ptr, out_rows, ORDERED, EVEN)


@triton.jit
def write(value, k, live, order_ptr, first, in_features, out_ptr, out_rows, ORDERED: tl.constexpr, EVEN: tl.constexpr):
    """Write one channel of a segment to its place among the input's."""
    inside = True if EVEN else first + k < in_features
    place = first + k
    if ORDERED:
        place = tl.load(order_ptr + first + k, mask=inside, other=0).to(tl.int32)
    out = out_ptr + place.to(tl.int64) * out_rows
    tl.store(out, value.to(out_ptr.dtype.element_ty), mask=live & inside)


@triton.jit(do_not_specialize=["grids", "words_a_grid", "first_row"])
def expand_kernel(
    order_ptr, codes_ptr, scales_ptr, row_scales_ptr, group_scales_ptr, zeros_ptr, table_ptr, out_ptr,
    out_features, in_features, grids, words_a_grid, first_row, out_rows,
    ORDERED: tl.constexpr, EVEN: tl.constexpr, CODED: tl.constexpr, ASYMMETRIC: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """One segment of ``4 Q`` rows of the weight, transposed: ``out[order[channel], row - first_row]``."""
    segment = tl.program_id(0)
    left = (tl.program_id(1) * Q + tl.arange(0, Q)[:, None]) * 4
    column = left + tl.arange(0, 4)[None, :]
    lead, rows = first_row + left, first_row + column
    live, some = column < out_rows, left < out_rows
    first = segment * 32
    bits = tl.load(table_ptr + segment * 4)
    word = tl.load(table_ptr + segment * 4 + 1)
    words_ptr = codes_ptr + word.to(tl.int64) * out_features + rows
    out = out_ptr + column
    if bits == 0:
        for k in range(32):
            nothing = tl.zeros(rows.shape, dtype=tl.float32)
            write(nothing, k, live, order_ptr, first, in_features, out, out_rows, ORDERED, EVEN)
    elif bits == 16:
        for k in range(32):
            at, shift = words_ptr + k // 4 * out_features, k % 4 * 8
            low = (tl.load(at, mask=live, other=0) >> shift) & 255
            high = (tl.load(at + 8 * out_features, mask=live, other=0) >> shift) & 255
            value = (low | (high << 8)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            write(value, k, live, order_ptr, first, in_features, out, out_rows, ORDERED, EVEN)
    else:
        grid = tl.load(table_ptr + segment * 4 + 2)
        first_zero = tl.load(table_ptr + segment * 4 + 3)
        zero = tl.zeros(rows.shape, dtype=tl.float32) + (1 << (bits - 1))
        if ASYMMETRIC:
            z8, z4 = (
                zero_word(zeros_ptr, first_zero, bits, lead, some, 8),
                zero_word(zeros_ptr, first_zero, bits, lead, some, 4),
            )
            z2, z1 = (
                zero_word(zeros_ptr, first_zero, bits, lead, some, 2),
                zero_word(zeros_ptr, first_zero, bits, lead, some, 1),
            )
            zero = unpacked(four_zeros(z8, z4, z2, z1, bits, lead))
        if CODED:
            row_scale = tl.load(row_scales_ptr + rows, mask=live, other=0.0).to(tl.float32)
            code = tl.load(scales_ptr + grid * words_a_grid + lead // 8, mask=some)
            scale = steps(code, row_scale, tl.load(group_scales_ptr + grid), bits, lead)
        else:
            scale = tl.load(scales_ptr + rows * grids + grid, mask=live, other=0.0).to(tl.float32)
        for width in tl.static_range(1, 9):
            if bits == width:
                expand_codes(
                    words_ptr, out_features, live, scale, zero, order_ptr, first, in_features, out, out_rows,
                    width, ORDERED, EVEN,
                )  # fmt: skip
