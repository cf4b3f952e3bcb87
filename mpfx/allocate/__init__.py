"""From statistics to a plan: importance, strategies, and what a plan costs."""

from mpfx.allocate.importance import ImportanceConfig, importance, signals
from mpfx.allocate.plan import GroupPlan, stored_bits_per_weight
from mpfx.allocate.strategies import ThresholdConfig, TierConfig, budget, fixed, quantile, threshold

__all__ = [
    "GroupPlan",
    "ImportanceConfig",
    "ThresholdConfig",
    "TierConfig",
    "budget",
    "fixed",
    "importance",
    "quantile",
    "signals",
    "stored_bits_per_weight",
    "threshold",
]
