"""From statistics to a plan: importance, strategies, and what a plan costs."""

from mpfx.allocate.importance import ImportanceConfig, block_means, importance, signals
from mpfx.allocate.plan import GroupPlan, code_bits_per_weight, stored_bits_per_weight
from mpfx.allocate.strategies import ThresholdConfig, TierConfig, budget, fixed, quantile, threshold

__all__ = [
    "GroupPlan",
    "ImportanceConfig",
    "ThresholdConfig",
    "TierConfig",
    "block_means",
    "budget",
    "code_bits_per_weight",
    "fixed",
    "importance",
    "quantile",
    "signals",
    "stored_bits_per_weight",
    "threshold",
]
