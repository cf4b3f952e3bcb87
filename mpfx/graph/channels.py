"""Follows output channels through a traced graph to the modules that read them.

Every tracked tensor stands as a tensor of channel ids, of the same form. Data movement is run for real on these, an
operation that works position by position keeps them, a product of matrices hands on those of the operand in which
all summed positions hold the same channels, and everything else ends them. So an operation that is not known
loses channels and never makes up a relation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mpfx.graph.live import node_info
from mpfx.graph.operations import (
    JOINING,
    LIKE_ANOTHER,
    MATRIX_PRODUCTS,
    METADATA,
    MOVEMENT,
    PAIRS,
    PRODUCTS,
    QUOTIENTS,
    REDUCTIONS,
    SAME_VALUES,
    SUMS,
    VIEWS,
    added_reason,
    call_again,
    harmless_writers,
    is_float,
    operation_name,
    place_of,
    summed_reason,
    unknown_reason,
)
from mpfx.graph.reads import Followed, Read, Rules
from mpfx.graph.recognition import Pointwise, likeness, module_function, pointwise
from mpfx.graph.sampling import SampleSizes, UnknownSizeError
from mpfx.graph.tags import (
    NO_CHANNEL,
    Layer,
    Operand,
    Tags,
    context_of,
    first_sum,
    hash_pairs,
    layer_ids,
    mixed,
    positions,
    product_layers,
    sizes_of,
    sum_layers,
    summed_over,
    varies_with,
    weighted,
)


def follow_channels(gm: fx.GraphModule, rules: Rules) -> Followed:
    """Follow the output channels (last dimension) of all sources through the graph."""
    flow = _Flow(gm, rules)
    readers = {node: len(node.users) for node in gm.graph.nodes}
    for node in gm.graph.nodes:
        flow.step(node)
        for read in node.all_input_nodes:
            readers[read] -= 1
            if not readers[read]:
                flow.forget(read)
    return flow.result


class _Lost(Exception):  # noqa: N818 - no error, but the end of a path
    """Raised with the reason when an operation ends the channels that it reads."""


_Value = Tags | tuple[Tags, ...]


class _Flow:
    """The tags of all values so far, and the result so far."""

    def __init__(self, gm: fx.GraphModule, rules: Rules) -> None:
        self.result = Followed.nowhere(rules.sources)
        self._gm, self._rules = gm, rules
        self._modules = dict(gm.named_modules(remove_duplicate=False))
        self._sizes = SampleSizes(gm)
        self._values: dict[fx.Node, _Value] = {}
        writers = harmless_writers(gm.graph)
        self._written = frozenset(s for n in gm.graph.nodes if n not in writers for s in node_info(n).mutates)
        self._tried: dict[Any, Pointwise | None] = {}
        self._rules_by_name: dict[str, Callable[[fx.Node, list[fx.Node]], _Value | None]] = {
            **dict.fromkeys(METADATA, lambda node, tagged: None),
            **dict.fromkeys(JOINING, self._join),
            **dict.fromkeys(PAIRS, self._pair),
            **dict.fromkeys(MATRIX_PRODUCTS, self._matrix_product),
            "scaled_dot_product_attention": self._attention,
        }

    def step(self, node: fx.Node) -> None:
        """Find the tags of one node's result from those of its arguments."""
        tagged = [a for a in node.all_input_nodes if a in self._values]
        if tagged:
            try:
                value = self._result(node, tagged)
                if value is not None:
                    self._keep(node, value)
            except _Lost as lost:
                self._lose(tagged, str(lost))
            except (UnknownSizeError, RuntimeError, TypeError, ValueError, IndexError):  # it cannot be run on ids
                self._lose(tagged, unknown_reason(node))
        if node.op == "call_module" and node.target in self._rules.sources:
            self._begin(node)

    def forget(self, node: fx.Node) -> None:
        """Drop the tags of a value that nothing reads any more, which are as large as a sample of it."""
        self._values.pop(node, None)

    def _begin(self, node: fx.Node) -> None:
        path = str(node.target)
        width, sizes = self._rules.sources[path], self._sizes.of(node)
        ids = self.result.first[path] + torch.arange(width)
        if sizes is None or sizes[-1:] != (width,):
            self.result.lose(ids, f"the form of its result is not known when {place_of(node)} runs")
            return
        try:
            self._keep(node, Tags((Layer(ids.expand(sizes), scales=True),)))
        except _Lost as lost:
            self.result.lose(ids, str(lost))

    def _keep(self, node: fx.Node, value: _Value) -> None:
        if node_info(node).storage in self._written and node_info(node).storage is not None:
            self._values[node] = value
            self._lose([node], "its memory is written to in place, which changes what others read from it")
            del self._values[node]
            return
        if isinstance(value, Tags) and value.form != self._sizes.of(node):
            raise _Lost(f"it goes through {place_of(node)}, whose result has another form than expected")
        self._values[node] = value

    def _lose(self, nodes: Sequence[fx.Node], reason: str) -> None:
        for node in nodes:
            value = self._values[node]
            for tags in (value,) if isinstance(value, Tags) else value:
                for layer in tags.layers:
                    self.result.lose(layer.ids, tags.sum or reason)

    def _result(self, node: fx.Node, tagged: list[fx.Node]) -> _Value | None:
        """The tags of the result, None if it has none without a loss."""
        if node.op == "output":
            raise _Lost("the model returns it")
        if node.op == "call_module":
            return self._module(node, tagged)
        rule = self._rules_by_name.get(operation_name(node), self._of_first)
        return rule(node, tagged)

    # Functions of one value

    def _of_first(self, node: fx.Node, tagged: list[fx.Node]) -> _Value | None:
        name = operation_name(node)
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or first not in tagged:
            if name in SAME_VALUES or name in LIKE_ANOTHER:
                return None  # the others lend their form only
            raise _Lost(unknown_reason(node))
        value = self._values[first]
        if name == "getitem" and isinstance(value, tuple):
            return value[int(self._sizes.arguments(node.args[1]))]
        if not isinstance(value, Tags):
            raise _Lost(unknown_reason(node))
        if name in SAME_VALUES:
            if not is_float(node):
                raise _Lost(f"{place_of(node)} converts it to another kind of number")
            return value
        if name in MOVEMENT or name in LIKE_ANOTHER or name == "getattr":
            return self._move(node, name, value)
        if name in REDUCTIONS:
            return self._reduce(node, value)
        if tagged != [first]:
            raise _Lost(unknown_reason(node))
        return self._pointwise(node, value, lambda args, kwargs: lambda x: call_again(node, x, args, kwargs))

    def _move(self, node: fx.Node, name: str, value: Tags) -> _Value:
        if name in LIKE_ANOTHER:
            sizes = self._sizes.of(node)
            return value.moved(lambda x: getattr(x, LIKE_ANOTHER[name])(sizes))
        rest, kwargs = self._sizes.arguments(node.args[1:]), self._sizes.arguments(dict(node.kwargs))
        other_bytes = any(isinstance(a, torch.dtype) for a in (*rest, *kwargs.values()))
        if other_bytes or (name == "getattr" and rest[0] not in VIEWS):
            raise _Lost(unknown_reason(node))
        return _split(value, lambda x: call_again(node, x[...], rest, kwargs))  # a view, as it may work in place

    def _reduce(self, node: fx.Node, value: Tags) -> Tags:
        """A sum or mean over positions that all hold the same channels."""
        rest, kwargs = self._sizes.arguments(node.args[1:]), self._sizes.arguments(dict(node.kwargs))
        dims = kwargs.get("dim", rest[0] if rest else None)
        keep = kwargs.get("keepdim", rest[1] if len(rest) > 1 else False)
        if dims is None or not is_float(node):
            raise _Lost(summed_reason(node))
        for dim in sorted({d % len(value.form) for d in ([dims] if isinstance(dims, int) else dims)}, reverse=True):
            summed = summed_over(value, dim)
            if summed is None:
                raise _Lost(summed_reason(node))
            value = summed if keep else summed.moved(lambda x, d=dim: x.squeeze(d))  # type: ignore[misc]
        return value

    def _pointwise(self, node: fx.Node, value: Tags, bind: Callable[[Any, Any], Callable[[Tensor], Any]]) -> Tags:
        """A function of one value that a trial shows to work position by position."""
        sizes = self._sizes.of(node)
        if sizes != value.form or not is_float(node):
            raise _Lost(unknown_reason(node))
        args, kwargs = self._sizes.arguments(node.args[1:]), self._sizes.arguments(dict(node.kwargs))
        what = likeness(self._modules[str(node.target)]) if node.op == "call_module" else node.target
        key = (node.op, what, sizes, repr(args), repr(kwargs))
        if key not in self._tried:
            self._tried[key] = pointwise(bind(args, kwargs), sizes)
        found = self._tried[key]
        if found is None:
            raise _Lost(unknown_reason(node))
        context = value.context if found.uniform else mixed(value.context, positions(sizes, sizes))
        return Tags(tuple(Layer(x.ids, x.scales and found.homogeneous) for x in value.layers), context, value.sum)

    # Functions of several values

    def _join(self, node: fx.Node, tagged: list[fx.Node]) -> Tags:
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(parts, (list, tuple)) or not isinstance(dim, int):
            raise _Lost(unknown_reason(node))
        values = [self._operand(node, part) for part in parts]
        count = max(len(value.layers) for value in values if isinstance(value, Tags))
        run = torch.stack if operation_name(node) == "stack" else torch.cat
        layers = []
        for i in range(count):
            present = [v.layers[i] for v in values if isinstance(v, Tags) and i < len(v.layers)]
            ids = [layer_ids(value, i) for value in values]
            layers.append(Layer(run(ids, dim), all(layer.scales for layer in present)))
        # Each part has come its own way, so that it is another function of its channels.
        contexts = [mixed(context_of(value), torch.full(sizes_of(value), i)) for i, value in enumerate(values)]
        context = run([c for c in contexts if c is not None], dim)
        return Tags(tuple(layers), context, first_sum([v for v in values if isinstance(v, Tags)]))

    def _operand(self, node: fx.Node, argument: Any) -> Operand:
        """Tags of an argument, or its sizes where it is not tracked (none for a number)."""
        if not isinstance(argument, fx.Node):
            return ()
        value = self._values.get(argument)
        if value is None:
            sizes = self._sizes.of(argument)
            if sizes is None and node_info(argument).sizes is not None:
                raise _Lost(unknown_reason(node))
            return sizes or ()
        if not isinstance(value, Tags):
            raise _Lost(unknown_reason(node))
        return value

    def _pair(self, node: fx.Node, tagged: list[fx.Node]) -> Tags | None:
        """An operation position by position on several values, such as the product of gate and up."""
        sizes, name = self._sizes.of(node), operation_name(node)
        others = [a for key, a in node.kwargs.items() if key in ("other", "input", "self")]
        if sizes is None or not is_float(node) or "out" in node.kwargs or "rounding_mode" in node.kwargs:
            raise _Lost(unknown_reason(node))
        factors = name in PRODUCTS or name in QUOTIENTS
        operands = [self._operand(node, a) for a in (*node.args, *others)]
        if not factors:
            operands = [self._without_lost(operand) for operand in operands]
        tracked = [o.moved(lambda x: x.expand(sizes)) for o in operands if isinstance(o, Tags)]
        if not tracked:
            return None
        unknown = [sizes_of(o) for o in operands if not isinstance(o, Tags) or o.untracked()]
        if not factors and any(varies_with(form, value) for form in unknown for value in tracked):
            raise _Lost(added_reason(node))
        if factors:
            layers = product_layers(operands, sizes, quotient=name in QUOTIENTS)
        else:
            layers = sum_layers(tracked, homogeneous=name in SUMS and len(tracked) == len(operands))
        context = None
        for part in (*(t.context for t in tracked), *(positions(form, sizes) for form in unknown)):
            context = mixed(context, part)
        makers = self.result.makers(torch.stack([layer.ids for layer in layers]))
        here = added_reason(node) if not factors and len(makers) > 1 else None
        return Tags(layers, context, first_sum(tracked) or here)

    def _without_lost(self, operand: Operand) -> Operand:
        """An operand all of whose channels are lost already is like one that was never tracked."""
        if isinstance(operand, Tags):
            ids = torch.stack([layer.ids for layer in operand.layers])
            if bool(self.result.lost[ids[ids != NO_CHANNEL]].all()):
                return tuple(operand.form)
        return operand

    def _matrix_product(self, node: fx.Node, tagged: list[fx.Node]) -> Tags:
        sizes = self._sizes.of(node)
        operands = [self._operand(node, a) for a in (*node.args, *node.kwargs.values())]
        if sizes is None or len(operands) != 2 or any(len(sizes_of(o)) < 2 for o in operands):
            raise _Lost(unknown_reason(node))
        left, right = operands
        found = []  # the sum, the sizes of its weights, and which argument holds these
        if isinstance(left, Tags) and (summed := summed_over(left, -1)):
            found.append((summed, (*sizes_of(right)[:-2], 1, sizes_of(right)[-1]), 1))
        if isinstance(right, Tags) and (summed := summed_over(right, -2)):
            found.append((summed, (*sizes_of(left)[:-1], 1), 0))
        if len(found) != 1:
            raise _Lost(summed_reason(node))
        [(summed, weights, other)] = found
        if isinstance(operands[other], Tags):
            self._lose([a for i, a in enumerate(node.all_input_nodes) if i == other], summed_reason(node))
        if node.all_input_nodes != [*node.args, *node.kwargs.values()]:  # one value twice
            raise _Lost(summed_reason(node))
        return weighted(summed, sizes, weights)

    def _attention(self, node: fx.Node, tagged: list[fx.Node]) -> Tags | None:
        """Attention is a weighted sum of its third argument, with weights for every head."""
        sizes = self._sizes.of(node)
        value = node.kwargs.get("value", node.args[2] if len(node.args) > 2 else None)
        others = [a for a in tagged if a is not value]
        self._lose(others, f"it decides the weights of attention in {place_of(node)}")
        if not isinstance(value, fx.Node) or value not in tagged:
            return None
        if len(others) + 1 != len(tagged) or [*node.args, *node.kwargs.values()].count(value) != 1:
            raise _Lost(f"it decides the weights of attention in {place_of(node)}")
        tags = self._values[value]
        summed = summed_over(tags, -2) if isinstance(tags, Tags) else None
        dropout = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
        if sizes is None or summed is None or dropout:
            raise _Lost(summed_reason(node))
        if len(sizes) > 2 and 1 < summed.form[-3] < sizes[-3]:  # enable_gqa: each head serves several
            times = sizes[-3] // summed.form[-3]
            summed = summed.moved(lambda x: x.repeat_interleave(times, -3))
        return weighted(summed, sizes, (*sizes[:-1], 1))

    # Modules

    def _module(self, node: fx.Node, tagged: list[fx.Node]) -> Tags | None:
        path = str(node.target)
        module = self._modules.get(path)
        kind = type(module).__name__
        value = self._values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if module is None:
            raise _Lost("it goes into a part of the model that runs as a whole")
        if not isinstance(value, Tags) or tagged != [node.args[0]]:
            raise _Lost(f"it is an argument of `{path}` ({kind}), which is not known to read it as columns of a matrix")
        if self._rules.may_read(node, value.form[-1]):
            refusal = self._rules.refusal(path)
            if refusal:
                raise _Lost(f"it is read by `{path}`, which must stay as it is: {refusal}")
            self._read(node, path, value)
            return None
        if path in self._rules.sources:
            raise _Lost(f"it is read by `{path}` ({kind}), which is no linear layer")
        if module._modules:
            raise _Lost(f"it goes into `{path}` ({kind}), which is not known to read it as columns of a matrix")
        if module._forward_hooks or module._forward_pre_hooks:
            raise _Lost(f"it goes into `{path}` ({kind}), which has forward hooks")
        return self._pointwise(node, value, lambda args, kwargs: module_function(module, args, kwargs))

    def _read(self, node: fx.Node, path: str, value: Tags) -> None:
        rows = value.moved(lambda x: x.reshape(-1, x.shape[-1]))
        if any(not bool((layer.ids == layer.ids[:1]).all()) for layer in rows.layers):
            raise _Lost(f"`{path}` reads other channels at other positions")
        context = torch.zeros(rows.form[-1], dtype=torch.int64)
        for row in () if rows.context is None else rows.context:
            context = hash_pairs(context, row)
        layers = tuple(Layer(layer.ids[0].clone(), layer.scales) for layer in rows.layers)
        self.result.reads[path].append(Read(layers, context))


def _split(value: Tags, move: Callable[[Tensor], Any]) -> _Value:
    """Tags after a movement that may give several results."""
    first = move(value.layers[0].ids)
    if isinstance(first, Tensor):
        return value.moved(move)
    return tuple(value.moved(lambda x, i=i: move(x)[i]) for i in range(len(first)))  # type: ignore[misc]
