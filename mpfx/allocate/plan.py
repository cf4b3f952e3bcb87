"""The plan: what every input group's weight will be, before it is solved."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """

    name: str
    rows: Mapping[str, int]
    bits: Tensor
    sparsity: Sparsity
    activation_order: bool
    grid: GridConfig

    @property
    def permuted(self) -> bool:
        """Whether the sweep order differs from the input's own and has to be stored."""
        return self.activation_order or bool((self.bits != self.bits[0]).any())

    @property
    def layout(self) -> Layout:
        """Of the channels in sweep order: wide ones first."""
        ordered = self.bits.sort(descending=True).values[::SEGMENT]
        return Layout(len(self.bits), tuple(ordered.tolist()), self.grid.group_size)

    def order(self, activation: Tensor) -> Tensor | None:
        """Channels in sweep order.

        Args:
            activation: mean square of every channel up to a factor (the diagonal of its Hessian), ``(in,)``.

        Returns:
            A permutation ``(in,)``, or None if it is the input's own order.
        """
        if not self.permuted:
            return None
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
        total = permutation_bytes(len(self.bits)) if self.permuted else 0
        return total + sum(self._site_bytes(layout, rows) for rows in self.rows.values())

    def _site_bytes(self, layout: Layout, rows: int) -> int:
        kept = None
        if self.sparsity:
            # The mask is chosen among the rows of all sites, so a site's own share is known on average only; of its
            # streams, each as long as whole blocks of 32 codes, one block more than the average is the most in all.
            kept = tuple(32 + self._kept(run, layout, rows) for run in layout.runs)
        return stored_bytes(layout, rows, symmetric=self.grid.symmetric, kept=kept).total

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


def stored_bits_per_weight(plans: list[GroupPlan]) -> float:
    """8 x stored bytes over weights, of all groups together."""
    return 8 * sum(plan.stored_bytes() for plan in plans) / sum(plan.numel for plan in plans)


def code_bits_per_weight(plans: list[GroupPlan]) -> float:
    """Average nominal width of a code, of all groups together."""
    return sum(plan.code_bits * plan.numel for plan in plans) / sum(plan.numel for plan in plans)
