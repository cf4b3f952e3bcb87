"""The joint prune-and-quantize sweep (optimal brain surgeon, channel by channel).

One pass over the channels of a weight in their sweep order: prune, round, and let the channels still to come make up
for the error, as ``H^-1`` says they can. Pruning and rounding error travel together (SparseGPT, Frantar & Alistarh
2023, on top of GPTQ, Frantar et al. 2023); widths may differ from channel to channel.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpfx.nn.layout import LEFT_OUT, RAW_BITS, SEGMENT, Layout, Span
from mpfx.nn.packing import QuantizedWeight
from mpfx.solve.coded import fit_coded_grid
from mpfx.solve.device import has_kernels
from mpfx.solve.factor import is_finite
from mpfx.solve.grid import Grid, GridConfig, fit_grid, nearest
from mpfx.solve.mask import Sparsity, prune_n_of_m
from mpfx.solve.state import SweepState
from mpfx.stats import exact_products

if TYPE_CHECKING:
    from mpfx.solve.cuda import KernelSweep

_TILE = 1024  # channels of a symmetric product that are computed at a time

_CANCELLED = 0.05  # share of a damped error below which too few digits are left once the damping's own is taken off


def sweep(
    weight: Tensor, upper: Tensor, layout: Layout, grid: GridConfig, sparsity: Sparsity | None = None
) -> QuantizedWeight:
    """Prune and quantize a weight so that its output changes least.

    Args:
        weight: ``(out, in)`` float32, channels in sweep order; not changed. The rows of all sites of an input group
            stacked.
        upper: ``(in, in)`` float32 with ``H^-1 = U^T U``, channels in sweep order
            (:func:`mpfx.solve.factor.factorise`).
        layout: bit width of every channel, groups and panels. Channels that are left out become zero, and later ones
            make up for that too.
        grid: how scales are fitted. Each is fitted once, on the weights of its group as compensated so far; the bases
            of coded ones on the weights as they are given.
        sparsity: what to prune; unstructured masks take the lowest ``w^2 / U_jj^2`` of a panel.

    Returns:
        Codes, scales, zeros and mask; ``.dequantize()`` is the solved weight.

    Raises:
        ValueError: if weights are not finite, or too large for float16 scales or bases or raw float16 channels.
    """
    return measured_sweep(weight, upper, layout, grid, sparsity)[0]


@exact_products()
def measured_sweep(
    weight: Tensor, upper: Tensor, layout: Layout, grid: GridConfig, sparsity: Sparsity | None = None
) -> tuple[QuantizedWeight, Tensor]:
    """Sweep, and tell the error that is made; arguments, and what is raised, are those of :func:`sweep`.

    Returns:
        What :func:`sweep` does, and of every row ``(W - Q) H' (W - Q)^T``, with H' the Hessian that was factored, its
        damping included; ``(out,)`` float64. No product is needed for that: with ``E = (W - Q) U^-1`` the errors that
        are pushed on and ``H'^-1 = U^T U``, it is ``E E^T``.
    """
    if not is_finite(weight):
        raise ValueError("the weights hold NaN or infinity: the layer is damaged.")
    state = _solver(weight, layout)(weight, upper, layout, grid, sparsity or Sparsity())
    solved = state.solve()
    if RAW_BITS in layout.widths and not is_finite(solved.dequantize()):
        raise ValueError("the solved weights are not finite: raw channels hold values that float16 cannot.")
    return solved, state.squared


def _solver(weight: Tensor, layout: Layout) -> "type[ChannelSweep | KernelSweep]":
    """Kernels where there are any: on CUDA devices, and for channels in segments of one width."""
    if layout.segment != SEGMENT or not has_kernels(weight.device):
        return ChannelSweep
    from mpfx.solve.cuda import KernelSweep

    return KernelSweep


class ChannelSweep(SweepState):
    """A sweep in plain PyTorch, on any device."""

    def __init__(self, weight: Tensor, upper: Tensor, layout: Layout, config: GridConfig, sparsity: Sparsity) -> None:
        super().__init__(weight, upper, layout, config, sparsity)
        self.diagonal = upper.diagonal().tolist()
        self.groups = {group.start: group for group in layout.groups}
        self.fitted = 0
        self.grid: Grid | None = None  # of the group that is being solved

    def solve(self) -> QuantizedWeight:
        """Solve all channels."""
        for panel in self.layout.panels:
            self._solve_panel(panel)
        return self.result()

    def _solve_panel(self, panel: Span) -> None:
        self.choose_mask(panel)
        for first, last in self.parts(panel):
            errors = torch.empty(last - first, self.work.shape[1], dtype=self.work.dtype, device=self.work.device)
            for start in range(first, last, SEGMENT):
                stop = min(start + SEGMENT, last)
                self._solve_segment(start, stop, panel, errors[start - first : stop - first])
                self.compensate(errors[start - first : stop - first], slice(start, stop), stop, last)
            self.carry_on(errors, slice(first, last))

    def _solve_segment(self, start: int, stop: int, panel: Span, errors: Tensor) -> None:
        """Solve channels ``start .. stop-1`` one after the other; writes ``(w - q) / U_jj`` into ``errors``."""
        for j in range(start, stop):
            if self.sparsity.group_m and (j - panel.start) % self.sparsity.group_m == 0 and panel.bits != LEFT_OUT:
                self._prune_next(j, panel.stop)
            if j in self.groups:
                self._start_group(self.groups[j])
            w = self.work[j]
            self.codes[j], q = self._quantize(w, self.pruned[j], panel)
            torch.div(w - q, self.diagonal[j], out=errors[j - start])
            if j + 1 < stop:  # (channels left in the segment, rows) -= U_j,later (outer) error
                self.work[j + 1 : stop].addr_(self.upper[j, j + 1 : stop], errors[j - start], alpha=-1)

    def _quantize(self, w: Tensor, pruned: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        if span.bits == LEFT_OUT:
            return torch.zeros_like(w, dtype=torch.int32), torch.zeros_like(w)
        codes, q = nearest(w, self.grid)
        if self.sparsity:
            codes, q = codes.masked_fill_(pruned, 0), q.masked_fill_(pruned, 0.0)
        return codes, q

    def _start_group(self, group: Span) -> None:
        if not group.quantized:
            self.grid = None
            return
        inside = slice(group.start, group.stop)
        weight = self.work[inside]
        if self.sparsity.group_m:  # the choice is made again, m channels at a time, when the sweep gets there
            ahead = prune_n_of_m(self.saliency(inside), self.sparsity)
            weight = weight.masked_fill(ahead, 0.0)
        elif self.sparsity:
            weight = weight.masked_fill(self.pruned[inside], 0.0)
        self.grid = self._fit(weight, group.bits)
        self.scale[self.fitted], self.zero[self.fitted] = self.grid.scale, self.grid.zero
        self.fitted += 1

    def _fit(self, weight: Tensor, bits: int) -> Grid:
        if self.bases is None:
            return fit_grid(weight, bits, self.config)
        grid, self.scale_codes[self.fitted] = fit_coded_grid(weight, bits, self.config, self.bases.product(self.fitted))
        return grid

    def _prune_next(self, start: int, stop: int) -> None:
        inside = slice(start, min(start + self.sparsity.group_m, stop))
        self.pruned[inside] = prune_n_of_m(self.saliency(inside), self.sparsity)


def layer_error(
    weight: Tensor, solved: Tensor, hessian: Tensor, damped: Tensor | None = None, ridge: float = 0.0
) -> float:
    """Relative squared error of the layer's output: ``tr(D H D^T) / tr(W H W^T)`` with ``D = W - solved``.

    Args:
        weight: ``(out, in)``.
        solved: ``(out, in)``, channels in the same order.
        hessian: ``(in, in)``, likewise.
        damped: of every row ``d (H + ridge I) d^T``, ``(out,)`` float64, where that is known (:func:`measured_sweep`):
            it saves half of the work.
        ridge: see there (:attr:`mpfx.solve.Factor.ridge`).

    Returns:
        The ratio; 0 where the weight's own output is zero.
    """
    size = quadratic_form(weight, hessian)
    if size <= 0:
        return 0.0
    off = weight - solved
    if damped is not None:
        total = float(damped.sum())
        error = total - ridge * float(torch.linalg.vector_norm(off, dtype=torch.float64)) ** 2
        if error > _CANCELLED * total:
            return error / size
    return quadratic_form(off, hessian) / size


@exact_products()
def quadratic_form(rows: Tensor, hessian: Tensor) -> float:
    """``tr(X H X^T)`` of a symmetric H: what is left of its diagonal is not multiplied.

    Args:
        rows: ``(rows, in)``.
        hessian: ``(in, in)``.
    """
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for start in range(0, len(hessian), _TILE):
        inside, later = slice(start, start + _TILE), slice(start + _TILE, None)
        here = rows[:, inside]
        product = here @ hessian[inside, inside]
        if start + _TILE < len(hessian):
            product.addmm_(rows[:, later], hessian[later, inside], alpha=2)
        total += product.mul_(here).sum(dtype=torch.float64)
    return float(total)
