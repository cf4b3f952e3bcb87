"""Real runs of a module on its example, at several sizes: what its parts return, for code that needs real values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpfx.graph.calls import TracedCall, holds_tensor, leaves, map_leaves, private_copy, result_tensors, tensors_in
from mpfx.graph.compat import is_transformed, storage_key
from mpfx.graph.errors import UnsupportedCodeError
from mpfx.graph.isolation import AutocastState, autocast_state, module_calls_through, rehearsed

Dimension = tuple[str, int]
"""A dimension of an argument: the argument's path and the index."""


@dataclass(frozen=True)
class FirstCall:
    """How a module was called the first time.

    Attributes:
        args: Positional arguments, with real or fake tensors.
        kwargs: Keyword arguments.
        autocast: What autocast did.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: AutocastState


@dataclass
class CallLog:
    """What was called inside the modules that are called as a whole.

    Attributes:
        order: Paths of the modules, in the order of their first call.
        first: The first calls of those for which `wanted` is true.
        direct_weight_uses: Paths of linear layers whose weight other code than their own forward has read.
        wanted: Says of which paths the first call is kept.
    """

    order: dict[str, None] = field(default_factory=dict)
    first: dict[str, FirstCall] = field(default_factory=dict)
    direct_weight_uses: set[str] = field(default_factory=set)
    wanted: Callable[[str], bool] = field(default=lambda path: False, repr=False)

    def add(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a module is called."""
        self.order.setdefault(path)
        if path not in self.first and self.wanted(path):
            self.first[path] = FirstCall(args, kwargs, autocast_state())

    def note_weights(self, tensors: Iterator[Tensor], linears: Mapping[int, str], reader: str | None) -> None:
        """Note which weights of linear layers are read by another module than their own."""
        paths = (linears.get(id(tensor)) for tensor in tensors)
        self.direct_weight_uses.update(path for path in paths if path is not None and path != reader)


@dataclass(frozen=True)
class TensorSample:
    """A tensor in the result of a real call.

    Attributes:
        dtype: Its type.
        device: Where it is.
        sizes: Its sizes.
        order: Its dimensions from the largest stride to the smallest.
        shares: Which tensor among the arguments it shares memory with, None if with none.
    """

    dtype: torch.dtype
    device: torch.device
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    shares: int | None


@dataclass(frozen=True)
class HiddenObject:
    """An object with tensors in the result of a real call; a graph cannot know what it holds."""

    type_name: str


@dataclass(frozen=True)
class CallSample:
    """What one real call gave.

    Attributes:
        result: With samples in place of tensors.
        written: Which tensors among the arguments it wrote to.
    """

    result: Any
    written: frozenset[int]


@dataclass
class RealRun:
    """One run of the module.

    Attributes:
        sizes: Of the arguments.
        calls: What every call of every module gave, by path.
    """

    sizes: dict[Dimension, int]
    calls: dict[str, list[CallSample]] = field(default_factory=dict)


class Rehearsal:
    """Runs a module for real on its example and on examples with other sizes, at most once each.

    Args:
        module: The traced module.
        call: Its arguments.
        linears: Path of every linear layer by the id of its weight.
        has_values: Whether the arguments hold the values of a real call.
    """

    def __init__(
        self,
        module: nn.Module,
        call: TracedCall,
        linears: Mapping[int, str],
        has_values: bool,
    ) -> None:
        self._module, self._call, self._linears = module, call, linears
        self._runs: list[RealRun] | None = None
        tensors = [*module.parameters(), *module.buffers(), *tensors_in(list(call.values.values()))]
        self.possible = has_values and not any(t.is_meta for t in tensors)

    def runs(self) -> Sequence[RealRun]:
        """The run on the example, and those on other values and sizes that succeeded.

        Raises:
            UnsupportedCodeError: If weights or arguments have no values.
            Exception: Whatever the module raises on the example.
        """
        if self._runs is None:
            base = self.run(CallLog())
            self._runs = [base, *self._other_values(), *self._resized_runs(base.sizes)]
        return self._runs

    def run(self, log: CallLog, values: Mapping[str, Any] | None = None) -> RealRun:
        """Run the module once.

        Args:
            log: Is told of the calls.
            values: The arguments by name; the example's by default.

        Raises:
            UnsupportedCodeError: If weights or arguments have no values, or the module returns no tensor.
            Exception: Whatever the module raises.
        """
        if not self.possible:
            raise UnsupportedCodeError("its code needs values, and weights or inputs have none (the meta device)")
        values = {name: map_leaves(v, _private, name) for name, v in (values or self._call.values).items()}
        positional, keywords = self._call.split(values)
        tensors = [*self._module.parameters(), *tensors_in((positional, keywords))]
        run = RealRun(_sizes(values))
        observer = _Observer(self._module, self._linears, log, run)
        cuda = sorted({t.device.index for t in tensors if t.is_cuda})
        with (
            rehearsed(self._module, list(self._module.buffers()), cuda),
            module_calls_through(observer.call_module),
            observer,
        ):
            result_tensors(self._module(*positional, **keywords))
        return run

    def _other_values(self) -> Iterator[RealRun]:
        """A run that differs in nothing but the values, so that what follows these is not taken to follow sizes."""
        run = self._try(_other_values)
        if run is not None:
            yield run

    def _resized_runs(self, sizes: Mapping[Dimension, int]) -> Iterator[RealRun]:
        """Change every size that occurs, wherever it occurs; where this fails, dimension by dimension."""
        for size in sorted(set(sizes.values())):
            group = {dimension for dimension, other in sizes.items() if other == size}
            runs = self._resized(group, size)
            for index in () if runs else sorted({index for _, index in group}):
                runs += self._resized({dimension for dimension in group if dimension[1] == index}, size)
            yield from runs

    def _resized(self, group: Collection[Dimension], size: int) -> list[RealRun]:
        """Runs with ``size`` changed in ``group``; none if the module takes no other size there."""
        near = [size - 1, size + 1] if size > 2 else [size + 1]
        first = next((run for other in near if (run := self._try(_resizer(group, other)))), None)
        far = self._try(_resizer(group, 2 * size + 1)) or self._try(_resizer(group, 2 * size))
        return [run for run in (first, far) if run is not None]

    def _try(self, change: Callable[[str, Any], Any]) -> RealRun | None:
        values = {name: map_leaves(value, change, name) for name, value in self._call.values.items()}
        try:
            return self.run(CallLog(), values)
        except Exception:  # whatever it is: an example that the module does not take
            return None


class _Observer(TorchFunctionMode):
    """Watches a real run: who is called, what comes back, whose weights are read."""

    def __init__(self, root: nn.Module, linears: Mapping[int, str], log: CallLog, run: RealRun) -> None:
        super().__init__()
        self._linears, self._log, self._run = linears, log, run
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._stack: list[str] = []
        self._thread = threading.get_ident()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one call of PyTorch, and note the weights that it reads."""
        out = func(*args, **(kwargs or {}))
        if next(tensors_in(out), None) is not None:
            reader = self._stack[-1] if self._stack else None
            self._log.note_weights(tensors_in((args, dict(kwargs or {}))), self._linears, reader)
        return out

    def call_module(
        self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stands in for ``nn.Module.__call__``."""
        path = self._paths.get(id(module))
        if path is None or threading.get_ident() != self._thread:
            return original(module, *args, **kwargs)
        self._log.add(path, args, kwargs)
        tensors = list(tensors_in((args, kwargs)))
        versions = [_version(tensor) for tensor in tensors]
        self._stack.append(path)
        try:
            out = original(module, *args, **kwargs)
        finally:
            self._stack.pop()
        written = frozenset(i for i, t in enumerate(tensors) if _version(t) != versions[i])
        sample = CallSample(map_leaves(out, lambda _, leaf: _sample(leaf, tensors), ""), written)
        self._run.calls.setdefault(path, []).append(sample)
        return out


def _sample(leaf: Any, arguments: Sequence[Tensor]) -> Any:
    if isinstance(leaf, Tensor):
        return _sample_tensor(leaf, arguments)
    return HiddenObject(type(leaf).__qualname__) if holds_tensor(leaf) else leaf


def _sample_tensor(tensor: Tensor, arguments: Sequence[Tensor]) -> TensorSample:
    order, shares = tuple(range(tensor.dim())), None
    if not is_transformed(tensor) and tensor.layout is torch.strided:
        strides = tensor.stride()
        order = tuple(sorted(order, key=lambda dim: -strides[dim]))
        plain = {i: a for i, a in enumerate(arguments) if not is_transformed(a) and a.layout is torch.strided}
        shares = next((i for i, a in plain.items() if storage_key(a) == storage_key(tensor)), None)
    return TensorSample(tensor.dtype, tensor.device, tuple(tensor.shape), order, shares)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() or is_transformed(tensor) else tensor._version


def _sizes(values: Mapping[str, Any]) -> dict[Dimension, int]:
    found = (item for name, value in values.items() for item in leaves(value, name))
    return {(path, d): n for path, leaf in found if isinstance(leaf, Tensor) for d, n in enumerate(leaf.shape)}


def _other_values(path: str, leaf: Any) -> Any:
    """Other values that are as valid: the opposite of numbers and flags, the first index in place of all."""
    if not isinstance(leaf, Tensor) or not leaf.numel():
        return leaf
    if leaf.is_floating_point() or leaf.is_complex():
        return -leaf
    return ~leaf if leaf.dtype == torch.bool else leaf.flatten()[0].expand(leaf.shape)


def _resizer(group: Collection[Dimension], size: int) -> Callable[[str, Any], Any]:
    """Give the dimensions in ``group`` another size, with the values that are there (which stay valid indices)."""

    def resize(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            for dim, old in enumerate(leaf.shape):
                if (path, dim) in group:
                    leaf = leaf.index_select(dim, torch.arange(size, device=leaf.device) % old)
        return leaf

    return resize


def _private(path: str, leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else private_copy(path, leaf)
