"""Refinement: coordinate descent on the codes, after the sweep has chosen scales, zeros and mask.

The sweep meets every channel once and chooses survivors panel by panel; with the mask fixed, what survives can still
be moved to better codes. With a mask that lowers the error of the layer by 10 to 20 %, without one it gains nothing.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpfx.nn.layout import LEFT_OUT, SEGMENT, Layout, Span
from mpfx.nn.packing import QuantizedWeight
from mpfx.solve.device import has_kernels
from mpfx.solve.grid import Grid, nearest
from mpfx.solve.state import DescentState
from mpfx.stats import exact_products

if TYPE_CHECKING:
    from mpfx.solve.cuda import KernelDescent

_LARGEST = torch.finfo(torch.float16).max


def refine(
    weight: Tensor, solved: QuantizedWeight, hessian: Tensor, damping: float = 0.01, passes: int = 1
) -> QuantizedWeight:
    """Lower ``tr((W - Q) H' (W - Q)^T)``, with ``H' = H + damping * mean(diag H) * I``, one channel after the other.

    Scales, zeros and mask stay. Every channel gets the codes that are best while all others stay, in cycles through
    the channels, so that the error never grows.

    Args:
        weight: W ``(out, in)`` float32, channels in sweep order, as it was given to the sweep; not changed.
        solved: Q, what the sweep made of it.
        hessian: H ``(in, in)`` float32, channels in sweep order; not changed.
        damping: fraction of the mean diagonal to add, the sweep's.
        passes: cycles at most; they end early where nothing changes any more.

    Returns:
        The weight with other codes.
    """
    return measured_refine(weight, solved, hessian, damping, passes)[0]


@exact_products()
def measured_refine(
    weight: Tensor, solved: QuantizedWeight, hessian: Tensor, damping: float = 0.01, passes: int = 1
) -> tuple[QuantizedWeight, Tensor]:
    """Refine, and tell what it gains; arguments are those of :func:`refine`.

    Returns:
        What :func:`refine` does, and by how much ``(W - Q) H' (W - Q)^T`` of every row has become smaller, ``(out,)``
        float64: a channel that moves by m against a pull of ``p = (H' (W - Q)^T)_j`` takes ``2 p m - H'_jj m^2`` off.
    """
    state = _solver(weight, solved.layout)(weight, solved, hessian, damping)
    for _ in range(passes):
        if not state.cycle():
            break
    return replace(solved, codes=state.result()), state.lowered


def _solver(weight: Tensor, layout: Layout) -> "type[ChannelDescent | KernelDescent]":
    """Kernels where there are any, as for the sweep."""
    if layout.segment != SEGMENT or not has_kernels(weight.device):
        return ChannelDescent
    from mpfx.solve.cuda import KernelDescent

    return KernelDescent


class ChannelDescent(DescentState):
    """A refinement in plain PyTorch, on any device."""

    def __init__(self, weight: Tensor, solved: QuantizedWeight, hessian: Tensor, damping: float) -> None:
        super().__init__(weight, solved)
        self.hessian = hessian.clone()
        self.hessian.diagonal().add_(damping * hessian.diagonal().mean())
        self.diagonal = self.hessian.diagonal().tolist()
        self.values = solved.dequantize().t().contiguous()  # (in, rows): Q
        self.grids = self._grids()

    def cycle(self) -> bool:
        """Solve all channels; whether a code has changed."""
        changed = False
        for panel in self.layout.panels:
            if panel.bits != LEFT_OUT:
                inside = slice(panel.start, panel.stop)
                before = self.codes[inside].clone()
                self._solve_panel(panel)
                changed = changed or not torch.equal(before, self.codes[inside])
        return changed

    def result(self) -> Tensor:
        """Codes, ``(rows, in)``."""
        return self.codes.t().contiguous()

    def _solve_panel(self, panel: Span) -> None:
        """Solve the channels of a panel; what they do to later panels shows when these are reached."""
        pull = self.hessian[panel.start : panel.stop] @ self.off  # (channels, rows): H' (W - Q), of the panel
        for start in range(panel.start, panel.stop, SEGMENT):
            stop = min(start + SEGMENT, panel.stop)
            moves = self._solve_segment(start, stop, pull[start - panel.start : stop - panel.start])
            if stop < panel.stop:
                pull[stop - panel.start :].addmm_(self.hessian[stop : panel.stop, start:stop], moves, alpha=-1)

    def _solve_segment(self, start: int, stop: int, pull: Tensor) -> Tensor:
        """Move channels ``start .. stop-1`` one after the other; returns by how much, ``(channels, rows)``."""
        moves = torch.zeros_like(pull)
        for j in range(start, stop):
            if self.diagonal[j] <= 0:  # no input, no damping: any value is as good
                continue
            move = moves[j - start]
            torch.sub(self._best(j, pull[j - start]), self.values[j], out=move)
            self.lowered += move * torch.sub(2 * pull[j - start], move, alpha=self.diagonal[j])
            self.values[j] += move
            self.off[j] -= move
            if j + 1 < stop:
                pull[j + 1 - start :].addr_(self.hessian[j, j + 1 : stop], move, alpha=-1)
        return moves

    def _best(self, j: int, pull: Tensor) -> Tensor:
        """Set a channel's codes to the best ones; returns their values, ``(rows,)``."""
        target = torch.add(self.values[j], pull, alpha=1 / self.diagonal[j])
        grid = self.grids[j]
        codes, values = nearest(target.clamp_(-_LARGEST, _LARGEST) if grid is None else target, grid)
        if self.pruned is not None:
            codes, values = codes.masked_fill_(self.pruned[j], 0), values.masked_fill_(self.pruned[j], 0.0)
        self.codes[j] = codes
        return values

    def _grids(self) -> list[Grid | None]:
        """The grid of every channel; none of raw channels and those left out."""
        of_channels, index = list[Grid | None](), 0
        for group in self.layout.groups:
            grid = None
            if group.quantized:
                grid, index = Grid(self.scale[index], self.zero[index], group.bits), index + 1
            of_channels += [grid] * group.channels
        return of_channels
