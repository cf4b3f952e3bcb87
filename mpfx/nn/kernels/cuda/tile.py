"""Many rows times a packed weight that is unpacked in registers: what ``tile.cu`` needs from the host."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from typing import NamedTuple

import torch
from torch import Tensor

from mpfx.nn.kernels.cuda.nvrtc import Launch, clusters_at_once, kernel
from mpfx.nn.kernels.cuda.weights import Weight, address, order_bytes, segments_of, weight_argument, weight_macros
from mpfx.nn.layout import LEFT_OUT, RAW_BITS, Layout
from mpfx.nn.packing import PackedWeight
from mpfx.nn.scales import CodedScales

_CAPABILITY = (9, 0)  # the only one that has `wgmma`
_ROWS = 128  # of the weight, of a block
_THREADS, _ARRANGERS = 384, 512  # as in tile.cu
_STEP_BYTES = 128  # of a row of activations
_ROW_BYTES, _TAIL_BYTES, _RESULT_BYTES = 544, 384 + 2048, 528  # as in tile.cu
_RING_BYTES = 208 << 10
_SHARED_BYTES = (227 << 10) - 256  # that a block can have, without what the kernel declares itself
_ALIGN_BYTES, _UNIT_BYTES = 1024, 40  # as in tile.cu: before the ring; of a step
_MOST_BLOCKS = 65535  # of a launch along y
_TOKENS = (16, 32, 64, 128, 176, 256)
_MOST_SPLITS = 8  # blocks of a cluster, at most
_MOST_PARTS = 3
_TRIED = 2  # cuts of one launch, and as many of several
# Measured on an H100, in nanoseconds: a step, what each row of activations adds to it, and the shortest step that there
# is; to start and end a block, and a cluster, whose blocks wait for each other and add up what they have.
_STEP_NS, _STEP_TOKEN_NS, _LEAST_STEP_NS = 330.0, 1.85, 480.0
_BLOCK_NS, _CLUSTER_NS = 2600.0, 7500.0


class Arguments(ctypes.Structure):
    """``Args`` of ``tile.cu``."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("arranged", ctypes.c_void_p),
        ("weight", Weight),
        ("units", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("steps", ctypes.c_int),
        ("first", ctypes.c_int),
        ("tiles", ctypes.c_int),
    ]


def unpacks_in_registers(x: Tensor, weight: PackedWeight) -> bool:
    """Whether the kernel runs: half precision, coded scales, no bitmask, rows that come in fours; on a Hopper GPU."""
    aligned = weight.out_features % 4 == 0 and weight.codes.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
    plain = weight.mask is None and isinstance(weight.scales, CodedScales) and x.dtype != torch.float32
    return plain and aligned and torch.cuda.get_device_capability(x.device) == _CAPABILITY


class Part(NamedTuple):
    """Rows of the weight that one launch multiplies.

    Attributes:
        tiles: so many times 128 rows.
        splits: blocks of a cluster, that share the channels.
    """

    tiles: int
    splits: int


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        tokens: rows of activations of a block.
        parts: launches, one after the other, that have all rows of the weight together.
    """

    tokens: int
    parts: tuple[Part, ...]

    def multiply(self, x: Tensor, weight: PackedWeight, order: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
        """Write the product ``(rows, out)``.

        Args:
            x: ``(rows, in)``, contiguous, float16 or bfloat16.
            weight: packed.
            order: uint16 or int32 ``(in,)``, or None.
            bias: ``(out,)``, contiguous, in the dtype of ``x``, or None.
            out: contiguous, in the dtype of ``x``.
        """
        layout, columns = weight.layout, -(-len(x) // self.tokens)
        steps, share = _steps(layout, 1), self.share(layout)
        arranged = torch.empty(columns * self.tokens * steps * _STEP_BYTES, dtype=torch.uint8, device=x.device)
        units = _units(layout, weight.out_features, x.device)
        common = (
            address(x), address(order), address(arranged), weight_argument(weight), address(units), address(bias),
            address(out), len(x), layout.in_features, steps,
        )  # fmt: skip
        stage, stages = _stages(self.tokens, _word_rows(layout), share)
        macros = (
            *(pair for pair in weight_macros(x, weight) if pair[0] not in ("IN", "LAST")), ("IN", 0), ("LAST", 0),
            ("TOKENS", self.tokens), ("EIGHTS", self.tokens // 16), ("STAGES", stages),
            ("WORD_ROWS", _word_rows(layout)), ("ORDER", order_bytes(order)),
        )  # fmt: skip
        arrange, run = (kernel("tile.cu", name, macros, x.device.index) for name in ("arrange", "tile"))
        arrange(Launch((columns * self.tokens, 1), _ARRANGERS, 2 * layout.in_features), Arguments(*common))
        shared, first = _ALIGN_BYTES + stages * stage + _UNIT_BYTES * share, 0
        for part in self.parts:
            grid = (part.splits, columns * part.tiles)
            run(Launch(grid, _THREADS, shared, part.splits, early=True), Arguments(*common, first, part.tiles))
            first += part.tiles

    def share(self, layout: Layout) -> int:
        """Steps of a block, at most."""
        return max(_steps(layout, part.splits) for part in self.parts)

    def fits(self, layout: Layout) -> bool:
        """Whether a block's results have room where the ring was."""
        stage, stages = _stages(self.tokens, _word_rows(layout), self.share(layout))
        return stages * stage >= self.tokens * _RESULT_BYTES

    def time(self, columns: int, layout: Layout, clusters: tuple[int, ...]) -> float:
        """About how many nanoseconds the launches take on an H100, without `arrange`, which is the same for all cuts.

        Clusters are started in order, as soon as there is room: one of a kind of which so many run at once takes up
        that fraction of the device.

        Args:
            columns: tiles of rows of activations.
            layout: of the weight.
            clusters: that run at once, by their size.
        """
        step = max(_STEP_NS + self.tokens * _STEP_TOKEN_NS, _LEAST_STEP_NS)
        now, free, running = 0.0, 1.0, [(0.0, 0.0)]  # when they end, and what they take up until then
        for part in self.parts:
            left, most = columns * part.tiles, clusters[part.splits - 1]
            took = step * _steps(layout, part.splits) + (_BLOCK_NS if part.splits == 1 else _CLUSTER_NS)
            while left:
                count = min(left, int(free * most + 1e-6))  # fractions do not add up to one exactly
                if count:
                    heappush(running, (now + took, count / most))
                    left, free = left - count, free - count / most
                else:
                    now, share = heappop(running)
                    free += share
        return max(end for end, _ in running)


def tiles_for(x: Tensor, weight: PackedWeight) -> tuple[Tile, ...]:
    """Cuts worth a try, the likeliest first; none, where the kernel does not run."""
    if not unpacks_in_registers(x, weight):
        return ()
    count = 1 << (len(x) - 1).bit_length()  # as other numbers of rows are to be served by the same choice
    clusters = clusters_at_once(_THREADS, _RING_BYTES, _MOST_SPLITS, x.device.index)
    return _tiles_for(count, -(-weight.out_features // _ROWS), weight.layout, clusters)


@lru_cache(maxsize=4096)
def _tiles_for(count: int, row_tiles: int, layout: Layout, clusters: tuple[int, ...]) -> tuple[Tile, ...]:
    if 2 * layout.in_features > _SHARED_BYTES:  # a row of activations is put in order there
        return ()
    times: dict[Tile, float] = {}
    for tokens in _TOKENS:
        columns = -(-count // tokens)
        if columns * row_tiles <= _MOST_BLOCKS and (tokens <= count or tokens == _TOKENS[0]):
            cuts = (Tile(tokens, parts) for parts in _cuts(row_tiles, columns, clusters))
            times |= {tile: tile.time(columns, layout, clusters) for tile in cuts if tile.fits(layout)}
    kinds: dict[tuple[int, int], Tile] = {}
    for tile in sorted(times, key=times.__getitem__):
        kinds.setdefault((tile.tokens, len(tile.parts)), tile)
    one, several = ([tile for (_, parts), tile in kinds.items() if (parts > 1) == many] for many in (False, True))
    return tuple(sorted(one[:_TRIED] + several[:_TRIED], key=times.__getitem__))


def _cuts(
    row_tiles: int, columns: int, clusters: tuple[int, ...], parts: int = _MOST_PARTS, least: int = 1
) -> Iterator[tuple[Part, ...]]:
    """One launch; or one that keeps all processors busy to its end, and others that have to split what is left."""
    for splits, most in enumerate(clusters[least - 1 :], least):
        if most == 0:  # a part of the GPU has not that many processors
            return
        yield (Part(row_tiles, splits),)
        full = columns * row_tiles // most * most // columns
        if parts > 1 and 0 < full < row_tiles:
            for more in _cuts(row_tiles - full, columns, clusters, parts - 1, splits + 1):
                yield Part(full, splits), *more


@lru_cache(maxsize=4096)
def _word_rows(layout: Layout) -> int:
    """Word rows of a step at most, as few different numbers as will do: each is compiled for itself."""
    widths = [0 if bits == LEFT_OUT else bits for bits in layout.widths] + [0]
    most = 32 if RAW_BITS in widths else max(a + b for a, b in zip(widths[::2], widths[1::2], strict=False))
    return next(rows for rows in (12, 16, 32) if most <= rows)


def _stages(tokens: int, word_rows: int, steps: int) -> tuple[int, int]:
    """Bytes of a stage, and stages of the ring: as many as there is room for beside what a block keeps of its steps."""
    stage = tokens * _STEP_BYTES + (word_rows * _ROW_BYTES + _TAIL_BYTES + 1023) // 1024 * 1024
    ring = min(_RING_BYTES, _SHARED_BYTES - _ALIGN_BYTES - _UNIT_BYTES * steps)
    return stage, min(8, ring // stage)


def _steps(layout: Layout, splits: int) -> int:
    """Steps of a block, at most."""
    return -(-len(layout.widths) // (2 * splits))


@lru_cache(maxsize=4096)
def _units(layout: Layout, rows: int, device: torch.device) -> Tensor:
    table = segments_of(layout, rows, None)
    table += [(0, 0, 0, 0)] * (len(table) % 2)
    return torch.tensor(table, dtype=torch.int32, device=device)
