"""Statistics of what a layer reads."""

from mpfx.stats.moments import MomentAccumulator, Moments
from mpfx.stats.pooling import pooled, topped_up

__all__ = ["MomentAccumulator", "Moments", "pooled", "topped_up"]
