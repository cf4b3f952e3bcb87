"""The founding score: five signals per channel."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mpfx.stats.moments import Moments


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """Weights of the five signals in a channel's importance.

    Args:
        activation: of mean abs(x_j).
        hessian: of 1 / [H^-1]_jj.
        weight: of mean_r abs(W_rj).
        output: of sqrt(mean_r W_rj^2 * mean x_j^2).
        stability: of var(x_j).
    """

    activation: float = 0.25
    hessian: float = 0.25
    weight: float = 0.15
    output: float = 0.25
    stability: float = 0.10

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"Expected `importance.{field.name}` to be at least 0 and finite but got {value}.")
        if not sum(getattr(self, field.name) for field in fields(self)):
            raise ValueError("Expected at least one weight of `importance` to be above 0 but got only zeros.")


def signals(weight: Tensor, moments: Moments, inverse_diagonal: Tensor) -> dict[str, Tensor]:
    """Compute the five signals, each divided by its mean over the channels.

    Without that the sum would be decided by whichever signal has the largest unit.

    Args:
        weight: ``(out, in)``, the rows of all sites that read the input.
        moments: of the input.
        inverse_diagonal: diagonal of the damped inverse Hessian, ``(in,)``.

    Returns:
        By name, ``(in,)`` each, with mean 1 (all zeros where the signal is zero everywhere).
    """
    raw = raw_signals(weight, moments, inverse_diagonal)
    return {name: signal / signal.mean().clamp(min=torch.finfo(torch.float32).tiny) for name, signal in raw.items()}


def raw_signals(weight: Tensor, moments: Moments, inverse_diagonal: Tensor) -> dict[str, Tensor]:
    """The five signals in units of their own, comparable between inputs; arguments as of :func:`signals`.

    The second one is the *reciprocal* of diag(H^-1): a large entry of the inverse marks a channel that is cheap to
    change (``w^2 / [H^-1]_jj`` is what pruning it costs), so the entry itself, as the founding text wrote it, ranks
    the channels upside down.
    """
    mean_square = weight.square().mean(0)
    return {
        "activation": moments.mean_abs,
        "hessian": 1 / inverse_diagonal,
        "weight": weight.abs().mean(0),
        "output": (mean_square * moments.mean_square).sqrt(),
        "stability": moments.variance,
    }


def importance(parts: dict[str, Tensor], config: ImportanceConfig) -> Tensor:
    """Weighted mean of the signals, ``(in,)``; its mean over the channels is 1.

    Args:
        parts: from :func:`signals`.
        config: the weights; only their ratios count.
    """
    share = {name: getattr(config, name) for name in parts}
    total = sum(share.values())
    return torch.stack([parts[name] * (share[name] / total) for name in parts]).sum(0)


def block_means(scores: Tensor, size: int) -> Tensor:
    """Replace every score by the mean over its block of ``size`` adjacent channels, ``(in,)``.

    With n:m sparsity a block of m channels has to stay together, so it is ranked as one.
    """
    return torch.cat([block.mean().expand(len(block)) for block in scores.split(size)])
