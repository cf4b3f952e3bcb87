"""The founding signals as features of the distortion: least squares over the units of a whole model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpfx.allocate.frontier import Curve, Frontier, GroupFrontier

_FLOOR = 1e-12
"""Of the mean of a signal or a distortion; less counts as so much, since logarithms are fitted."""


@dataclass(frozen=True)
class SignalFit:
    """A frontier with predicted distortions.

    Attributes:
        frontier: the curves' distortions are what the signals make them.
        explained: share of the variance of the logarithm of the measured distortions that they explain, over all
            units, widths and patterns, the mean of every width aside.
    """

    frontier: Frontier
    explained: float


def fit_signals(frontier: Frontier, features: Sequence[Tensor]) -> SignalFit:
    """Predict the distortion per weight of every unit of channels from its signals.

    For every width b and pattern, ``log D(b) = a_b + sum_k e_bk log s_k`` is fitted to the measured distortions by
    least squares over all units of the model: the product of powers of the signals that tells most about the harm.

    Args:
        frontier: with measured distortions.
        features: of every group ``(units, signals)``: non-negative, in units that groups share.
    """
    signals = _logarithm(torch.cat([part.double().cpu() for part in features]))
    design = torch.cat([torch.ones(len(signals), 1, dtype=torch.float64), signals], 1)
    weights = torch.cat([group.sizes.double() * sum(group.rows.values()) for group in frontier.groups])[:, None]
    groups, left, total = [list[Curve]() for _ in frontier.groups], 0.0, 0.0
    for curves in zip(*(group.curves for group in frontier.groups), strict=True):
        measured = _logarithm(torch.cat([curve.distortion for curve in curves]) / weights)
        found = torch.linalg.lstsq(design, measured, driver="gelsd").solution
        predicted = design @ found
        left += float((measured - predicted).square().sum())
        total += float((measured - measured.mean(0)).square().sum())
        parts = (predicted.exp() * weights).split([len(curve.distortion) for curve in curves])
        for mine, curve, part in zip(groups, curves, parts, strict=True):
            mine.append(replace(curve, distortion=part))
    fitted: list[GroupFrontier] = [
        replace(group, curves=tuple(mine)) for group, mine in zip(frontier.groups, groups, strict=True)
    ]
    return SignalFit(replace(frontier, groups=tuple(fitted)), 1 - left / total if total else 1.0)


def _logarithm(values: Tensor) -> Tensor:
    """Of every column, ``(n, columns)``."""
    return values.maximum(values.mean(0) * _FLOOR).clamp(min=1e-300).log()
