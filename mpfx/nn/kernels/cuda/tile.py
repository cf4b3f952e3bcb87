"""Many rows times a packed weight that is unpacked in registers: what ``tile.cu`` needs from the host."""

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mpfx.nn.kernels.cuda.nvrtc import Launch, kernel
from mpfx.nn.kernels.cuda.weights import Weight, address, order_bytes, segments_of, weight_argument, weight_macros
from mpfx.nn.layout import LEFT_OUT, RAW_BITS, Layout
from mpfx.nn.packing import PackedWeight
from mpfx.nn.scales import CodedScales

_CAPABILITY = (9, 0)  # the only one that has `wgmma`
_ROWS = 128  # of the weight, of a block
_THREADS, _ARRANGERS = 384, 512  # as in tile.cu
_STEP_BYTES = 128  # of a row of activations
_ROW_BYTES, _TAIL_BYTES, _RESULT_BYTES = 576, 384 + 2048, 528  # as in tile.cu
_RING_BYTES = 208 << 10
_SHARED_BYTES = (227 << 10) - 256  # that a block can have, without what the kernel declares itself
_ALIGN_BYTES, _UNIT_BYTES = 1024, 40  # as in tile.cu: before the ring; of a step
_MOST_BLOCKS = 65535  # of a launch along y
_TOKENS = (16, 32, 64, 128, 176, 256)
_MOST_SPLITS = 8
_LEAST_TOKENS = 112  # fewer do not make a block any faster: it has to unpack the weight all the same


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
    ]


def unpacks_in_registers(x: Tensor, weight: PackedWeight) -> bool:
    """Whether the kernel runs: half precision, coded scales, no bitmask, rows that come in fours; on a Hopper GPU."""
    aligned = weight.out_features % 4 == 0 and weight.codes.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
    plain = weight.mask is None and isinstance(weight.scales, CodedScales) and x.dtype != torch.float32
    return plain and aligned and torch.cuda.get_device_capability(x.device) == _CAPABILITY


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        tokens: rows of activations of a block.
        splits: blocks that share the channels of the same rows.
    """

    tokens: int
    splits: int

    def multiply(self, x: Tensor, weight: PackedWeight, order: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
        """Write the product ``(rows, out)``.

        Args:
            x: ``(rows, in)``, contiguous, float16 or bfloat16.
            weight: packed.
            order: uint16 or int32 ``(in,)``, or None.
            bias: ``(out,)``, contiguous, in the dtype of ``x``, or None.
            out: contiguous, in the dtype of ``x``.
        """
        layout, rows = weight.layout, weight.out_features
        tiles, steps = -(-len(x) // self.tokens), _steps(layout, self.splits)
        all_steps = self.splits * steps
        arranged = torch.empty(tiles * self.tokens * all_steps * _STEP_BYTES, dtype=torch.uint8, device=x.device)
        units = _units(layout, rows, all_steps, x.device)
        parts = (
            address(x), address(order), address(arranged), weight_argument(weight), address(units), address(bias),
            address(out), len(x), layout.in_features,
        )  # fmt: skip
        stage, stages = _stages(self.tokens, _word_rows(layout), steps)
        macros = (
            *(pair for pair in weight_macros(x, weight) if pair[0] not in ("IN", "LAST")), ("IN", 0), ("LAST", 0),
            ("TOKENS", self.tokens), ("EIGHTS", self.tokens // 16), ("STAGES", stages),
            ("WORD_ROWS", _word_rows(layout)), ("ORDER", order_bytes(order)),
        )  # fmt: skip
        arrange = kernel("tile.cu", "arrange", macros, x.device.index)
        arrange(Launch((tiles * self.tokens, 1), _ARRANGERS, 2 * layout.in_features), Arguments(*parts, all_steps))
        shared = _ALIGN_BYTES + stages * stage + _UNIT_BYTES * steps
        grid = (self.splits, tiles * -(-rows // _ROWS))
        run = kernel("tile.cu", "tile", macros, x.device.index)
        run(Launch(grid, _THREADS, shared, self.splits, early=True), Arguments(*parts, steps))


def tiles_for(x: Tensor, weight: PackedWeight) -> tuple[Tile, ...]:
    """Cuts worth a try, the likeliest first; none, where the kernel does not run."""
    if not unpacks_in_registers(x, weight):
        return ()
    count = 1 << (len(x) - 1).bit_length()  # as other numbers of rows are to be served by the same choice
    return _tiles_for(count, -(-weight.out_features // _ROWS), weight.layout, x.device)


@lru_cache(maxsize=4096)
def _tiles_for(count: int, row_tiles: int, layout: Layout, device: torch.device) -> tuple[Tile, ...]:
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    found: dict[Tile, float] = {}
    if 2 * layout.in_features > _SHARED_BYTES:  # a row of activations is put in order there
        return ()
    for tokens in _TOKENS:
        blocks = row_tiles * -(-count // tokens)
        splits = 1
        while splits < _MOST_SPLITS and 2 * splits * blocks <= processors:
            splits *= 2
        stage, stages = _stages(tokens, _word_rows(layout), _steps(layout, splits))
        fits = stages * stage >= tokens * _RESULT_BYTES and blocks <= _MOST_BLOCKS
        if fits and (tokens <= count or tokens == _TOKENS[0]):
            waves = -(-blocks * splits // processors)
            found[Tile(tokens, splits)] = waves * max(tokens, _LEAST_TOKENS) / splits
    return tuple(sorted(found, key=lambda tile: found[tile]))[:3]


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
    """Steps of a block."""
    return -(-len(layout.widths) // (2 * splits))


@lru_cache(maxsize=4096)
def _units(layout: Layout, rows: int, steps: int, device: torch.device) -> Tensor:
    table = segments_of(layout, rows, None)
    table += [(0, 0, 0, 0)] * (2 * steps - len(table))
    return torch.tensor(table, dtype=torch.int32, device=device)
