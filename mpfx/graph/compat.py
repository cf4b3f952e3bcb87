"""Every private name of PyTorch that tracing needs, in one place.

Supported: torch 2.11 to 2.14. The rest of the package uses PyTorch's public names and what is defined here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from sympy import Symbol
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

__all__ = [
    "DATA_DEPENDENT_ERRORS",
    "SYMBOLIC_NUMBERS",
    "FakeTensor",
    "FakeTensorMode",
    "ShapeEnv",
    "Symbol",
    "compiler_flags_set",
    "dynamic_fake",
    "emit_expression",
    "fake_mode",
    "is_transformed",
    "python_dispatcher",
    "size_symbol",
    "static_fake",
    "storage_key",
    "symbolic_expression",
]

DATA_DEPENDENT_ERRORS: tuple[type[Exception], ...] = (
    GuardOnDataDependentSymNode,
    DataDependentOutputException,
    DynamicOutputShapeException,
)
"""Raised by fake tensors where a result depends on values that they do not have."""

SYMBOLIC_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)

_COMPILER_FLAGS = ("_is_compiling_flag", "_is_exporting_flag")

python_dispatcher: Callable[[], Any] = enable_python_dispatcher
"""Context manager: operators written in C++ (`baddbmm`) accept symbolic sizes."""


@contextmanager
def compiler_flags_set() -> Iterator[None]:
    """Let ``torch.compiler.is_compiling()`` and ``is_exporting()`` be true.

    Models then leave out shortcuts that look at the values of a tensor (a mask that is all ones).
    """
    flags = [name for name in _COMPILER_FLAGS if hasattr(torch.compiler, name)]
    before = {name: getattr(torch.compiler, name) for name in flags}
    try:
        for name in flags:
            setattr(torch.compiler, name, True)
        yield
    finally:
        for name, value in before.items():
            setattr(torch.compiler, name, value)


def fake_mode(env: ShapeEnv) -> FakeTensorMode:
    """A mode in which tensors have sizes and types but no values; real weights may take part."""
    return FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)


def dynamic_fake(mode: FakeTensorMode, tensor: Tensor) -> FakeTensor:
    """A fake of ``tensor`` with a symbol for every size of two or more."""
    sizes = [DimDynamic.STATIC if size < 2 else DimDynamic.DYNAMIC for size in tensor.shape]
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(sizes)
    return mode.from_tensor(tensor, symbolic_context=context)


def static_fake(mode: FakeTensorMode, tensor: Tensor, meta_stands_for: torch.device) -> FakeTensor:
    """A fake of ``tensor`` with its sizes as numbers: for parameters, buffers and constants.

    Args:
        mode: Makes the fakes.
        tensor: The real one.
        meta_stands_for: The device of the fake where the tensor has none yet: that of the inputs.
    """
    if not (tensor.is_meta or tensor.is_inference()):
        return mode.from_tensor(tensor, static_shapes=True)
    device = meta_stands_for if tensor.is_meta else tensor.device
    with mode:  # a direct fake of an inference tensor would be one too, and these count no writes
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    assert isinstance(fake, FakeTensor)
    return fake


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor stands for others inside ``torch.func`` (vmap, grad)."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def symbolic_expression(number: Any) -> sympy.Basic:
    """The expression behind a SymInt, SymFloat or SymBool."""
    expression: sympy.Basic = number.node.expr
    return expression


def size_symbol(size: Any) -> Symbol | None:
    """The symbol that a size is, None if it is a number or an expression."""
    expression = symbolic_expression(size) if isinstance(size, torch.SymInt) else None
    return expression if isinstance(expression, Symbol) else None


def emit_expression(graph: fx.Graph, expression: sympy.Basic, symbols: Mapping[sympy.Basic, fx.Node]) -> fx.Node:
    """Append nodes that compute ``expression`` from the nodes of its symbols."""
    tracer = fx.proxy.GraphAppendingTracer(graph)
    values: dict[Any, Any] = {symbol: fx.Proxy(node, tracer) for symbol, node in symbols.items()}
    result: fx.Node = sympy_interp(PythonReferenceAnalysis, values, expression).node
    return result


def storage_key(tensor: Tensor) -> int:
    """A number that all views of one storage share, while one of them is alive."""
    key: int = tensor.untyped_storage()._cdata
    return key
