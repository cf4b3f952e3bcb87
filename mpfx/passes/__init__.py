"""Graph passes: each takes a torch.fx GraphModule and hands one on."""

from mpfx.passes.allocate import Allocate, check_feasible
from mpfx.passes.base import Pass, PassError, PassResult, run_passes
from mpfx.passes.config import CompressionConfig
from mpfx.passes.locate import LocateSites, annotated, located
from mpfx.passes.observe import observed, padding_mask
from mpfx.passes.pack import Pack
from mpfx.passes.preflight import located_graph
from mpfx.passes.solve import PruneAndQuantize, SolvedGroup, solve_group, solved_groups

__all__ = [
    "Allocate",
    "CompressionConfig",
    "LocateSites",
    "Pack",
    "Pass",
    "PassError",
    "PassResult",
    "PruneAndQuantize",
    "SolvedGroup",
    "annotated",
    "check_feasible",
    "located",
    "located_graph",
    "observed",
    "padding_mask",
    "run_passes",
    "solve_group",
    "solved_groups",
]
