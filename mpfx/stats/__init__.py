"""Statistics of what a layer reads, and of what its outputs mean to the loss."""

from mpfx.stats.moments import ALL_SUMS, ChannelMoments, MomentAccumulator, Moments, Sums
from mpfx.stats.pooling import pooled, topped_up
from mpfx.stats.precision import exact_products
from mpfx.stats.sensitivity import Sensitivity

__all__ = [
    "ALL_SUMS",
    "ChannelMoments",
    "MomentAccumulator",
    "Moments",
    "Sensitivity",
    "Sums",
    "exact_products",
    "pooled",
    "topped_up",
]
