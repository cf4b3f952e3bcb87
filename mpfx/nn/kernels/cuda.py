"""Packed products on a CUDA device."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mpfx.nn.kernels.decode import SCRATCH, decode_kernel
from mpfx.nn.kernels.expand import expand_kernel
from mpfx.nn.kernels.tables import scale_words, segment_table
from mpfx.nn.packing import PackedWeight
from mpfx.nn.scales import CodedScales

DECODE_ROWS = 8
"""Up to so many rows of activations are multiplied straight from the packed words."""

CHUNK_BYTES = 16 << 20
"""At most so much of a weight is unpacked at a time: it stays in the L2 cache until it is multiplied."""

_COUNTERS = 1 << 14  # tiles of rows times rows of activations, at most


@dataclass(frozen=True)
class Shape:
    """How the decode kernel is cut: rows, segments and warps of a program."""

    rows: int
    share: int
    warps: int


def cuda_linear(x: Tensor, weight: PackedWeight, permutation: Tensor | None, bias: Tensor | None) -> Tensor:
    """Multiply activations ``(tokens, in)`` with a packed weight; returns ``(tokens, out)`` in their dtype."""
    x = x.contiguous()
    if 0 < len(x) <= DECODE_ROWS:
        return decode(x, weight, permutation, bias)
    return multiply(x, weight, permutation, bias)


def decode(
    x: Tensor, weight: PackedWeight, permutation: Tensor | None, bias: Tensor | None, shape: Shape | None = None
) -> Tensor:
    """The product for a few rows; ``shape`` overrules the choice."""
    layout, rows = weight.layout, weight.out_features
    shape = default_shape(rows, len(layout.widths)) if shape is None else shape
    segments, coded = len(layout.widths), isinstance(weight.scales, CodedScales)
    tiles, splits = -(-rows // shape.rows), -(-segments // shape.share)
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    scratch = torch.empty(
        len(x) * tiles * splits * (1 << (shape.share - 1).bit_length()) * SCRATCH, dtype=torch.int32, device=x.device
    )
    partial = torch.empty(len(x) * splits * rows if splits > 1 else 0, dtype=torch.float32, device=x.device)
    decode_kernel[tiles, splits, len(x)](
        x, permutation, *_parts(weight), segment_table(layout, rows, x.device), bias,
        scratch, partial, _counters(x.device), out,
        rows, layout.in_features, segments, len(layout.grids), scale_words(rows), shape.share, splits,
        ORDERED=permutation is not None, EVEN=layout.in_features % 32 == 0, CODED=coded,
        ASYMMETRIC=weight.zeros is not None, BIAS=bias is not None, SPLIT=splits > 1,
        SHARE=1 << (shape.share - 1).bit_length(), Q=shape.rows // 4, num_warps=shape.warps,
    )  # fmt: skip
    return out


def multiply(x: Tensor, weight: PackedWeight, permutation: Tensor | None, bias: Tensor | None) -> Tensor:
    """The product for many rows: the weight is unpacked in chunks of rows, each multiplied at once."""
    rows, channels = weight.out_features, weight.layout.in_features
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    most = max(64, CHUNK_BYTES // (channels * x.element_size()) // 64 * 64)
    chunk = -(-rows // -(-rows // most)) + 63 & ~63  # equal chunks, whole tiles
    room = torch.empty(channels * min(chunk, rows), dtype=x.dtype, device=x.device)
    for first in range(0, rows, chunk):
        count = min(chunk, rows - first)
        part = room[: channels * count].view(channels, count)
        expand(weight, permutation, first, part)
        if bias is None:
            torch.mm(x, part, out=out[:, first : first + count])
        else:
            torch.addmm(bias[first : first + count].to(x.dtype), x, part, out=out[:, first : first + count])
    return out


def expand(weight: PackedWeight, permutation: Tensor | None, first: int, out: Tensor) -> None:
    """Write rows ``first ...`` of a weight, transposed and in the input's own channel order, to ``(in, rows)``."""
    layout, rows = weight.layout, weight.out_features
    tile = 128
    expand_kernel[len(layout.widths), -(-out.shape[1] // tile)](
        permutation, *_parts(weight), segment_table(layout, rows, out.device), out,
        rows, layout.in_features, len(layout.grids), scale_words(rows), first, out.shape[1],
        ORDERED=permutation is not None, CODED=isinstance(weight.scales, CodedScales),
        ASYMMETRIC=weight.zeros is not None, EVEN=layout.in_features % 32 == 0, Q=tile // 4, num_warps=1,
    )  # fmt: skip


def default_shape(rows: int, segments: int) -> Shape:
    """A shape that was fast on an H100: many rows a program, as each prepares the activations of its segments anew."""
    tile, warps = (512, 4) if rows >= 2048 else (128, 1)
    return Shape(tile, min(4, segments), warps)


def _parts(weight: PackedWeight) -> tuple[Tensor | None, ...]:
    scales = weight.scales
    coded = (scales.codes, scales.row, scales.group) if isinstance(scales, CodedScales) else (scales, None, None)
    return (weight.codes, *coded, weight.zeros)


def _counters(device: torch.device) -> Tensor:
    """Zeros that every kernel leaves as zeros.

    One set a stream, as kernels of one stream follow each other. In a CUDA graph under capture every call gets its own,
    which the graph fills anew: what is made there belongs to that graph, and other graphs may run beside it.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    return _kept_counters(device, torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0)


@lru_cache(maxsize=64)
def _kept_counters(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
