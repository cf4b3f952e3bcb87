"""The frontier: distortion against stored bytes, for every part of a model at every width.

It is measured once; any budget is then solved from it in milliseconds, without the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpfx.graph import PermutationFold
from mpfx.nn.layout import PANEL, SCALE_BITS, SEGMENT, Layout, permutation_bytes, stored_bytes
from mpfx.solve import GridConfig, Sparsity, fit_bases, prune_n_of_m, round_nearest

MOST_ROWS = 1024
"""Rows that are enough to compare widths: a sample that stands for all."""


@dataclass(frozen=True)
class Curve:
    """One way to store the weight of an input group: dense codes, or surviving codes under a bitmask.

    Attributes:
        sparsity: pattern.
        stored: bytes of every unit of channels at every width, ``(units, widths)`` int64.
        distortion: estimated increase of the loss, up to a factor that the whole model shares, ``(units, widths)``
            float64: ``sum (w - q)^2 / [U]_jj^2 / 2`` over
            rows and channels, with the factor of the guided Hessian summed over tokens.
        base: bytes whatever the widths: permutation, bases of the scales.
    """

    sparsity: Sparsity
    stored: Tensor
    distortion: Tensor
    base: int


@dataclass(frozen=True)
class GroupFrontier:
    """All ways to store the weight of one input group.

    Attributes:
        name: of the input group.
        rows: output channels of every site, by module path.
        order: channels in the order in which units are cut, ``(in,)`` int64.
        unit: channels of a unit, a multiple of 32; the last may be smaller.
        free: whether units may be rearranged; False where channels are confined to cells (attention heads).
        fold: how the order is made by reordering rows elsewhere; None: it is stored, or natural.
        curves: the first one is tried where nothing speaks for another.
    """

    name: str
    rows: Mapping[str, int]
    order: Tensor
    unit: int
    free: bool
    fold: PermutationFold | None
    curves: tuple[Curve, ...]

    @property
    def channels(self) -> int:
        """Input channels."""
        return len(self.order)

    @property
    def numel(self) -> int:
        """Weights of all sites."""
        return self.channels * sum(self.rows.values())

    @property
    def sizes(self) -> Tensor:
        """Channels of every unit, ``(units,)``."""
        return torch.tensor([len(part) for part in self.order.split(self.unit)])


@dataclass(frozen=True)
class Frontier:
    """Of a whole model.

    Attributes:
        widths: bits of the columns of every curve, ascending; 0: left out.
        grid: how scales are stored.
        groups: in graph order.
        activation_order: whether channels are swept by activation within a width.
    """

    widths: tuple[int, ...]
    grid: GridConfig
    groups: tuple[GroupFrontier, ...]
    activation_order: bool = True


def measure_curve(
    weight: Tensor,
    diagonal: Tensor,
    unit: int,
    widths: Sequence[int],
    grid: GridConfig,
    sparsity: Sparsity,
) -> Tensor:
    """Distortion of every unit of channels at every width, with the real quantizer.

    Args:
        weight: ``(rows, in)`` float32, channels in sweep order.
        diagonal: of the upper factor U of the inverse Hessian, ``(in,)``, likewise.
        unit: channels of a unit.
        widths: to measure; 0: left out, 16: float16 values.
        grid: how scales are fitted.
        sparsity: pattern that is pruned first.

    Returns:
        ``(units, widths)`` float64.
    """
    step = -(-len(weight) // MOST_ROWS)
    sample = weight[::step]
    cost = diagonal.double().pow(-2) * (len(weight) / len(sample) / 2)
    pruned = _pruned(sample, diagonal, sparsity)
    columns, bases = [], None
    for bits in widths:
        layout = Layout(weight.shape[1], (bits,) * -(-weight.shape[1] // SEGMENT), grid.group_size)
        if layout.grids and bases is None and grid.scale_bits == SCALE_BITS:
            bases = fit_bases(sample.t(), layout, grid)  # the same for all widths
        change = round_nearest(sample, layout, grid, pruned, bases) - sample
        per_channel = change.square().sum(0, dtype=torch.float64) * cost
        columns.append(per_channel)
    return unit_sums(torch.stack(columns), unit).t().contiguous().cpu()


def unit_sums(values: Tensor, unit: int) -> Tensor:
    """Sums over the channels of every unit, ``(..., units)``, of values ``(..., in)``; the last unit may be smaller."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % unit))
    sums: Tensor = padded.unflatten(-1, (-1, unit)).sum(-1)
    return sums


def _pruned(weight: Tensor, diagonal: Tensor, sparsity: Sparsity) -> Tensor | None:
    """The mask that a sweep would choose without compensation, ``(rows, in)``, True where pruned; of equals all."""
    if not sparsity:
        return None
    saliency = (weight / diagonal).square().t().contiguous()  # channels first
    if sparsity.group_m:
        return prune_n_of_m(saliency, sparsity).t()
    whole = len(saliency) // PANEL * PANEL
    panels = [saliency[:whole].unflatten(0, (-1, PANEL)), saliency[None, whole:]]  # all at once, and what is left
    return torch.cat([_lowest(part, sparsity).flatten(0, 1) for part in panels if part.numel()]).t()


def _lowest(panels: Tensor, sparsity: Sparsity) -> Tensor:
    """The least salient weights of every panel, ``(panels, channels, rows)``."""
    count = sparsity.pruned(panels.shape[2], panels.shape[1])
    if not count:
        return torch.zeros_like(panels, dtype=torch.bool)
    least = panels.flatten(1).kthvalue(count, dim=1).values
    return panels <= least[:, None, None]


def count_bytes(
    rows: Sequence[int], sizes: Sequence[int], widths: Sequence[int], grid: GridConfig, sparsity: Sparsity
) -> tuple[Tensor, int]:
    """Bytes of every unit at every width, and those that do not depend on the widths.

    Args:
        rows: output channels of every site of the group.
        sizes: channels of every unit.
        widths: bits.
        grid: how scales are stored.
        sparsity: pattern; the surviving codes are counted on average.

    Returns:
        ``(units, widths)`` int64, and the bytes common to all.
    """

    def total(channels: int, bits: int) -> int:
        layout = Layout(channels, (bits,) * -(-channels // SEGMENT), grid.group_size)
        return sum(_site_bytes(layout, count, grid, sparsity) for count in rows)

    if len(sizes) == 1:  # nothing to tell a unit from the rest by
        return torch.tensor([[total(sizes[0], bits) for bits in widths]]), 0
    whole = sizes[0]
    base = 2 * total(whole, widths[0]) - total(2 * whole, widths[0])
    table = {size: [total(whole + size, bits) - total(whole, bits) for bits in widths] for size in set(sizes)}
    return torch.tensor([table[size] for size in sizes]), base


def _site_bytes(layout: Layout, rows: int, grid: GridConfig, sparsity: Sparsity) -> int:
    kept = None
    if sparsity:
        kept = tuple(
            0 if run.bits == 0 else rows * run.channels - sparsity.pruned(rows, run.channels) for run in layout.runs
        )
    counted = stored_bytes(layout, rows, symmetric=grid.symmetric, scale_bits=grid.scale_bits, kept=kept)
    return counted.total


def with_curves(
    draft: GroupFrontier,
    frontier: Frontier,
    sparsities: Sequence[Sparsity],
    measured: tuple[Tensor, Tensor] | None,
) -> GroupFrontier:
    """Add the curves of one input group, one per pattern.

    Args:
        draft: the group without curves.
        frontier: widths and grid.
        sparsities: patterns to choose from.
        measured: weight ``(rows, in)`` float32 of all sites and diagonal of the factor U ``(in,)``, channels in the
            group's order; None: distortions are made up, as where only sizes are to be checked.
    """
    sizes, curves = draft.sizes.tolist(), []
    for sparsity in sparsities:
        stored, base = count_bytes(list(draft.rows.values()), sizes, frontier.widths, frontier.grid, sparsity)
        distortion = torch.tensor([4.0**-bits for bits in frontier.widths], dtype=torch.float64).expand(stored.shape)
        if measured is not None:
            distortion = measure_curve(*measured, draft.unit, frontier.widths, frontier.grid, sparsity)
        base += 0 if draft.fold is not None else permutation_bytes(draft.channels)
        curves.append(Curve(sparsity, stored, distortion, base))
    return replace(draft, curves=tuple(curves))
