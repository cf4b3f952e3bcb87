"""The arguments of a traced call: their names, their nested tensors, and the check of a later call's arguments."""

from __future__ import annotations

import copy
import enum
import inspect
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mpfx.graph.compat import Symbol
from mpfx.graph.errors import TraceError, UnsupportedCodeError
from mpfx.graph.sizes import SizeRules

PLAIN_TYPES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
"""Arguments of these types are compared by value; they may stand in a graph as they are."""

_LITERAL_TYPES = (bool, int, float, str, type(None))
_SEARCH_DEPTH = 4


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, (dict, UserDict)):
        yield from tensors_in(list(value.values()))


def has_tensor(value: Any) -> bool:
    """Whether there are tensors in nested lists, tuples and dicts."""
    return next(tensors_in(value), None) is not None


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Walk nested lists, tuples and dicts: every innermost value with its path (``batch['ids'][0]``)."""
    if isinstance(value, (dict, UserDict)):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def map_leaves(value: Any, change: Callable[[str, Any], Any], path: str) -> Any:
    """Rebuild nested lists, tuples and dicts with ``change(path, leaf)`` in place of every innermost value."""
    if isinstance(value, (dict, UserDict)):
        mapped = copy.copy(value)
        for key, item in value.items():
            mapped[key] = map_leaves(item, change, f"{path}[{key!r}]")
        return mapped
    if isinstance(value, (list, tuple)):
        items = [map_leaves(item, change, f"{path}[{index}]") for index, item in enumerate(value)]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return change(path, value)


def holds_tensor(value: Any, depth: int = _SEARCH_DEPTH) -> bool:
    """Whether a tensor is found in the attributes of an object of any kind (a cache that is filled)."""
    if isinstance(value, Tensor):
        return True
    if depth == 0 or isinstance(value, (*PLAIN_TYPES, type, FunctionType, ModuleType, nn.Module)):
        return False
    if isinstance(value, Mapping):
        return any(holds_tensor(item, depth - 1) for item in value.values())
    if isinstance(value, (list, tuple, set)):
        return any(holds_tensor(item, depth - 1) for item in value)
    return any(holds_tensor(item, depth - 1) for item in getattr(value, "__dict__", {}).values())


def private_copy(path: str, value: Any) -> Any:
    """A copy of an argument that is no tensor, which the forward may fill with tensors.

    Raises:
        TraceError: If the object holds tensors, which would become constants of the graph.
    """
    if isinstance(value, (*PLAIN_TYPES, nn.Module)) or callable(value):
        return value
    if holds_tensor(value):
        raise TraceError(
            f"The argument `{path}` is a {type(value).__name__} that holds tensors, which a graph cannot take as "
            "input. What to change: pass tensors, or lists and dicts of tensors; leave filled caches out."
        )
    return copy.deepcopy(value)


def given_or_traced(value: Any, traced: Any) -> Any:
    """The argument, or a copy of what it was while tracing where it is left out."""
    return private_copy("", traced) if value is None else value


def result_tensors(result: Any) -> Any:
    """The tensors of a forward's result in their nesting, dataclasses and mappings as dicts.

    Raises:
        UnsupportedCodeError: If there are none.
    """
    tensors = _only_tensors(result)
    if tensors is None:
        raise UnsupportedCodeError("the forward returns no tensor", "trace a module that returns tensors")
    return tensors


def _only_tensors(value: Any) -> Any:
    """The tensors of a result in their nesting, None where there are none."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(kept for item in value if (kept := _only_tensors(item)) is not None) or None
    if is_dataclass(value) and not isinstance(value, dict):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, (dict, UserDict)):
        return {key: kept for key, item in value.items() if (kept := _only_tensors(item)) is not None} or None
    return None


@dataclass(frozen=True)
class TensorSpec:
    """A traced tensor: its type, and per dimension a number (fixed) or the symbol that stands for it."""

    dtype: torch.dtype
    sizes: tuple[int | Symbol, ...]


@dataclass(frozen=True)
class Fixed:
    """An argument that is not a tensor: what it was while tracing is part of the graph."""

    value: Any

    def is_left_out(self, value: Any) -> bool:
        """Whether ``value`` only stands for an argument that was not given: placeholders default to what code holds."""
        return value is None and not is_literal(self.value)


@dataclass
class TracedCall:
    """How the module was called while tracing, and what a later call must have in common with that.

    Attributes:
        signature: Of the module's forward.
        positional: Names of the arguments that were given by position.
        values: Every argument by its name.
        optional: Forward's own defaults of parameters that were not given.
        specs: For the path of every innermost value, what it was.
    """

    signature: inspect.Signature
    positional: tuple[str, ...]
    values: dict[str, Any]
    optional: dict[str, Any] = field(default_factory=dict)
    specs: dict[str, TensorSpec | Fixed] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TracedCall:
        """Name the arguments of the call ``module(*args, **kwargs)``."""
        signature = inspect.signature(module.forward)
        values = name_arguments(signature, args, kwargs)
        optional = {
            name: parameter.default
            for name, parameter in signature.parameters.items()
            if name not in values and parameter.default is not parameter.empty
        }
        return cls(signature, tuple(values)[: len(args)], values, optional)

    def forget_tensors(self) -> None:
        """Drop the example, which must not live as long as the graph."""
        self.values = {}

    def split(self, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Undo the naming: the positional and the keyword arguments."""
        keywords = {name: value for name, value in values.items() if name not in self.positional}
        return [values[name] for name in self.positional], keywords

    def without_defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Drop the values that only fill a placeholder, so that ``split`` gives arguments that forward takes."""
        return {
            name: value
            for name, value in values.items()
            if name in self.positional or not (name in self.optional or self._left_out(name, value))
        }

    def placeholder_default(self, name: str) -> Any:
        """What the placeholder of an argument without tensors falls back to: its value, if code can hold it."""
        value = self.values[name] if name in self.values else self.optional[name]
        return value if is_literal(value) else None

    def check(self, values: Mapping[str, Any], sizes: SizeRules, compare: Callable[[], str | None]) -> None:
        """Raise a ValueError where the arguments differ from the traced ones in more than dynamic sizes.

        Args:
            values: The arguments by name.
            sizes: What the trace assumed about their sizes.
            compare: Given to :meth:`SizeRules.check`.
        """
        found: dict[str, Any] = {}
        for name, value in values.items():
            found.update(leaves(value, name))
        for path in self.specs.keys() - found.keys():
            if any(path == name or path.startswith(f"{name}[") for name in values):
                raise ValueError(f"Expected `{path}`, which was there when the module was traced.")
        symbols: dict[Symbol, int] = {}
        for path, leaf in found.items():
            symbols.update(_check_leaf(path, leaf, self.specs.get(path)))
        sizes.check(symbols, compare)

    def _left_out(self, path: str, value: Any) -> bool:
        spec = self.specs.get(path)
        return isinstance(spec, Fixed) and spec.is_left_out(value)


def name_arguments(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name the arguments of a call after the parameters of forward.

    What falls in ``*rest`` is called ``rest_0``, ``rest_1`` ...; what falls in ``**kwargs`` keeps its key.

    Raises:
        TypeError: If the arguments do not fit the signature.
    """
    signature.bind(*args, **kwargs)
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(len(args) - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _check_leaf(path: str, leaf: Any, spec: TensorSpec | Fixed | None) -> dict[Symbol, int]:
    """Compare one innermost value with the traced one; the sizes of its symbols."""
    if spec is None:
        raise ValueError(f"`{path}` was not there when the module was traced; trace it with this argument.")
    if isinstance(spec, Fixed):
        if not (spec.is_left_out(leaf) or _same(leaf, spec.value)):
            raise ValueError(
                f"Expected `{path}` to be {_short(spec.value)}, as when the module was traced, but got {_short(leaf)}."
            )
        return {}
    if not isinstance(leaf, Tensor):
        raise ValueError(f"Expected `{path}` to be a tensor, as when the module was traced, but got {_short(leaf)}.")
    if leaf.dtype != spec.dtype or leaf.dim() != len(spec.sizes):
        raise ValueError(
            f"Expected `{path}` with {len(spec.sizes)} dimensions of {spec.dtype}, as when the module was traced, "
            f"but got {leaf.dim()} of {leaf.dtype}."
        )
    return _check_sizes(path, leaf, spec)


def _check_sizes(path: str, tensor: Tensor, spec: TensorSpec) -> dict[Symbol, int]:
    symbols = {}
    for dim, (size, traced) in enumerate(zip(tensor.shape, spec.sizes, strict=True)):
        if not isinstance(traced, int):
            symbols[traced] = size
        elif size != traced:
            raise ValueError(
                f"Expected `{path}.shape[{dim}]` to be {traced}, as when the module was traced, but got {size}."
            )
    return symbols


def _same(value: Any, traced: Any) -> bool:
    if type(value) is not type(traced):
        return False
    return bool(value == traced) if isinstance(traced, PLAIN_TYPES) else not holds_tensor(value)


def is_literal(value: Any) -> bool:
    """Whether code can hold the value, so that a placeholder can default to it."""
    if type(value) in (tuple, list):
        return all(is_literal(item) for item in value)
    return type(value) in _LITERAL_TYPES


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, PLAIN_TYPES) else f"a {type(value).__name__}"
