"""Packed weights times activations by torch alone, group after group: what runs where numba is not installed."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mpfx.nn.layout import LEFT_OUT, RAW_BITS, Span, words
from mpfx.nn.packing import PackedWeight, survivors
from mpfx.nn.planes import unpack_codes, unpack_mask
from mpfx.nn.scales import decoded


def eager_linear(x: Tensor, weight: PackedWeight, most_bytes: int) -> Tensor:
    """Multiply float32 activations ``(rows, in)`` with a weight, of which never more than some channels are dense.

    Args:
        x: in the weight's order of channels.
        weight: packed.
        most_bytes: of dense float32 weight at a time, if that is enough for a segment.

    Returns:
        float32 ``(rows, out)``.
    """
    layout, out = weight.layout, weight.out_features
    scales, y = decoded(weight.scales, layout), x.new_zeros(len(x), out)
    step = max(1, most_bytes // (4 * out * layout.segment)) * layout.segment
    codes, grid, zero_word = _Codes(weight), 0, 0
    for group in layout.groups:
        zero = x.new_zeros(())
        if group.quantized:
            zero = x.new_tensor(float(1 << group.bits - 1))
            if weight.zeros is not None:
                stop = zero_word + words(out, group.bits)
                zero = unpack_codes(weight.zeros[zero_word:stop], group.bits, out)[:, None].float()
                zero_word = stop
        for start in range(group.start, group.stop, step) if group.bits != LEFT_OUT else ():
            span = Span(start, min(start + step, group.stop), group.bits)
            values, kept = codes.next(span)
            dense = values.to(torch.int16).view(torch.float16).float() if group.bits == RAW_BITS else values - zero
            if kept is not None:
                dense.masked_fill_(~kept, 0.0)
            if group.quantized:
                dense *= scales[:, grid, None]
            y += x[:, span.start : span.stop] @ dense.t()
        grid += group.quantized
    return y


class _Codes:
    """Codes of a weight, span after span."""

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight
        self.word = 0
        self.streams = dict(_streams(weight))  # by width: its words and how many of its codes have been read

    def next(self, span: Span) -> tuple[Tensor, Tensor | None]:
        """Codes ``(out, channels)`` of the span behind those that were asked for, and which of them are kept."""
        mask, segment = self.weight.mask, self.weight.layout.segment
        if mask is None:
            stop = self.word + words(span.channels, span.bits)
            rows, self.word = self.weight.codes[self.word : stop], stop
            return unpack_codes(rows.t(), span.bits, span.channels), None
        kept = unpack_mask(mask[span.start // segment : -(-span.stop // segment)], span.channels)
        codes = torch.zeros(kept.shape, dtype=torch.int32)
        for start in range(0, span.channels, segment):
            alive = kept[:, start : start + segment]
            codes[:, start : start + segment][alive] = self._read(span.bits, int(alive.sum()))
        return codes, kept

    def _read(self, bits: int, count: int) -> Tensor:
        stream, done = self.streams[bits]
        self.streams[bits] = (stream, done + count)
        part = stream[done // 32 * bits : words(done + count, bits)]
        return unpack_codes(part, bits, done % 32 + count)[done % 32 :]


def _streams(weight: PackedWeight) -> Iterator[tuple[int, tuple[Tensor, int]]]:
    if weight.mask is None:
        return
    start, layout, counts = 0, weight.layout, survivors(weight.mask, weight.layout)
    for bits in sorted(set(layout.widths) - {LEFT_OUT}):
        of_width = torch.tensor([width == bits for width in layout.widths])
        count = int(counts[of_width].sum())
        stop = start + words(count, bits)
        yield bits, (weight.codes[start:stop], 0)
        start = stop
