"""Grids whose scales are coded: the bases before the sweep, then four bits a row and group as the sweep gets there."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpfx.nn.layout import LEFT_OUT, Layout
from mpfx.nn.scales import FACTORS, scale_values
from mpfx.solve.grid import Grid, GridConfig, as_float16, extent, rounding_error, zero_points

_HEADROOM = 0.25  # octaves that compensation may add to the largest range of a row
_HEADROOM_LEFT_OUT = 0.75  # where it also makes up for channels that are left out
_TRIED = 7  # codes of the clip search: from one that clips nothing down to 0.42 of it, as the float16 search does
_AROUND = 2  # codes tried without clip search: those on either side of the whole range


@dataclass(frozen=True)
class ScaleBases:
    """What coded scales are multiples of; float16 values held in float32.

    Attributes:
        row: ``(rows,)``.
        group: ``(grids,)``.
    """

    row: Tensor
    group: Tensor

    def product(self, grid: int) -> Tensor:
        """The largest range that a code of this grid can stand for, ``(rows,)``."""
        return self.row * self.group[grid]

    def products(self, grids: Sequence[int]) -> Tensor:
        """The same of several grids, one after the other, ``(grids x rows,)``."""
        return (self.group[torch.tensor(grids, device=self.group.device)][:, None] * self.row).flatten()


def fit_bases(weight: Tensor, layout: Layout, config: GridConfig) -> ScaleBases:
    """Fit bases to the ranges of all groups.

    A group's base is the median of its rows' ranges; a row's base is the largest factor that its ranges lie above
    those of the groups, and a quarter of an octave more (three where channels are left out) for what compensation will
    add.

    Args:
        weight: ``(channels, rows)`` float32, in sweep order, before the sweep.
        layout: of the channels.
        config: symmetric or not.

    Returns:
        The bases; 1 for rows that are all zero, and the median of all ranges for groups that are.

    Raises:
        ValueError: if weights are NaN, or so large that no float16 base can hold them.
    """
    if not layout.grids:
        return ScaleBases(weight.new_ones(weight.shape[1]), weight.new_ones(0))
    ranges = _ranges(weight, layout, config)
    if bool(ranges.isnan().any()):
        raise ValueError("the weights hold NaN: the layer is damaged.")
    octaves = ranges.masked_fill(ranges == 0, torch.nan).log2()
    usual = octaves.nanmedian().nan_to_num(nan=0.0)
    middle = octaves.nanmedian(1).values
    group = as_float16(torch.where(middle.isnan(), usual, middle).exp2(), "range")
    above = (octaves - group.log2()[:, None]).nan_to_num(nan=-torch.inf, posinf=torch.inf).amax(0) + _headroom(layout)
    row = as_float16(torch.where(above == -torch.inf, 0.0, above).exp2(), "range relative to the other rows'")
    return ScaleBases(row, group)


def _ranges(weight: Tensor, layout: Layout, config: GridConfig) -> Tensor:
    """What the grids span, ``(grids, rows)``; groups of as many channels in one go."""
    ranges = weight.new_empty(len(layout.grids), weight.shape[1])
    alike: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(layout.grids):
        alike[group.channels].append(index)
    for channels, members in alike.items():
        starts = torch.tensor([layout.grids[index].start for index in members], device=weight.device)
        parts = weight[starts[:, None] + torch.arange(channels, device=weight.device)]  # (groups, channels, rows)
        ranges[torch.tensor(members, device=weight.device)] = extent(parts, config)[1]
    return ranges


def _headroom(layout: Layout) -> float:
    return _HEADROOM_LEFT_OUT if LEFT_OUT in layout.widths else _HEADROOM


def tried(config: GridConfig) -> int:
    """How many codes a scale is chosen from: the largest that clips nothing, and finer ones."""
    return _TRIED if config.clip_search else _AROUND


def fit_coded_grid(weight: Tensor, bits: int, config: GridConfig, base: Tensor) -> tuple[Grid, Tensor]:
    """Fit one grid per row, its scale coded.

    Args:
        weight: ``(channels, rows)`` float32, zero where pruned.
        bits: code width, 1..8.
        config: symmetric or not, clip search or not.
        base: the largest range that a code stands for, ``(rows,)`` (:meth:`ScaleBases.product`).

    Returns:
        The grid, and the codes of its scales, integers ``(rows,)``: those with the least error, of the finest one that
        clips nothing and the next six finer ones (without clip search the next one only: the whole range lies in
        between).

    Raises:
        ValueError: if weights are not finite.
    """
    low, span = extent(weight, config)
    if not bool(span.isfinite().all()):
        raise ValueError("the weights hold NaN or infinity: the layer is damaged.")
    span = torch.where(span == 0, base, span)
    zero = zero_points(low, span, bits, config)  # the same for every range: low shrinks along with it
    covering = (4 * (base / span).log2()).floor_().clamp_(min=0)
    finer = torch.arange(tried(config), device=weight.device)
    codes = (covering[:, None] + finer).clamp_(max=len(FACTORS) - 1).int()  # (rows, candidates)
    scales = scale_values(base[:, None], codes, [bits] * len(finer))
    errors = _errors(weight, scales.t(), zero, bits).t()
    best = errors.argmin(1, keepdim=True)  # the coarsest among equals
    return Grid(scales.gather(1, best)[:, 0], zero, bits), codes.gather(1, best)[:, 0]


def _errors(weight: Tensor, scales: Tensor, zero: Tensor, bits: int) -> Tensor:
    """What the clip search compares, ``(candidates, rows)``, of scales likewise."""
    if weight.is_cuda:  # as few launches as may be: they take longer than what they do
        return rounding_error(weight, Grid(scales[:, None], zero, bits))
    return torch.stack([rounding_error(weight, Grid(scale, zero, bits)) for scale in scales])
