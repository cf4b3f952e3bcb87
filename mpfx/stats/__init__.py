"""Statistics of activations: accumulators with update, merge and finalise."""

from mpfx.stats.moments import MomentAccumulator, Moments

__all__ = ["MomentAccumulator", "Moments"]
