"""Coded scales: four bits a scale instead of sixteen, on a logarithmic grid between two float16 bases."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpfx.nn.layout import SCALE_BITS, Layout, words
from mpfx.nn.planes import pack_codes, unpack_codes

_QUARTERS = (1.0, 0.8408964152537145, 0.7071067811865476, 0.5946035575013605)  # 2^0, 2^(-1/4), 2^(-1/2), 2^(-3/4)

FACTORS = tuple(_QUARTERS[code % 4] / (1 << code // 4) for code in range(1 << SCALE_BITS))
"""What each code k stands for, ``2^(-k/4)``: written out, as powers may come out otherwise on another device."""


def scale_values(base: Tensor, codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Decode scales.

    Two products in float32, in this order, with constants that are rounded to float32 once: every device gets the
    same bits.

    Args:
        base: float32, the product of a row's and a group's base; broadcasts with ``codes``.
        codes: integers 0..15, ``(..., len(widths))``.
        widths: bits of the weights' codes, by column.

    Returns:
        ``(base * 2^(-code/4)) * (1 / (2^width - 1))`` in float32: the step between two codes of a weight.
    """
    factors = torch.tensor(FACTORS, dtype=torch.float32, device=base.device)
    steps = torch.tensor([1 / ((1 << bits) - 1) for bits in widths], dtype=torch.float32, device=base.device)
    return base * factors[codes.long()] * steps


@dataclass(frozen=True)
class CodedScales:
    """The scales of one weight, one for every row r and quantized group g, as codes k of 4 bits.

    ``scale[r, g] = row[r] * group[g] * 2^(-k[r, g] / 4) / (2^bits[g] - 1)``: what is coded is the range that a grid
    spans, so that groups of any width go together. Products are those of :func:`scale_values`.

    Attributes:
        codes: int32 ``(words,)``: per quantized group the packed codes of all rows.
        row: float16 ``(out,)``.
        group: float16 ``(grids,)``.
    """

    codes: Tensor
    row: Tensor
    group: Tensor

    @classmethod
    def of(cls, codes: Tensor, row: Tensor, group: Tensor) -> "CodedScales":
        """Pack codes ``(out, grids)``, integers 0..15; the bases are stored in float16."""
        packed = pack_codes(codes.t(), SCALE_BITS).flatten()
        return cls(packed, row.half().contiguous(), group.half().contiguous())

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.codes.nbytes + self.row.nbytes + self.group.nbytes

    def unpacked(self) -> Tensor:
        """Codes, int32 ``(out, grids)``."""
        rows, grids = len(self.row), len(self.group)
        return unpack_codes(self.codes.view(grids, words(rows, SCALE_BITS)), SCALE_BITS, rows).t()

    def decode(self, layout: Layout) -> Tensor:
        """Scales, float32 ``(out, grids)``."""
        base = self.row.float()[:, None] * self.group.float()
        return scale_values(base, self.unpacked(), [group.bits for group in layout.grids])

    def rows(self, index: slice | Tensor) -> "CodedScales":
        """The scales of some of the rows, or of all of them in another order."""
        return CodedScales.of(self.unpacked()[index], self.row[index], self.group)


Scales = Tensor | CodedScales
"""Scales of a weight: float16 ``(out, grids)``, or coded."""


def decoded(scales: Scales, layout: Layout) -> Tensor:
    """Scales of either form, float32 ``(out, grids)``."""
    return scales.float() if isinstance(scales, Tensor) else scales.decode(layout)


def scale_rows(scales: Scales, index: slice | Tensor) -> Scales:
    """The scales of some of the rows, or of all of them in another order."""
    return scales[index] if isinstance(scales, Tensor) else scales.rows(index)
