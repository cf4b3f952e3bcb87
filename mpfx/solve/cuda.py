"""Solving on a CUDA device: one launch a panel, and one matrix product between a panel and all other channels."""

from collections.abc import Container, Iterator
from functools import cache

import torch
from torch import Tensor

from mpfx.nn.layout import LEFT_OUT, PANEL, SCALE_BITS, SEGMENT, WIDTHS, Layout, Span
from mpfx.nn.packing import QuantizedWeight
from mpfx.nn.scales import FACTORS
from mpfx.solve.coded import tried
from mpfx.solve.descent import descent_kernel
from mpfx.solve.grid import GridConfig, as_float16, shrinks
from mpfx.solve.mask import Sparsity
from mpfx.solve.panels import fit_kernel, panel_kernel
from mpfx.solve.state import DescentState, SweepState

_ROWS = 32  # of a program: one warp, one row a lane
_AHEAD = 4  # later channels that make up for errors at a time
_AT_A_TIME = 8  # channels in registers; fewer where n of fewer are chosen, on weights that are up to date


class KernelSweep(SweepState):
    """A sweep whose panels are solved by kernels.

    Channels are padded to whole segments: with weights of zero, which no other channel sees.
    """

    def __init__(self, weight: Tensor, upper: Tensor, layout: Layout, config: GridConfig, sparsity: Sparsity) -> None:
        super().__init__(weight, upper, layout, config, sparsity)
        self.channels, self.rows = self.work.shape
        self._pad(-self.channels % SEGMENT)
        self.upper = self.upper.contiguous()
        self.inverse = self.upper.diagonal().reciprocal()
        self.errors = torch.empty(PANEL, self.rows, device=weight.device)
        self.table = torch.tensor(_table(layout, self.large), dtype=torch.int32, device=weight.device)
        self.factors, self.steps = _constants(weight.device)
        self.unstructured = bool(sparsity) and not sparsity.group_m
        self.options = _options(config, sparsity)

    def _pad(self, missing: int) -> None:
        if not missing:
            return
        self.work, self.codes, self.pruned = (_padded(t, missing) for t in (self.work, self.codes, self.pruned))
        self.upper = _padded(self.upper, missing, missing)
        self.upper.diagonal()[-missing:] = 1.0

    def solve(self) -> QuantizedWeight:
        """Solve all channels."""
        panels = {panel.start: panel for panel in self.layout.panels}
        for start, stop in self._launches():
            for panel in (panels[at] for at in range(start, stop, SEGMENT) if at in panels):
                self.choose_mask(panel)
            if start in self.large:
                self._fit(*self.large[start])
            self._solve_channels(start, min(stop + -stop % SEGMENT, len(self.work)))
        for name in ("work", "codes", "pruned"):
            setattr(self, name, getattr(self, name)[: self.channels])
        if self.bases is None:
            self.scale = as_float16(self.scale)
        return self.result()

    def _launches(self) -> Iterator[tuple[int, int]]:
        """Channels that are solved by one launch: parts of panels, joined where masks and large groups allow."""
        first = last = 0
        for panel in self.layout.panels:
            for start, stop in self.parts(panel):
                apart = self.unstructured or start in self.large or stop - first > PANEL
                if apart and first < last:
                    yield first, last
                    first = start
                last = stop
        yield first, last

    def _fit(self, index: int, group: Span) -> None:
        fit_kernel[self._programs()](
            self.work, self.pruned.view(torch.int8), self.inverse, *self._grids(),
            index, group.start, group.stop + -group.stop % SEGMENT, self.channels, self.rows, group.bits,
            **self.options,
        )  # fmt: skip

    def _solve_channels(self, start: int, stop: int) -> None:
        count = min(_AT_A_TIME, self.sparsity.group_m or _AT_A_TIME)
        panel_kernel[self._programs()](
            self.work, self.pruned.view(torch.int8), self.codes, self.errors, self.upper, self.inverse, self.table,
            *self._grids(), start // SEGMENT, stop // SEGMENT, self.channels, self.rows, len(self.upper),
            COUNT=count, AHEAD=min(_AHEAD, count), **self.options,
        )  # fmt: skip
        self.carry_on(self.errors[: stop - start], slice(start, stop))

    def _programs(self) -> tuple[int]:
        return (-(-self.rows // _ROWS),)

    def _grids(self) -> tuple[Tensor | None, ...]:
        bases = (None, None) if self.bases is None else (self.bases.row, self.bases.group)
        return (self.factors, self.steps, *bases, self.scale, self.zero, self.scale_codes)


class KernelDescent(DescentState):
    """A refinement whose panels are solved by kernels.

    Channels are padded to whole segments: with codes of zero that stay, as no input reaches them.
    """

    def __init__(self, weight: Tensor, solved: QuantizedWeight, hessian: Tensor, damping: float) -> None:
        super().__init__(weight, solved)
        self.channels, rows = self.codes.shape
        self.off = self.off.contiguous()
        self.ridge = float(damping * hessian.diagonal().mean())
        diagonal = hessian.diagonal() + self.ridge
        self.inverse = torch.where(diagonal > 0, diagonal.reciprocal(), 0.0)  # 0: any value is as good, it stays
        self.hessian, self.zero = hessian.contiguous(), self.zero.contiguous()
        self._pad(-self.channels % SEGMENT)
        self.table = torch.tensor(_table(self.layout, ()), dtype=torch.int32, device=weight.device)
        self.pull = torch.empty(PANEL, rows, device=weight.device)
        self.changed = torch.zeros(1, dtype=torch.int32, device=weight.device)

    def _pad(self, missing: int) -> None:
        if not missing:
            return
        self.codes, self.off = _padded(self.codes, missing), _padded(self.off, missing)
        self.pruned = None if self.pruned is None else _padded(self.pruned, missing)
        self.hessian, self.inverse = _padded(self.hessian, missing, missing), _padded(self.inverse[:, None], missing)

    def cycle(self) -> bool:
        """Solve all channels; whether a code has changed."""
        self.changed.zero_()
        for start in range(0, len(self.codes), PANEL):
            widths = self.layout.widths[start // SEGMENT : (start + PANEL) // SEGMENT]
            if any(bits != LEFT_OUT for bits in widths):
                self._solve_channels(start, start + len(widths) * SEGMENT)
        return bool(self.changed)

    def result(self) -> Tensor:
        """Codes, ``(rows, in)``."""
        return self.codes[: self.channels].t().contiguous()

    def _solve_channels(self, start: int, stop: int) -> None:
        inside, rows = slice(start, stop), self.codes.shape[1]
        pull = self.pull[: stop - start]
        torch.addmm(self.off[inside], self.hessian[inside], self.off, beta=self.ridge, out=pull)
        descent_kernel[(-(-rows // _ROWS),)](
            pull, self.off, self.codes, None if self.pruned is None else self.pruned.view(torch.int8), self.hessian,
            self.inverse, self.table, self.scale, self.zero, self.changed, self.lowered,
            start // SEGMENT, stop // SEGMENT, rows, len(self.hessian),
            MASKED=self.pruned is not None, COUNT=_AT_A_TIME, AHEAD=_AHEAD, ROWS=_ROWS, num_warps=1,
        )  # fmt: skip


@torch.no_grad()
def compile_kernels(config: GridConfig, sparsity: Sparsity, refined: bool, device: torch.device) -> None:
    """Solve a small weight as others will be: what compiles for it serves them too. Takes seconds, the first time.

    Meant for a thread beside the one that uses the device: it works on a stream of its own.

    Args:
        config: how grids are fitted.
        sparsity: what is pruned.
        refined: whether codes are refined after the sweep.
        device: a CUDA device.
    """
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        weight = torch.linspace(-1, 1, _ROWS * PANEL, device=device).view(_ROWS, PANEL)
        hessian, layout = torch.eye(PANEL, device=device), Layout(PANEL, (4,) * (PANEL // SEGMENT), config.group_size)
        solved = KernelSweep(weight, hessian, layout, config, sparsity).solve()
        if refined:
            KernelDescent(weight, solved, hessian, 0.01).cycle()
    stream.synchronize()


def _padded(values: Tensor, below: int, right: int = 0) -> Tensor:
    """More rows, and columns, of zeros."""
    return torch.nn.functional.pad(values, (0, right, 0, below))


def _options(config: GridConfig, sparsity: Sparsity) -> dict[str, int]:
    return {
        "MASKED": bool(sparsity),
        "KEEP_N": sparsity.keep_n,
        "GROUP_M": sparsity.group_m,
        "SYMMETRIC": config.symmetric,
        "CODED": config.scale_bits == SCALE_BITS,
        "TRIED": len(shrinks(config)) if config.scale_bits != SCALE_BITS else tried(config),
        "ROWS": _ROWS,
        "num_warps": 1,
    }


def _table(layout: Layout, large: Container[int]) -> list[tuple[int, int, int, int]]:
    """Per segment: width, grid (-1: none), and the padded span of its group if panels are to fit that (else -1)."""
    grids = {group.start: index for index, group in enumerate(layout.grids)}
    rows = []
    for group in layout.groups:
        fitted = group.quantized and group.start not in large
        span = (group.start, group.stop + -group.stop % SEGMENT) if fitted else (-1, -1)
        rows += [(group.bits, grids.get(group.start, -1), *span)] * -(-group.channels // SEGMENT)
    return rows


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """What coded scales are made of: factors by code, steps by width."""
    steps = [1.0, *(1 / ((1 << bits) - 1) for bits in WIDTHS)]
    return torch.tensor(FACTORS, dtype=torch.float32, device=device), torch.tensor(steps, device=device)
