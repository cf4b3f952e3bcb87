"""Which modules make the channels that linear layers read, and what may be folded from one into the other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from mpfx.graph.channels import follow_channels
from mpfx.graph.linear import is_experts, is_linear, paths_around
from mpfx.graph.live import TraceRecord, node_info, record_of
from mpfx.graph.reads import Followed, Read, Rules
from mpfx.graph.recognition import experts_inputs, likeness, matrix_input, norm_kind
from mpfx.graph.tags import NO_CHANNEL, Layer, hash_pairs

ProducerKind = Literal["norm", "norm_plus_one", "linear"]


@dataclass(frozen=True)
class Consumer:
    """A module that reads channels of a producer as the columns of its weight.

    Attributes:
        path: Of a linear layer, a router with a two-dimensional weight, or fused experts.
        channels: int64 ``(in,)``: the output channel of the producer that each input channel reads, -1 for none.
        scalable: Whether a positive factor on a channel of the producer arrives as the same factor.
    """

    path: str
    channels: Tensor
    scalable: bool


@dataclass(frozen=True)
class Producer:
    """A norm or linear layer, and where its output channels go.

    Attributes:
        path: Module path.
        kind: ``"norm"`` multiplies channel c by ``weight[c]``, ``"norm_plus_one"`` by ``1 + weight[c]``; ``"linear"``
            makes it with row c of its weight.
        consumers: What reads its channels. A path occurs twice where a channel is read as the product of two.
        closed: bool ``(channels,)``: whether a channel reaches these consumers and nothing else.
        cell: int64 ``(channels,)``: as far as what follows is concerned, channels may be permuted inside one cell (an
            attention head) only; -1 for those that are not closed.
        reason: Why channels are not closed, of the first of these; None where all are.
    """

    path: str
    kind: ProducerKind
    consumers: tuple[Consumer, ...]
    closed: Tensor
    cell: Tensor
    reason: str | None


@dataclass(frozen=True)
class PermutationFold:
    """Sites whose input channels can be reordered, as rows of the layers that make them follow.

    Attributes:
        sites: Paths of all linear layers that read the value; all of their input channels come from it.
        unit: int64 ``(in,)``: the free unit that each input channel stands for. Where heads are grouped, several
            input channels share one.
        image: int64 ``(in,)``: the copy (head) that a channel belongs to. Inside one image every unit of its cell
            occurs exactly once.
        cell: int64 ``(units,)``: units may be permuted inside one cell only.
        producers: Path of each linear layer that makes the units, with the row for every unit, int64 ``(units,)``. A
            layer occurs twice where each unit is made from two of its rows.
        out_features: Number of rows in all of each layer in `producers`.
    """

    sites: tuple[str, ...]
    unit: Tensor
    image: Tensor
    cell: Tensor
    producers: tuple[tuple[str, Tensor], ...]
    out_features: tuple[int, ...]


@dataclass(frozen=True)
class ScaleFold:
    """A positive factor per unit that can move from one producer into the columns of all its consumers.

    Attributes:
        consumers: Path of everything that reads the value, with the unit of each input channel, int64 ``(in,)``, -1 for
            none. Where a path occurs twice, both factors apply.
        producer: Module path.
        kind: Of the producer, see `Producer`.
        rows: int64 ``(units,)``: the output channel of the producer that each unit is.
    """

    consumers: tuple[tuple[str, Tensor], ...]
    producer: str
    kind: ProducerKind
    rows: Tensor


def producers(gm: fx.GraphModule) -> tuple[Producer, ...]:
    """Norms and linear layers that the graph calls, in graph order, with what becomes of their output channels.

    Weights that are shared, hooked, parametrized or read by other code take no part. Norms are recognised by
    a trial with random weights, so a model on the meta device will do. What has been replaced before the first
    call of this function is no producer or consumer either. All of it holds for the traced call: what only another call
    reads (an output head that was not in use, say) is not known here.

    Raises:
        TypeError: If the graph was not made by `trace`.
    """
    return _analysis(gm).producers


def permutation_folds(gm: fx.GraphModule) -> tuple[PermutationFold, ...]:
    """Where input channels of linear layers can be reordered at no cost, in graph order of the readers.

    Examples are down from gate and up, and o from v inside attention heads.

    Raises:
        TypeError: If the graph was not made by `trace`.
    """
    record = record_of(gm)
    return record.cached("permutation_folds", gm.graph, lambda: tuple(_permutation_folds(_analysis(gm))))


def scale_folds(gm: fx.GraphModule) -> tuple[ScaleFold, ...]:
    """Where positive factors can move from a producer's output channels into its consumers' columns, in graph order.

    Raises:
        TypeError: If the graph was not made by `trace`.
    """
    record = record_of(gm)
    return record.cached("scale_folds", gm.graph, lambda: tuple(_scale_folds(_analysis(gm))))


# Which modules take part


class _Participants:
    """The modules of a graph as sources and readers of channels."""

    def __init__(self, gm: fx.GraphModule, record: TraceRecord) -> None:
        self._record = record
        self._modules = dict(record.model.named_modules(remove_duplicate=False))
        self._calls = _calls(gm)
        self._entered = {path for node in gm.graph.nodes for path in node_info(node).stack}
        self._opaque = {path for path in self._calls if self._runs_whole(path)}
        self._read_directly = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
        modules = list(record.model.modules())
        self._holders = Counter(id(child) for m in modules for child in m._modules.values())
        self._owners = Counter(_memory(p) for m in modules for p in m._parameters.values() if p is not None)
        self._may_read: dict[tuple[str, int], bool] = {}
        self._norms: dict[Hashable, ProducerKind | None] = {}
        self._matrices: dict[tuple[Hashable, int], int | None] = {}

    def kinds(self) -> Iterator[tuple[str, ProducerKind]]:
        """Every module whose output channels are to be followed, in graph order."""
        for path, calls in self._calls.items():
            kind = self._kind(path)
            if kind is not None and self.refusal(path) is None and all(_has_one_input(call) for call in calls):
                yield path, kind

    def refusal(self, path: str) -> str | None:
        """Why the weights of a module cannot be changed, or None."""
        module, facts = self._modules[path], self._record.linears.get(path)
        own = [(name, p) for name, p in module._parameters.items() if p is not None]
        if self._record.shared.intersection([id(module), *(id(p) for _, p in own)]):
            return "it is used outside of the traced module too"
        if any(0 in p.stride() for _, p in own if p.numel() > 1):
            return "a parameter is an expanded view, which cannot be written to"
        reasons = {
            "it has been replaced since the trace": facts is not None and not is_linear(module),
            "a parameter is shared with another module (tied)": any(self._owners[_memory(p)] > 1 for _, p in own),
            "the module is registered under more than one path": self._holders[id(module)] > 1,
            "it has forward hooks": bool(module._forward_hooks or module._forward_pre_hooks),
            "other code reads a parameter directly": any(f"{path}.{name}" in self._read_directly for name, _ in own),
            "it is also part of a module that runs as a whole": self._lies_in_opaque(path),
        }
        found = (reason for reason, applies in reasons.items() if applies)
        return (facts.dense_reason if facts is not None else None) or next(found, None)

    def _lies_in_opaque(self, path: str) -> bool:
        return not self._opaque.isdisjoint(paths_around(path))

    def may_read(self, call: fx.Node, width: int) -> bool:
        """Whether the called module reads ``width`` channels of its first argument as columns of a matrix."""
        path = str(call.target)
        if (path, width) not in self._may_read:
            self._may_read[path, width] = self._reads(path, width)
        return self._may_read[path, width] and (path in self._record.experts or _has_one_input(call))

    def _reads(self, path: str, width: int) -> bool:
        module = self._modules[path]
        if path in self._record.linears:
            return self._record.linears[path].in_features == width
        if is_experts(module):
            return experts_inputs(module, width) is not None
        key = likeness(module), width
        if key not in self._matrices:
            self._matrices[key] = matrix_input(module, width)
        return self._matrices[key] is not None

    def _kind(self, path: str) -> ProducerKind | None:
        if path in self._record.linears:
            return "linear"
        if path not in self._modules:
            return None
        key = likeness(self._modules[path])
        if key not in self._norms:
            self._norms[key] = norm_kind(self._modules[path])
        return self._norms[key]

    def idle(self) -> Iterator[tuple[int, str]]:
        """Modules that another call of the model may run: the width that they read, and their path."""
        parts = self._record.opaque.values()
        called = {*self._calls, *(path for part in parts for path in part.calls)} - {part.path for part in parts}
        entered = {*self._entered, *(part.path for part in parts)}
        opaque = {part.path for part in parts}
        everywhere = dict(self._record.model.named_modules(remove_duplicate=False))
        running = {id(everywhere[path]) for path in called | entered if path in everywhere}
        for path, module in self._modules.items():
            layer = path in self._record.linears or path in self._record.experts
            # What lies in a module that is called as a whole belongs to it.
            seen = id(module) in running or not called.isdisjoint(paths_around(path))
            seen = seen or (not layer and not opaque.isdisjoint(paths_around(path)))
            if seen or isinstance(module, nn.Embedding):
                continue
            if path in self._record.linears:
                yield self._record.linears[path].in_features, path
            else:
                yield from ((p.shape[-1], path) for p in module._parameters.values() if p is not None and p.dim())

    def _runs_whole(self, path: str) -> bool:
        module = self._modules.get(path)
        leaves = self._record.linears.keys() | self._record.experts
        return module is None or bool(module._modules and path not in leaves)


def _calls(gm: fx.GraphModule) -> dict[str, list[fx.Node]]:
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in gm.graph.find_nodes(op="call_module", sort=True):
        calls[str(node.target)].append(node)
    return calls


def _has_one_input(call: fx.Node) -> bool:
    given = [*call.args, *call.kwargs.values()]
    return len(given) == 1 and isinstance(given[0], fx.Node) and bool(call.args)


def _memory(parameter: Tensor) -> object:
    """The same for parameters that are one, or lie in the same place."""
    if parameter.is_meta or type(parameter) is not nn.Parameter or not parameter.data_ptr():
        return id(parameter)
    return ("at", parameter.device, parameter.data_ptr())


# Where the channels go


@dataclass(frozen=True)
class _Analysis:
    """What the folds are derived from.

    Attributes:
        producers: In graph order.
        followed: Where their channels go.
        reads: By path, what each reader reads the same way in every call.
        linears: Paths of the linear layers.
    """

    producers: tuple[Producer, ...]
    followed: Followed
    reads: Mapping[str, Read]
    linears: frozenset[str]


def _analysis(gm: fx.GraphModule) -> _Analysis:
    record = record_of(gm)
    return record.cached("producers", gm.graph, lambda: _analyse(gm, record))


def _analyse(gm: fx.GraphModule, record: TraceRecord) -> _Analysis:
    participants = _Participants(gm, record)
    kinds = dict(participants.kinds())
    widths = {path: _width(record, path) for path in kinds}
    followed = follow_channels(gm, Rules(widths, participants.may_read, participants.refusal))
    reads = dict(_merged_reads(gm, followed))
    consumers = _consumers(followed, reads)
    idle = dict(participants.idle())
    for path, width in widths.items():
        for read in {width, *(len(use.layer.ids) for use in consumers[path])} & idle.keys():
            channels = torch.arange(followed.first[path], followed.first[path] + width)
            followed.lose(channels, f"`{idle[read]}`, which the traced call does not reach, may read it in another")
    found = tuple(_producer(path, kind, widths[path], followed, consumers[path]) for path, kind in kinds.items())
    return _Analysis(found, followed, reads, frozenset(record.linears))


def _width(record: TraceRecord, path: str) -> int:
    if path in record.linears:
        return record.linears[path].out_features
    weight = record.model.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _merged_reads(gm: fx.GraphModule, followed: Followed) -> Iterator[tuple[str, Read]]:
    """One read per reader; loses the channels of those that read differently from call to call."""
    calls = _calls(gm)
    for path, reads in followed.reads.items():
        ordered = [Read(tuple(sorted(read.layers, key=_order_key)), read.context) for read in reads]
        if len(reads) < len(calls[path]) or any(_ids_key(read) != _ids_key(ordered[0]) for read in ordered):
            for layer in (layer for read in reads for layer in read.layers):
                followed.lose(layer.ids, f"`{path}` is also called on another value")
            continue
        factors = zip(*(read.layers for read in ordered), strict=True)
        layers = tuple(Layer(same[0].ids, all(layer.scales for layer in same)) for same in factors)
        yield path, Read(layers, _same_in_all([read.context for read in ordered]))


def _same_in_all(contexts: Sequence[Tensor]) -> Tensor:
    """Contexts that are the same where they are the same in every call."""
    number = torch.zeros_like(contexts[0])
    for context in contexts:
        number = _numbered_pairs(number, context)
    return number


def _order_key(layer: Layer) -> tuple[int, bytes]:
    return int(layer.ids[layer.ids != NO_CHANNEL].min()), layer.ids.numpy().tobytes()


def _ids_key(read: Read) -> tuple[bytes, ...]:
    return tuple(layer.ids.numpy().tobytes() for layer in read.layers)


@dataclass(frozen=True)
class _Use:
    """One layer of what a reader reads, with `Read.context`."""

    reader: str
    layer: Layer
    context: Tensor


def _consumers(followed: Followed, reads: Mapping[str, Read]) -> Mapping[str, list[_Use]]:
    """The readers of every producer's channels."""
    found: dict[str, list[_Use]] = defaultdict(list)
    for path, read in reads.items():
        for layer in read.layers:
            for maker in followed.makers(layer.ids):
                found[maker].append(_Use(path, layer, read.context))
    return found


def _producer(path: str, kind: ProducerKind, width: int, followed: Followed, uses: Sequence[_Use]) -> Producer:
    first = followed.first[path]
    places = _Places(width)
    consumers = []
    for use in uses:
        own = (use.layer.ids >= first) & (use.layer.ids < first + width)
        channels = torch.where(own, use.layer.ids - first, NO_CHANNEL)
        consumers.append(Consumer(use.reader, channels, use.layer.scales))
        places.add(channels[own], use.context[own])
    closed = places.used & ~followed.lost[first : first + width]
    cell = torch.full((width,), NO_CHANNEL)
    cell[closed] = _numbered(places.signatures[closed])
    reason = None if bool(closed.all()) else followed.reasons.get(path, "no linear layer reads it")
    return Producer(path, kind, tuple(consumers), closed, cell, reason)


class _Places:
    """Tells channels apart by the places and contexts that they are read in, each as often as it occurs.

    Attributes:
        signatures: int64 ``(channels,)``, hashes: the same for channels that are read alike.
        used: bool ``(channels,)``: whether a channel is read anywhere.
    """

    def __init__(self, count: int) -> None:
        self.signatures = torch.zeros(count, dtype=torch.int64)
        self.used = torch.zeros(count, dtype=torch.bool)
        self._next = 1

    def add(self, channels: Tensor, contexts: Tensor) -> None:
        """Note a further place: there ``channels[i]`` is read in ``contexts[i]``."""
        place = torch.full_like(contexts, self._next)
        self.signatures.index_add_(0, channels, hash_pairs(hash_pairs(place, contexts), place))
        self.used[channels] = True
        self._next += 1


def _numbered(keys: Tensor) -> Tensor:
    """Number the different keys in order of their first occurrence."""
    different, number = torch.unique(keys, return_inverse=True)
    first = torch.full((len(different),), len(keys)).scatter_reduce(0, number, torch.arange(len(keys)), "amin")
    return first.argsort().argsort()[number]


def _numbered_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Number the different pairs ``(a[i], b[i])`` in order of their first occurrence."""
    return _numbered(hash_pairs(a, b))


# Folds


def _scale_folds(analysis: _Analysis) -> Iterator[ScaleFold]:
    for producer in analysis.producers:
        scalable = producer.closed.clone()
        for consumer in producer.consumers:
            if not consumer.scalable:
                scalable[consumer.channels[consumer.channels != NO_CHANNEL]] = False
        rows = scalable.nonzero().flatten()
        if len(rows):
            unit = torch.full((len(scalable) + 1,), NO_CHANNEL)  # the last entry is that of channel -1
            unit[rows] = torch.arange(len(rows))
            units = [(consumer.path, unit[consumer.channels]) for consumer in producer.consumers]
            used = tuple((path, of) for path, of in units if bool((of != NO_CHANNEL).any()))
            yield ScaleFold(used, producer.path, producer.kind, rows)


def _permutation_folds(analysis: _Analysis) -> Iterator[PermutationFold]:
    groups: dict[tuple[bytes, ...], list[str]] = defaultdict(list)
    readers = torch.zeros(len(analysis.followed.lost), dtype=torch.int64)  # of every id
    by_path = {producer.path: producer for producer in analysis.producers}
    for path, read in analysis.reads.items():
        groups[_ids_key(read)].append(path)
        ids = torch.cat([layer.ids for layer in read.layers])
        readers[ids[ids != NO_CHANNEL]] += 1  # once, however often an id is there
    for paths in groups.values():
        ids = torch.stack([layer.ids for layer in analysis.reads[paths[0]].layers])
        closed = not bool((ids == NO_CHANNEL).any()) and not bool(analysis.followed.lost[ids].any())
        if closed and analysis.linears.issuperset(paths) and bool((readers[ids] == len(paths)).all()):
            fold = _permutation_fold(paths, ids, analysis, by_path)
            if fold is not None:
                yield fold


def _permutation_fold(
    paths: Sequence[str], ids: Tensor, analysis: _Analysis, by_path: Mapping[str, Producer]
) -> PermutationFold | None:
    """The fold of channels ``ids (layers, in)`` that the linear layers ``paths`` and nothing else read."""
    key = torch.zeros_like(ids[0])
    for row in ids:
        key = hash_pairs(key, row)
    unit = _numbered(key)
    units = torch.empty(len(ids), int(unit.max()) + 1, dtype=torch.int64)
    units[:, unit] = ids
    if units.unique().numel() != units.numel():  # a channel that stands with several others has no place of its own
        return None
    image = torch.zeros_like(unit)
    for path in paths:
        image = _numbered_pairs(image, analysis.reads[path].context)
    image = _numbered_pairs(image, _occurrence(_numbered_pairs(image, unit)))
    places = _Places(units.shape[1])
    places.add(unit, image)
    cell = _numbered(places.signatures)
    makers = [analysis.followed.makers(row) for row in units]
    known = all(len(paths) == 1 and by_path[paths[0]].kind == "linear" for paths in makers)
    if not known or not bool((torch.bincount(cell) > 1).any()):
        return None
    rows = tuple((path, row - analysis.followed.first[path]) for [path], row in zip(makers, units, strict=True))
    widths = tuple(len(by_path[path].closed) for path, _ in rows)
    return PermutationFold(tuple(paths), unit, image, cell, rows, widths)


def _occurrence(key: Tensor) -> Tensor:
    """For every position how many before it have the same key."""
    order = key.argsort(stable=True)
    counts = torch.bincount(key)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(key)
    rank[order] = torch.arange(len(key)) - starts[key[order]]
    return rank
