"""Many rows times a packed weight that is unpacked in registers: what ``tile.cu`` needs from the host."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from mpfx.nn.kernels.cuda.nvrtc import Launch, kernel, last_captured
from mpfx.nn.kernels.cuda.weights import Weight, address, order_bytes, segments_of, weight_argument, weight_macros
from mpfx.nn.layout import LEFT_OUT, RAW_BITS, Layout
from mpfx.nn.packing import PackedWeight
from mpfx.nn.scales import CodedScales

_CAPABILITY = (9, 0)  # the only one that has `wgmma`
_ROWS = 128  # of the weight, of a tile
_THREADS, _ARRANGERS = 384, 512  # as in tile.cu
_STEP_BYTES = 128  # of a row of activations
_ROW_BYTES, _TAIL_BYTES = 544, 384 + 2048  # as in tile.cu
_RING_BYTES = 208 << 10
_SHARED_BYTES = (227 << 10) - 256  # that a block can have, without what the kernel declares itself
_ALIGN_BYTES, _UNIT_BYTES = 1024, 40  # as in tile.cu: before the ring; of a step
_TOKENS = (16, 32, 64, 128, 176, 256)
_MOST_SPLITS = 8  # shares of a tile, at most
_MOST_PARTS = 3  # as in tile.cu
_MOST_FOUND_BYTES = 64 << 20  # what shares of tiles may leave in memory
_TRIED = 4  # cuts, each of another kind
# Measured on an H100, in nanoseconds: a step, what each row of activations adds to it, and the shortest step that there
# is; by rows of activations, to write results; of a tile that is shared out, to leave and add up what each share found.
_STEP_NS, _STEP_TOKEN_NS, _LEAST_STEP_NS = 270.0, 1.5, 320.0
_WRITE_TOKEN_NS, _SHARE_TOKEN_NS = 8.0, 13.0


class _Part(ctypes.Structure):
    """``Part`` of ``tile.cu``."""

    _fields_ = [
        *[(name, ctypes.c_int) for name in ("tile", "share", "slot", "tiles", "splits", "steps")],
        *[(name, ctypes.c_uint32) for name in ("by_tiles", "by_splits")],
    ]


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
        ("found", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("steps", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("shares", ctypes.c_int),
        ("slots", ctypes.c_int),
        ("most_splits", ctypes.c_int),
        ("parts", _Part * _MOST_PARTS),
    ]


def unpacks_in_registers(x: Tensor, weight: PackedWeight) -> bool:
    """Whether the kernel runs: half precision, coded scales, no bitmask, rows that come in fours; on a Hopper GPU."""
    aligned = weight.out_features % 4 == 0 and weight.codes.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
    plain = weight.mask is None and isinstance(weight.scales, CodedScales) and x.dtype != torch.float32
    return plain and aligned and torch.cuda.get_device_capability(x.device) == _CAPABILITY


class Part(NamedTuple):
    """Rows of the weight whose tiles are shared out alike.

    Attributes:
        tiles: so many times 128 rows.
        splits: shares of a tile, each with a part of the channels.
    """

    tiles: int
    splits: int


@dataclass(frozen=True)
class Tile:
    """How the work is cut: of as many processors as there are, each takes every so-many-th share.

    Attributes:
        tokens: rows of activations of a tile.
        parts: of the rows of the weight, one after the other.
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
        assert sum(part.tiles for part in self.parts) == -(-weight.out_features // _ROWS)
        steps, slots = _steps(layout), self.slots(columns)
        arranged = torch.empty(columns * self.tokens * steps * _STEP_BYTES, dtype=torch.uint8, device=x.device)
        found = torch.empty(self.found_bytes(columns), dtype=torch.uint8, device=x.device)
        arrived = torch.empty(slots, dtype=torch.int32, device=x.device)
        units = _units(layout, weight.out_features, x.device)
        parts, shares = self._shared_out(columns, steps)
        arguments = Arguments(
            address(x), address(order), address(arranged), weight_argument(weight), address(units), address(bias),
            address(out), address(found), address(arrived), len(x), layout.in_features, steps, columns, shares, slots,
            self.most_splits, parts,
        )  # fmt: skip
        stage, stages = _stages(self.tokens, _word_rows(layout), steps)
        blocks = min(shares, _processors(x.device))
        pairs = _are_pairs(parts[len(self.parts) - 1], blocks)
        macros = (
            *(pair for pair in weight_macros(x, weight) if pair[0] not in ("IN", "LAST")), ("IN", 0),
            ("TOKENS", self.tokens), ("EIGHTS", self.tokens // 16), ("STAGES", stages),
            ("WORD_ROWS", _word_rows(layout)), ("ORDER", order_bytes(order)), ("PAIRS", int(pairs)),
        )  # fmt: skip
        ahead = 1 if steps * _STEP_BYTES // 16 <= _ARRANGERS else 3
        arrange, run = (kernel("tile.cu", name, macros, x.device.index) for name in (f"arrange_{ahead}", "tile"))
        early = last_captured() is not None  # behind another kernel; without a graph, launching takes longer anyway
        rows = Launch((columns * self.tokens // 2, 1), _ARRANGERS, _arranged_bytes(layout.in_features), early=early)
        arrange(rows, arguments)
        shared = _ALIGN_BYTES + stages * stage + _UNIT_BYTES * steps
        run(Launch((blocks, 1), _THREADS, shared, cluster=2 if pairs else 1, early=True), arguments)

    @property
    def most_splits(self) -> int:
        """Shares of a tile, at most."""
        return max(part.splits for part in self.parts)

    def slots(self, columns: int) -> int:
        """How many tiles several processors share."""
        return columns * sum(part.tiles for part in self.parts if part.splits > 1)

    def found_bytes(self, columns: int) -> int:
        """What shares of tiles leave in memory: float32 results."""
        return self.slots(columns) * self.most_splits * _ROWS * self.tokens * 4

    def _shared_out(self, columns: int, steps: int) -> tuple[ctypes.Array[_Part], int]:
        """Where the parts start, as ``tile.cu`` wants it, and how many shares they have together."""
        tiles = (0, *accumulate(part.tiles for part in self.parts))
        shares = (0, *accumulate(columns * part.tiles * part.splits for part in self.parts))
        slots = (0, *accumulate(columns * part.tiles * (part.splits > 1) for part in self.parts))
        parts = (_Part * _MOST_PARTS)(*[_Part(share=shares[-1], tiles=1, splits=1)] * _MOST_PARTS)
        for i, part in enumerate(self.parts):
            by = [((1 << 32) // divisor + 1) & 0xFFFFFFFF for divisor in part]
            parts[i] = _Part(tiles[i], shares[i], slots[i], part.tiles, part.splits, -(-steps // part.splits), *by)
        return parts, shares[-1]

    def time(self, columns: int, steps: int, processors: int) -> float:
        """About how many nanoseconds the work takes on an H100, without `arrange`, which is the same for all cuts.

        Args:
            columns: tiles of rows of activations.
            steps: of all channels.
            processors: that take shares in turn.
        """
        step = max(_STEP_NS + self.tokens * _STEP_TOKEN_NS, _LEAST_STEP_NS)
        busy, first = [0.0] * processors, 0
        for part in self.parts:
            took = step * -(-steps // part.splits) + self.tokens * _WRITE_TOKEN_NS
            took += self.tokens * _SHARE_TOKEN_NS * part.splits * (part.splits > 1)
            rounds, more = divmod(columns * part.tiles * part.splits, processors)
            busy = [time + rounds * took for time in busy]
            for i in range(first, first + more):
                busy[i % processors] += took
            first += more
        return max(busy)


def _arranged_bytes(channels: int) -> int:
    """Shared memory of two rows that are put in order: pieces change places, so the last eight channels are whole."""
    return 4 * 8 * -(-channels // 8)


def _are_pairs(last: _Part, blocks: int) -> bool:
    """Whether the last shares of blocks are those of tiles in two, so that two blocks of a cluster have one tile."""
    return bool(last.splits == 2 and last.share % 2 == blocks % 2 == 0)


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tiles_for(x: Tensor, weight: PackedWeight) -> tuple[Tile, ...]:
    """Cuts worth a try, the likeliest first; none, where the kernel does not run."""
    if not unpacks_in_registers(x, weight):
        return ()
    count = 1 << (len(x) - 1).bit_length()  # as other numbers of rows are to be served by the same choice
    row_tiles, channels = -(-weight.out_features // _ROWS), weight.layout.in_features
    return _tiles_for(count, row_tiles, channels, _steps(weight.layout), _processors(x.device))


@lru_cache(maxsize=4096)
def _tiles_for(count: int, row_tiles: int, channels: int, steps: int, processors: int) -> tuple[Tile, ...]:
    if _arranged_bytes(channels) > _SHARED_BYTES:  # two rows of activations are put in order there
        return ()
    times: dict[Tile, float] = {}
    for tokens in _TOKENS:
        columns = -(-count // tokens)
        exact = columns * row_tiles * max(row_tiles, _MOST_SPLITS**2) < 1 << 32  # what `divided` of tile.cu finds
        if exact and (tokens <= count or tokens == _TOKENS[0]):
            cuts = (Tile(tokens, parts) for parts in _cuts(row_tiles, columns, processors, steps))
            few = (tile for tile in cuts if tile.found_bytes(columns) <= _MOST_FOUND_BYTES)
            times |= {tile: tile.time(columns, steps, processors) for tile in few}
    kinds: dict[tuple[int, int, bool], Tile] = {}
    for tile in sorted(times, key=times.__getitem__):
        kinds.setdefault((tile.tokens, len(tile.parts), tile.most_splits > 1), tile)
    return tuple(kinds.values())[:_TRIED]


def _cuts(
    row_tiles: int, columns: int, processors: int, steps: int, parts: int = _MOST_PARTS, least: int = 1
) -> Iterator[tuple[Part, ...]]:
    """All tiles alike; or so many that all processors are busy to their end, and those that are left in more shares."""
    for splits in range(least, min(_MOST_SPLITS, steps) + 1):
        yield (Part(row_tiles, splits),)
        full = columns * row_tiles * splits // processors * processors // (splits * columns)
        if parts > 1 and 0 < full < row_tiles:
            for more in _cuts(row_tiles - full, columns, processors, steps, parts - 1, splits + 1):
                yield Part(full, splits), *more


@lru_cache(maxsize=4096)
def _word_rows(layout: Layout) -> int:
    """Word rows of a step at most, as few different numbers as will do: each is compiled for itself."""
    most = max((bits for bits in layout.widths if bits != LEFT_OUT), default=0)
    return 2 * next(bits for bits in (6, 8, RAW_BITS) if most <= bits)


def _stages(tokens: int, word_rows: int, steps: int) -> tuple[int, int]:
    """Bytes of a stage, and stages of the ring: as many as there is room for beside what a block keeps of all steps."""
    stage = tokens * _STEP_BYTES + (word_rows * _ROW_BYTES + _TAIL_BYTES + 1023) // 1024 * 1024
    ring = min(_RING_BYTES, _SHARED_BYTES - _ALIGN_BYTES - _UNIT_BYTES * steps)
    return stage, min(8, ring // stage)


def _steps(layout: Layout) -> int:
    """Of all channels."""
    return -(-len(layout.widths) // 2)


@lru_cache(maxsize=4096)
def _units(layout: Layout, rows: int, device: torch.device) -> Tensor:
    table = segments_of(layout, rows, None)
    table += [(0, 0, 0, 0)] * (len(table) % 2)
    return torch.tensor(table, dtype=torch.int32, device=device)
