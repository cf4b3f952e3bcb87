"""Graph passes: each takes a torch.fx GraphModule and hands one on."""

from mpfx.passes.allocate import ALLOCATIONS, Allocate, check_feasible
from mpfx.passes.backward import sense_by_blocks
from mpfx.passes.base import Pass, PassError, PassResult, run_passes
from mpfx.passes.config import CompressionConfig
from mpfx.passes.locate import FindProducers, GroupInputs, LocateSites, analysis, located
from mpfx.passes.observe import Reading, Sensed, dense_moments, finalised, observed, padding_masks, tokens_of
from mpfx.passes.pack import FoldPermutations, Pack
from mpfx.passes.pipeline import Calibration, Compressed, compress_calibrated
from mpfx.passes.preflight import located_graph
from mpfx.passes.ranks import ALONE, RankError, Ranks, was_told
from mpfx.passes.running import Runner, most_bytes, stays_on_host
from mpfx.passes.scale import FoldScales
from mpfx.passes.scope import Scope
from mpfx.passes.sense import Sensing
from mpfx.passes.solve import PruneAndQuantize, SolveConfig, SolvedGroup, solve_group, solved_groups

__all__ = [
    "ALLOCATIONS",
    "ALONE",
    "Allocate",
    "Calibration",
    "Compressed",
    "CompressionConfig",
    "FindProducers",
    "FoldPermutations",
    "FoldScales",
    "GroupInputs",
    "LocateSites",
    "Pack",
    "Pass",
    "PassError",
    "PassResult",
    "PruneAndQuantize",
    "RankError",
    "Ranks",
    "Reading",
    "Runner",
    "Scope",
    "Sensed",
    "Sensing",
    "SolveConfig",
    "SolvedGroup",
    "analysis",
    "check_feasible",
    "compress_calibrated",
    "dense_moments",
    "finalised",
    "located",
    "located_graph",
    "most_bytes",
    "observed",
    "padding_masks",
    "run_passes",
    "sense_by_blocks",
    "solve_group",
    "solved_groups",
    "stays_on_host",
    "tokens_of",
    "was_told",
]
