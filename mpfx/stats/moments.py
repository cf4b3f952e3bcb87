"""Statistics of what a layer reads, accumulated batch by batch."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """What was seen of one input, per channel.

    Attributes:
        hessian: ``2/n * sum_t c_t x_t x_t^T``, ``(in, in)`` float32: of the squared error of a layer's output.
        mean_abs: mean of abs(x), ``(in,)`` float32.
        mean: mean of x, ``(in,)`` float32.
        variance: of x, ``(in,)`` float32.
        tokens: n.
        drift: ``2/n * sum_t c_t (y_t - x_t) x_t^T``, ``(in, in)`` float32, where y is what x would be in another model
            (the dense one); None: not observed.
    """

    hessian: Tensor
    mean_abs: Tensor
    mean: Tensor
    variance: Tensor
    tokens: int
    drift: Tensor | None = None

    @property
    def mean_square(self) -> Tensor:
        """Mean of x^2, ``(in,)``."""
        return self.variance + self.mean.square()

    def reordered(self, order: Tensor) -> "Moments":
        """The statistics of ``x[order]``, ``(in,)``."""
        hessian = self.hessian[order][:, order]
        drift = None if self.drift is None else self.drift[order][:, order]
        return Moments(hessian, self.mean_abs[order], self.mean[order], self.variance[order], self.tokens, drift)


class MomentAccumulator:
    """Sums behind :class:`Moments`: update with batches, merge with another rank's, finalise.

    Args:
        in_features: channels of the input.
        device: where the sums lie.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        # Apple's GPUs have no float64.
        exact = torch.float32 if torch.device(device).type == "mps" else torch.float64

        def zeros(*shape: int, dtype: torch.dtype = exact) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._outer = zeros(in_features, in_features, dtype=torch.float32)
        self._absolute, self._sum, self._square = zeros(in_features), zeros(in_features), zeros(in_features)
        self._drift: Tensor | None = None
        self.tokens = 0

    @torch.no_grad()
    def update(self, x: Tensor, weights: Tensor | None = None, reference: Tensor | None = None) -> None:
        """Add the tokens of one batch.

        Args:
            x: ``(..., in)``, any floating dtype; summed in float32 and float64.
            weights: ``(...)``, non-negative weight c_t of every token. Tokens of weight 0 (padding) do not count at
                all.
            reference: what another model reads in the place of x, ``(..., in)``; None: the same, or not known.
        """
        x = x.detach().flatten(0, -2).float()
        off = None if reference is None else reference.detach().flatten(0, -2).float() - x
        scaled = x
        if weights is not None:
            c = weights.detach().flatten().float()
            kept = c > 0
            x, c = x[kept], c[kept]
            off = None if off is None else off[kept]
            scaled = x * c[:, None]
        self._outer.addmm_(scaled.t(), x)
        if off is not None:
            self._drift = torch.zeros_like(self._outer) if self._drift is None else self._drift
            self._drift.addmm_(off.t(), scaled)
        self._absolute += x.abs().sum(0)
        self._sum += x.sum(0)
        self._square += x.square().sum(0)
        self.tokens += len(x)

    def merge(self, other: Self) -> None:
        """Add what another accumulator saw."""
        for mine, its in zip(self._sums(), other._sums(), strict=True):
            mine.add_(its.to(mine.device))
        if other._drift is not None:
            self._drift = torch.zeros_like(self._outer) if self._drift is None else self._drift
            self._drift.add_(other._drift.to(self._drift.device))
        self.tokens += other.tokens

    def _sums(self) -> tuple[Tensor, ...]:
        return self._outer, self._absolute, self._sum, self._square

    def finalise(self) -> Moments:
        """Return the statistics of all tokens so far.

        Raises:
            ValueError: if no token was seen.
        """
        if not self.tokens:
            raise ValueError("no token reached this input during calibration.")
        mean = self._sum / self.tokens
        return Moments(
            hessian=self._outer * (2 / self.tokens),
            mean_abs=(self._absolute / self.tokens).float(),
            mean=mean.float(),
            variance=(self._square / self.tokens - mean.square()).clamp_(min=0).float(),
            tokens=self.tokens,
            drift=None if self._drift is None else self._drift * (2 / self.tokens),
        )
