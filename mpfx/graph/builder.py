"""Builds the nodes of a traced graph: which value of the forward is which node."""

from __future__ import annotations

import enum
import numbers
import operator
import types
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpfx.graph.calls import PLAIN_TYPES, has_tensor
from mpfx.graph.compat import (
    SYMBOLIC_NUMBERS,
    FakeTensor,
    FakeTensorMode,
    Symbol,
    emit_expression,
    is_transformed,
    size_symbol,
    static_fake,
    storage_key,
    symbolic_expression,
)
from mpfx.graph.errors import UnsupportedCodeError
from mpfx.graph.isolation import AUTOCAST_DEVICES
from mpfx.graph.live import CONSTANTS, META_KEY, NodeInfo, node_info

_BAKED_TYPES = (*PLAIN_TYPES, types.EllipsisType, range, torch.memory_format, torch.layout)

_PYTHON_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


class GraphBuilder:
    """Knows for every tensor and size that the forward has seen which node stands for it.

    Args:
        root: The traced module, whose parameters and buffers become ``get_attr`` nodes.
        mode: Makes the fakes.
        device: Of the inputs; parameters on the meta device are taken to be there too.

    Attributes:
        graph: The graph so far.
        constants: Holds the tensors that are no inputs, parameters or buffers.
        stack: Paths of the modules that are running, outermost first.
    """

    def __init__(self, root: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
        self.graph = fx.Graph()
        self.constants = nn.Module()
        self.stack: list[str] = []
        self._mode, self._device = mode, device
        self._attributes = _attribute_names(root)
        self._fakes: dict[int, tuple[Tensor, FakeTensor]] = {}  # of real tensors by their id, and these themselves
        self._nodes: dict[int, fx.Node] = {}  # by the id of a tensor, which `_alive` keeps from being reused
        self._alive: list[Tensor] = []
        self._symbols: dict[Any, fx.Node] = {}
        self._symbol_sources: dict[Symbol, tuple[fx.Node, int]] = {}

    def add(self, op: str, target: Any, args: Any = (), kwargs: Any = None, info: NodeInfo | None = None) -> fx.Node:
        """Append a node; ``args`` and ``kwargs`` hold nodes already.

        Raises:
            UnsupportedCodeError: If the forward has enabled autocast by itself.
        """
        if any(torch.is_autocast_enabled(device) for device in AUTOCAST_DEVICES):
            raise UnsupportedCodeError("the forward enables autocast, which a graph does not hold")
        node = self.graph.create_node(op, target, args, kwargs or {})
        node.meta[META_KEY] = replace(info or NodeInfo(), stack=tuple(self.stack))
        return node

    def bind(self, out: Any, node: fx.Node) -> None:
        """Remember that ``node`` makes the tensors in ``out``, and which sizes can be read off them."""
        if isinstance(out, Tensor):
            self._bind_tensor(out, node)
        elif isinstance(out, (dict, list, tuple)):
            for key, item in out.items() if isinstance(out, dict) else enumerate(out):
                if has_tensor(item):
                    self.bind(item, self.add("call_function", operator.getitem, (node, key)))

    def bind_number(self, number: Any, node: fx.Node) -> None:
        """Remember that ``node`` makes a number that depends on the values of a tensor."""
        self._symbols[symbolic_expression(number)] = node

    def knows(self, tensor: Tensor) -> bool:
        """Whether this very tensor is already some node's value."""
        return id(tensor) in self._nodes or id(tensor) in self._attributes

    def fake(self, tensor: Tensor) -> FakeTensor:
        """The fake of a parameter, a buffer or a constant; fakes as they are.

        Raises:
            UnsupportedCodeError: If the tensor stands for others inside ``torch.func``.
        """
        if isinstance(tensor, FakeTensor):
            return tensor
        if is_transformed(tensor):
            raise UnsupportedCodeError("the forward uses torch.func (vmap, grad), whose calls a graph does not hold")
        if id(tensor) not in self._fakes:
            self._fakes[id(tensor)] = (tensor, static_fake(self._mode, tensor, self._device))
        return self._fakes[id(tensor)][1]

    def argument(self, value: Any) -> Any:
        """What stands for a value of the forward in the arguments of a node.

        Raises:
            UnsupportedCodeError: If a graph cannot hold the value.
        """
        if isinstance(value, (tuple, list)):
            return self._sequence(value)
        if isinstance(value, dict):
            return {key: self.argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self.argument(part) for part in (value.start, value.stop, value.step)))
        if isinstance(value, Tensor):
            return self._nodes.get(id(value)) or self._attribute(value)
        if isinstance(value, SYMBOLIC_NUMBERS):
            return self._number(symbolic_expression(value))
        return _constant(value)

    def _sequence(self, values: tuple[Any, ...] | list[Any]) -> Any:
        items = [self.argument(item) for item in values]
        if isinstance(values, list):
            return items
        return type(values)(*items) if hasattr(values, "_fields") else tuple(items)

    def _bind_tensor(self, tensor: Tensor, node: fx.Node) -> None:
        self._alive.append(tensor)
        self._nodes[id(tensor)] = node
        node.meta[META_KEY] = replace(
            node_info(node), sizes=tuple(tensor.shape), dtype=tensor.dtype, storage=storage_key(self.fake(tensor))
        )
        for dim, size in enumerate(tensor.shape):
            symbol = size_symbol(size)
            if symbol is not None:
                self._symbol_sources.setdefault(symbol, (node, dim))

    def _attribute(self, tensor: Tensor) -> fx.Node:
        """A node that reads a parameter, a buffer or a constant."""
        name = self._attributes.get(id(tensor))
        if name is None:
            if isinstance(tensor, FakeTensor):
                raise UnsupportedCodeError("a tensor comes from code that is no plain call of PyTorch (vmap, autograd)")
            constant = f"constant_{len(self.constants._buffers)}"
            self.constants.register_buffer(constant, tensor)
            name = f"{CONSTANTS}.{constant}"
        node = self.add("get_attr", name)
        self.bind(tensor, node)
        return node

    def _number(self, expression: Any) -> Any:
        """A number, or the node that computes a size from the sizes of tensors."""
        if expression.is_number:
            return int(expression) if expression.is_integer else float(expression)
        if expression in self._symbols:
            return self._symbols[expression]
        symbols = {symbol: self._symbol(symbol) for symbol in expression.free_symbols}
        return symbols.get(expression) or emit_expression(self.graph, expression, symbols)

    def _symbol(self, symbol: Symbol) -> fx.Node:
        if symbol not in self._symbols:
            if symbol not in self._symbol_sources:
                raise UnsupportedCodeError(f"the number {symbol} depends on the values of a tensor")
            self._symbols[symbol] = self.add("call_method", "size", self._symbol_sources[symbol])
        return self._symbols[symbol]


def _attribute_names(root: nn.Module) -> Mapping[int, str]:
    names: dict[int, str] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    for name, buffer in root.named_buffers(remove_duplicate=False):
        names.setdefault(id(buffer), name)
    return names


def _constant(value: Any) -> Any:
    """A value that stands in the graph as it is, in a form that the code of a graph can hold."""
    if isinstance(value, type) and value in _PYTHON_DTYPES:
        return _PYTHON_DTYPES[value]
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, enum.Enum)):
        return int(value) if isinstance(value, numbers.Integral) else float(value)  # NumPy's numbers too
    if isinstance(value, _BAKED_TYPES):
        return value
    raise UnsupportedCodeError(f"an object of type {type(value).__name__} is passed on, which a graph does not hold")
