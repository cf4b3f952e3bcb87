"""Every private name of PyTorch that tracing needs, in one place.

Supported: torch 2.11 to 2.14. The rest of the package uses PyTorch's public names and what is defined here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

__all__ = [
    "DATA_DEPENDENT_ERRORS",
    "SYMBOLIC_NUMBERS",
    "FakeTensor",
    "FakeTensorMode",
    "ShapeEnv",
    "Symbol",
    "TorchDispatchMode",
    "compiled_code_runs_eagerly",
    "compiler_flags_set",
    "dynamic_fake",
    "emit_expression",
    "fake_mode",
    "is_transformed",
    "mode_stacks",
    "python_dispatcher",
    "size_hint",
    "size_symbol",
    "size_value",
    "static_fake",
    "storage_key",
    "symbolic_expression",
    "unknown_size",
    "written_arguments",
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
def compiler_flags_set(value: bool = True) -> Iterator[None]:
    """Let ``torch.compiler.is_compiling()`` and ``is_exporting()`` be true, or false again inside.

    Where they are true, models leave out shortcuts that look at the values of a tensor (a mask that is all ones).
    """
    flags = [name for name in _COMPILER_FLAGS if hasattr(torch.compiler, name)]
    before = {name: getattr(torch.compiler, name) for name in flags}
    try:
        for name in flags:
            setattr(torch.compiler, name, value)
        yield
    finally:
        for name, earlier in before.items():
            setattr(torch.compiler, name, earlier)


def fake_mode(env: ShapeEnv) -> FakeTensorMode:
    """A mode in which tensors have sizes and types but no values; real weights may take part."""
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    mode.cache_enabled = False  # to keep a result under symbolic sizes takes longer than to compute it
    return mode


def dynamic_fake(mode: FakeTensorMode, tensor: Tensor, static: Collection[int] = ()) -> FakeTensor:
    """A fake of ``tensor`` with a symbol for every size of two or more, but for those of the ``static`` dimensions."""
    fixed = [size < 2 or dim in static for dim, size in enumerate(tensor.shape)]
    sizes = [DimDynamic.STATIC if is_fixed else DimDynamic.DYNAMIC for is_fixed in fixed]
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
    result: fx.Node = sympy_interp(_SizeArithmetic, values, expression).node
    return result


class _SizeArithmetic(PythonReferenceAnalysis):
    """Python's arithmetic on proxies too, which neither SymPy nor the functions of `math` take."""

    @staticmethod
    def int_truediv(a: Any, b: Any) -> Any:
        return a / b

    @staticmethod
    def floor_to_int(x: Any, dtype: Any) -> Any:
        return _emit_call(math.floor, x)

    @staticmethod
    def ceil_to_int(x: Any, dtype: Any) -> Any:
        return _emit_call(math.ceil, x)

    @staticmethod
    def trunc_to_int(x: Any, dtype: Any) -> Any:
        return _emit_call(math.trunc, x)

    @staticmethod
    def round_to_int(a: Any, dtype: Any) -> Any:
        return _emit_call(round, a)

    @staticmethod
    def round_decimal(a: Any, b: Any) -> Any:
        return _emit_call(round, a, b)


def _emit_call(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of numbers, in the graph where one of them is there."""
    tracer = next((arg.tracer for arg in args if isinstance(arg, fx.Proxy)), None)
    return function(*args) if tracer is None else tracer.create_proxy("call_function", function, args, {})


def storage_key(tensor: Tensor) -> int:
    """A number that all views of one storage share, while one of them is alive."""
    key: int = tensor.untyped_storage()._cdata
    return key


def written_arguments(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operator of the dispatcher writes to, by its schema; none for one without a schema."""
    schema = getattr(operator, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (t for t in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(t, Tensor))


@contextmanager
def compiled_code_runs_eagerly() -> Iterator[None]:
    """Let what ``torch.compile`` has wrapped run as the code that it was made from."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and loading it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def unknown_size(env: ShapeEnv) -> torch.SymInt:
    """A size of which nothing is known but that it is one."""
    size = env.create_unbacked_symint()
    torch._check(size >= 0)
    return size


def size_hint(size: Any) -> int | None:
    """What a size was for the example, None if it depends on the values of a tensor."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = size.node.hint if size.node.has_hint() else None
    return None if hint is None else int(hint)


def mode_stacks() -> tuple[int, int, str]:
    """How many torch function modes and dispatch modes are active, and what compiled code does."""
    dynamo = sys.modules.get("torch._dynamo")
    stance = dynamo.eval_frame._stance.stance if dynamo is not None else "default"
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(), stance


def size_value(size: Any, values: Mapping[Symbol, int]) -> int | None:
    """A size, or an expression of sizes, for given values of the symbols; None if it has others.

    True and false count as one and zero.
    """
    expression = symbolic_expression(size) if isinstance(size, SYMBOLIC_NUMBERS) else sympy.sympify(size)
    value = expression.xreplace({symbol: sympy.Integer(number) for symbol, number in values.items()})
    if value in (sympy.true, sympy.false):
        return int(bool(value))
    return int(value) if value.is_Integer else None
