"""A Linear layer over a packed weight on the CPU, which never makes the whole dense weight.

Up to eight rows of activations are multiplied with the packed words themselves. For more, rows of the weight are
expanded into one buffer of a few megabytes, chunk after chunk, and torch multiplies. Both are compiled by numba, at
first use, and kept on disk; without numba, torch expands groups of channels.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mpfx.nn.kernels.cpu_eager import eager_linear
from mpfx.nn.kernels.tables import segment_table
from mpfx.nn.layout import LEFT_OUT, Layout, words
from mpfx.nn.packing import PackedWeight
from mpfx.nn.scales import CodedScales

FEW_ROWS = 8
"""Rows of activations up to which the packed words are multiplied as they are."""

CHUNK_BYTES = 4 << 20
"""Most bytes of dense float32 weight at a time, unless 64 rows of it are more."""

_THREAD_WEIGHTS = 1 << 18  # that a thread is worth waking for
_CPU = torch.device("cpu")


@torch.no_grad()
def cpu_linear(x: Tensor, weight: PackedWeight, permutation: Tensor | None) -> Tensor:
    """Multiply rows of activations with a packed weight, in float32.

    Up to eight rows are rounded to integers of 16 bits relative to the largest activation of their segment of 32
    channels, which moves the result by less than 1e-4 of its norm; with more rows, products are those of float32.

    Args:
        x: ``(rows, in)``, float32, float16 or bfloat16.
        weight: on the CPU.
        permutation: integers ``(in,)``; channel ``permutation[k]`` of ``x`` meets channel k of the weight. None: the
            order is the input's own.

    Returns:
        ``(rows, out)`` in the dtype of ``x``.
    """
    values = x.float()
    if not _has_numba():
        values = values if permutation is None else values.index_select(1, permutation.to(torch.int32))
        return eager_linear(values, weight, CHUNK_BYTES).to(x.dtype)
    few = len(x) <= FEW_ROWS <= weight.out_features  # the kernel takes eight rows of the weight at once
    return (_multiply if few else _expand)(values, weight, permutation).to(x.dtype)


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


@cache
def _jit() -> Any:
    return import_module("mpfx.nn.kernels.cpu_jit")  # importing numba takes a while


@cache
def _codes() -> Any:
    return import_module("mpfx.nn.kernels.cpu_codes")


def _multiply(x: Tensor, weight: PackedWeight, permutation: Tensor | None) -> Tensor:
    jit, stored, rows = _jit(), _stored(weight), weight.out_features
    count, segments = len(x), len(weight.layout.widths)
    made = jit.Activations(
        values=np.empty((count, 32 * segments), np.float32),
        pairs=np.empty((count, 16 * segments), np.int32),
        units=np.empty((count, segments), np.float32),
        sums=np.empty((count, segments), np.int32),
    )
    order = np.empty(0, np.int32) if permutation is None else permutation.to(torch.int32).numpy()
    jit.activations(x.contiguous().numpy(), order, made)
    y = torch.empty(count, rows, dtype=torch.float32, device=_CPU)  # whatever the defaults are
    out = y.numpy()
    _by_rows(lambda first, last: jit.multiply(stored, made, first, last, out), 0, rows, weight.layout.in_features)
    return y


def _expand(x: Tensor, weight: PackedWeight, permutation: Tensor | None) -> Tensor:
    stored, rows, block = _stored(weight), weight.out_features, _codes().BLOCK
    channels = 32 * len(weight.layout.widths)
    if permutation is not None:
        x = x.index_select(1, permutation.to(torch.int32))
    chunk = min(rows, max(1, CHUNK_BYTES // (4 * channels * block)) * block)
    buffer = torch.empty(channels, chunk, dtype=torch.float32, device=_CPU)
    y = torch.empty(len(x), rows, dtype=torch.float32, device=_CPU)
    out = buffer.numpy()
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        _by_rows(partial(_dequantize, stored, out, start), start, stop, channels)
        torch.mm(x, buffer[: x.shape[1], : stop - start], out=y[:, start:stop])
    return y


def _dequantize(stored: Any, out: NDArray[np.float32], start: int, first: int, last: int) -> None:
    _jit().dequantize(stored, first, last, out, first - start)


def _by_rows(work: Callable[[int, int], None], first: int, last: int, channels: int) -> None:
    """Share the rows of a weight among as many threads as torch uses.

    Pieces are taken, not handed out: a thread that comes late finds nothing left to do, and is not waited for.
    """
    codes = _codes()
    threads = max(1, min(torch.get_num_threads(), (last - first) * channels // _THREAD_WEIGHTS))
    wanted = -(-(last - first) // (2 * threads if threads > 1 else 1))
    step = min(-(-wanted // codes.BLOCK) * codes.BLOCK, codes.TILE)
    pieces = itertools.count(first, step)

    def some() -> None:
        while (start := next(pieces)) < last:
            work(start, min(start + step, last))

    helpers = [_pool().submit(some) for _ in range(threads - 1)]
    some()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(64, "mpfx-cpu")  # starts no more than are asked for


def _stored(weight: PackedWeight) -> Any:
    """The arrays of a weight; nothing is copied."""
    scales, mask, none = weight.scales, weight.mask, np.empty(0, np.int32)
    coded = scales if isinstance(scales, CodedScales) else None
    survivors = _Survivors(np.empty((0, 0), np.int64), np.empty(0, np.int64))
    if mask is not None:
        survivors = _survivors(mask, weight.layout)
    return _codes().Stored(
        codes=weight.codes.numpy().reshape(-1),
        table=segment_table(weight.layout, weight.out_features, _CPU).numpy(),
        scales=np.empty((0, 0), np.int16) if isinstance(scales, CodedScales) else scales.numpy().view(np.int16),
        scale_codes=none if coded is None else coded.codes.numpy(),
        row_scales=np.empty(0, np.int16) if coded is None else coded.row.numpy().view(np.int16),
        group_scales=np.empty(0, np.int16) if coded is None else coded.group.numpy().view(np.int16),
        zeros=none if weight.zeros is None else weight.zeros.numpy(),
        mask=np.empty((0, 0), np.int32) if mask is None else mask.numpy(),
        starts=survivors.starts,
        streams=survivors.streams,
        rows=weight.out_features,
        symmetric=weight.zeros is None,
    )


@dataclass(frozen=True)
class _Survivors:
    """Where the surviving codes are: the first by segment and block of rows, the end, and each stream's first word."""

    starts: NDArray[np.int64]
    streams: NDArray[np.int64]


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by mask, as long as it lives: its version, its survivors


def _survivors(mask: Tensor, layout: Layout) -> _Survivors:
    version = -1 if mask.is_inference() else mask._version  # changes when a checkpoint is loaded into the mask
    known = _known.get(mask)
    if known is None or known[0] != version:
        known = _known[mask] = (version, _count(mask, layout))
    found: _Survivors = known[1]
    return found


def _count(mask: Tensor, layout: Layout) -> _Survivors:
    segments, rows = mask.shape
    counts = np.empty((segments, -(-rows // _codes().BLOCK)), np.int64)
    _codes().count_survivors(mask.numpy(), counts)
    starts = np.zeros((segments, counts.shape[1] + 1), np.int64)
    streams, first = np.zeros(segments, np.int64), 0
    for bits in sorted(set(layout.widths) - {LEFT_OUT}):
        of_width = np.array(layout.widths) == bits
        streams[of_width] = first
        ends = counts[of_width].cumsum().reshape(-1, counts.shape[1])
        starts[of_width, 1:] = ends
        starts[of_width, 0] = ends[:, -1] - counts[of_width].sum(1)
        first += words(int(ends[-1, -1]), bits)
    return _Survivors(starts, streams)
