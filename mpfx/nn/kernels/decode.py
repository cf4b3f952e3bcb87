"""Matrix times vector on packed weights, in Triton: for one to a few rows of activations.

Lanes are rows of the weight, so the words of a segment are read side by side. Activations become integers of 16 bits
relative to the largest of their segment, as two bytes; four codes masked in place are four bytes of one word, and one
`dp4a` multiplies them with four bytes of the activation. So a weight costs about one instruction per plane of its
code, and nothing is converted. Scale and zero point are applied once per grid: ``s (sum c x - z sum x)``.

Every program prepares the activations of its own segments first (channel order, integers, four bytes to a word) and
keeps them in a scratch of its own: there is no second launch.
"""

import triton
import triton.language as tl

SCRATCH = 18
"""Words of scratch a segment: eight of high and eight of low bytes of its activations, their size and their sum."""

_LARGEST = tl.constexpr(32512.0)  # 127 * 256: rounded to bytes, neither of both leaves -128..127


@triton.jit
def dot4(codes, x, total):
    """``total`` plus the products of four unsigned and four signed bytes."""
    return tl.inline_asm_elementwise(
        "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def activation(x_ptr, order_ptr, channel, in_features, ORDERED: tl.constexpr, EVEN: tl.constexpr):
    """The activation that meets a channel of the weight, float32."""
    inside = True if EVEN else channel < in_features
    place = channel
    if ORDERED:
        place = tl.load(order_ptr + channel, mask=inside, other=0).to(tl.int32)
    return tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def prepare(
    x_ptr, order_ptr, first, segments, in_features, room_ptr,
    ORDERED: tl.constexpr, EVEN: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Write the activations of some segments as integers to scratch: four high, four low bytes to a word."""
    index = tl.arange(0, SHARE)[:, None]
    channel = (first + index) * 32 + tl.arange(0, 32)[None, :]
    inside = first + index < segments
    within = inside if EVEN else inside & (channel < in_features)
    place = channel
    if ORDERED:
        place = tl.load(order_ptr + channel, mask=within, other=0).to(tl.int32)
    x = tl.load(x_ptr + place, mask=within, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 1)
    inverse = 1.0 / tl.maximum(largest, 1e-30)
    whole = x * inverse[:, None] * _LARGEST
    whole = (whole + tl.where(whole < 0, -0.5, 0.5)).to(tl.int32)
    high = (whole + 128) >> 8
    low = whole - high * 256
    words_ptr = room_ptr + index * 18 + tl.arange(0, 8)[None, :]
    tl.store(words_ptr, four_bytes(high, SHARE), mask=inside)
    tl.store(words_ptr + 8, four_bytes(low, SHARE), mask=inside)
    size = largest * (1.0 / _LARGEST) + 0.0 * tl.sum(x, 1)  # not finite if an activation is not
    floats_ptr = room_ptr.to(tl.pointer_type(tl.float32)) + tl.arange(0, SHARE) * 18
    tl.store(floats_ptr + 16, size)
    tl.store(floats_ptr + 17, size * tl.sum(whole, 1).to(tl.float32))


@triton.jit
def four_bytes(values, SHARE: tl.constexpr):
    """Put every four of ``(SHARE, 32)`` integers into one word, ``(SHARE, 8)``."""
    parts = tl.reshape(values & 255, [SHARE, 8, 4]) << (tl.arange(0, 4) * 8)[None, None, :]
    return tl.sum(parts, 2)


@triton.jit
def word_dot(word, x_ptr, high, low, P: tl.constexpr, J: tl.constexpr):
    """Add word ``J`` of a plane times the activations, of whose high and low bytes apart."""
    for i in tl.static_range(8 // P):
        four = word if P == 8 else (word >> (P * i)) & (((1 << P) - 1) * 0x01010101)
        at = J * (8 // P) + i  # channels 4 * at ... of the segment, in this order
        high = dot4(four, tl.load(x_ptr + at), high)
        low = dot4(four, tl.load(x_ptr + 8 + at), low)
    return high, low


@triton.jit
def raw_dot(words_ptr, stride, live, x_ptr, order_ptr, first, in_features, ORDERED: tl.constexpr, EVEN: tl.constexpr):
    """Sum over 32 float16 channels: rare, so that few instructions count more than speed."""
    total = tl.zeros(live.shape, dtype=tl.float32)
    for channel in range(32):
        at = words_ptr + channel // 4 * stride
        shift = channel % 4 * 8
        low = (tl.load(at, mask=live, other=0) >> shift) & 255
        high = (tl.load(at + 8 * stride, mask=live, other=0) >> shift) & 255
        x = activation(x_ptr, order_ptr, first + channel, in_features, ORDERED, EVEN)
        total += (low | (high << 8)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * x
    return total


@triton.jit
def zero_word(zeros_ptr, first, bits, lead, wanted, P: tl.constexpr):
    """The word that holds the plane of ``P`` bits of the zero points of rows ``lead .. lead + 3``, as four bytes."""
    at = zeros_ptr + first + lead // 32 * bits + (bits & (16 - 2 * P)) + lead % 32 * P // 32
    return tl.load(at, mask=wanted & ((bits & P) != 0))


@triton.jit
def four_zeros(eight, four, two, one, bits, lead):
    """Zero points of four rows, a byte each, from the words of their planes."""
    found = tl.where((bits & 8) != 0, eight, 0)
    found |= tl.where((bits & 4) != 0, (four >> (lead % 8)) & 0x0F0F0F0F, 0) << (bits & 8)
    found |= tl.where((bits & 2) != 0, (two >> (lead % 16 // 2)) & 0x03030303, 0) << (bits & 12)
    found |= tl.where((bits & 1) != 0, (one >> (lead % 32 // 4)) & 0x01010101, 0) << (bits & 14)
    return found


@triton.jit
def unpacked(bytes_of_rows):
    """``(Q, 1)`` words of four bytes as ``(Q, 4)`` floats."""
    return ((bytes_of_rows >> (tl.arange(0, 4) * 8)[None, :]) & 255).to(tl.float32)


@triton.jit
def steps(code, row_scale, group_scale, bits, lead):
    """Coded scales of rows ``(Q, 4)`` from the word of their codes, float32."""
    whole = group_scale.to(tl.float32) / ((1 << bits) - 1).to(tl.float32)
    return row_scale * whole * tl.exp2(unpacked((code >> (lead % 8)) & 0x0F0F0F0F) * -0.25)


@triton.jit(do_not_specialize=["segments", "grids", "words_a_grid", "share"])
def decode_kernel(
    x_ptr, order_ptr, codes_ptr, scales_ptr, row_scales_ptr, group_scales_ptr, zeros_ptr, table_ptr, bias_ptr,
    scratch_ptr, partial_ptr, counter_ptr, out_ptr,
    out_features, in_features, segments, grids, words_a_grid, share, splits,
    ORDERED: tl.constexpr, EVEN: tl.constexpr, CODED: tl.constexpr, ASYMMETRIC: tl.constexpr, BIAS: tl.constexpr,
    SPLIT: tl.constexpr, SHARE: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Rows ``4 Q i ...`` of the product with row j of the activations, over ``share`` segments.

    The last of the programs that share rows adds up what all of them found, in order: the same bits every time.
    """
    tile, split, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lead = (tile * Q + tl.arange(0, Q)[:, None]) * 4
    rows = lead + tl.arange(0, 4)[None, :]
    live, some = rows < out_features, lead < out_features
    x_ptr += batch.to(tl.int64) * in_features
    start, stop = split * share, min((split + 1) * share, segments)
    program = (batch * tl.num_programs(1) + split) * tl.num_programs(0) + tile
    room_ptr = scratch_ptr + program.to(tl.int64) * SHARE * 18
    prepare(x_ptr, order_ptr, start, stop, in_features, room_ptr, ORDERED, EVEN, SHARE)
    tl.debug_barrier()
    row_scale = tl.zeros(rows.shape, dtype=tl.float32)
    if CODED:
        row_scale = tl.load(row_scales_ptr + rows, mask=live, other=0.0).to(tl.float32)
    result = tl.zeros(rows.shape, dtype=tl.float32)
    dot, total = tl.zeros(rows.shape, dtype=tl.float32), 0.0
    # All words are loaded at the top, those of planes that a segment lacks masked out: so their loads are in flight
    # together, where branches would make each wait for the one before.
    for segment in range(start, stop):
        bits = tl.load(table_ptr + segment * 4)
        word = tl.load(table_ptr + segment * 4 + 1)
        words_ptr = codes_ptr + word.to(tl.int64) * out_features + rows
        four = live & ((bits & 4) != 0)
        f0 = tl.load(words_ptr, mask=four)  # a plane of 8 bits, which would lie before, means 8 bits in all
        f1 = tl.load(words_ptr + out_features, mask=four)
        f2 = tl.load(words_ptr + 2 * out_features, mask=four)
        f3 = tl.load(words_ptr + 3 * out_features, mask=four)
        two, one = live & ((bits & 2) != 0), live & ((bits & 1) != 0)
        t0 = tl.load(words_ptr + (bits & 4) * out_features, mask=two)
        t1 = tl.load(words_ptr + ((bits & 4) + 1) * out_features, mask=two)
        o0 = tl.load(words_ptr + (bits & 6) * out_features, mask=one)
        grid = tl.load(table_ptr + segment * 4 + 2)
        first = tl.load(table_ptr + segment * 4 + 3)
        following = tl.load(table_ptr + segment * 4 + 6, mask=segment + 1 < stop, other=-1)
        ends = (grid >= 0) & (following != grid)  # what a grid's segments share is needed once, at its end
        if ASYMMETRIC:
            z8 = zero_word(zeros_ptr, first, bits, lead, some & ends, 8)
            z4 = zero_word(zeros_ptr, first, bits, lead, some & ends, 4)
            z2 = zero_word(zeros_ptr, first, bits, lead, some & ends, 2)
            z1 = zero_word(zeros_ptr, first, bits, lead, some & ends, 1)
        if CODED:
            code = tl.load(scales_ptr + grid * words_a_grid + lead // 8, mask=some & ends)
        if bits == 16:
            result += raw_dot(
                words_ptr, out_features, live, x_ptr, order_ptr, segment * 32, in_features, ORDERED, EVEN
            )  # fmt: skip
        elif bits > 0:
            here = room_ptr + (segment - start) * 18
            high, low = tl.zeros(rows.shape, dtype=tl.int32), tl.zeros(rows.shape, dtype=tl.int32)
            if bits & 1:
                high, low = word_dot(o0, here, high, low, 1, 0)
                high, low = high << (bits & 6), low << (bits & 6)
            if bits & 2:
                high_2, low_2 = tl.zeros(rows.shape, dtype=tl.int32), tl.zeros(rows.shape, dtype=tl.int32)
                high_2, low_2 = word_dot(t0, here, high_2, low_2, 2, 0)
                high_2, low_2 = word_dot(t1, here, high_2, low_2, 2, 1)
                high, low = high + (high_2 << (bits & 4)), low + (low_2 << (bits & 4))
            if bits & 4:  # the lowest bits of a code, so nothing to shift
                high, low = word_dot(f0, here, high, low, 4, 0)
                high, low = word_dot(f1, here, high, low, 4, 1)
                high, low = word_dot(f2, here, high, low, 4, 2)
                high, low = word_dot(f3, here, high, low, 4, 3)
            if bits & 8:
                for j in tl.static_range(8):
                    eight = tl.load(words_ptr + j * out_features, mask=live, other=0)
                    high, low = word_dot(eight, here, high, low, 8, j)
            floats_ptr = here.to(tl.pointer_type(tl.float32))
            size = tl.load(floats_ptr + 16)
            dot += high.to(tl.float32) * (size * 256.0) + low.to(tl.float32) * size
            total += tl.load(floats_ptr + 17)
            if ends:
                if ASYMMETRIC:
                    dot -= unpacked(four_zeros(z8, z4, z2, z1, bits, lead)) * total
                else:
                    dot -= (1 << (bits - 1)) * total
                if CODED:
                    scale = steps(code, row_scale, tl.load(group_scales_ptr + grid), bits, lead)
                else:
                    scale = tl.load(scales_ptr + rows * grids + grid, mask=live, other=0.0).to(tl.float32)
                result += scale * dot
                dot, total = tl.zeros(rows.shape, dtype=tl.float32), 0.0
    last = True
    if SPLIT:
        mine = partial_ptr + (batch * splits + split) * out_features + rows
        tl.store(mine, result, mask=live)
        tl.debug_barrier()
        counter = counter_ptr + batch * tl.num_programs(0) + tile
        last = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
        if last:
            tl.debug_barrier()
            result = tl.zeros(rows.shape, dtype=tl.float32)
            for first in range(0, splits, 4):
                for other in tl.static_range(4):  # loads in flight together: one after the other, each would wait
                    at = partial_ptr + (batch * splits + first + other) * out_features + rows
                    result += tl.load(at, mask=live & (first + other < splits), other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)  # for the next call
    if last:
        if BIAS:
            result += tl.load(bias_ptr + rows, mask=live, other=0.0).to(tl.float32)
        out = out_ptr + batch.to(tl.int64) * out_features + rows
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=live)
