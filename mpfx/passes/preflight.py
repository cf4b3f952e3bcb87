"""Everything that can be refused before any work is done."""

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from mpfx.graph import trace
from mpfx.passes.allocate import check_feasible
from mpfx.passes.base import run_passes
from mpfx.passes.config import CompressionConfig
from mpfx.passes.locate import LocateSites


def located_graph(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], config: CompressionConfig
) -> fx.GraphModule:
    """Trace a call, locate what is to be compressed, and check that the config can be met.

    Raises:
        TraceError: if the module cannot be traced.
        PassError: if nothing is left to compress, or a pattern of ``dense`` matches nothing.
        ValueError: if the budget is infeasible, or a pattern of ``block_bits`` matches nothing.
    """
    gm = run_passes(trace(module, args, kwargs), [LocateSites(config.dense, config.compress_head)])
    check_feasible(gm, config)
    return gm
