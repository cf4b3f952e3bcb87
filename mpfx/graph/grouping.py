"""The linear layers of a traced graph, and which of them read the same value."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx, nn

from mpfx.graph.live import node_info, record_of
from mpfx.graph.partition import blocks

_SAME_VALUES = frozenset(
    {"to", "float", "half", "bfloat16", "double", "type", "type_as", "clone", "detach", "contiguous"}
)
_SAME_CHANNELS = frozenset({"view", "reshape", "flatten", "unsqueeze", "squeeze"})


@dataclass(frozen=True)
class Site:
    """A linear layer that the graph calls.

    Attributes:
        path: Module path of the ``nn.Linear`` or transposed linear layer.
        in_features: Number of input channels.
        out_features: Number of output channels.
        block: Index into ``blocks(gm)`` of the block that calls it, None outside the repeated blocks.
        dense_reason: Why it must be left dense, or None.
    """

    path: str
    in_features: int
    out_features: int
    block: int | None
    dense_reason: str | None


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
    """The linear layers that the graph calls, in graph order; one that is called twice is listed once.

    They are known from the time of tracing, so replacing their modules does not change the list.

    Raises:
        TypeError: If the graph was not made by `trace`.
    """
    record = record_of(gm)
    return record.cached("sites", gm.graph, lambda: tuple(_sites(gm).values()))


def input_groups(gm: fx.GraphModule, skip: Collection[str] = ()) -> tuple[InputGroup, ...]:
    """Group the sites that read the same value (q, k, v; gate, up), in the order of solving.

    A site that is called several times belongs together with those that are called on the same values each time.
    Sites that must stay dense, and the paths in ``skip``, are left out. A group lies in one block.

    Raises:
        TypeError: If the graph was not made by `trace`.
    """
    values: dict[str, list[tuple[fx.Node, int]]] = {}
    for node in _site_calls(gm):
        values.setdefault(str(node.target), []).append(_value_read(gm, node))
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in sites(gm):
        if site.dense_reason is None and site.path not in skip:
            key = (site.block, site.in_features, *values[site.path])
            groups.setdefault(key, []).append(site)
    return tuple(InputGroup(members[0].path, tuple(members), members[0].block) for members in groups.values())


def _site_calls(gm: fx.GraphModule) -> list[fx.Node]:
    linears = record_of(gm).linears
    return [n for n in gm.graph.find_nodes(op="call_module", sort=True) if n.target in linears]


def _sites(gm: fx.GraphModule) -> dict[str, Site]:
    linears = record_of(gm).linears
    block_of = {path: block.index for block in reversed(blocks(gm)) if block.repeated for path in block.sites}
    found = {}
    for node in _site_calls(gm):
        path = str(node.target)
        facts = linears[path]
        found[path] = Site(path, facts.in_features, facts.out_features, block_of.get(path), facts.dense_reason)
    return found


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
