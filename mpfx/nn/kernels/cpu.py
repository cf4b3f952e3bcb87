"""A Linear layer over a packed weight on the CPU, which never makes the whole dense weight.

Up to eight rows of activations are multiplied with the packed words themselves. For more, rows of the weight are
expanded into one buffer of a few megabytes, chunk after chunk, and torch multiplies. Both are compiled by numba, at
first use, and kept on disk; without numba, torch expands groups of channels.
"""

import ctypes
import os
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

from mpfx.nn.kernels.cpu_eager import eager_linear
from mpfx.nn.kernels.tables import OfMask, mask_version, segment_table
from mpfx.nn.layout import LEFT_OUT, Layout, words
from mpfx.nn.packing import PackedWeight

FEW_ROWS = 8
"""Rows of activations up to which the packed words are multiplied as they are."""

CHUNK_BYTES = 4 << 20
"""Most bytes of dense float32 weight at a time, unless 64 rows of it are more."""

_THREAD_WEIGHTS = 1 << 21  # that a thread is worth waking for
_CPU = torch.device("cpu")
_DTYPES = {
    "codes": torch.int32,
    "scales": torch.float16,
    "scale_codes": torch.int32,
    "row_scales": torch.float16,
    "group_scales": torch.float16,
    "zeros": torch.int32,
    "mask": torch.int32,
}


def cpu_linear(x: Tensor, weight: PackedWeight, permutation: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """Multiply rows of activations with a packed weight, in float32; nothing is recorded for gradients.

    Up to eight rows are rounded to integers of 16 bits relative to the largest activation of their segment of 32
    channels, which moves the result by less than 1e-4 of its norm; with more rows, products are those of float32.

    Args:
        x: ``(..., in)``, float32, float16 or bfloat16.
        weight: on the CPU.
        permutation: integers ``(in,)``; channel ``permutation[k]`` of ``x`` meets channel k of the weight. None: the
            order is the input's own.
        bias: ``(out,)`` or None.

    Returns:
        ``(..., out)`` in the dtype of ``x``.

    Raises:
        ValueError: if the sizes of the arguments do not fit the weight.
    """
    layout = weight.layout
    if x.shape[-1] != layout.in_features:
        raise ValueError(f"Expected `x` of {layout.in_features} channels but got {x.shape[-1]}.")
    values = x if x.dtype is torch.float32 else x.detach().float()
    if not _has_numba():
        y = _eager(values, weight, permutation, bias)
    elif values.numel() <= FEW_ROWS * layout.in_features:
        y = _multiply(values.contiguous(), weight, permutation, bias)
    else:
        y = _expand(values, weight, permutation, bias)
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """Rows of results in the shape of the input; no view: what an operator hands out may be written to."""
    shaped: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]])
    return shaped


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


@cache
def _jit() -> Any:
    return import_module("mpfx.nn.kernels.cpu_jit")  # importing numba takes a while


@cache
def _codes() -> Any:
    return import_module("mpfx.nn.kernels.cpu_codes")


@torch.no_grad()
def _eager(x: Tensor, weight: PackedWeight, permutation: Tensor | None, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if permutation is None else flat.index_select(1, permutation.to(torch.int32))
    y = eager_linear(flat, weight, CHUNK_BYTES)
    y = y if bias is None else y.add_(bias.float())
    return _shaped(y, x)


def _multiply(x: Tensor, weight: PackedWeight, permutation: Tensor | None, bias: Tensor | None) -> Tensor:
    stored = _stored(weight)
    y = torch.empty((*x.shape[:-1], stored.rows), dtype=torch.float32, device=_CPU)  # whatever the defaults are
    order = None if permutation is None else _order(permutation, stored.channels)
    shift = None if bias is None else _shift(bias, stored.rows)
    arguments = (
        x.data_ptr(), x.numel() // stored.channels,
        0 if order is None else order.data_ptr(), 0 if order is None else order.itemsize // 4,
        0 if shift is None else shift.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    _together(_jit().multiply, (stored.address, *arguments), (stored, x, order, shift, y), 0, stored.rows, stored.rows)
    return y


def _order(permutation: Tensor, channels: int) -> Tensor:
    """A permutation as the kernel takes it, of 16 or 32 bits."""
    _check_here("permutation", permutation)
    if permutation.numel() != channels:
        raise ValueError(f"Expected `permutation` of {channels} channels but got {permutation.numel()}.")
    order = permutation if permutation.dtype in (torch.uint16, torch.int32) else permutation.to(torch.int32)
    return order.contiguous()


def _check_here(name: str, tensor: Tensor) -> None:
    """Addresses on other devices, or of no memory, must not be read."""
    if not tensor.is_cpu:
        raise ValueError(f"Expected `{name}` on the CPU, as `x` is, but got one on {tensor.device}.")


def _shift(bias: Tensor, rows: int) -> Tensor:
    _check_here("bias", bias)
    if bias.numel() != rows:
        raise ValueError(f"Expected `bias` of {rows} rows but got {bias.numel()}.")
    return bias.detach().float().contiguous()


@torch.no_grad()
def _expand(x: Tensor, weight: PackedWeight, permutation: Tensor | None, bias: Tensor | None) -> Tensor:
    stored, block, channels = _stored(weight), _codes().BLOCK, 32 * len(weight.layout.widths)
    flat = x.reshape(-1, x.shape[-1])
    if permutation is not None:
        flat = flat.index_select(1, permutation.to(torch.int32))
    chunk = max(1, CHUNK_BYTES // (4 * channels * block)) * block
    chunk = min(-(-stored.rows // block) * block, chunk)
    buffer = torch.empty(channels, chunk, dtype=torch.float32, device=_CPU)
    y = torch.empty(len(flat), stored.rows, dtype=torch.float32, device=_CPU)
    for start in range(0, stored.rows, chunk):
        stop = min(start + chunk, stored.rows)
        arguments = (stored.address, start, stop, buffer.data_ptr(), chunk)
        _together(_jit().dequantize, arguments, (stored, buffer), start, stop, _codes().TILE)
        torch.mm(flat, buffer[: flat.shape[1], : stop - start], out=y[:, start:stop])
    y = y if bias is None else y.add_(bias.float())
    return _shaped(y, x)


def _together(work: Any, arguments: tuple[int, ...], kept: tuple[Any, ...], first: int, last: int, most: int) -> None:
    """Share rows ``first .. last-1`` of a weight among as many threads as torch uses, and the weight is worth.

    Pieces are taken, not handed out: a thread that comes late finds nothing left to do, and is not waited for.

    Args:
        work: compiled; takes the arguments, the address of the next row, and the rows to take at a time.
        arguments: addresses and sizes.
        kept: what the addresses are of, for as long as a thread is at work.
        first: row.
        last: row behind the last.
        most: rows to take at a time.
    """
    weights, block = (last - first) * kept[0].channels, _codes().BLOCK
    threads = 1 if weights < 2 * _THREAD_WEIGHTS else min(torch.get_num_threads(), weights // _THREAD_WEIGHTS)
    wanted = (last - first) // (4 * threads) if threads > 1 else last - first
    step = max(block, min(-(-wanted // block) * block, most))
    task = ctypes.c_int64(first)
    whole = (*arguments, ctypes.addressof(task), step)
    if threads == 1:
        work(*whole)
        return
    helpers = [_pool().submit(_help, work, whole, (kept, task)) for _ in range(threads - 1)]
    try:
        work(*whole)
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _help(work: Any, arguments: tuple[int, ...], _: tuple[Any, ...]) -> None:
    work(*arguments)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(64, "mpfx-cpu")  # starts no more than are asked for


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


@dataclass(frozen=True)
class _Stored:
    """Where the kernels find a weight, as long as its tensors are where they were; copies of a weight have none.

    ``address`` is that of numbers that lead to all arrays; ``kept`` are those that would be gone otherwise.
    """

    tensors: tuple[Tensor, ...]
    pointers: list[int]
    version: int
    address: int
    rows: int
    channels: int
    kept: tuple[Any, ...]

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()

    def holds(self, mask: Tensor | None) -> bool:
        """Whether the tensors are where they were, and the mask has not been written to."""
        return self.pointers == [t.data_ptr() for t in self.tensors] and self.version == mask_version(mask)


def _nothing() -> None:
    """What a copy of addresses is."""


def _stored(weight: PackedWeight) -> _Stored:
    known: _Stored | None = weight.__dict__.get("_cpu")  # next to what cached properties keep
    if known is None or not known.holds(weight.mask):
        known = weight.__dict__["_cpu"] = _located(weight)
    return known


def _located(weight: PackedWeight) -> _Stored:
    """Find the tensors of a weight; nothing is copied, unless it does not lie in one piece."""
    parts = {name: part for name in _DTYPES if (part := weight.parts[name]) is not None}
    for name, part in parts.items():
        _check_here(name, part)
        if part.dtype != _DTYPES[name]:
            raise ValueError(f"Expected `{name}` of {_DTYPES[name]} but got {part.dtype}.")
    arrays: dict[str, Any] = {name: part.contiguous() for name, part in parts.items()}
    arrays["table"] = segment_table(weight.layout, weight.out_features, _CPU)
    if weight.mask is not None:
        survivors = _survivors(weight.mask, partial(_count, weight.mask, weight.layout))
        arrays |= {"starts": torch.from_numpy(survivors.starts), "streams": torch.from_numpy(survivors.streams)}
    fields = []
    for name in _codes().FIELDS:
        array = arrays.get(name)
        fields += [0, 0] if array is None else [array.data_ptr(), array.numel()]
    made = np.array([*fields, weight.out_features, weight.layout.in_features], np.int64)
    tensors = tuple(parts.values())
    return _Stored(
        tensors=tensors,
        pointers=[t.data_ptr() for t in tensors] if all(t.is_contiguous() for t in tensors) else [],
        version=mask_version(weight.mask),
        address=made.ctypes.data,
        rows=weight.out_features,
        channels=weight.layout.in_features,
        kept=(made, arrays),
    )


@dataclass(frozen=True)
class _Survivors:
    """Where the surviving codes are: the first by segment and block of rows, the end, and each stream's first word."""

    starts: NDArray[np.int64]
    streams: NDArray[np.int64]


_survivors = OfMask[_Survivors]()


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
