"""Rounding to nearest, without compensation: what widths and scales are compared by before anything is solved."""

from collections import defaultdict

import torch
from torch import Tensor

from mpfx.nn.layout import LEFT_OUT, RAW_BITS, SCALE_BITS, Layout
from mpfx.solve.coded import ScaleBases, fit_bases, fit_coded_grid
from mpfx.solve.grid import GridConfig, fit_grid, nearest


def round_nearest(
    weight: Tensor,
    layout: Layout,
    config: GridConfig,
    pruned: Tensor | None = None,
    bases: ScaleBases | None = None,
) -> Tensor:
    """Round every group of a layout to its own grid.

    Args:
        weight: ``(rows, in)`` float32, channels in sweep order; not changed.
        layout: of the channels.
        config: how grids are fitted.
        pruned: bool ``(rows, in)``, True where the result is zero; None: nowhere.
        bases: of coded scales, where they are known: they depend on where groups lie, not on their widths.

    Returns:
        ``(rows, in)`` float32: what the rounded weight stands for.
    """
    kept = weight if pruned is None else weight.masked_fill(pruned, 0.0)
    if bases is None and config.scale_bits == SCALE_BITS:
        bases = fit_bases(weight.t(), layout, config)
    rounded = torch.zeros_like(weight)
    alike: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for index, group in enumerate(layout.grids):
        alike[group.bits, group.channels].append((index, group.start))
    for (bits, channels), members in alike.items():
        # All groups of one width in one go, as more rows of one group.
        starts = torch.tensor([start for _, start in members], device=weight.device)
        columns = (starts[:, None] + torch.arange(channels, device=weight.device)).flatten()
        parts = kept[:, columns].unflatten(1, (-1, channels)).permute(2, 1, 0).flatten(1)  # (channels, groups x rows)
        if bases is None:
            grid = fit_grid(parts, bits, config)
        else:
            grid, _ = fit_coded_grid(parts, bits, config, bases.products([index for index, _ in members]))
        values = nearest(parts, grid)[1].unflatten(1, (len(members), -1))  # (channels, groups, rows)
        rounded[:, columns] = values.permute(2, 1, 0).flatten(1)
    for run in layout.runs:
        if run.bits == RAW_BITS:
            rounded[:, run.start : run.stop] = nearest(kept[:, run.start : run.stop], None)[1]
        assert run.quantized or run.bits in (RAW_BITS, LEFT_OUT)
    return rounded if pruned is None else rounded.masked_fill_(pruned, 0.0)
