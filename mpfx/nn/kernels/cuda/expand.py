"""Packed weights unpacked chunk by chunk, for many rows of activations: what ``expand.cu`` needs from the host."""

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from mpfx.nn.kernels.cuda.nvrtc import Launch, kernel
from mpfx.nn.kernels.cuda.tune import fastest
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


def multiply(x: Tensor, weight: PackedWeight, order: Tensor | None, bias: Tensor | None) -> Tensor:
    """The product for many rows: the weight is unpacked in chunks of rows, each multiplied at once."""
    rows, channels = weight.out_features, weight.layout.in_features
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    chunks = tuple(dict.fromkeys(_chunk(rows, channels * x.element_size(), most) for most in CHUNK_BYTES))
    key = f"expand {rows} x {channels}, {1 << (len(x) - 1).bit_length()} of {str(x.dtype).removeprefix('torch.')}"
    chunk = fastest(key, chunks, lambda chunk: _multiply(x, weight, order, bias, out, chunk), x.device)
    _multiply(x, weight, order, bias, out, chunk)
    return out


def _chunk(rows: int, row_bytes: int, most: int) -> int:
    """Rows of a chunk: equal chunks, whole tiles, at most so many bytes."""
    fitting = max(64, most // row_bytes // 64 * 64)
    return -(-rows // -(-rows // fitting)) + 63 & ~63


def _multiply(
    x: Tensor, weight: PackedWeight, order: Tensor | None, bias: Tensor | None, out: Tensor, chunk: int
) -> None:
    rows, channels = weight.out_features, weight.layout.in_features
    room = torch.empty(channels * min(chunk, rows), dtype=x.dtype, device=x.device)
    for first in range(0, rows, chunk):
        count = min(chunk, rows - first)
        part = room[: channels * count].view(channels, count)
        expand(x, weight, order, first, part)
        if bias is None:
            torch.mm(x, part, out=out[:, first : first + count])
        else:
            torch.addmm(bias[first : first + count].to(x.dtype), x, part, out=out[:, first : first + count])


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
    macros = (*weight_macros(x, weight), ("ORDER", order_bytes(order)), ("WARPS", _WARPS), ("FULL", int(full)))
    launch = Launch((-(-out.shape[1] // (ROWS * _WARPS)), len(layout.widths)), 32 * _WARPS, 0)
    kernel("expand.cu", "expand", macros, x.device.index)(launch, arguments)


@lru_cache(maxsize=4096)
def _units(layout: Layout, rows: int, streams: tuple[int, ...] | None, device: torch.device) -> Tensor:
    return torch.tensor(segments_of(layout, rows, streams), dtype=torch.int32, device=device)
