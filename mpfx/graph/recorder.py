"""Records one eager run on fake tensors: PyTorch calls become nodes, leaf modules become ``call_module`` nodes."""

from __future__ import annotations

import operator
import threading
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpfx.graph.builder import GraphBuilder
from mpfx.graph.calls import has_tensor, map_leaves, tensors_in
from mpfx.graph.compat import (
    DATA_DEPENDENT_ERRORS,
    SYMBOLIC_NUMBERS,
    FakeTensor,
    Symbol,
    compiler_flags_set,
    fake_mode,
    is_transformed,
    storage_key,
)
from mpfx.graph.errors import FixedSizeError, ImageSizeError, UnsupportedCodeError, asking_line
from mpfx.graph.forms import LearnedForms
from mpfx.graph.live import NodeInfo
from mpfx.graph.rehearsal import CallLog
from mpfx.graph.sizes import SizeEnv

_OPERATORS = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}
_REFUSALS: tuple[type[Exception], ...] = (UnsupportedCodeError, *DATA_DEPENDENT_ERRORS)
_METHOD_TYPES = (types.MethodDescriptorType, types.WrapperDescriptorType)


@dataclass(frozen=True)
class Parts:
    """How the modules of a traced module are called.

    Attributes:
        leaves: ids of the modules that are called as a whole.
        linears: Path of every linear layer by the id of its weight.
        opaque: Paths of the modules that are called as a whole because their forward cannot be recorded.
        learned: Paths of leaves and opaque modules that cannot run on fake tensors either.
        dynamic: Whether an opaque module may not make a symbolic size a number.
        holders: Paths of the modules around the repeated ones, whose code may fix sizes as too much depends on them.
        strict_sizes: Whether other modules may not fix sizes.
        static_images: Whether the height and width of images are numbers.
    """

    leaves: frozenset[int]
    linears: Mapping[int, str]
    opaque: frozenset[str] = frozenset()
    learned: frozenset[str] = frozenset()
    dynamic: bool = True
    holders: frozenset[str] = frozenset({""})
    strict_sizes: bool = False
    static_images: bool = False


class Recorder(TorchFunctionMode):
    """While active, records everything that makes or changes a tensor.

    Args:
        root: The traced module.
        parts: Which of its modules are entered.
        device: Of the inputs; parameters on the meta device are taken to be there too.
        log: Is told of what opaque modules call.

    Attributes:
        env: The symbols of the trace.
        mode: Makes the fakes.
        builder: Holds the graph.
        parts: Which of its modules are entered.
        forms: Makes the results of modules that cannot run on fake tensors.
        log: What opaque modules called, and the linear layers whose weight other code than their own has read.
        failure: The last exception of the forward, with the paths of the modules that it left, innermost last.
        called: Paths of the opaque modules that were called, in order.
    """

    def __init__(self, root: nn.Module, parts: Parts, device: torch.device, log: CallLog) -> None:
        super().__init__()
        self.env = SizeEnv(
            _weakly(self._refuse), _weakly(self._size_fixed), _weakly(self._image_costly), _weakly(self._place)
        )
        self.mode = fake_mode(self.env)
        self.builder = GraphBuilder(root, self.mode, device)
        self.forms: LearnedForms | None = None
        self.log = log
        self.failure: tuple[Exception, tuple[str, ...]] | None = None
        self.called: dict[str, None] = {}
        self.parts = parts
        self._refusal: tuple[Exception, tuple[str, ...]] | None = None
        self._root = root
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._thread = threading.get_ident()
        self._leaf: str | None = None  # the leaf or opaque module that is running
        self._reader: str | None = None  # the innermost module that is running

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
        run = self._run_unrecorded if self._leaf in self.parts.opaque else self._run
        try:
            return run(func, args, kwargs or {})
        except _REFUSALS as error:
            self._refuse(error)
            raise

    def _run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        _refuse(func, name)
        fake_args, fake_kwargs = self._without_real_tensors((tuple(args), dict(kwargs)))
        writes = _Writes((fake_args, fake_kwargs), _written_by_name(name, fake_args))
        frozen = self.env.fixed_symbols()
        with self.env.operator():
            out = func(*fake_args, **fake_kwargs)
        if has_tensor(out):
            self._note_direct_weights((args, kwargs))
        if isinstance(out, (list, tuple)) and (fixed := self.env.fixed_symbols() - frozen):
            self.env.note_fixed(fixed)  # as many results as the size: a loop follows
        if self._leaf is not None:
            return out
        if name != "requires_grad_":  # changes no value
            self.builder.refuse_parameters(writes.storages)
        if has_tensor(out) or writes.storages:
            return self._record(func, args, kwargs, out, writes.info())
        if name == "item" and isinstance(out, SYMBOLIC_NUMBERS):
            self.builder.bind_number(out, self.builder.add("call_method", "item", self.builder.argument(tuple(args))))
        return out  # sizes, types and the like are no work of the graph

    def _run_unrecorded(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a call that an opaque module makes: of any kind, also inside ``torch.func``."""
        _refuse_numpy(getattr(func, "__name__", ""))
        fake_args, fake_kwargs = map_leaves((tuple(args), dict(kwargs)), self._fake_outside_transforms, "")
        with self.env.operator():
            out = func(*fake_args, **fake_kwargs)
        if has_tensor(out):
            self._note_direct_weights((args, kwargs))
        return out

    def _fake_outside_transforms(self, _: str, leaf: Any) -> Any:
        return self.builder.fake(leaf) if isinstance(leaf, Tensor) and not is_transformed(leaf) else leaf

    def finish(self) -> None:
        """Raise what only shows at the end.

        Raises:
            Exception: The first error that the forward caught, which made it go another way than without a trace.
            UnsupportedCodeError: If a module keeps random numbers that it has drawn, which a graph would draw anew.
        """
        if self._refusal is not None:
            self.failure = self._refusal
            raise self._refusal[0]
        for path, module in self._root.named_modules():
            kept = [name for name, value in {**vars(module), **module._buffers}.items() if self._is_drawn(value)]
            if kept:
                error = UnsupportedCodeError(f"the forward keeps random numbers in `{kept[0]}` for later calls")
                steps = path.split(".") if path else []
                self.failure = (error, ("", *(".".join(steps[: i + 1]) for i in range(len(steps)))))
                raise error

    def _is_drawn(self, value: Any) -> bool:
        return isinstance(value, FakeTensor) and self.builder.is_drawn(value)

    def _refuse(self, error: Exception) -> None:
        if self._refusal is None:
            self._refusal = (error, tuple(self.builder.stack))

    def _size_fixed(self, symbols: Collection[Symbol]) -> None:
        """Stop where code fixes sizes, unless nearly all of the model would have to be called as it is for that."""
        if self._running_path() in self.parts.holders or not self.parts.strict_sizes:
            return
        of_image = self.env.of_image(symbols) and not self.parts.static_images
        error = ImageSizeError() if of_image else FixedSizeError()
        self._refuse(error)
        raise error

    def _image_costly(self) -> None:
        error = ImageSizeError()
        self._refuse(error)
        raise error

    def _running_path(self) -> str:
        """Path of the innermost module that is known to run; what a leaf calls counts as the leaf."""
        return self._leaf or (self.builder.stack[-1] if self.builder.stack else "")

    def _place(self) -> str:
        path = self._running_path()
        return f"`{path}` at {asking_line()}" if path else asking_line()

    def call_module(
        self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stands in for ``nn.Module.__call__``: leaves become nodes, other modules are entered."""
        path = self._paths.get(id(module))
        if path is None or threading.get_ident() != self._thread:
            return original(module, *args, **kwargs)
        if self._leaf is not None:
            return self._call_inside(lambda: original(module, *args, **kwargs), path, args, kwargs)
        self.builder.refuse_autocast()  # before the call, as its caller is to blame
        self.builder.refuse_transformed((args, kwargs))
        if path in self.parts.opaque:
            return self._call_opaque(lambda: original(module, *args, **kwargs), path, args, kwargs)
        if path and id(module) in self.parts.leaves:
            return self._call_leaf(lambda: original(module, *args, **kwargs), path, module, args, kwargs)
        with self._running(path):
            out = original(module, *args, **kwargs)
            self.builder.refuse_unknown(out)
            return out

    @contextmanager
    def _running(self, path: str) -> Iterator[None]:
        """The code of a module runs; what it raises is blamed on it."""
        self.builder.stack.append(path)
        try:
            with self._reading(path):
                yield
        except Exception as error:
            self._blame(error)
            raise
        finally:
            self.builder.stack.pop()

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        before, self._reader = self._reader, path
        try:
            yield
        finally:
            self._reader = before

    def _blame(self, error: Exception) -> None:
        if self.failure is None or self.failure[0] is not error:  # the innermost module sees it first
            self.failure = (error, tuple(self.builder.stack))

    def _call_inside(self, run: Callable[[], Any], path: str, args: Any, kwargs: Any) -> Any:
        """A module that a leaf or an opaque module calls."""
        if self._leaf in self.parts.opaque:
            self.log.add(path, args, kwargs)
        with self._reading(path):
            return run()

    def _call_leaf(self, run: Callable[[], Any], path: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        node_args, node_kwargs = self._node_arguments(path, args, kwargs)
        writes, learned = _Writes((args, kwargs)), path in self.parts.learned
        lenient = self.env.lenient() if type(module).__module__.startswith("torch.nn.") else nullcontext()
        with self._running(path), self._inside(path), lenient:
            out = self._learned(path, args, kwargs) if learned else run()
        with self._made_by(path):
            node = self.builder.add("call_module", path, node_args, node_kwargs, writes.info())
            node = self.builder.check(out, node) if learned else node
            return self._bind(out, node, in_place=bool(writes.storages))

    def _call_opaque(self, run: Callable[[], Any], path: str, args: Any, kwargs: Any) -> Any:
        """Call a module as it is: on fakes, if its code can, with PyTorch's flags as in a call without a trace."""
        self.called.setdefault(path)
        whole = not path
        node_args, node_kwargs = ((), {}) if whole else self._node_arguments(path, args, kwargs)
        writes, frozen = _Writes((args, kwargs)), self.env.fixed_symbols()
        with self._running(path), self._inside(path), compiler_flags_set(False):
            out = self._learned(path, args, kwargs) if path in self.parts.learned else run()
            if self.parts.dynamic and self.env.fixed_symbols() != frozen:
                raise FixedSizeError
        if whole:
            return out  # the graph is then made of the inputs alone
        with self._made_by(path):
            node = self.builder.add("call_module", path, node_args, node_kwargs, writes.info())
            node = self.builder.check(out, node)
            return self._bind(out, node, in_place=bool(writes.storages))

    def _node_arguments(self, path: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        with self._made_by(path):
            return self.builder.argument(args), self.builder.argument(kwargs)

    def _learned(self, path: str, args: Any, kwargs: Any) -> Any:
        assert self.forms is not None
        return self.forms.result(path, (args, kwargs))

    @contextmanager
    def _inside(self, path: str) -> Iterator[None]:
        self._leaf = path
        try:
            yield
        finally:
            self._leaf = None

    @contextmanager
    def _made_by(self, path: str) -> Iterator[None]:
        """Nodes for a call belong to the called module; errors of the graph are its caller's."""
        self.builder.stack.append(path)
        try:
            yield
        except Exception as error:
            self.builder.stack.pop()
            self._blame(error)
            self.builder.stack.append(path)
            raise
        finally:
            self.builder.stack.pop()

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
        self.log.note_weights(tensors_in(arguments), self.parts.linears, self._reader)


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


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that does not keep its object alive.

    Symbolic sizes of fake tensors hold the environment that they come from, out of sight of the garbage collector: what
    that held would never be freed, and a recorder holds the model.
    """
    found = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        listener = found()
        return "" if listener is None else listener(*args)  # of questions after the recording nobody has to be told

    return call


def _refuse(func: Callable[..., Any], name: str) -> None:
    """Raise an error for calls that nothing in a graph can stand for."""
    _refuse_numpy(name)
    if name == "__set__" and func.__self__.__name__ == "data":  # type: ignore[attr-defined]
        raise UnsupportedCodeError("the forward assigns to `.data`", "write with copy_ instead")


def _refuse_numpy(name: str) -> None:
    if name in ("numpy", "__array__"):
        raise UnsupportedCodeError("the forward leaves PyTorch for NumPy")


def _target(func: Callable[..., Any], name: str) -> tuple[str, Any]:
    """The kind and the target of the node for a call of ``func``: by its name where it is a method of Tensor."""
    if name == "__get__":
        return "call_function", getattr
    if name in _OPERATORS:
        return "call_function", _OPERATORS[name]
    if isinstance(func, _METHOD_TYPES) or getattr(Tensor, name, None) is func:
        return "call_method", name
    method = next((method for method, known in vars(Tensor).items() if known is func), None)
    if method is not None:  # `x ** 2` calls a function that is called "pow", under which no module has it
        return "call_method", method
    return "call_function", func


def _written_by_name(name: str, args: Sequence[Any]) -> Iterator[Tensor]:
    """What an in-place function writes to: those on lists of tensors do not count it as a write."""
    return tensors_in(args[:1]) if name.endswith("_") and not name.endswith("__") else iter(())
