"""Numbers in place of the symbolic sizes of a trace, so that data movement can be run on small tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from mpfx.graph.compat import Symbol, size_hint, size_symbol, size_value, symbolic_expression
from mpfx.graph.live import node_info, record_of


class UnknownSizeError(Exception):
    """An argument is a tensor, or depends on the values of one."""


class SampleSizes:
    """Sizes and numbers of a graph for one choice of the sizes of its inputs.

    The smallest different sizes that the trace allows are chosen, else those of the traced example.

    Args:
        gm: A traced graph.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._values = _choose(gm)
        self._known: dict[Any, int | None] = {}
        self._numbers: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> tuple[int, ...] | None:
        """The sizes of a node's tensor, None if it is none or one whose sizes depend on values."""
        sizes = node_info(node).sizes
        known = None if sizes is None else [self._size(size) for size in sizes]
        return None if known is None or None in known else tuple(size for size in known if size is not None)

    def arguments(self, argument: Any) -> Any:
        """Arguments with numbers in place of the nodes that compute numbers.

        Raises:
            UnknownSizeError: If one is a tensor, or depends on the values of one.
        """
        return fx.node.map_arg(argument, self._number)

    def _size(self, size: Any) -> int | None:
        if isinstance(size, int):
            return size
        expression = symbolic_expression(size)  # unlike the size itself, it can be a key
        if expression not in self._known:
            self._known[expression] = size_value(expression, self._values)
        return self._known[expression]

    def _number(self, node: fx.Node) -> Any:
        if node not in self._numbers:
            self._numbers[node] = self._compute(node)
        return self._numbers[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "call_method" and node.target == "size" and isinstance(node.args[0], fx.Node):
            sizes = self.of(node.args[0])
            if sizes is not None and len(node.args) == 2:
                return sizes[self.arguments(node.args[1])]
        elif node.op == "call_function" and node_info(node).sizes is None and callable(node.target):
            args, kwargs = self.arguments(node.args), self.arguments(node.kwargs)
            return node.target(*args, **kwargs)
        raise UnknownSizeError(node.name)


def _choose(gm: fx.GraphModule) -> Mapping[Symbol, int]:
    """Values of the symbols in the sizes of the inputs."""
    hints = dict(_hints(gm))
    small = {symbol: min(2 + i, hint) for i, (symbol, hint) in enumerate(hints.items())}
    allowed = all(size_value(rule, small) != 0 for rule in record_of(gm).sizes.rules)
    return small if allowed else hints


def _hints(gm: fx.GraphModule) -> Iterator[tuple[Symbol, int]]:
    seen = set()
    for size in (size for node in gm.graph.nodes for size in node_info(node).sizes or ()):
        symbol = size_symbol(size)
        if symbol is not None and symbol not in seen:
            seen.add(symbol)
            hint = size_hint(size)
            if hint is not None:
                yield symbol, hint
