"""Graphs on the user's own modules, and the record that a trace leaves on graph and nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn

from mpfx.graph.calls import TracedCall
from mpfx.graph.errors import TraceError
from mpfx.graph.experts import ExpertsFacts
from mpfx.graph.linear import LinearFacts
from mpfx.graph.opaque import OpaquePart
from mpfx.graph.sizes import SizeRules

META_KEY = "mpfx"
"""The one key of ``GraphModule.meta`` and ``Node.meta`` that this package writes to while tracing."""

CONSTANTS = "_mpfx_constants"
"""Name under which a graph finds the module that holds its constants."""

WHOLE = "_mpfx_whole"
"""Name under which a graph finds the traced module itself, where all that it does is to call it."""

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
        experts: The fused experts at the time of tracing, by path.
        hooks: Keys of the hooks that the trace ran through, so that what they do is in the graph.
        opaque: The parts that the graph calls as they are, by path, "" for the whole model.
        shared: ids of modules and parameters that others than the traced module use too (`note_outside`).
        verified: Forms of batches that broke a rule about sizes and on which the graph was found right all the same.
    """

    model: nn.Module
    constants: nn.Module
    call: TracedCall
    sizes: SizeRules
    linears: dict[str, LinearFacts]
    experts: dict[str, ExpertsFacts]
    hooks: frozenset[int] = frozenset()
    opaque: dict[str, OpaquePart] = field(default_factory=dict)
    shared: frozenset[int] = frozenset()
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


def note_outside(gm: fx.GraphModule, whole: nn.Module) -> None:
    """Note what a larger module uses of the traced one by other ways than through it: that must not change.

    Args:
        gm: Traced graph; to be called before anything is analysed.
        whole: Holds the traced module.
    """
    record, seen = record_of(gm), set[int]()

    def visit(module: nn.Module) -> None:
        if module is record.model or id(module) in seen:
            return
        seen.add(id(module))
        seen.update(id(p) for p in module._parameters.values() if p is not None)
        for child in module._modules.values():
            if child is not None:
                visit(child)

    visit(whole)
    record.shared = frozenset(seen)


def opaque_parts(gm: fx.GraphModule) -> tuple[OpaquePart, ...]:
    """The parts of a traced model that its graph calls as they are, in the order of their first call.

    Raises:
        TypeError: If the graph was not made by `trace`.
    """
    return tuple(record_of(gm).opaque.values())


def node_info(node: fx.Node) -> NodeInfo:
    """What the trace knows of a node; empty for nodes that were added later."""
    info = node.meta.get(META_KEY)
    return info if isinstance(info, NodeInfo) else NodeInfo()


def live_module(model: nn.Module, graph: fx.Graph, constants: nn.Module) -> fx.GraphModule:
    """A GraphModule that runs ``graph`` on the children, parameters and buffers of ``model`` themselves.

    Whatever is replaced in the model is replaced in the graph, and the other way round.

    Raises:
        TraceError: If a child of the model has the name of an attribute of GraphModule, which would hide it, or
            the model is a TorchScript module.
    """
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    _reject_hidden_names(gm, model, graph)
    gm.training = model.training
    for name in _SHARED:
        gm.__dict__[name] = getattr(model, name)
    gm.__dict__[CONSTANTS] = constants  # no child, as the children are the model's
    if any(node.target == WHOLE for node in graph.nodes):
        gm.__dict__[WHOLE] = model
    gm.graph = graph
    return gm


def _reject_hidden_names(gm: fx.GraphModule, model: nn.Module, graph: fx.Graph) -> None:
    used = [str(node.target).partition(".")[0] for node in graph.nodes if node.op in ("call_module", "get_attr")]
    if not isinstance(model._modules, dict):
        raise TraceError(
            "The traced module is a TorchScript module, whose children a graph cannot share. "
            "What to change: trace the module that it was made from, or a module that has this one as a child."
        )
    for name in dict.fromkeys([*model._modules, *used]):
        if hasattr(gm, name):
            raise TraceError(
                f"The traced module has a child `{name}`, a name that torch.fx uses itself. "
                "What to change: rename it, or trace a module that has this one as a child."
            )
