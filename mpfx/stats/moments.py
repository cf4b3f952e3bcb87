"""Statistics of what a layer reads, accumulated batch by batch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from mpfx.stats.precision import exact_products

_CHUNK, _CHUNK_CUDA = 2048, 8192
"""Tokens that are scaled and multiplied at a time: more of them take memory, and gain nothing."""

_BLOCK, _BLOCK_CUDA = 192, 2048
"""Channels of a product that are computed at a time: of a symmetric one, without what is left of them."""


@dataclass(frozen=True)
class ChannelMoments:
    """What remains of :class:`Moments` where no two channels are looked at together.

    Attributes:
        power: diagonal of the Hessian, ``(in,)`` float32.
        mean_abs: mean of abs(x), ``(in,)`` float32.
    """

    power: Tensor
    mean_abs: Tensor

    def reordered(self, order: Tensor) -> "ChannelMoments":
        """The statistics of ``x[order]``, ``(in,)``."""
        return ChannelMoments(self.power[order], self.mean_abs[order])


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

    @property
    def channels(self) -> ChannelMoments:
        """What there is to know of every channel alone; small."""
        return ChannelMoments(self.hessian.diagonal().clone(), self.mean_abs)

    def to(self, device: torch.device) -> "Moments":
        """The same statistics on another device."""
        names = ("hessian", "mean_abs", "mean", "variance")
        drift = None if self.drift is None else self.drift.to(device)
        return replace(self, **{name: getattr(self, name).to(device) for name in names}, drift=drift)

    def reordered(self, order: Tensor) -> "Moments":
        """The statistics of ``x[order]``, ``(in,)``."""
        hessian = self.hessian[order][:, order]
        drift = None if self.drift is None else self.drift[order][:, order]
        return Moments(hessian, self.mean_abs[order], self.mean[order], self.variance[order], self.tokens, drift)


@dataclass(frozen=True)
class Sums:
    """Which sums are taken.

    Attributes:
        channels: also those of single channels, behind `mean_abs`, `mean` and `variance`; else these come out as NaN.
        products: also those of products of channels; else the Hessian comes out as its diagonal, and no token may have
            another weight than 0 or 1.
    """

    channels: bool = True
    products: bool = True


ALL_SUMS = Sums()


class MomentAccumulator:
    """Sums behind :class:`Moments`: update with batches, merge with another rank's, finalise.

    Args:
        in_features: channels of the input.
        device: where the sums lie.
        taken: which sums.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu", taken: Sums = ALL_SUMS) -> None:
        # Apple's GPUs have no float64.
        exact = torch.float32 if torch.device(device).type == "mps" else torch.float64

        def zeros(*shape: int, dtype: torch.dtype = exact) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # Blocks below the diagonal are not in use.
        self._outer = zeros(in_features, in_features, dtype=torch.float32) if taken.products else None
        self._absolute, self._sum, self._square = zeros(in_features), zeros(in_features), zeros(in_features)
        self.taken = taken
        self._drift: Tensor | None = None
        self.tokens = 0

    @torch.no_grad()
    @exact_products()
    def update(self, x: Tensor, weights: Tensor | None = None, reference: Tensor | None = None) -> None:
        """Add the tokens of one batch, a few thousand at a time.

        Half-precision inputs are multiplied as they are on CUDA devices, their products summed in float32; everywhere
        else, and other inputs, in float32. There tokens with weights are rounded to half precision once more: a
        relative error of about 0.1 % (bfloat16) or 0.02 % (float16), independent from value to value, in a sum over
        all tokens.

        Args:
            x: ``(..., in)``, any floating dtype.
            weights: ``(...)``, non-negative weight c_t of every token, best on the host. Tokens of weight 0 (padding)
                do not count at all.
            reference: what another model reads in the place of x, ``(..., in)``; None: the same, or not known.
        """
        x = x.detach().flatten(0, -2)
        y = None if reference is None else reference.detach().flatten(0, -2)
        c = None if weights is None else weights.detach().flatten().float()
        if c is not None:  # looked at where they are: from the host, no device has to be waited for
            kept = c > 0
            if not bool(kept.all()):
                c, places = c[kept], kept.nonzero()[:, 0].to(x.device)
                x, y = x[places], None if y is None else y[places]
            c = None if bool((c == 1).all()) else c.to(x.device)
        self.tokens += len(x)
        size = _CHUNK if x.device.type == "cpu" else _CHUNK_CUDA
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            self._add(x[part], None if c is None else c[part], None if y is None else y[part])

    def _add(self, x: Tensor, weights: Tensor | None, reference: Tensor | None) -> None:
        x = x if _multiplies_half(x) else x.float()
        if self.taken.channels or self._outer is None:
            self._absolute += _absolutes(x)
            self._sum += x.sum(0, dtype=torch.float32)
            self._square += _squares(x)
        if self._outer is None:
            if weights is not None:
                raise ValueError("Expected tokens that count alike where no products of channels are summed.")
            return
        roots, share = (None, None) if weights is None else _roots(weights, x.dtype)
        scaled = _scaled(x, roots)
        _add_blocks(self._outer, scaled, scaled, share, upper=True)
        if reference is not None:
            self._drift = torch.zeros_like(self._outer) if self._drift is None else self._drift
            _add_blocks(self._drift, _scaled(reference.to(x.dtype) - x, roots), scaled, share)

    def merge(self, other: Self) -> None:
        """Add what another accumulator saw."""
        for mine, its in zip(self._sums(), other._sums(), strict=True):
            mine.add_(its.to(mine.device))
        if other._drift is not None:
            self._drift = torch.zeros_like(other._drift) if self._drift is None else self._drift
            self._drift.add_(other._drift.to(self._drift.device))
        self.tokens += other.tokens

    @property
    def drifting(self) -> bool:
        """Whether what another model reads was seen too."""
        return self._drift is not None

    def add_up(self, add: Callable[[Tensor], Any], tokens: int, drifting: bool) -> None:
        """Let the sums of all processes take the place of this one's.

        Args:
            add: called with one tensor after the other; adds up, in place, what all processes have of it.
            tokens: that all of them saw.
            drifting: whether any of them saw what another model reads.
        """
        if drifting and self._drift is None and self._outer is not None:
            self._drift = torch.zeros_like(self._outer)
        for tensor in (*self._sums(), *(() if self._drift is None else (self._drift,))):
            add(tensor)
        self.tokens = tokens

    def _sums(self) -> tuple[Tensor, ...]:
        channels = self._absolute, self._sum, self._square
        return channels if self._outer is None else (self._outer, *channels)

    def finalise(self) -> Moments:
        """Return the statistics of all tokens so far.

        Raises:
            ValueError: if no token was seen.
        """
        if not self.tokens:
            raise ValueError("no token reached this input during calibration.")
        known = self.tokens if self.taken.channels else torch.nan
        mean = self._sum / known
        return Moments(
            hessian=self._hessian(),
            mean_abs=(self._absolute / known).float(),
            mean=mean.float(),
            variance=(self._square / self.tokens - mean.square()).clamp_(min=0).float(),
            tokens=self.tokens,
            drift=None if self._drift is None else self._drift * (2 / self.tokens),
        )

    def _hessian(self) -> Tensor:
        if self._outer is None:
            return (self._square * (2 / self.tokens)).float().diag_embed()
        return _mirrored(self._outer * (2 / self.tokens))


def _multiplies_half(x: Tensor) -> bool:
    """Whether the device multiplies such values with sums in float32, many times as fast as float32 ones."""
    return x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16)


def _roots(weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Roots of weights, ``(tokens, 1)``; for float16 relative to the largest, so that none overflows, and that one."""
    if dtype != torch.float16:
        return weights.sqrt()[:, None], None
    largest = weights.max()
    return (weights / largest).sqrt()[:, None], largest


def _scaled(x: Tensor, roots: Tensor | None) -> Tensor:
    return x if roots is None else x * roots.to(x.dtype)


def _absolutes(x: Tensor) -> Tensor:
    """Sums over tokens of the absolute values, float32."""
    if x.dtype == torch.float32:
        return x.abs().sum(0)
    norms: Tensor = torch.linalg.vector_norm(x, 1, dim=0, dtype=torch.float32)
    return norms


def _squares(x: Tensor) -> Tensor:
    """Sums over tokens of the squares, float32: half-precision squares could overflow, and a copy costs memory."""
    if x.dtype == torch.float32:
        return x.square().sum(0)
    norms: Tensor = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32)
    return norms.square()


def _add_blocks(total: Tensor, left: Tensor, right: Tensor, share: Tensor | None, *, upper: bool = False) -> None:
    """Add ``share left^T right``, some rows at a time; of a symmetric one only what is not left of the diagonal."""
    size = _block(total)
    for start in range(0, len(total), size):
        rows, first = slice(start, start + size), start if upper else 0
        _add_product(total[rows, first:], left[:, rows], right[:, first:], share)


def _block(product: Tensor) -> int:
    return _BLOCK if product.device.type == "cpu" else _BLOCK_CUDA


def _add_product(total: Tensor, left: Tensor, right: Tensor, share: Tensor | None) -> None:
    """Add ``share left^T right`` to float32 sums."""
    half = left.dtype != torch.float32
    if share is not None:
        product = torch.mm(left.t(), right, out_dtype=torch.float32) if half else left.t() @ right
        total.add_(product.mul_(share))
    elif half:
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.t(), right)


def _mirrored(upper: Tensor) -> Tensor:
    """Make a matrix symmetric of which only what lies on and above the diagonal is known, in place."""
    size = _block(upper)
    for start in range(0, len(upper), size):
        rows, later = slice(start, start + size), slice(start + size, None)
        upper[rows, rows] = upper[rows, rows].triu() + upper[rows, rows].triu(1).t()
        upper[later, rows] = upper[rows, later].t()
    return upper
