"""Everything that can be refused before any work is done."""

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from mpfx.graph import note_outside, trace
from mpfx.passes.allocate import check_feasible
from mpfx.passes.base import run_passes
from mpfx.passes.config import CompressionConfig
from mpfx.passes.locate import analysis


def located_graph(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    config: CompressionConfig,
    whole: nn.Module | None = None,
) -> fx.GraphModule:
    """Trace a call, find what is to be compressed and what belongs together, and check that the config can be met.

    Args:
        module: to trace.
        args: of the call.
        kwargs: of the call.
        config: what is to be done.
        whole: a larger module that holds it; what this uses of it by other ways must not change.

    Raises:
        TraceError: if the config is strict and the module cannot be traced whole.
        PassError: if nothing is left to compress, or a pattern of the scope matches nothing.
        ValueError: if the budget is infeasible, or a pattern of ``block_bits`` matches nothing.
    """
    gm = trace(module, args, kwargs, whole=config.strict)
    if whole is not None:
        note_outside(gm, whole)
    gm = run_passes(gm, analysis(config.scope))
    check_feasible(gm, config)
    return gm
