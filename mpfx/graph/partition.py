"""Cuts a traced graph into blocks that run one after the other, and runs them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import fx, nn

from mpfx.graph.attention import naming_causal_masks
from mpfx.graph.experts import ExpertStack
from mpfx.graph.linear import is_linear, paths_around
from mpfx.graph.live import WHOLE, TraceRecord, live_module, node_info, record_of

OUTPUT = "output"
"""The key under which `run_block` returns the result of the last block."""


@dataclass(frozen=True)
class Block:
    """One part of a traced graph.

    Attributes:
        index: Position in the order of execution.
        name: Path of the repeated module (``model.layers.3``), or ``prefix``, ``between.N``, ``suffix`` for what
            lies around these, or ``part.N`` where the model repeats no module.
        module: Runs the part on the model's own children, called with the values in `needs` by name. Returns a
            dict of the values that later blocks need; the last block returns the result of the whole graph.
        needs: Names of the values that it reads: placeholders of the whole graph, or results of earlier blocks.
        sites: Paths of the sites that it calls, in order.
        stages: The sites again, in the order of solving: those of one stage do not read what others of it make.
        units: The sites again, in the order of solving, where everything that may be solved on one and the same run of
            the block is together: one unit, but for a part that could not be traced and has repeated modules inside.
        direct: Those sites that what earlier blocks' sites made reaches without passing through a site of this block:
            their inputs carry the earlier blocks' errors along a residual, say, and not those of their neighbours.
        is_last: Whether it returns the result of the whole graph.
        repeated: Whether it is a unit for sequential solving, as opposed to what lies around these.
    """

    index: int
    name: str
    module: fx.GraphModule
    needs: tuple[str, ...]
    sites: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    units: tuple[tuple[str, ...], ...]
    direct: frozenset[str]
    is_last: bool
    repeated: bool


@dataclass
class _Part:
    """A run of nodes, and the path of the repeated module that they belong to."""

    label: str | None
    nodes: list[fx.Node]


def blocks(gm: fx.GraphModule) -> tuple[Block, ...]:
    """Cut a traced graph into blocks that cover it in order.

    The cuts are at the children of the outermost lists of modules with linear layers inside; in a model without
    such lists, wherever only one value is handed on. All calls of one linear layer lie in one block, and so do
    all writes to memory that other blocks read.

    Raises:
        TypeError: If the graph was not made by `trace`.
    """
    record = record_of(gm)
    return record.cached("blocks", gm.graph, lambda: tuple(_cut(gm, record)))


def last_readers(parts: Iterable[Block]) -> dict[str, int]:
    """The index of the last block that reads a value, by the value's name."""
    return {name: block.index for block in parts for name in block.needs}


def run_block(block: Block, env: Mapping[str, Any], readers: Mapping[str, int]) -> dict[str, Any]:
    """Run one block on the values of one batch.

    To stream batches, start with ``env = bind_inputs(gm, args, kwargs)`` for each of them, and for every block
    replace each env by the result before going on to the next block.

    Args:
        block: The block to run.
        env: The values known so far, by name.
        readers: `last_readers` of all blocks that are to run, this one among them or not.

    Returns:
        The values that the later blocks need; after the last block the model's result under ``"output"``.

    Raises:
        KeyError: If ``env`` lacks a value that the block reads.
    """
    result = block.module(**{name: env[name] for name in block.needs})
    if block.is_last:
        return {OUTPUT: result}
    return {name: value for name, value in {**env, **result}.items() if readers.get(name, -1) > block.index}


def dead_ends(block: Block) -> tuple[str, ...]:
    """Linear layers of a block that make nothing which other sites of the block read.

    Only such as the graph calls itself, once: where it matters only what sites read, they need not be computed.
    """
    calls = Counter(str(node.target) for node in block.module.graph.nodes if node.op == "call_module")
    last = block.stages[-1] if block.stages else ()
    return tuple(path for path in last if calls[path] == 1)


def run_on(block: Block, device: torch.device, instead_of: Collection[torch.device]) -> None:
    """Let a block make its own tensors, such as positions, on the device where its weights and inputs will be.

    Args:
        block: To be changed.
        device: Where it will run.
        instead_of: Devices on which the trace found weights and inputs.
    """

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) and value in instead_of else value

    for node in block.module.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
    block.module.recompile()


def _cut(gm: fx.GraphModule, record: TraceRecord) -> Iterator[Block]:
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    labels = _repeated_children(record)
    parts = _split_at_children(nodes, labels) if labels else _split_at_bottlenecks(gm, record, nodes)
    parts = list(_merge(parts, _unbreakable(parts, record, gm.graph)))
    touched = _behind_sites(gm.graph, record)
    for index, (part, name) in enumerate(zip(parts, _names(parts, bool(labels)), strict=True)):
        module = _part_module(gm, record, part, is_last=index + 1 == len(parts))
        yield Block(
            index=index,
            name=name,
            module=module,
            needs=tuple(str(n.target) for n in module.graph.find_nodes(op="placeholder")),
            sites=tuple(dict.fromkeys(_sites_called(part, record))),
            stages=tuple(_stages(part, record)),
            units=tuple(_units(part, record, labels)),
            direct=frozenset(_direct(part, record, touched)),
            is_last=index + 1 == len(parts),
            repeated=part.label is not None or not labels,
        )


# What a part calls


def expert_paths(stack: ExpertStack) -> Iterator[str]:
    """The path of every expert of a stack as a site."""
    return (f"{stack.module}.{stack.parameter}.{index}" for index in range(stack.experts))


def _sites_called(part: _Part, record: TraceRecord) -> Iterator[str]:
    return (path for node in part.nodes for step in _steps(node, record) for path in step)


def _steps(node: fx.Node, record: TraceRecord) -> Iterator[tuple[str, ...]]:
    """The sites that a node calls, those together that it calls on the same value or independently."""
    if node.op != "call_module":
        return
    path = "" if node.target == WHOLE else str(node.target)
    if path in record.opaque:
        for inner in record.opaque[path].calls:
            yield from _steps_of_module(inner, record)
    else:
        yield from _steps_of_module(path, record)


def _steps_of_module(path: str, record: TraceRecord) -> Iterator[tuple[str, ...]]:
    if path in record.linears:
        yield (path,)
    elif path in record.experts:
        yield from (tuple(expert_paths(stack)) for stack in record.experts[path].stacks)


def _stages(part: _Part, record: TraceRecord) -> Iterator[tuple[str, ...]]:
    """Sites by the number of sites on the longest way to them."""
    depth: dict[fx.Node, int] = {}
    found: dict[int, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for node in part.nodes:
        level = max((depth.get(a, 0) for a in node.all_input_nodes), default=0)
        for step in _steps(node, record):
            found[level] += [path for path in step if path not in seen]
            seen.update(step)
            level += 1
        depth[node] = level
    return (tuple(found[level]) for level in sorted(found) if found[level])


def _behind_sites(graph: fx.Graph, record: TraceRecord) -> set[fx.Node]:
    """Everything that depends on what some site makes."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if _is_heavy(node, record) or any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def _direct(part: _Part, record: TraceRecord, touched: set[fx.Node]) -> Iterator[str]:
    inside, reached = set(part.nodes), set[fx.Node]()
    for node in part.nodes:
        if any(a in reached or (a not in inside and a in touched) for a in node.all_input_nodes):
            if not _is_heavy(node, record):
                reached.add(node)
            elif node.target not in record.opaque:  # what happens inside of an opaque part nobody knows
                yield from (path for step in _steps(node, record) for path in step)


def _units(part: _Part, record: TraceRecord, labels: set[str]) -> Iterator[tuple[str, ...]]:
    outer = {path for node in part.nodes for path in (*node_info(node).stack, str(node.target)) if path in labels}

    def repeated_child(path: str) -> str | None:
        return next((p for p in paths_around(path) if p in labels and p not in outer), None)

    for _, paths in groupby(dict.fromkeys(_sites_called(part, record)), key=repeated_child):
        yield tuple(paths)


# Where to cut


def _repeated_children(record: TraceRecord) -> set[str]:
    """Paths of the children of the outermost lists of modules that have linear layers or experts inside."""
    above = {prefix for path in record.linears.keys() | record.experts for prefix in paths_around(path)}
    labels: set[str] = set()
    for path, module in record.model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not any(_inside(path, label) for label in labels):
            children = dict(_called_children(path, module))
            deep = {p: c for p, c in children.items() if p in above}
            if isinstance(module, nn.Sequential):  # a plain chain repeats only what is of one kind
                deep = {p: c for p, c in deep.items() if sum(type(o) is type(c) for o in deep.values()) > 1}
            if len(deep) > 1:
                labels |= deep.keys()
    return labels


def _called_children(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children by path; in the place of lists of layers, which are never called, what these hold."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}".lstrip(".")
        if isinstance(child, nn.ModuleList) and not any(is_linear(inner) for inner in child.children()):
            yield from _called_children(child_path, child)
        else:
            yield child_path, child


def _above(path: str) -> Iterator[str]:
    """A path and those above it: lists are never called, so they are in no stack."""
    yield path
    yield from paths_around(path)


def _inside(path: str, label: str) -> bool:
    return path == label or path.startswith(label + ".")


def _split_at_children(nodes: Sequence[fx.Node], labels: set[str]) -> list[_Part]:
    """A part for every run of nodes made inside one labelled module, and for what lies between."""
    parts = [_Part(None, [])]
    for node in nodes:
        label = next((path for module in node_info(node).stack for path in _above(module) if path in labels), None)
        # Functions between two labelled modules stay with the first, so that only modules open a part.
        if (label or node.op == "call_module") and label != parts[-1].label:
            if parts[-1].nodes:
                parts.append(_Part(label, []))
            parts[-1].label = label
        parts[-1].nodes.append(node)
    return parts


def _split_at_bottlenecks(gm: fx.GraphModule, record: TraceRecord, nodes: Sequence[fx.Node]) -> list[_Part]:
    """Cut after a node that is the only live value which depends on data, with linear layers on both sides."""
    order = {node: i for i, node in enumerate(nodes)}
    last_use = {n: max((order.get(u, len(nodes)) for u in n.users), default=-1) for n in gm.graph.nodes}
    data = {n for n in gm.graph.find_nodes(op="placeholder") if _is_float(n)}
    work_left = sum(_is_heavy(n, record) for n in nodes)
    parts, live, work = [_Part(None, [])], set(data), 0
    for i, node in enumerate(nodes):
        parts[-1].nodes.append(node)
        if node.op == "call_module" or any(a in data for a in node.all_input_nodes):
            data.add(node)
            live.add(node)
        live = {n for n in live if last_use[n] > i}
        work += _is_heavy(node, record)
        work_left -= _is_heavy(node, record)
        if work and work_left and live == {node}:
            parts.append(_Part(None, []))
            work = 0
    return parts


def _is_float(node: fx.Node) -> bool:
    dtype = node_info(node).dtype
    return dtype is not None and dtype.is_floating_point


def _is_heavy(node: fx.Node, record: TraceRecord) -> bool:
    return next(_steps(node, record), None) is not None


# Where not to cut


def _unbreakable(parts: Sequence[_Part], record: TraceRecord, graph: fx.Graph) -> Iterator[tuple[int, int]]:
    """Ranges (first, last) of parts that must stay together."""
    callers = defaultdict(set)
    for i, part in enumerate(parts):
        for path in _sites_called(part, record):
            if path not in record.linears or record.linears[path].dense_reason is None:
                callers[path].add(i)
    yield from ((min(used), max(used)) for used in callers.values())
    yield from _writes_across(parts, graph)


def _writes_across(parts: Sequence[_Part], graph: fx.Graph) -> Iterator[tuple[int, int]]:
    """Ranges in which memory made in one part is written in another, where this must reach other readers.

    A block may run several times on the same inputs, so it writes to a copy of these (see `_part_module`). The
    write would be lost for later readers of the original, and for the block's own other views of it.
    """
    home = {node: i for i, part in enumerate(parts) for node in part.nodes}
    made = defaultdict(list)
    for node in graph.nodes:
        if node_info(node).storage is not None:
            made[node_info(node).storage].append(node)
    for j, part in enumerate(parts):
        for storage in {s for node in part.nodes for s in node_info(node).mutates}:
            early = [n for n in made[storage] if home.get(n, 0) < j]
            readers = [home.get(u, len(parts) - 1) for n in early for u in n.users]
            views = [n for n in early if any(home.get(u, len(parts) - 1) == j for u in n.users)]
            if len(views) > 1 or any(reader > j for reader in readers):
                yield min(home.get(n, 0) for n in early), max(readers)


def _merge(parts: Sequence[_Part], ranges: Iterable[tuple[int, int]]) -> Iterator[_Part]:
    joined = {i for first, last in ranges for i in range(first, last)}  # i and i + 1 stay together
    current = _Part(None, [])
    for i, part in enumerate(parts):
        current = _Part(current.label or part.label, current.nodes + part.nodes)
        if i not in joined:
            yield current
            current = _Part(None, [])


def _names(parts: Sequence[_Part], has_labels: bool) -> Iterator[str]:
    used: dict[str, int] = defaultdict(int)
    for i, part in enumerate(parts):
        if part.label is not None:
            name = part.label
        elif not has_labels:
            name = f"part.{i}"
        else:
            name = "prefix" if i == 0 else "suffix" if i + 1 == len(parts) else f"between.{i}"
        used[name] += 1
        yield name if used[name] == 1 else f"{name}:{used[name]}"  # a module list that is run through twice


# The graph of a part


def _part_module(gm: fx.GraphModule, record: TraceRecord, part: _Part, is_last: bool) -> fx.GraphModule:
    """The graph of one part. Inputs that it writes to are copied first, so that it can run on them again."""
    graph, inside, output = fx.Graph(), set(part.nodes), gm.graph.output_node()
    written = {storage for node in part.nodes for storage in node_info(node).mutates}
    outer = [*part.nodes, output] if is_last else part.nodes
    inputs = list(dict.fromkeys(a for node in outer for a in node.all_input_nodes if a not in inside))
    copies = {a: graph.placeholder(_name(a)) for a in inputs if a.op != "get_attr"}
    for node in inputs:
        if node.op == "get_attr":
            copies[node] = graph.node_copy(node)
        elif node_info(node).storage in written:
            copies[node] = graph.call_method("clone", (copies[node],))
    for node in part.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        naming_causal_masks(copies[node])
    result = output.args[0] if is_last else _handed_on(part, inside)
    graph.output(fx.node.map_arg(result, lambda n: copies[n]))
    return live_module(record.model, graph, record.constants)


def _handed_on(part: _Part, inside: set[fx.Node]) -> dict[str, fx.Node]:
    return {
        _name(node): node
        for node in part.nodes
        if node.op != "get_attr" and any(user not in inside for user in node.users)
    }


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "placeholder" else node.name
