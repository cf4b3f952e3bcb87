"""Refinement: coordinate descent on the codes, after the sweep has chosen scales, zeros and mask.

The sweep meets every channel once and chooses survivors panel by panel; with the mask fixed, what survives can still
be moved to better codes. With a mask that lowers the error of the layer by 10 to 20 %, without one it gains nothing.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mpfx.nn.layout import LEFT_OUT, SEGMENT, Span
from mpfx.nn.packing import QuantizedWeight
from mpfx.nn.scales import decoded
from mpfx.solve.grid import Grid, nearest

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
    state = _Descent(weight, solved, hessian, damping)
    for _ in range(passes):
        before = state.codes.clone()
        for panel in solved.layout.panels:
            if panel.bits != LEFT_OUT:
                state.solve_panel(panel)
        if torch.equal(before, state.codes):
            break
    return replace(solved, codes=state.codes.t().contiguous())


class _Descent:
    """What goes from channel to channel; weights are channels first."""

    def __init__(self, weight: Tensor, solved: QuantizedWeight, hessian: Tensor, damping: float) -> None:
        self.hessian = hessian.clone()
        self.hessian.diagonal().add_(damping * hessian.diagonal().mean())
        self.diagonal = self.hessian.diagonal().tolist()
        self.values = solved.dequantize().t().contiguous()  # (in, rows): Q
        self.off = weight.t() - self.values  # W - Q
        self.codes = solved.codes.t().contiguous().clone()
        self.pruned = None if solved.kept is None else ~solved.kept.t()
        self.grids = _grids(solved)

    def solve_panel(self, panel: Span) -> None:
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


def _grids(solved: QuantizedWeight) -> list[Grid | None]:
    """The grid of every channel; none of raw channels and those left out."""
    scales, of_channels = decoded(solved.scales, solved.layout).t().contiguous(), list[Grid | None]()
    index = 0
    for group in solved.layout.groups:
        grid = None
        if group.quantized:
            middle = torch.full_like(scales[index], 1 << group.bits - 1)
            zero = middle if solved.zeros is None else solved.zeros[:, index].float()
            grid, index = Grid(scales[index], zero, group.bits), index + 1
        of_channels += [grid] * group.channels
    return of_channels
