"""The weights that a traced graph multiplies with, and which of them read the same value."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, fx, nn

from mpfx.graph.experts import ExpertsFacts, ExpertStack, expert_weight
from mpfx.graph.linear import linear_weight
from mpfx.graph.live import WHOLE, TraceRecord, node_info, record_of
from mpfx.graph.partition import blocks, expert_paths

_SAME_VALUES = frozenset(
    {"to", "float", "half", "bfloat16", "double", "type", "type_as", "clone", "detach", "contiguous"}
)
_SAME_CHANNELS = frozenset({"view", "reshape", "flatten", "unsqueeze", "squeeze"})

SiteKind = Literal["linear", "transposed", "expert"]


@dataclass(frozen=True)
class Site:
    """A weight matrix that the graph multiplies with: a linear layer's, or one expert's.

    Attributes:
        path: Of the linear layer; of an expert ``<module>.<parameter>.<index>``.
        in_features: Number of input channels.
        out_features: Number of output channels.
        block: Index into ``blocks(gm)`` of the block that calls it, None outside the repeated blocks.
        dense_reason: Why it must be left dense, or None.
        kind: ``linear``; ``transposed``: a linear layer that stores its weight as (in, out), as GPT-2's; ``expert``.
        stack: Of an expert, the parameter that holds it and its neighbours.
        index: Of an expert, its number in the stack.
    """

    path: str
    in_features: int
    out_features: int
    block: int | None
    dense_reason: str | None
    kind: SiteKind = "linear"
    stack: ExpertStack | None = None
    index: int = 0

    @property
    def module(self) -> str:
        """Path of the module that is called."""
        return self.path if self.stack is None else self.stack.module

    def parameter(self, model: nn.Module) -> nn.Parameter:
        """The parameter that holds the weight, and in the case of an expert its neighbours too."""
        return model.get_submodule(self.module).get_parameter("weight" if self.stack is None else self.stack.parameter)

    def weight(self, model: nn.Module) -> Tensor:
        """The weight ``(out, in)``: writing into it in place changes the model."""
        if self.stack is None:
            return linear_weight(model.get_submodule(self.path))
        return expert_weight(model, self.stack, self.index)


@dataclass(frozen=True)
class InputGroup:
    """Replaceable sites of one block that read the same value.

    Attributes:
        name: Path of the first site.
        sites: In graph order.
        block: The block of all of them.
    """

    name: str
    sites: tuple[Site, ...]
    block: int | None


def sites(gm: fx.GraphModule) -> tuple[Site, ...]:
    """The linear layers and experts that the graph calls, in graph order; one that is called twice is listed once.

    They are known from the time of tracing, so replacing their modules does not change the list. Parts that could not
    be traced list what lies inside of them.

    Raises:
        TypeError: If the graph was not made by `trace`.
    """
    record = record_of(gm)
    return record.cached("sites", gm.graph, lambda: tuple(_sites(gm)))


def input_groups(gm: fx.GraphModule, skip: Collection[str] = ()) -> tuple[InputGroup, ...]:
    """Group the sites that read the same value (q, k, v; gate, up), in the order of solving.

    A site that is called several times belongs together with those that are called on the same values each time.
    Sites that must stay dense, and the paths in ``skip``, are left out. A group lies in one block. Inside a part
    that could not be traced, sites are grouped where that part's inside could be.

    Raises:
        TypeError: If the graph was not made by `trace`.
    """
    keys = _inputs_read(gm)
    groups: dict[object, list[Site]] = {}
    for site in sites(gm):
        if site.dense_reason is None and site.path not in skip:
            key = keys.get(site.path, site.path) if site.stack is None else site.path
            groups.setdefault((site.block, site.in_features, key), []).append(site)
    return tuple(InputGroup(members[0].path, tuple(members), members[0].block) for members in groups.values())


def expert_modules(gm: fx.GraphModule) -> dict[str, ExpertsFacts]:
    """What is known of the fused experts of the traced module, by path."""
    return record_of(gm).experts


def calling_nodes(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """For every site the first node that calls it, or the part around it that could not be traced; by path."""
    record = record_of(gm)
    return record.cached("callers", gm.graph, lambda: _calling_nodes(gm))


def inputs_behind(gm: fx.GraphModule) -> dict[str, frozenset[str]]:
    """For every site the names of the model's inputs that what it reads depends on; by path."""
    record = record_of(gm)
    return record.cached("inputs", gm.graph, lambda: _inputs_behind(gm))


def _calling_nodes(gm: fx.GraphModule) -> dict[str, fx.Node]:
    nodes = {str(n.target): n for n in reversed(gm.graph.nodes) if n.op == "call_module"}

    def caller(path: str) -> fx.Node:
        while path and path not in nodes:
            path = path.rpartition(".")[0]
        node: fx.Node = nodes[path or WHOLE]
        return node

    return {site.path: caller(site.module) for site in sites(gm)}


def _inputs_behind(gm: fx.GraphModule) -> dict[str, frozenset[str]]:
    behind: dict[fx.Node, frozenset[str]] = {}
    for node in gm.graph.nodes:
        own = {str(node.target)} if node.op == "placeholder" else set()
        behind[node] = frozenset(own.union(*(behind[before] for before in node.all_input_nodes)))
    return {path: behind[node] for path, node in calling_nodes(gm).items()}


def _sites(gm: fx.GraphModule) -> Iterator[Site]:
    record = record_of(gm)
    block_of = {path: block.index for block in reversed(blocks(gm)) for path in block.sites if block.repeated}
    called = dict.fromkeys(path for block in blocks(gm) for path in block.sites)
    experts = {s.path: s for s in _expert_sites(record)}
    for path in called:
        block = block_of.get(path)
        if path in experts:
            site = experts[path]
            yield replace(site, block=block)
        else:
            facts = record.linears[path]
            kind: SiteKind = "transposed" if facts.transposed else "linear"
            yield Site(path, facts.in_features, facts.out_features, block, facts.dense_reason, kind)


def _expert_sites(record: TraceRecord) -> Iterator[Site]:
    for facts in record.experts.values():
        for stack in facts.stacks:
            for i, path in enumerate(expert_paths(stack)):
                yield Site(path, stack.in_features, stack.out_features, None, facts.dense_reason, "expert", stack, i)


def _inputs_read(gm: fx.GraphModule) -> dict[str, object]:
    """What identifies the values that a linear layer reads over all its calls, by its path."""
    record = record_of(gm)
    values: dict[str, object] = {}
    for part in record.opaque.values():
        for child, inner in part.inside.items():
            above = ".".join(name for name in (part.path, child) if name)
            values.update({f"{above}.{path}": read for path, read in _inputs_read(inner).items()})
    traced: dict[str, list[tuple[fx.Node, int]]] = defaultdict(list)
    for node in gm.graph.find_nodes(op="call_module", sort=True):
        if node.target in record.linears:
            traced[str(node.target)].append(_value_read(gm, node))
    return {**values, **{path: tuple(read) for path, read in traced.items()}}


def _value_read(gm: fx.GraphModule, call: fx.Node) -> tuple[fx.Node, int]:
    """The value that a site reads, and how often its memory had been written to by then.

    Steps back over nodes that keep both the values and the channels (the last dimension).
    """
    node = next(iter(call.all_input_nodes))
    while node.all_input_nodes and _keeps_values(gm, node) and not any(node_info(u).mutates for u in node.users):
        node = node.all_input_nodes[0]
    return node, node_info(call).version


def _keeps_values(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not module.training)
    if node.op != "call_method" or node.target not in _SAME_VALUES | _SAME_CHANNELS:
        return False
    sizes, before = node_info(node).sizes, node_info(node.all_input_nodes[0]).sizes
    return bool(sizes and before) and sizes[-1:] == before[-1:]  # type: ignore[index]
