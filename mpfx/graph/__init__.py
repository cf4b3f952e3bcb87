"""Graphs of models: tracing, linear layers, input groups, sequential blocks. All that knows torch.fx."""

from mpfx.graph.errors import TraceError
from mpfx.graph.grouping import InputGroup, Site, input_groups, sites
from mpfx.graph.linear import is_linear, linear_weight
from mpfx.graph.live import traced_module
from mpfx.graph.partition import OUTPUT, Block, blocks, run_block
from mpfx.graph.tracing import bind_inputs, trace

__all__ = [
    "OUTPUT",
    "Block",
    "InputGroup",
    "Site",
    "TraceError",
    "bind_inputs",
    "blocks",
    "input_groups",
    "is_linear",
    "linear_weight",
    "run_block",
    "sites",
    "trace",
    "traced_module",
]
