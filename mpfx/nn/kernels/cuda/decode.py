"""A few rows of activations times a packed weight: what ``decode.cu`` needs from the host."""

import ctypes
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from mpfx.nn.kernels.cuda.nvrtc import Launch, kernel, last_captured
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
from mpfx.nn.layout import RAW_BITS, SEGMENT, Layout
from mpfx.nn.packing import PackedWeight
from mpfx.nn.scales import CodedScales

_TAIL = 64  # as in decode.cu
_MASKED_ROOM = 128 + 2 * (33 * 32 + 8)
_WARPS = 24  # that a multiprocessor has the registers for


class Arguments(ctypes.Structure):
    """``Args`` of ``decode.cu``."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("weight", Weight),
        ("units", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("most_units", ctypes.c_int),
        ("stage_bytes", ctypes.c_int),
        ("early", ctypes.c_int),
    ]


@dataclass(frozen=True)
class Cut:
    """How the work is cut.

    Attributes:
        cluster: blocks that share the channels of the same rows.
        groups: of a block; each has 32 rows.
        warps: of a group; they share its channels.
        stages: units that a warp copies ahead.
    """

    cluster: int
    groups: int
    warps: int
    stages: int


def room_for(x: Tensor, weight: PackedWeight) -> int:
    """How many vectors fit into the shared memory of a multiprocessor at once."""
    return _room_for(weight.layout, x.dtype, weight.mask is not None, x.device)


def decode(
    x: Tensor, weight: PackedWeight, order: Tensor | None, bias: Tensor | None, cut: Cut | None = None
) -> Tensor:
    """The product for a few rows; ``cut`` overrules the choice.

    Args:
        x: ``(rows, in)``, contiguous, as many rows as :func:`room_for` says.
        weight: packed.
        order: uint16 or int32 ``(in,)``, or None.
        bias: ``(out,)`` or None.
        cut: of the work.
    """
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    if cut is None:
        cut = _choose(x, weight, order, bias)
    out = torch.empty(len(x), weight.out_features, dtype=x.dtype, device=x.device)
    _launch(x, weight, order, bias, out, cut)
    return out


def _launch(x: Tensor, weight: PackedWeight, order: Tensor | None, bias: Tensor | None, out: Tensor, cut: Cut) -> None:
    layout, rows = weight.layout, weight.out_features
    coded, streams = isinstance(weight.scales, CodedScales), None if weight.mask is None else masked(weight).streams
    units, most = unit_table(
        layout, rows, cut.cluster * cut.warps, weight.zeros is not None, coded, streams, x.device
    )  # fmt: skip
    stage, stages = _stage_bytes(layout, streams is not None), min(cut.stages, most)
    at_once, shared = _room(cut, layout, x.dtype, len(x), streams is not None, x.device)
    aligned = layout.in_features % SEGMENT == 0 and x.data_ptr() % 16 == 0 and address(order) % 16 == 0
    macros = (
        *weight_macros(x, weight), ("ORDER", order_bytes(order)), ("EVEN", int(aligned)), ("SEGMENTS", _UNIT_SEGMENTS),
        ("GROUPS", cut.groups), ("WARPS", cut.warps), ("STAGES", stages), ("COUNT", len(x)), ("AT_ONCE", at_once),
    )  # fmt: skip
    run = kernel("decode.cu", "decode", macros, x.device.index)
    early = last_captured() in _handles  # then nothing before it can have written this weight, and not yet be done
    _handles.add(run.handle)
    arguments = Arguments(
        address(x), address(order), weight_argument(weight), address(units), address(bias), address(out), most, stage,
        early,
    )  # fmt: skip
    grid, threads = (cut.cluster, -(-rows // (ROWS * cut.groups))), 32 * cut.groups * cut.warps
    run(Launch(grid, threads, shared, cut.cluster, early), arguments)


_handles: set[int] = set()  # of kernels that let the next one start while they run, and write no weights


def _choose(x: Tensor, weight: PackedWeight, order: Tensor | None, bias: Tensor | None) -> Cut:
    """The fastest of a few cuts; measured once a shape and device, and kept on disk."""
    layout, rows = weight.layout, weight.out_features
    candidates = cuts(rows, layout, x.dtype, len(x), weight.mask is not None, x.device)
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    bits = round(layout.code_bits * 4) / 4
    key = (f"decode {rows} x {layout.in_features}, {len(x)} of {x.dtype}".replace("torch.", "")
           + f", {bits} bits, {'masked' if weight.mask is not None else 'full'}")  # fmt: skip
    return fastest(key, candidates, lambda cut: _launch(x, weight, order, bias, out, cut), x.device)


@lru_cache(maxsize=4096)
def cuts(
    rows: int, layout: Layout, dtype: torch.dtype, count: int, mask: bool, device: torch.device
) -> tuple[Cut, ...]:
    """Cuts worth a try, the likeliest first: as many groups of a block as give every multiprocessor one block."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    tiles = -(-rows // ROWS)
    groups = min(max(1, -(-tiles // processors)), 8)
    found = [Cut(1, groups, warps, stages) for warps, stages in _SHAPES.get(groups, ((_WARPS // groups, 2),))]
    if 2 * tiles <= processors and torch.cuda.get_device_capability(device) >= (9, 0):
        found[1:1] = [Cut(2, 1, 16, 2)]
    found += [Cut(1, 1, warps, stages) for warps in (8, 4) for stages in (2, 1)]  # for vectors that need much room
    return tuple(cut for cut in found if _room(cut, layout, dtype, count, mask, device)[0])[:3]


_SHAPES = {1: ((16, 2), (24, 2), (20, 2)), 2: ((12, 2), (10, 2), (12, 3)), 3: ((8, 2), (7, 2), (8, 3)),
           4: ((5, 2), (6, 2), (4, 2))}  # fmt: skip
"""Warps and stages that were fast on an H100, by groups."""

_UNIT_SEGMENTS = 2


@lru_cache(maxsize=4096)
def _room(
    cut: Cut, layout: Layout, dtype: torch.dtype, count: int, mask: bool, device: torch.device
) -> tuple[int, int]:  # fmt: skip
    """How many vectors are put in order at once, 0: not even one fits; and the shared memory of a block in bytes."""
    properties: Any = torch.cuda.get_device_properties(device)
    limit = int(properties.shared_memory_per_block_optin) - 1024  # what the kernel declares itself
    columns, segments = count * (4 if dtype == torch.float32 else 3), len(layout.widths) + 1
    _, most = unit_table(layout, ROWS, cut.cluster * cut.warps, True, True, None, torch.device("cpu"))
    ring = min(cut.stages, most) * _stage_bytes(layout, mask) + 16 * most
    own = max(ring + 256 + _MASKED_ROOM * mask, 128 * columns)  # of a warp
    shared = 128 + segments * columns * SEGMENT + _even(4 * segments * columns) + cut.groups * cut.warps * own
    for at_once in range(count, 0, -1):
        whole = shared + _even(at_once * layout.in_features * dtype.itemsize)
        if whole <= limit:
            return at_once, whole
    return 0, 0


@lru_cache(maxsize=4096)
def _room_for(layout: Layout, dtype: torch.dtype, mask: bool, device: torch.device) -> int:
    smallest = Cut(1, 1, 4, 1)
    return max((n for n in range(1, 9) if _room(smallest, layout, dtype, n, mask, device)[0]), default=0)


def _even(count: int) -> int:
    return count + 127 & ~127


@lru_cache(maxsize=4096)
def _stage_bytes(layout: Layout, mask: bool) -> int:
    if mask:
        return _TAIL
    return max(128 * bits * (1 if bits == RAW_BITS else _UNIT_SEGMENTS) for bits in layout.widths) + _TAIL


@lru_cache(maxsize=4096)
def unit_table(
    layout: Layout, rows: int, workers: int, asymmetric: bool, coded: bool, streams: tuple[int, ...] | None,
    device: torch.device,
) -> tuple[Tensor, int]:  # fmt: skip
    """Share the segments of a weight among warps, in units of up to two that have one grid.

    Returns:
        int32 ``(workers, most, 4)``: what ``unit`` of ``decode.cu`` reads; and most.
    """
    table, units, costs = segments_of(layout, rows, streams), [], []
    spans = (*layout.grids, *(run for run in layout.runs if run.bits == RAW_BITS))
    for span in sorted(spans, key=lambda span: -span.bits):  # warps of a block do the same at the same time
        first, stop = span.start // SEGMENT, -(-span.stop // SEGMENT)
        step = 1 if span.bits == RAW_BITS else _UNIT_SEGMENTS
        for segment in range(first, stop, step):
            bits, word, grid, zero = table[segment]
            count = min(step, stop - segment)
            zero_lanes, scale_lanes = (0, 0) if bits == RAW_BITS else (bits * asymmetric, 12 * coded)
            units.append((bits | count << 8 | zero_lanes << 16 | scale_lanes << 24, segment | grid << 16, word, zero))
            costs.append(3 + count * (1 if bits in (1, 2, 4, 8) else 2) + bits / 10)  # planes are instructions
    ends = list(accumulate(costs, initial=0.0))
    shares = [min(bisect_left(ends, ends[-1] * w / workers - 1e-9), len(units)) for w in range(workers)] + [len(units)]
    most = max(1, *(last - first for first, last in pairwise(shares)))
    rest = [[(0, 0, 0, 0)] * (most - (last - first)) for first, last in pairwise(shares)]
    padded = [units[first:last] + more for (first, last), more in zip(pairwise(shares), rest, strict=True)]
    signed = [[tuple(v - (1 << 32) if v >= 1 << 31 else v for v in unit) for unit in share] for share in padded]
    return torch.tensor(signed, dtype=torch.int32, device=device), most
