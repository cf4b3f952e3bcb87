"""What a sweep, or the refinement after it, carries from panel to panel, whoever solves the panels."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from mpfx.nn.layout import LEFT_OUT, SCALE_BITS, Layout, Span
from mpfx.nn.packing import QuantizedWeight
from mpfx.nn.scales import CodedScales, Scales, decoded
from mpfx.solve.coded import fit_bases
from mpfx.solve.grid import GridConfig
from mpfx.solve.mask import Sparsity, prune_lowest


class SweepState:
    """Weights, masks, codes and grids, all of them channels first.

    Args:
        weight: see :func:`mpfx.solve.sweep`, likewise all others; not changed.

    Attributes:
        work: ``(in, rows)`` float32: what is still to be solved, compensated so far.
        codes: ``(in, rows)`` int32.
        pruned: ``(in, rows)`` bool.
        scale: of every grid, ``(grids, rows)`` float32.
        zero: likewise, code of the value 0.
        scale_codes: likewise, int32, where scales are coded.
        bases: of coded scales; None: scales are float16 values.
        squared: per row the squares of all errors ``(w - q) / U_jj`` so far, ``(rows,)`` float64.
        large: groups that go on behind the panel that they start in, with the numbers of their grids, by first channel.
    """

    def __init__(self, weight: Tensor, upper: Tensor, layout: Layout, config: GridConfig, sparsity: Sparsity) -> None:
        self.work = weight.t().contiguous()
        if self.work.data_ptr() == weight.data_ptr():
            self.work = self.work.clone()
        rows, device = self.work.shape[1], weight.device
        self.codes = torch.empty(self.work.shape, dtype=torch.int32, device=device)
        self.pruned = torch.zeros(self.work.shape, dtype=torch.bool, device=device)
        self.squared = torch.zeros(rows, dtype=torch.float64, device=device)
        self.upper, self.layout, self.config, self.sparsity = upper, layout, config, sparsity
        self.bases = fit_bases(self.work, layout, config) if config.scale_bits == SCALE_BITS else None
        self.scale, self.zero = (torch.empty(len(layout.grids), rows, device=device) for _ in range(2))
        self.scale_codes = torch.empty(len(layout.grids), rows, dtype=torch.int32, device=device)
        self.large = {
            group.start: (index, group) for index, group in enumerate(layout.grids) if _is_large(group, layout)
        }

    def parts(self, panel: Span) -> Iterator[tuple[int, int]]:
        """Channels of a panel between two updates of all later ones.

        Mostly all of them; but a group that goes on behind its panel is fitted on weights that are up to date, so that
        all that comes before it has to be done.
        """
        edges = [panel.start, *(start for start in self.large if panel.start < start < panel.stop), panel.stop]
        return pairwise(edges)

    def choose_mask(self, panel: Span) -> None:
        """Mark what is known to be pruned before a panel is solved: all but n:m masks."""
        inside = slice(panel.start, panel.stop)
        if panel.bits == LEFT_OUT:
            self.pruned[inside] = True
        elif self.sparsity and not self.sparsity.group_m:
            count = self.sparsity.pruned(self.work.shape[1], panel.channels)
            self.pruned[inside] = prune_lowest(self.saliency(inside), count)

    def saliency(self, inside: slice) -> Tensor:
        """``w^2 / U_jj^2``, ``(channels, rows)``: the error that pruning a weight makes."""
        return self.work[inside].square().div_(self.upper.diagonal()[inside, None].square())

    def carry_on(self, errors: Tensor, done: slice) -> None:
        """Let all later channels make up for the errors ``(channels, rows)`` of those that are done."""
        self.squared += errors.square().sum(0, dtype=torch.float64)
        self.compensate(errors, done, done.stop, len(self.work))

    def compensate(self, errors: Tensor, done: slice, start: int, stop: int) -> None:
        """Let channels ``start .. stop-1`` make up for the errors ``(channels, rows)`` of those that are done."""
        if start < stop:
            self.work[start:stop].addmm_(self.upper[done, start:stop].t(), errors, alpha=-1)

    def result(self) -> QuantizedWeight:
        """What was solved."""
        return QuantizedWeight(
            codes=self.codes.t().contiguous(),
            scales=self._scales(),
            zeros=None if self.config.symmetric else self.zero.t().contiguous().to(torch.uint8),
            kept=(~self.pruned).t().contiguous() if self.sparsity else None,
            layout=self.layout,
        )

    def _scales(self) -> Scales:
        if self.bases is None:
            return self.scale.t().contiguous().half()
        return CodedScales.of(self.scale_codes.t(), self.bases.row, self.bases.group)


class DescentState:
    """Codes of a solved weight and how far off they are, all of them channels first.

    Args:
        weight: see :func:`mpfx.solve.refine`, likewise all others; not changed.

    Attributes:
        codes: ``(in, rows)`` int32.
        off: ``(in, rows)`` float32: W - Q.
        lowered: by how much the error of every row has become smaller, ``(rows,)`` float64.
        pruned: ``(in, rows)`` bool; None: nothing is.
        scale: of every grid, ``(grids, rows)`` float32.
        zero: likewise, code of the value 0.
    """

    def __init__(self, weight: Tensor, solved: QuantizedWeight) -> None:
        self.codes = solved.codes.t().clone(memory_format=torch.contiguous_format)
        self.off = solved.dequantize().neg_().add_(weight).t()
        self.lowered = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        self.pruned = None if solved.kept is None else ~solved.kept.t().contiguous()
        self.layout = solved.layout
        self.scale = decoded(solved.scales, solved.layout).t().contiguous()
        self.zero = self._middles() if solved.zeros is None else solved.zeros.t().float()

    def _middles(self) -> Tensor:
        middles = [float(1 << grid.bits - 1) for grid in self.layout.grids]
        return torch.tensor(middles, device=self.scale.device)[:, None].expand(self.scale.shape)


def _is_large(group: Span, layout: Layout) -> bool:
    panel = next(panel for panel in layout.panels if panel.start <= group.start < panel.stop)
    return group.stop > panel.stop
