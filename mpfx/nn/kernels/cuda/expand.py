"""Packed weights unpacked chunk by chunk, for many rows of activations: what ``expand.cu`` needs from the host."""

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mpfx.nn.kernels.cuda.nvrtc import Launch, kernel
from mpfx.nn.kernels.cuda.weights import (
    ROWS,
    Weight,
    address,
    masked,
    order_bytes,
    segments_of,
    weight_argument,
    weight_macros,
)
from mpfx.nn.layout import SEGMENT, Layout
from mpfx.nn.packing import PackedWeight

CHUNK_BYTES = (16 << 20, 32 << 20, 48 << 20)
"""At most so much of a weight is unpacked at a time, whichever is the fastest: what stays in the L2 cache until it is
multiplied, and yet gives few rows of activations enough to do."""

_WARPS = 4


class Arguments(ctypes.Structure):
    """``Args`` of ``expand.cu``."""

    _fields_ = [
        ("order", ctypes.c_void_p),
        ("weight", Weight),
        ("units", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("first_row", ctypes.c_int),
        ("out_rows", ctypes.c_int),
    ]


@dataclass(frozen=True)
class Chunks:
    """How the work is cut: so many rows of the weight are unpacked and multiplied at a time."""

    rows: int

    def multiply(self, x: Tensor, weight: PackedWeight, order: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
        """Write the product ``(rows, out)``.

        Args:
            x: ``(rows, in)``, contiguous.
            weight: packed.
            order: uint16 or int32 ``(in,)``, or None.
            bias: ``(out,)`` in the dtype of ``x``, or None.
            out: in the dtype of ``x``.
        """
        rows, channels = weight.out_features, weight.layout.in_features
        room = torch.empty(channels * min(self.rows, rows), dtype=x.dtype, device=x.device)
        for first in range(0, rows, self.rows):
            count = min(self.rows, rows - first)
            part = room[: channels * count].view(channels, count)
            expand(x, weight, order, first, part)
            if bias is None:
                torch.mm(x, part, out=out[:, first : first + count])
            else:
                torch.addmm(bias[first : first + count], x, part, out=out[:, first : first + count])


def chunks_for(x: Tensor, weight: PackedWeight) -> tuple[Chunks, ...]:
    """Cuts worth a try: equal chunks, whole tiles, at most so many bytes as ``CHUNK_BYTES`` says."""
    rows, row_bytes = weight.out_features, weight.layout.in_features * x.element_size()
    fitting = [max(64, most // row_bytes // 64 * 64) for most in CHUNK_BYTES]
    return tuple(dict.fromkeys(Chunks(-(-rows // -(-rows // fit)) + 63 & ~63) for fit in fitting))


def expand(x: Tensor, weight: PackedWeight, order: Tensor | None, first: int, out: Tensor) -> None:
    """Write rows ``first ...`` of a weight to ``(in, rows)``: transposed, in the input's own channel order.

    Args:
        x: the activations, of whose dtype ``out`` is.
        weight: packed.
        order: uint16 or int32 ``(in,)``, or None.
        first: a multiple of 32.
        out: contiguous.
    """
    layout, streams = weight.layout, None if weight.mask is None else masked(weight).streams
    units = _units(layout, weight.out_features, streams, x.device)
    arguments = Arguments(address(order), weight_argument(weight), address(units), address(out), first, out.shape[1])
    full = layout.in_features % SEGMENT == 0 and out.shape[1] % ROWS == 0 and address(order) % 16 == 0
    macros = (
        *weight_macros(x, weight), ("MASKED", int(weight.mask is not None)), ("ORDER", order_bytes(order)),
        ("WARPS", _WARPS), ("FULL", int(full)),
    )  # fmt: skip
    launch = Launch((-(-out.shape[1] // (ROWS * _WARPS)), len(layout.widths)), 32 * _WARPS, 0)
    kernel("expand.cu", "expand", macros, x.device.index)(launch, arguments)


@lru_cache(maxsize=4096)
def _units(layout: Layout, rows: int, streams: tuple[int, ...] | None, device: torch.device) -> Tensor:
    return torch.tensor(segments_of(layout, rows, streams), dtype=torch.int32, device=device)
