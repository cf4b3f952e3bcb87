"""Statistics of what a layer reads, and of what its outputs mean to the loss."""

from mpfx.stats.moments import ChannelMoments, MomentAccumulator, Moments
from mpfx.stats.pooling import pooled, topped_up
from mpfx.stats.sensitivity import Sensitivity

__all__ = ["ChannelMoments", "MomentAccumulator", "Moments", "Sensitivity", "pooled", "topped_up"]
