"""From statistics to a plan: importance, strategies, and what a plan costs."""

from mpfx.allocate.importance import ImportanceConfig, block_means, importance, signals
from mpfx.allocate.plan import GroupPlan, code_bits_per_weight, confined_order, is_free, stored_bits_per_weight
from mpfx.allocate.scaling import ChannelScales, search_scales
from mpfx.allocate.strategies import ThresholdConfig, TierConfig, budget, fixed, quantile, threshold

__all__ = [
    "ChannelScales",
    "GroupPlan",
    "ImportanceConfig",
    "ThresholdConfig",
    "TierConfig",
    "block_means",
    "budget",
    "code_bits_per_weight",
    "confined_order",
    "fixed",
    "importance",
    "is_free",
    "quantile",
    "search_scales",
    "signals",
    "stored_bits_per_weight",
    "threshold",
]
