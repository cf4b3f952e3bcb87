"""Graphs of models: all that knows torch.fx.

Recording: `tracing` climbs the `ladder`; an `attempt` runs the forward under a `recorder`, which has a `builder` make
nodes; `calls`, `sizes`, `forms` and `rehearsal` know arguments, sizes and results; `live` and `opaque` hold what a
trace leaves behind; `errors`, `isolation`, `verify` and `compat` keep it honest and apart.
Analysis: `linear`, `grouping` (sites, input groups), `partition` (blocks), `producers` and `folding` (with `channels`,
`tags`, `reads`, `operations`, `recognition`, `sampling`).
Experts: `experts`, with `operands`, `probing`, `products`, `watching`.
"""

from mpfx.graph.errors import TraceError
from mpfx.graph.experts import ExpertsFacts, ExpertStack, watch_experts
from mpfx.graph.folding import channel_order, permute, rescale, row_order
from mpfx.graph.grouping import (
    InputGroup,
    Site,
    SiteKind,
    calling_nodes,
    expert_modules,
    input_groups,
    inputs_behind,
    sites,
)
from mpfx.graph.linear import is_linear, linear_weight
from mpfx.graph.live import note_outside, opaque_parts, traced_module
from mpfx.graph.opaque import OpaquePart
from mpfx.graph.partition import OUTPUT, Block, blocks, dead_ends, last_readers, run_block, run_on
from mpfx.graph.producers import (
    Consumer,
    PermutationFold,
    Producer,
    ScaleFold,
    permutation_folds,
    producers,
    scale_folds,
)
from mpfx.graph.tracing import bind_inputs, first_samples, trace

__all__ = [
    "OUTPUT",
    "Block",
    "Consumer",
    "ExpertStack",
    "ExpertsFacts",
    "InputGroup",
    "OpaquePart",
    "PermutationFold",
    "Producer",
    "ScaleFold",
    "Site",
    "SiteKind",
    "TraceError",
    "bind_inputs",
    "blocks",
    "calling_nodes",
    "channel_order",
    "dead_ends",
    "expert_modules",
    "first_samples",
    "input_groups",
    "inputs_behind",
    "is_linear",
    "last_readers",
    "linear_weight",
    "note_outside",
    "opaque_parts",
    "permutation_folds",
    "permute",
    "producers",
    "rescale",
    "row_order",
    "run_block",
    "run_on",
    "scale_folds",
    "sites",
    "trace",
    "traced_module",
    "watch_experts",
]
