"""Builds the nodes of a traced graph: which value of the forward is which node."""

from __future__ import annotations

import enum
import numbers
import operator
import types
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpfx.graph.calls import PLAIN_TYPES, has_tensor, leaves, tensors_in
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
from mpfx.graph.isolation import autocast_state
from mpfx.graph.live import CONSTANTS, META_KEY, NodeInfo, node_info
from mpfx.graph.opaque import RESULT, checked, form_of_value

_BAKED_TYPES = (*PLAIN_TYPES, types.EllipsisType, range, torch.memory_format, torch.layout)

_TRANSFORMED = "the forward uses torch.func (vmap, grad), whose calls a graph does not hold"
_UNKNOWN = "a tensor comes from code that is no plain call of PyTorch (vmap, autograd, TorchScript)"

_OF_SIZES = frozenset({"size", "rand_like", "randn_like", "randint_like", "empty_like", "new_empty", "new_zeros"})
"""Read the form of a tensor and not its values."""

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
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._fakes: dict[int, tuple[Tensor, FakeTensor]] = {}  # of real tensors by their id, and these themselves
        self._nodes: dict[int, fx.Node] = {}  # by the id of a tensor, which `_alive` keeps from being reused
        self._alive: list[Tensor] = []
        self._symbols: dict[Any, fx.Node] = {}
        self._symbol_sources: dict[Symbol, tuple[fx.Node, int]] = {}
        self._autocast = autocast_state()

    def add(self, op: str, target: Any, args: Any = (), kwargs: Any = None, info: NodeInfo | None = None) -> fx.Node:
        """Append a node; ``args`` and ``kwargs`` hold nodes already.

        Raises:
            UnsupportedCodeError: If the forward has switched autocast by itself.
        """
        self.refuse_autocast()
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

    def check(self, out: Any, node: fx.Node) -> fx.Node:
        """Append a node that hands on the result of an opaque module if it is of the form of ``out``."""
        forms: dict[str, Any] = {}
        for path, leaf in leaves(out, RESULT):
            if isinstance(leaf, Tensor):
                forms[path] = ("tensor", leaf.dtype, *(self._size(size) for size in leaf.shape))
            elif isinstance(leaf, SYMBOLIC_NUMBERS):
                forms[path] = ("value", self.argument(leaf))
            else:
                forms[path] = form_of_value(leaf)
        return self.add("call_function", checked, (node, str(node.target), forms))

    def refuse_autocast(self) -> None:
        """Check that autocast does what it did when the trace began.

        Raises:
            UnsupportedCodeError: If the forward has switched it.
        """
        if autocast_state() != self._autocast:
            raise UnsupportedCodeError("the forward enables autocast, which a graph does not hold")

    def refuse_transformed(self, arguments: Any) -> None:
        """Check that a module is not called inside ``torch.func``.

        Raises:
            UnsupportedCodeError: If it is.
        """
        if any(is_transformed(tensor) for tensor in tensors_in(arguments)):
            raise UnsupportedCodeError(_TRANSFORMED)

    def refuse_unknown(self, out: Any) -> None:
        """Check that the graph knows the tensors in the result of a module.

        Raises:
            UnsupportedCodeError: If one was made by code that no call of PyTorch shows.
        """
        if any(isinstance(tensor, FakeTensor) and not self.knows(tensor) for tensor in tensors_in(out)):
            raise UnsupportedCodeError(_UNKNOWN)

    def refuse_parameters(self, storages: Collection[int]) -> None:
        """Check that a call has not written to the memory of a parameter.

        The model may do so once, as a flag tells it, but a graph would do it in every run.

        Raises:
            UnsupportedCodeError: If it has.
        """
        if storages and any(
            isinstance(tensor, nn.Parameter) and storage_key(fake) in storages for tensor, fake in self._fakes.values()
        ):
            raise UnsupportedCodeError(
                "the forward writes to a parameter, which a graph would do in every run",
                "change parameters outside of forward",
            )

    def is_drawn(self, tensor: Tensor) -> bool:
        """Whether a tensor holds random numbers that owe nothing to the inputs but their sizes."""
        found = False
        seen: set[fx.Node] = set()
        todo = [self._nodes[id(tensor)]] if id(tensor) in self._nodes else []
        while todo:
            node = todo.pop()
            if node.op == "placeholder":
                return False
            found |= _is_random(node)
            if node not in seen and _called_name(node) not in _OF_SIZES:
                todo += node.all_input_nodes
            seen.add(node)
        return found

    def _size(self, size: Any) -> Any:
        """A size, its node, or None if it depends on the values of a tensor."""
        try:
            return self.argument(size)
        except UnsupportedCodeError:
            return None

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
            raise UnsupportedCodeError(_TRANSFORMED)
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
        return self._module(value) if isinstance(value, nn.Module) else _constant(value)

    def _module(self, module: nn.Module) -> fx.Node:
        """A node for a child of the traced module that is handed on; it is looked up again in every run."""
        path = self._paths.get(id(module))
        if not path:
            raise UnsupportedCodeError(
                f"a {type(module).__name__} is passed on that is no child of the traced module",
                "make it a child, so that a graph can hold it",
            )
        return self.add("get_attr", path)

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
                raise UnsupportedCodeError(_UNKNOWN)
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


def _called_name(node: fx.Node) -> str:
    """What a node calls, "" if that is no operation of PyTorch."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _is_random(node: fx.Node) -> bool:
    packet = getattr(torch.ops.aten, _called_name(node) or "-", None)
    tags = (tag for overload in packet.overloads() for tag in getattr(packet, overload).tags) if packet else ()
    return torch.Tag.nondeterministic_seeded in tags


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
    raise UnsupportedCodeError(
        f"an object of type {type(value).__name__} is passed on, which a graph does not hold",
        "where it is a cache, call the module without one; else pass tensors and plain values",
    )
