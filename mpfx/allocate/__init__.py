"""From statistics to a plan: importance, strategies, and what a plan costs."""

from mpfx.allocate.answer import Answer, Kind, answer
from mpfx.allocate.choose import Allocation, OptimalConfig, WidthLimit, check_ties, choose, relative_gap
from mpfx.allocate.fit import SignalFit, fit_signals
from mpfx.allocate.frontier import MOST_ROWS, Curve, Frontier, GroupFrontier, unit_sums, with_curves
from mpfx.allocate.importance import ImportanceConfig, block_means, importance, raw_signals, signals
from mpfx.allocate.plan import GroupPlan, code_bits_per_weight, confined_order, is_free, stored_bits_per_weight
from mpfx.allocate.planfile import PLAN_FILE, PlanEntry, load_plan, save_plan
from mpfx.allocate.scaling import SAMPLE, ChannelScales, search_scales
from mpfx.allocate.storage import Domain, load_frontier, remove_frontier, save_frontier
from mpfx.allocate.strategies import ThresholdConfig, TierConfig, budget, fixed, quantile, threshold

__all__ = [
    "MOST_ROWS",
    "PLAN_FILE",
    "SAMPLE",
    "Allocation",
    "Answer",
    "ChannelScales",
    "Curve",
    "Domain",
    "Frontier",
    "GroupFrontier",
    "GroupPlan",
    "ImportanceConfig",
    "Kind",
    "OptimalConfig",
    "PlanEntry",
    "SignalFit",
    "ThresholdConfig",
    "TierConfig",
    "WidthLimit",
    "answer",
    "block_means",
    "budget",
    "check_ties",
    "choose",
    "code_bits_per_weight",
    "confined_order",
    "fit_signals",
    "fixed",
    "importance",
    "is_free",
    "load_frontier",
    "load_plan",
    "quantile",
    "raw_signals",
    "relative_gap",
    "remove_frontier",
    "save_frontier",
    "save_plan",
    "search_scales",
    "signals",
    "stored_bits_per_weight",
    "threshold",
    "unit_sums",
    "with_curves",
]
