"""Where a kernel finds the parts of every segment: tables that follow from a layout, or from a mask."""

from collections.abc import Callable
from functools import lru_cache
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mpfx.nn.layout import LEFT_OUT, RAW_BITS, SCALE_BITS, Layout, words

T = TypeVar("T")


def encoded(widths: tuple[int, ...]) -> str:
    """Widths as a text, a character per segment: what an operator can take as one cheap argument."""
    return "".join("f" if bits == RAW_BITS else str(bits) for bits in widths)


@lru_cache(maxsize=4096)
def layout_of(in_features: int, widths: str, group_size: int) -> Layout:
    """Undo :func:`encoded`; a group size of 0 stands for row scales."""
    return Layout(in_features, tuple(RAW_BITS if c == "f" else int(c) for c in widths), group_size or None)


@lru_cache(maxsize=4096)
def segment_table(layout: Layout, rows: int, device: torch.device) -> Tensor:
    """Per segment: its width, its first word in the codes, its grid, and the first word of that grid's zero points.

    Returns:
        int32 ``(segments, 4)``; a grid of -1: none.
    """
    grid_of, zero_of, zero = {}, {}, 0
    for index, grid in enumerate(layout.grids):
        for segment in range(grid.start // layout.segment, -(-grid.stop // layout.segment)):
            grid_of[segment], zero_of[segment] = index, zero
        zero += words(rows, grid.bits)
    table, word = [], 0
    for segment, bits in enumerate(layout.widths):
        table.append((bits, word, grid_of.get(segment, -1), zero_of.get(segment, 0)))
        word += 0 if bits == LEFT_OUT else bits  # a segment of b bits is b words of every row
    return torch.tensor(table, dtype=torch.int32, device=device)


def scale_words(rows: int) -> int:
    """Words that hold the coded scales of one grid."""
    return words(rows, SCALE_BITS)


class OfMask(Generic[T]):
    """What follows from masks: found once a mask, as long as it lives, and again when it has been written to."""

    def __init__(self) -> None:
        self._known = WeakIdKeyDictionary()

    def __call__(self, mask: Tensor, find: Callable[[], T]) -> T:
        """What is known of a mask; else, what ``find`` finds."""
        known = self._known.get(mask)
        if known is None or known[0] != mask_version(mask):
            known = self._known[mask] = (mask_version(mask), find())
        found: T = known[1]
        return found


def mask_version(mask: Tensor | None) -> int:
    """Changes when a checkpoint is loaded into a mask."""
    return -1 if mask is None or mask.is_inference() else mask._version
