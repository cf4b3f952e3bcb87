"""The sweep on a CUDA device: one launch a panel, and one matrix product that carries its errors to later panels."""

from collections.abc import Container, Iterator
from functools import cache

import torch
from torch import Tensor

from mpfx.nn.layout import PANEL, SCALE_BITS, SEGMENT, WIDTHS, Layout, Span
from mpfx.nn.packing import QuantizedWeight
from mpfx.nn.scales import FACTORS
from mpfx.solve.coded import tried
from mpfx.solve.grid import GridConfig, as_float16, shrinks
from mpfx.solve.mask import Sparsity
from mpfx.solve.panels import fit_kernel, panel_kernel
from mpfx.solve.state import SweepState

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
        below, pad = (0, 0, 0, missing), torch.nn.functional.pad
        self.work, self.codes, self.pruned = (pad(t, below) for t in (self.work, self.codes, self.pruned))
        self.upper = pad(self.upper, (0, missing, 0, missing))
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
        self.compensate(self.errors[: stop - start], slice(start, stop), stop, len(self.work))

    def _programs(self) -> tuple[int]:
        return (-(-self.rows // self.options["ROWS"]),)

    def _grids(self) -> tuple[Tensor | None, ...]:
        bases = (None, None) if self.bases is None else (self.bases.row, self.bases.group)
        return (self.factors, self.steps, *bases, self.scale, self.zero, self.scale_codes)


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
