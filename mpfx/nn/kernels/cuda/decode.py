"""A few rows of activations times a packed weight: what ``decode.cu`` and ``decode_masked.cu`` need from the host."""

import ctypes
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
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
    described,
    masked,
    order_bytes,
    segments_of,
    weight_argument,
    weight_macros,
)
from mpfx.nn.layout import RAW_BITS, SEGMENT, Layout
from mpfx.nn.packing import PackedWeight
from mpfx.nn.scales import CodedScales

_TAIL = 64  # as in decode.cuh
_ROOM = {False: 256, True: 2 * 512 + 2 * (33 * 32 + 16)}  # of a warp, by whether there is a mask
_PLANNED = {False: 16, True: 48}  # of a unit
_TABLE_BYTES = 32 << 10
_WARPS = 24  # that a multiprocessor has the registers for


class Site(ctypes.Structure):
    """``Site`` of ``decode.cuh``."""

    _fields_ = [
        ("weight", Weight),
        ("units", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("most_units", ctypes.c_int),
        ("stage_bytes", ctypes.c_int),
        ("first_block", ctypes.c_int),
    ]


@cache
def _arguments(sites: int) -> type[ctypes.Structure]:
    """``Args`` of ``decode.cuh``."""
    fields = [("x", ctypes.c_void_p), ("order", ctypes.c_void_p), ("early", ctypes.c_int), ("sites", Site * sites)]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


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


def alike(x: Tensor, weights: Sequence[PackedWeight]) -> bool:
    """Whether one launch can multiply all these weights, which the same activations meet in the same order."""
    return len({(_source(weight), *weight_macros(x, weight)) for weight in weights}) == 1


def decode(
    x: Tensor,
    weights: Sequence[PackedWeight],
    order: Tensor | None,
    biases: Sequence[Tensor | None],
    cut: Cut | None = None,
) -> list[Tensor]:
    """The products for a few rows; ``cut`` overrules the choice.

    Args:
        x: ``(rows, in)``, contiguous, as many rows as :func:`room_for` says.
        weights: packed, :func:`alike`.
        order: uint16 or int32 ``(in,)``, or None.
        biases: one ``(out,)`` or None for every weight.
        cut: of the work.
    """
    biases = [None if bias is None else bias.to(x.dtype).contiguous() for bias in biases]
    if cut is None:
        cut = _choose(x, weights, order)
    outs = [torch.empty(len(x), weight.out_features, dtype=x.dtype, device=x.device) for weight in weights]
    _launch(x, weights, order, biases, outs, cut)
    return outs


def _launch(
    x: Tensor, weights: Sequence[PackedWeight], order: Tensor | None, biases: Sequence[Tensor | None],
    outs: Sequence[Tensor], cut: Cut,
) -> None:  # fmt: skip
    sites, block = [], 0
    for weight, bias, out in zip(weights, biases, outs, strict=True):
        sites.append(_site(weight, bias, out, cut, block))
        block += -(-weight.out_features // (ROWS * cut.groups))
    at_once, shared = _room_of(x, weights, cut)
    in_features = weights[0].layout.in_features
    aligned = in_features % SEGMENT == 0 and x.data_ptr() % 16 == 0 and address(order) % 16 == 0
    macros = (
        *weight_macros(x, weights[0]), ("ORDER", order_bytes(order)), ("EVEN", int(aligned)), ("SITES", len(sites)),
        ("SEGMENTS", _UNIT_SEGMENTS), ("GROUPS", cut.groups), ("WARPS", cut.warps),
        ("STAGES", min(cut.stages, *(site.most_units for site in sites))), ("COUNT", len(x)), ("AT_ONCE", at_once),
    )  # fmt: skip
    run = kernel(_source(weights[0]), "decode", macros, x.device.index)
    # What is before it then cannot have written this weight, and not yet be done.
    early = _overlaps(x.device) and last_captured() in _handles
    _handles.add(run.handle)
    arguments = _arguments(len(sites))(address(x), address(order), early, (Site * len(sites))(*sites))
    run(Launch((cut.cluster, block), 32 * cut.groups * cut.warps, shared, cut.cluster, early), arguments)


def _source(weight: PackedWeight) -> str:
    return "decode.cu" if weight.mask is None else "decode_masked.cu"


def _site(weight: PackedWeight, bias: Tensor | None, out: Tensor, cut: Cut, block: int) -> Site:
    layout, streams = weight.layout, None if weight.mask is None else masked(weight).streams
    coded, asymmetric = isinstance(weight.scales, CodedScales), weight.zeros is not None
    units, most = unit_table(
        layout, weight.out_features, cut.cluster * cut.warps, asymmetric, coded, streams, out.device
    )  # fmt: skip
    return Site(
        weight_argument(weight), address(units), address(bias), address(out), most,
        _stage_bytes(layout, weight.mask is not None), block,
    )  # fmt: skip


def _room_of(x: Tensor, weights: Sequence[PackedWeight], cut: Cut) -> tuple[int, int]:
    """:func:`_room` for the one of these weights that needs most."""
    rooms = [_room(cut, w.layout, x.dtype, len(x), w.mask is not None, x.device) for w in weights]
    at_once = min(at_once for at_once, _ in rooms)
    return at_once, max(shared for _, shared in rooms)


@lru_cache(maxsize=64)
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel can start before the one before it has come to its end."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


_handles: set[int] = set()  # of kernels that let the next one start while they run, and write no weights


def _choose(x: Tensor, weights: Sequence[PackedWeight], order: Tensor | None) -> Cut:
    """The fastest of a few cuts; measured once for sizes and a device, and kept on disk."""
    candidates = _cuts(x, weights)
    outs = [torch.empty(len(x), weight.out_features, dtype=x.dtype, device=x.device) for weight in weights]
    none = [None] * len(weights)
    key = f"decode {described(x, weights)}"
    return fastest(key, candidates, lambda cut: _launch(x, weights, order, none, outs, cut), x.device)


def _cuts(x: Tensor, weights: Sequence[PackedWeight]) -> tuple[Cut, ...]:
    tiles = sum(-(-weight.out_features // ROWS) for weight in weights)
    return tuple(cut for cut in cuts(tiles, x.device) if _room_of(x, weights, cut)[0])[:4]


@lru_cache(maxsize=4096)
def cuts(tiles: int, device: torch.device) -> tuple[Cut, ...]:
    """Cuts worth a try, the likeliest first: as many groups of a block as give every multiprocessor one block."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    groups = min(max(1, -(-tiles // processors)), _MOST_GROUPS)
    found = [Cut(1, groups, warps, stages) for warps, stages in _SHAPES.get(groups, ((_WARPS // groups, 2),))]
    if torch.cuda.get_device_capability(device) >= (9, 0):
        if 2 * tiles <= processors:
            found[1:1] = [Cut(2, 1, 16, 2)]
        pairs = -(-2 * tiles // processors)  # groups of a block, if two of them share the channels
        if 2 * groups > pairs > groups and pairs <= _MOST_GROUPS:  # more multiprocessors have something to do
            found[1:1] = [Cut(2, pairs, max(1, _WARPS // pairs), 2)]
    return (*found, *(Cut(1, 1, warps, stages) for warps in (8, 4) for stages in (2, 1)))  # for much room


_MOST_GROUPS = 12
_SHAPES = {1: ((16, 2), (24, 2), (20, 2)), 2: ((12, 2), (10, 2), (12, 3)), 3: ((8, 2), (7, 2), (8, 3)),
           4: ((5, 2), (6, 2), (4, 2)), 6: ((4, 2), (3, 2), (4, 3))}  # fmt: skip
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
    stages = min(cut.stages, most)
    planned = _PLANNED[mask] * (most + stages * mask)
    own = max(stages * _stage_bytes(layout, mask) + _ROOM[mask] + planned, 128 * columns)  # of a warp
    shared = _TABLE_BYTES * mask + 128 + segments * columns * SEGMENT + _even(4 * segments * columns)
    shared += cut.groups * cut.warps * own
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
    most = max(128 * bits * (1 if bits == RAW_BITS else _UNIT_SEGMENTS) for bits in layout.widths)
    if mask:  # of each segment whole blocks of survivors, which may start and end anywhere in 16 bytes
        return _UNIT_SEGMENTS * (33 * 4 * max(layout.widths) + 32 & ~15) + _TAIL
    return most + _TAIL


@lru_cache(maxsize=4096)
def unit_table(
    layout: Layout, rows: int, workers: int, asymmetric: bool, coded: bool, streams: tuple[int, ...] | None,
    device: torch.device,
) -> tuple[Tensor, int]:  # fmt: skip
    """Share the segments of a weight among warps, in units of up to two that have one grid.

    Returns:
        int32 ``(workers, most, 4)``: what ``unit`` of ``decode.cuh`` reads; and most.
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
