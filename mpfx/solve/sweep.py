"""The joint prune-and-quantize sweep (optimal brain surgeon, channel by channel).

One pass over the channels of a weight in their sweep order: prune, round, and let the channels still to come make up
for the error, as ``H^-1`` says they can. Pruning and rounding error travel together (SparseGPT, Frantar & Alistarh
2023, on top of GPTQ, Frantar et al. 2023); widths may differ from channel to channel.
"""

import torch
from torch import Tensor

from mpfx.nn.layout import LEFT_OUT, SCALE_BITS, SEGMENT, Layout, Span
from mpfx.nn.packing import QuantizedWeight
from mpfx.nn.scales import CodedScales, Scales
from mpfx.solve.coded import fit_bases, fit_coded_grid
from mpfx.solve.grid import Grid, GridConfig, fit_grid, nearest
from mpfx.solve.mask import Sparsity, prune_lowest, prune_n_of_m


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
    state = _Sweep(weight, upper, layout, grid, sparsity or Sparsity())
    for panel in layout.panels:
        state.solve_panel(panel)
    solved = state.result()
    if not bool(torch.isfinite(solved.dequantize()).all()):
        raise ValueError("the solved weights are not finite: raw channels hold values that float16 cannot.")
    return solved


class _Sweep:
    """What the sweep carries from panel to panel; weights are channels first."""

    def __init__(self, weight: Tensor, upper: Tensor, layout: Layout, config: GridConfig, sparsity: Sparsity) -> None:
        self.work = weight.t().contiguous()  # (in, rows): what is still to be solved, compensated so far
        if self.work.data_ptr() == weight.data_ptr():
            self.work = self.work.clone()
        self.codes = torch.empty(self.work.shape, dtype=torch.int32, device=weight.device)
        self.pruned = torch.zeros(self.work.shape, dtype=torch.bool, device=weight.device)
        self.upper, self.diagonal = upper, upper.diagonal().tolist()
        self.layout, self.config, self.sparsity = layout, config, sparsity
        self.grids: list[Grid] = []
        self.bases = fit_bases(self.work, layout, config) if config.scale_bits == SCALE_BITS else None
        self.scale_codes: list[Tensor] = []
        self.groups = {group.start: group for group in layout.groups}

    def solve_panel(self, panel: Span) -> None:
        rows = self.work.shape[1]
        inside = slice(panel.start, panel.stop)
        if panel.bits == LEFT_OUT:
            self.pruned[inside] = True
        elif self.sparsity and not self.sparsity.group_m:
            saliency = self._saliency(inside)
            self.pruned[inside] = prune_lowest(saliency, self.sparsity.pruned(rows, panel.channels))
        errors = torch.empty(panel.channels, rows, dtype=self.work.dtype, device=self.work.device)
        for start in range(panel.start, panel.stop, SEGMENT):
            stop = min(start + SEGMENT, panel.stop)
            self._solve_segment(start, stop, panel, errors[start - panel.start : stop - panel.start])
            self._compensate(errors[start - panel.start : stop - panel.start], slice(start, stop), stop, panel.stop)
        self._compensate(errors, inside, panel.stop, len(self.work))

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
            self.work[j] = q
            if j + 1 < stop:  # (channels left in the segment, rows) -= U_j,later (outer) error
                self.work[j + 1 : stop].addr_(self.upper[j, j + 1 : stop], errors[j - start], alpha=-1)

    def _quantize(self, w: Tensor, pruned: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        if span.bits == LEFT_OUT:
            return torch.zeros_like(w, dtype=torch.int32), torch.zeros_like(w)
        codes, q = nearest(w, self.grids[-1] if span.quantized else None)
        if self.sparsity:
            codes, q = codes.masked_fill_(pruned, 0), q.masked_fill_(pruned, 0.0)
        return codes, q

    def _start_group(self, group: Span) -> None:
        if not group.quantized:
            return
        inside = slice(group.start, group.stop)
        weight = self.work[inside]
        if self.sparsity.group_m:  # the choice is made again, m channels at a time, when the sweep gets there
            ahead = prune_n_of_m(self._saliency(inside), self.sparsity)
            weight = weight.masked_fill(ahead, 0.0)
        elif self.sparsity:
            weight = weight.masked_fill(self.pruned[inside], 0.0)
        if self.bases is None:
            self.grids.append(fit_grid(weight, group.bits, self.config))
            return
        grid, codes = fit_coded_grid(weight, group.bits, self.config, self.bases.product(len(self.grids)))
        self.grids.append(grid)
        self.scale_codes.append(codes)

    def _prune_next(self, start: int, stop: int) -> None:
        inside = slice(start, min(start + self.sparsity.group_m, stop))
        self.pruned[inside] = prune_n_of_m(self._saliency(inside), self.sparsity)

    def _saliency(self, inside: slice) -> Tensor:
        return self.work[inside].square() / self.upper.diagonal()[inside, None].square()

    def _compensate(self, errors: Tensor, done: slice, start: int, stop: int) -> None:
        if start < stop:
            self.work[start:stop].addmm_(self.upper[done, start:stop].t(), errors, alpha=-1)

    def result(self) -> QuantizedWeight:
        zeros = self._columns([grid.zero for grid in self.grids])
        return QuantizedWeight(
            codes=self.codes.t().contiguous(),
            scales=self._scales(),
            zeros=None if self.config.symmetric else zeros.to(torch.uint8),
            kept=(~self.pruned).t().contiguous() if self.sparsity else None,
            layout=self.layout,
        )

    def _scales(self) -> Scales:
        if self.bases is None:
            return self._columns([grid.scale for grid in self.grids]).half()
        return CodedScales.of(self._columns(self.scale_codes), self.bases.row, self.bases.group)

    def _columns(self, of_grids: list[Tensor]) -> Tensor:
        """One column per grid, ``(rows, grids)``."""
        return torch.stack(of_grids, 1) if of_grids else self.work.new_empty(self.work.shape[1], 0)


def layer_error(weight: Tensor, solved: Tensor, hessian: Tensor) -> float:
    """Relative squared error of the layer's output: ``tr(D H D^T) / tr(W H W^T)`` with ``D = W - solved``.

    Args:
        weight: ``(out, in)``.
        solved: ``(out, in)``, channels in the same order.
        hessian: ``(in, in)``, likewise.

    Returns:
        The ratio; 0 where the weight's own output is zero.
    """
    off = weight - solved
    size = float((weight @ hessian).mul_(weight).sum())
    return float((off @ hessian).mul_(off).sum()) / size if size > 0 else 0.0
