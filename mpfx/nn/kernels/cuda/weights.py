"""What kernels on packed weights get from the host: pointers, what is known when they are compiled, and tables."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mpfx.nn.kernels.tables import OfMask, scale_words, segment_table
from mpfx.nn.layout import LEFT_OUT, Layout, words
from mpfx.nn.packing import PackedWeight, survivors
from mpfx.nn.planes import last_word
from mpfx.nn.scales import CodedScales

ROWS = 32
"""Rows of the weight that a warp has."""

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""Dtypes of activations, as kernels know them."""

_POINTERS = ("codes", "scales", "scale_codes", "row_scales", "group_scales", "zeros", "mask", "starts")


class Weight(ctypes.Structure):
    """``Weight`` of ``packed.cuh``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int) for name in ("rows", "grids", "scale_words")),
    ]


def weight_argument(weight: PackedWeight) -> Weight:
    """The pointers of a weight; it has to live until the kernel has run, as torch's tensors do on one stream."""
    parts = {**weight.parts, "starts": None if weight.mask is None else masked(weight).starts}
    rows = weight.out_features
    return Weight(*map(address, (parts[name] for name in _POINTERS)), rows, len(weight.layout.grids), scale_words(rows))


def address(tensor: Tensor | None) -> int:
    """Where the values of a tensor are; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def weight_macros(x: Tensor, weight: PackedWeight) -> tuple[tuple[str, int], ...]:
    """What ``packed.cuh`` and ``masked.cuh`` have to know when they are compiled."""
    layout, parts = weight.layout, [part for part in (weight.codes, weight.mask) if part is not None]
    aligned = weight.out_features % 4 == 0 and all(part.data_ptr() % 16 == 0 for part in parts)
    return (
        ("DTYPE", DTYPES[x.dtype]),
        ("IN", layout.in_features),
        ("CODED", int(isinstance(weight.scales, CodedScales))),
        ("ZEROS", int(weight.zeros is not None)),
        ("ALIGNED", int(aligned)),
        ("LAST", last_word(layout.in_features)),
    )


def described(x: Tensor, weights: Sequence[PackedWeight]) -> str:
    """What times of products with few rows depend on, as choices of the fastest way are kept by it."""
    sizes = ", ".join(f"{w.out_features} of {round(w.layout.code_bits * 4) / 4} bits" for w in weights)
    kind = "full" if weights[0].mask is None else "masked"
    return f"{sizes} x {x.shape[1]}, {kind}, {len(x)} of {x.dtype}".replace("torch.", "")


def order_bytes(order: Tensor | None) -> int:
    """Bytes of an entry of the channel order; 0: none."""
    return 0 if order is None else order.element_size()


def segments_of(layout: Layout, rows: int, streams: tuple[int, ...] | None) -> list[tuple[int, int, int, int]]:
    """Per segment: its width, where its words are, its grid or 0, and the first word of that grid's zero points.

    Args:
        layout: of the weight.
        rows: of the weight.
        streams: under a mask, the first word of every segment's stream.
    """
    table = segment_table(layout, rows, torch.device("cpu")).tolist()
    return [
        (bits, word if streams is None else streams[index], max(grid, 0), zero)
        for index, (bits, word, grid, zero) in enumerate(table)
    ]


@dataclass(frozen=True)
class Masked:
    """Where the surviving codes of a masked weight are.

    Attributes:
        starts: int32 ``(segments, tiles + 1)``: codes of a width's stream before those of 32 rows of a segment.
        streams: the first word of every segment's stream.
    """

    starts: Tensor
    streams: tuple[int, ...]


_masked = OfMask[Masked]()


def masked(weight: PackedWeight) -> Masked:
    """Where the surviving codes are; counted once a mask.

    Raises:
        RuntimeError: if they would have to be counted while a CUDA graph is captured.
    """
    assert weight.mask is not None
    return _masked(weight.mask, partial(_count, weight.mask, weight.layout))


def _count(mask: Tensor, layout: Layout) -> Masked:
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "The survivors of a bitmask cannot be counted while a CUDA graph is captured. Run the layer once before"
            " the capture, as CUDA graphs ask for anyway."
        )
    segments, rows = mask.shape
    tiles = -(-rows // ROWS)
    counts = torch.zeros(segments, tiles * ROWS, dtype=torch.int32, device=mask.device)
    counts[:, :rows] = survivors(mask, layout)
    of_tiles = counts.view(segments, tiles, ROWS).sum(2)
    starts = torch.zeros(segments, tiles + 1, dtype=torch.int64, device=mask.device)
    streams, first = [0] * segments, 0
    for bits in sorted(set(layout.widths) - {LEFT_OUT}):
        index = [segment for segment, width in enumerate(layout.widths) if width == bits]
        ends = of_tiles[index].flatten().cumsum(0)
        starts[index, 1:] = ends.view(-1, tiles)
        starts[index[1:], 0] = starts[index[:-1], -1]
        for segment in index:
            streams[segment] = first
        first += words(int(ends[-1]), bits)
    return Masked(starts.to(torch.int32), tuple(streams))
