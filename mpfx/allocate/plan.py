"""The plan: what every input group's weight will be, before it is solved."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mpfx.graph import PermutationFold, channel_order
from mpfx.nn.layout import SEGMENT, Layout, Span, permutation_bytes, stored_bytes
from mpfx.solve.grid import GridConfig
from mpfx.solve.mask import Sparsity


@dataclass(frozen=True)
class GroupPlan:
    """The decision for the sites of one input group.

    Attributes:
        name: of the input group.
        rows: output channels of every site, by module path.
        bits: width of every channel in the input's own order, ``(in,)`` uint8; a whole number of segments per width,
            but for the narrowest.
        sparsity: pattern of every site.
        activation_order: within a width, sweep the channels with the largest activations first; else in their own
            order.
        grid: of the scales.
        fold: how the input's channels can be reordered by reordering rows of the sites that make them: then no
            permutation is stored. None: it is, and the input is gathered at run time.
        arrangement: the sweep order, ``(in,)``, where the widths were given to the channels of this very order (heads,
            inside which channels have to stay); None: it follows from widths and activations.
    """

    name: str
    rows: Mapping[str, int]
    bits: Tensor
    sparsity: Sparsity
    activation_order: bool
    grid: GridConfig
    fold: PermutationFold | None = None
    arrangement: Tensor | None = None

    @property
    def confined(self) -> bool:
        """Whether channels have to stay inside cells, so that the sweep order is not free."""
        return self.fold is not None and not is_free(self.fold)

    @property
    def permuted(self) -> bool:
        """Whether the sweep order differs from the input's own."""
        mixed = bool((self.bits != self.bits[0]).any())
        return self.activation_order or self.arrangement is not None or (mixed and not self.confined)

    @property
    def layout(self) -> Layout:
        """Of the channels in sweep order: wide ones first, where the order is free."""
        if self.arrangement is not None:
            ordered = self.bits[self.arrangement]
        else:
            ordered = self.bits if self.confined else self.bits.sort(descending=True).values
        return Layout(len(self.bits), tuple(ordered[::SEGMENT].tolist()), self.grid.group_size)

    def order(self, activation: Tensor) -> Tensor | None:
        """Channels in sweep order.

        Args:
            activation: mean square of every channel up to a factor (the diagonal of its Hessian), ``(in,)``.

        Returns:
            A permutation ``(in,)``, or None if it is the input's own order.
        """
        if not self.permuted:
            return None
        if self.arrangement is not None:
            return self.arrangement.to(activation.device)
        if self.fold is not None and self.confined:
            return confined_order(self.fold, activation)
        order = activation.argsort(descending=True, stable=True)
        if not self.activation_order:
            order = torch.arange(len(self.bits), device=activation.device)
        bits = self.bits.to(order.device)[order].int()
        return order[bits.argsort(descending=True, stable=True)]

    def stored_bytes(self) -> int:
        """Bytes of all sites of the group, permutation included.

        Exact, but with a mask: then at most so many, and not over by more than two blocks of codes a site and width.
        """
        layout = self.layout
        total = permutation_bytes(len(self.bits)) if self.permuted and self.fold is None else 0
        return total + sum(self._site_bytes(layout, rows) for rows in self.rows.values())

    def _site_bytes(self, layout: Layout, rows: int) -> int:
        kept = None
        if self.sparsity:
            # The mask is chosen among the rows of all sites, so a site's own share is known on average only; of its
            # streams, each as long as whole blocks of 32 codes, one block more than the average is the most in all.
            kept = tuple(32 + self._kept(run, layout, rows) for run in layout.runs)
        grid = self.grid
        return stored_bytes(layout, rows, symmetric=grid.symmetric, scale_bits=grid.scale_bits, kept=kept).total

    def _kept(self, run: Span, layout: Layout, rows: int) -> int:
        panels = [panel for panel in layout.panels if run.start <= panel.start < run.stop]
        return sum(rows * panel.channels - self.sparsity.pruned(rows, panel.channels) for panel in panels)

    @property
    def numel(self) -> int:
        """Weights of all sites."""
        return len(self.bits) * sum(self.rows.values())

    @property
    def code_bits(self) -> float:
        """Average nominal width over the channels."""
        return float(self.bits.double().mean())


def is_free(fold: PermutationFold) -> bool:
    """Whether a fold allows every order of the channels: one cell, each unit one channel."""
    return len(fold.cell) == len(fold.unit) and bool((fold.cell == fold.cell[0]).all())


def confined_order(fold: PermutationFold, score: Tensor) -> Tensor:
    """Sort channels by score, largest first, inside the cells of a fold.

    Args:
        fold: units and their cells.
        score: of every channel ``(in,)``; a unit that stands for several channels has their sum.

    Returns:
        Channels in the new order, ``(in,)``.
    """
    unit, cell = fold.unit.to(score.device), fold.cell.to(score.device)
    of_units = score.new_zeros(len(cell)).index_add_(0, unit, score)
    ranked = of_units.argsort(descending=True, stable=True)
    places = cell.argsort(stable=True)  # of the units of cell 0, then of cell 1, ...
    order = torch.empty_like(places)
    order[places] = ranked[cell[ranked].argsort(stable=True)]
    return channel_order(fold, order.cpu()).to(score.device)


def stored_bits_per_weight(plans: list[GroupPlan]) -> float:
    """8 x stored bytes over weights, of all groups together."""
    return 8 * sum(plan.stored_bytes() for plan in plans) / sum(plan.numel for plan in plans)


def code_bits_per_weight(plans: list[GroupPlan]) -> float:
    """Average nominal width of a code, of all groups together."""
    return sum(plan.code_bits * plan.numel for plan in plans) / sum(plan.numel for plan in plans)
