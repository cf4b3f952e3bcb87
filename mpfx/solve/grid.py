"""Uniform grids: fit a scale and a zero point per row to a group of channels, round to it, read it back.

Everything here is *channels first*, ``(channels, rows)``: the sweep walks channels, and a channel is then contiguous.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mpfx.nn.layout import SCALE_BITS

_SHRINKS = tuple(1 - step * 0.025 for step in range(24))
_ERROR_POWER = 2.4  # between squares and worst case, as GPTQ's clip search (Frantar et al., 2023) weighs errors
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # positive float16 values


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """How grids are fitted.

    Args:
        group_size: channels that share one scale and zero point per output row, a multiple of 32. null: one scale
            per row and bit width.
        symmetric: the zero point is the middle code and is not stored.
        clip_search: try 24 shrunken ranges, or 7 coded ones, and keep the one with the least error, instead of min and
            max (coded: the better one of the two nearest).
        scale_bits: width of a stored scale: 4, a code on a logarithmic grid, or 16, a float16 value. 4 needs a
            `group_size`.
    """

    group_size: int | None = 64
    symmetric: bool = False
    clip_search: bool = True
    scale_bits: int = SCALE_BITS

    def __post_init__(self) -> None:
        if self.scale_bits not in (SCALE_BITS, 16):
            raise ValueError(f"Expected `grid.scale_bits` to be {SCALE_BITS} or 16 but got {self.scale_bits}.")
        if self.group_size is None and self.scale_bits != 16:
            raise ValueError(
                f"Expected `grid.scale_bits` to be 16 where `grid.group_size` is null but got {self.scale_bits}: set "
                "grid.scale_bits to 16."
            )
        if self.group_size is not None and (self.group_size < 32 or self.group_size % 32):
            raise ValueError(
                f"Expected `grid.group_size` to be null or a positive multiple of 32 but got {self.group_size}."
            )


@dataclass(frozen=True)
class Grid:
    """A uniform grid per row.

    Attributes:
        scale: step between two codes, ``(rows,)`` float32; what the stored scale, float16 or coded, decodes to.
        zero: code of the value 0, an integer held in float32, ``(rows,)``.
        bits: code width; codes are ``0 .. 2**bits - 1``.
    """

    scale: Tensor
    zero: Tensor
    bits: int

    def quantize(self, weight: Tensor) -> Tensor:
        """Round ``(..., rows)`` to the nearest codes, held in float32."""
        return (weight / self.scale).round_().add_(self.zero).clamp_(0, (1 << self.bits) - 1)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of codes ``(..., rows)``; exact in float32, so that packed weights read back the same."""
        return (codes - self.zero).mul_(self.scale)


def fit_grid(weight: Tensor, bits: int, config: GridConfig) -> Grid:
    """Fit one grid per row.

    Args:
        weight: ``(channels, rows)`` float32, zero where pruned. The range always holds 0, so pruning does not widen it.
        bits: code width, 1..8.
        config: symmetric or not, clip search or not.

    Returns:
        The grid; its scales are float16 values already, so that what is solved is what is stored.

    Raises:
        ValueError: if weights are NaN, or so large that no float16 scale can hold them.
    """
    low, span = extent(weight, config)
    span = torch.where(span == 0, 1.0, span)
    top, zero = (1 << bits) - 1, zero_points(low, span, bits, config)
    best = Grid(as_float16(span / top), zero, bits)
    if not config.clip_search:
        return best
    least = rounding_error(weight, best)
    for shrink in shrinks(config)[1:]:
        trial = Grid(as_float16(span * (shrink / top)), zero, bits)
        error = rounding_error(weight, trial)
        best = Grid(torch.where(error < least, trial.scale, best.scale), zero, bits)
        least = torch.minimum(error, least)
    return best


def shrinks(config: GridConfig) -> tuple[float, ...]:
    """The shares of the whole range that are tried."""
    return _SHRINKS if config.clip_search else _SHRINKS[:1]


def extent(weight: Tensor, config: GridConfig) -> tuple[Tensor, Tensor]:
    """The least value that a grid has to reach, and its whole range, ``(..., rows)``.

    Args:
        weight: ``(..., channels, rows)``.
        config: symmetric or not.
    """
    low, high = weight.amin(-2).clamp_(max=0), weight.amax(-2).clamp_(min=0)
    if config.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    return low, high - low


def zero_points(low: Tensor, span: Tensor, bits: int, config: GridConfig) -> Tensor:
    """Codes of the value 0, held in float32, of grids from ``low`` on, of range ``span``, and of shrunken ones."""
    if config.symmetric:
        return torch.full_like(span, 1 << (bits - 1))
    return (-low / span * ((1 << bits) - 1)).round_()


def nearest(weight: Tensor, grid: Grid | None) -> tuple[Tensor, Tensor]:
    """Round to codes, int32, and the values that they stand for; None: to raw float16."""
    if grid is None:
        half = weight.half()
        return half.view(torch.int16).int() & 0xFFFF, half.float()
    codes = grid.quantize(weight)
    return codes.int(), grid.dequantize(codes)


def rounding_error(weight: Tensor, grid: Grid) -> Tensor:
    """What the clip search minimises, ``(..., rows)``, of scales ``(..., 1, rows)`` or ``(rows,)``."""
    # As quantize and dequantize, without the way to the codes' zero point and back: whole numbers are exact.
    steps = (weight / grid.scale).round_().clamp_(-grid.zero, ((1 << grid.bits) - 1) - grid.zero)
    return steps.mul_(grid.scale).sub_(weight).abs_().pow_(_ERROR_POWER).sum(-2)


def as_float16(scale: Tensor, what: str = "quantization step") -> Tensor:
    """Round positive numbers to positive float16 values, held in float32.

    Raises:
        ValueError: if there are NaN, or numbers that float16 cannot hold.
    """
    if bool(scale.isnan().any()):
        raise ValueError("the weights hold NaN: the layer is damaged.")
    if not bool((scale <= _LARGEST).all()):
        raise ValueError(
            f"weights need a {what} of {scale.max():.3g}, but a float16 scale holds at most {_LARGEST:g}: "
            "the layer's weights are damaged or not normalised; leave the site dense (`scope.exclude`) or rescale it."
        )
    return scale.clamp(min=_SMALLEST).half().float()
