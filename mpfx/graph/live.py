"""Graphs on the user's own modules, and the record that a trace leaves on graph and nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn

from mpfx.graph.calls import TracedCall
from mpfx.graph.errors import TraceError
from mpfx.graph.linear import LinearFacts
from mpfx.graph.sizes import SizeRules

META_KEY = "mpfx"
"""The one key of ``GraphModule.meta`` and ``Node.meta`` that this package writes to while tracing."""

CONSTANTS = "_mpfx_constants"
"""Name under which a graph finds the module that holds its constants."""

_SHARED = ("_modules", "_parameters", "_buffers")

T = TypeVar("T")


@dataclass(frozen=True)
class NodeInfo:
    """What the trace knows of a node.

    Attributes:
        stack: Paths of the modules that were running, outermost first; the last one made the node.
        sizes: Sizes of the result (numbers or symbolic), None where it is no tensor.
        dtype: Type of the result, None where it is no tensor.
        storage: The same number for all nodes whose results share memory.
        mutates: Storages that the node writes to.
        version: How often the memory of the first argument had been written to when the node read it.
    """

    stack: tuple[str, ...] = ()
    sizes: tuple[Any, ...] | None = None
    dtype: torch.dtype | None = None
    storage: int | None = None
    mutates: frozenset[int] = frozenset()
    version: int = 0


@dataclass
class TraceRecord:
    """What a trace knows of its graph as a whole.

    Attributes:
        model: The traced module, whose children the graph shares.
        constants: Holds, as buffers, the tensors that the forward used and that are none of the model's.
        call: The traced arguments.
        sizes: What was assumed about the sizes of the arguments.
        linears: The linear layers at the time of tracing, by path; later replacements do not change it.
        experts: Paths of the fused experts at the time of tracing.
        hooks: Keys of the hooks that the trace ran through, so that what they do is in the graph.
        verified: Forms of batches that broke a rule about sizes and on which the graph was found right all the same.
    """

    model: nn.Module
    constants: nn.Module
    call: TracedCall
    sizes: SizeRules
    linears: dict[str, LinearFacts]
    experts: frozenset[str]
    hooks: frozenset[int] = frozenset()
    verified: set[tuple[Any, ...]] = field(default_factory=set, repr=False)
    _analyses: dict[str, tuple[Any, Any]] = field(default_factory=dict, repr=False)

    def cached(self, name: str, graph: fx.Graph, compute: Callable[[], T]) -> T:
        """The result of an analysis, computed again only after the graph has changed."""
        state = tuple((n.op, n.target, n.name, tuple(n.all_input_nodes)) for n in graph.nodes)
        known = self._analyses.get(name)
        if known is None or known[0] != state:
            self._analyses[name] = known = (state, compute())
        return cast(T, known[1])


def record_of(gm: fx.GraphModule) -> TraceRecord:
    """The record of a traced graph.

    Raises:
        TypeError: If the graph was not made by `trace`.
    """
    record = gm.meta.get(META_KEY)
    if not isinstance(record, TraceRecord):
        raise TypeError("Expected a GraphModule made by mpfx.graph.trace.")
    return record


def traced_module(gm: fx.GraphModule) -> nn.Module:
    """The user's own module, whose children the graph shares.

    Raises:
        TypeError: If the graph was not made by `trace`.
    """
    return record_of(gm).model


def node_info(node: fx.Node) -> NodeInfo:
    """What the trace knows of a node; empty for nodes that were added later."""
    info = node.meta.get(META_KEY)
    return info if isinstance(info, NodeInfo) else NodeInfo()


def live_module(model: nn.Module, graph: fx.Graph, constants: nn.Module) -> fx.GraphModule:
    """A GraphModule that runs ``graph`` on the children, parameters and buffers of ``model`` themselves.

    Whatever is replaced in the model is replaced in the graph, and the other way round.

    Raises:
        TraceError: If a child of the model has the name of an attribute of GraphModule, which would hide it.
    """
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    _reject_hidden_names(gm, graph)
    gm.training = model.training
    for name in _SHARED:
        gm.__dict__[name] = getattr(model, name)
    gm.__dict__[CONSTANTS] = constants  # no child, as the children are the model's
    gm.graph = graph
    return gm


def _reject_hidden_names(gm: fx.GraphModule, graph: fx.Graph) -> None:
    for node in graph.nodes:
        first = str(node.target).partition(".")[0]
        if node.op in ("call_module", "get_attr") and hasattr(gm, first):
            raise TraceError(
                f"The traced module calls its child `{first}`, a name that torch.fx uses itself. "
                "What to change: rename it, or trace a module that has this one as a child."
            )
