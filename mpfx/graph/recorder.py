"""Records one eager run on fake tensors: PyTorch calls become nodes, leaf modules become ``call_module`` nodes."""

from __future__ import annotations

import operator
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpfx.graph.builder import GraphBuilder
from mpfx.graph.calls import has_tensor, map_leaves, tensors_in
from mpfx.graph.compat import SYMBOLIC_NUMBERS, FakeTensor, fake_mode, storage_key
from mpfx.graph.errors import UnsupportedCodeError
from mpfx.graph.live import NodeInfo
from mpfx.graph.sizes import SizeEnv

_OPERATORS = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}
_METHOD_TYPES = (types.MethodDescriptorType, types.WrapperDescriptorType)


class Recorder(TorchFunctionMode):
    """While active, records everything that makes or changes a tensor.

    Args:
        root: The traced module.
        leaves: ids of the modules that are called as a whole.
        linears: Path of every linear layer by the id of its weight.
        device: Of the inputs; parameters on the meta device are taken to be there too.

    Attributes:
        env: The symbols of the trace.
        mode: Makes the fakes.
        builder: Holds the graph.
        direct_weight_uses: Paths of linear layers whose weight other code than their own forward has read.
        failure: The last exception of the forward, with the path of the innermost module that it left.
    """

    def __init__(self, root: nn.Module, leaves: set[int], linears: Mapping[int, str], device: torch.device) -> None:
        super().__init__()
        self.env = SizeEnv()
        self.mode = fake_mode(self.env)
        self.builder = GraphBuilder(root, self.mode, device)
        self.direct_weight_uses: set[str] = set()
        self.failure: tuple[Exception, str] | None = None
        self._leaves, self._linears = leaves, linears
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._thread = threading.get_ident()
        self._leaf: str | None = None  # the leaf that is running

    def placeholder(self, name: str, value: Any, default: Any = None) -> None:
        """Add an input: with nested tensors in ``value``, or a plain one that falls back to ``default``."""
        if has_tensor(value):
            self.builder.bind(value, self.builder.add("placeholder", name))
        else:
            self.builder.graph.placeholder(name, default_value=default)

    def output(self, value: Any) -> None:
        """Finish the graph: it returns the nested tensors in ``value``."""
        self.builder.graph.output(self.builder.argument(value))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one call of PyTorch, and record it unless a leaf makes it."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        _refuse(func, name)
        fake_args, fake_kwargs = self._without_real_tensors((tuple(args), dict(kwargs)))
        writes = _Writes((fake_args, fake_kwargs), _written_by_name(name, fake_args))
        with self.env.operator():
            out = func(*fake_args, **fake_kwargs)
        if has_tensor(out):
            self._note_direct_weights((args, kwargs))
        if self._leaf is not None:
            return out
        if has_tensor(out) or writes.storages:
            return self._record(func, args, kwargs, out, writes.info())
        if name == "item" and isinstance(out, SYMBOLIC_NUMBERS):
            self.builder.bind_number(out, self.builder.add("call_method", "item", self.builder.argument(tuple(args))))
        return out  # sizes, types and the like are no work of the graph

    def call_module(
        self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stands in for ``nn.Module.__call__``: leaves become nodes, other modules are entered."""
        path = self._paths.get(id(module))
        if self._leaf is not None or path is None or threading.get_ident() != self._thread:
            return original(module, *args, **kwargs)
        with self._running(path):
            if path and id(module) in self._leaves:
                return self._call_leaf(lambda: original(module, *args, **kwargs), module, args, kwargs)
            return original(module, *args, **kwargs)

    @contextmanager
    def _running(self, path: str) -> Iterator[None]:
        self.builder.stack.append(path)
        try:
            yield
        except Exception as error:
            if self.failure is None or self.failure[0] is not error:  # the innermost module sees it first
                self.failure = (error, path)
            raise
        finally:
            self.builder.stack.pop()

    def _call_leaf(self, run: Callable[[], Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        path = self.builder.stack[-1]
        node_args, node_kwargs = self.builder.argument(args), self.builder.argument(kwargs)
        writes = _Writes((args, kwargs))
        self._leaf = path
        try:
            with self.env.lenient() if type(module).__module__.startswith("torch.nn.") else nullcontext():
                out = run()
        finally:
            self._leaf = None
        node = self.builder.add("call_module", path, node_args, node_kwargs, writes.info())
        return self._bind(out, node, in_place=bool(writes.storages))

    def _record(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, info: NodeInfo
    ) -> Any:
        name, node_args = getattr(func, "__name__", ""), self.builder.argument(tuple(args))
        op, target = _target(func, name)
        if name == "__get__":  # an attribute, such as x.T
            node_args = (node_args[0], func.__self__.__name__)  # type: ignore[attr-defined]
        node = self.builder.add(op, target, node_args, self.builder.argument(dict(kwargs)), info)
        return self._bind(out, node, in_place=bool(info.mutates))

    def _without_real_tensors(self, arguments: Any) -> Any:
        """Fakes in place of parameters, buffers and constants, which the call might write to."""
        if all(isinstance(tensor, FakeTensor) for tensor in tensors_in(arguments)):
            return arguments
        return map_leaves(arguments, lambda _, leaf: self.builder.fake(leaf) if isinstance(leaf, Tensor) else leaf, "")

    def _bind(self, out: Any, node: Any, in_place: bool) -> Any:
        """Make ``node`` stand for a result, and return what the forward goes on with."""
        out = out if in_place else self._separate(out)
        self.builder.bind(out, node)
        return out

    def _separate(self, out: Any) -> Any:
        """Give a result that *is* an argument an identity of its own.

        ``x.to(float32)`` and a dropout that is off return ``x`` itself. Were both one value here, code that
        reads ``x`` would read the result, which at run time, under autocast or in training, differs from it.
        """
        if isinstance(out, Tensor) and self.builder.knows(out):
            with self.env.operator():
                return torch.ops.aten.alias.default(out)
        if type(out) in (tuple, list):
            return type(out)(self._separate(item) for item in out)
        return out

    def _note_direct_weights(self, arguments: Any) -> None:
        for tensor in tensors_in(arguments):
            path = self._linears.get(id(tensor))
            if path is not None and path != self._leaf:
                self.direct_weight_uses.add(path)


class _Writes:
    """Which of a call's tensors it wrote to, from their version counters before and after."""

    def __init__(self, arguments: Any, certain: Iterable[Tensor] = ()) -> None:
        self._before = [(t, t._version) for t in tensors_in(arguments) if isinstance(t, FakeTensor)]
        self._certain = frozenset(storage_key(t) for t in certain)

    @property
    def storages(self) -> frozenset[int]:
        return self._certain.union(storage_key(t) for t, version in self._before if t._version != version)

    def info(self) -> NodeInfo:
        return NodeInfo(mutates=self.storages, version=self._before[0][1] if self._before else 0)


def _refuse(func: Callable[..., Any], name: str) -> None:
    """Raise an error for calls that nothing in a graph can stand for."""
    if name in ("numpy", "__array__"):
        raise UnsupportedCodeError("the forward leaves PyTorch for NumPy")
    if name == "__set__" and func.__self__.__name__ == "data":  # type: ignore[attr-defined]
        raise UnsupportedCodeError("the forward assigns to `.data`", "write with copy_ instead")


def _target(func: Callable[..., Any], name: str) -> tuple[str, Any]:
    """The kind and the target of the node for a call of ``func``: by its name where it is a method of Tensor."""
    if name == "__get__":
        return "call_function", getattr
    if name in _OPERATORS:
        return "call_function", _OPERATORS[name]
    if isinstance(func, _METHOD_TYPES) or getattr(Tensor, name, None) is func:
        return "call_method", name
    return "call_function", func


def _written_by_name(name: str, args: Sequence[Any]) -> Iterator[Tensor]:
    """What an in-place function writes to: those on lists of tensors do not count it as a write."""
    return tensors_in(args[:1]) if name.endswith("_") and not name.endswith("__") else iter(())
