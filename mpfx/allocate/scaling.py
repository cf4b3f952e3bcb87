"""Dynamic channel scaling: give channels with large activations finer steps, at the expense of the others.

A channel's weights are multiplied by ``s`` before rounding and its input is divided by ``s``; rounding then does less
to what ``s`` makes large (AWQ, Lin et al. 2024; SmoothQuant, Xiao et al. 2023). How much is searched for every input
group.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpfx.nn.layout import Layout
from mpfx.solve import GridConfig, round_nearest
from mpfx.stats import ChannelMoments

EXPONENTS = tuple(step / 10 for step in range(11))
"""Powers of the activations' size that are tried; 0 leaves everything as it is."""

SAMPLE = 128
"""Rows that are enough to rank eleven candidates."""


@dataclass(frozen=True)
class ChannelScales:
    """What the search found.

    Attributes:
        scales: positive factor of every unit, ``(units,)`` float32, geometric mean about 1.
        exponent: the power that won.
        gain: output error after rounding, relative to that without scales: below 1, or 1 for exponent 0.
    """

    scales: Tensor
    exponent: float
    gain: float


def search_scales(
    weight: Tensor,
    moments: ChannelMoments,
    unit: Tensor,
    layout: Layout,
    grid: GridConfig,
    *,
    powers_of_two: bool = False,
) -> ChannelScales:
    """Find the power of the activations' size whose scales lose least when the weight is rounded to nearest.

    Args:
        weight: ``(rows, in)`` float32, channels in sweep order: of all sites of the input group, or a sample.
        moments: of their input, channels likewise; may be weighted by sensitivities.
        unit: which unit a channel belongs to, ``(in,)``, likewise: channels of one unit share a factor.
        layout: width of every channel, and which channels share a grid.
        grid: how grids are fitted.
        powers_of_two: allow these only, which half precision multiplies by without rounding.

    Returns:
        The scales with the least ``sum D_rj^2 H_jj``, ``D`` the change of the weight and H the Hessian: what
        ``tr(D H D^T)`` is on average, as the signs of rounding errors are independent of one another. Measured on
        SmolLM2-135M: the errors of all rows come out as with the whole Hessian, which a sample of rows makes noisy.
    """
    units = int(unit.max()) + 1
    unit, size = unit.to(weight.device), moments.mean_abs
    pooled = size.new_zeros(units).index_add_(0, unit, size) / torch.bincount(unit, minlength=units)
    pooled = pooled.clamp(min=float(pooled.max()) * 1e-4 or 1.0).log()
    # Many times as fast, and the candidates rank alike.
    grid = replace(grid, clip_search=False, scale_bits=16)
    sample = weight[:: -(-len(weight) // SAMPLE)]
    powers = torch.tensor(EXPONENTS, device=weight.device)[:, None]
    scales = powers * (pooled - pooled.mean())  # (powers, units), logarithms
    scales = (scales / math.log(2)).round().exp2() if powers_of_two else scales.exp()
    of_channels = scales[:, None, unit]
    # All candidates in one go, as more rows of one weight.
    scaled = (sample * of_channels).flatten(0, 1)
    change = (round_nearest(scaled, layout, grid) - scaled).unflatten(0, (len(powers), -1)) / of_channels
    errors = change.square_().mul_(moments.power).sum((1, 2), dtype=torch.float64).tolist()
    best = min(range(len(errors)), key=errors.__getitem__)  # the smallest power among equals
    gain = errors[best] / errors[0] if errors[0] > 0 else 1.0
    return ChannelScales(scales[best], EXPONENTS[best], gain)
