"""Results of modules that cannot run on fake tensors: fakes whose sizes follow what real runs have shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor

from mpfx.graph.calls import PLAIN_TYPES, TensorSpec, leaves, map_leaves, tensors_in
from mpfx.graph.compat import FakeTensor, symbolic_expression, unknown_size
from mpfx.graph.errors import UnsupportedCodeError
from mpfx.graph.opaque import HiddenResult
from mpfx.graph.rehearsal import CallSample, HiddenObject, RealRun, TensorSample
from mpfx.graph.sizes import SizeEnv


class LearnedForms:
    """Makes the results of modules for one recording.

    Args:
        runs: Real runs at several sizes.
        specs: Of the traced arguments, by path.
        inputs: Fakes of the arguments.
        env: The symbols of the recording, whose mode for fakes is active whenever a result is made.
    """

    def __init__(
        self,
        runs: Sequence[RealRun],
        specs: Mapping[str, Any],
        inputs: Any,
        env: SizeEnv,
    ) -> None:
        self._runs, self._env = runs, env
        self._inputs = list(tensors_in(inputs))
        self._symbols = [_symbol_values(run, specs) for run in runs]
        self._calls: Counter[str] = Counter()

    def result(self, path: str, arguments: Any) -> Any:
        """The result of the next call of the module at ``path``; writes to arguments as the real call does.

        Args:
            path: Of the module.
            arguments: Of the call, nested, with fakes.

        Raises:
            UnsupportedCodeError: If the real runs do not tell the form.
        """
        samples = self._next_samples(path)
        tensors = list(tensors_in(arguments))
        known = list(self._known_sizes(tensors))
        results = [dict(leaves(sample.result, "")) for sample in samples]
        if any(result.keys() != results[0].keys() for result in results):
            raise UnsupportedCodeError("its result has another structure at other sizes")

        def make(leaf_path: str, leaf: Any) -> Any:
            return self._value([result[leaf_path] for result in results], path, tensors, known)

        out = map_leaves(samples[0].result, make, "")
        for index in set().union(*(sample.written for sample in samples)):
            tensors[index].zero_()  # a write like any other: its fake has no values
        return out

    def _next_samples(self, path: str) -> list[CallSample]:
        index = self._calls[path]
        self._calls[path] += 1
        if any(len(run.calls.get(path, ())) <= index for run in self._runs):
            raise UnsupportedCodeError("it is called more often while tracing than in a real run")
        if len(self._runs) < 2:
            raise UnsupportedCodeError("its code needs real values, and the model runs on the example alone")
        return [run.calls[path][index] for run in self._runs]

    def _known_sizes(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Any, tuple[int, ...]]]:
        """Symbolic sizes of arguments and inputs, with what they were in the runs."""
        seen: set[sympy.Basic] = set()
        for size in (size for tensor in [*tensors, *self._inputs] for size in tensor.shape):
            expression = symbolic_expression(size) if isinstance(size, torch.SymInt) else None
            if expression is None or expression in seen:
                continue
            seen.add(expression)
            values = [expression.xreplace(symbols) for symbols in self._symbols]
            if all(value.is_number for value in values):
                yield size, tuple(int(value) for value in values)

    def _value(self, values: list[Any], path: str, tensors: Sequence[Tensor], known: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, TensorSample):
            return self._tensor(values, tensors, known)
        if isinstance(first, HiddenObject):
            return HiddenResult(first.type_name, path)
        if all(type(value) is type(first) for value in values):
            if not isinstance(first, PLAIN_TYPES) or all(value == first for value in values):
                return first
            if isinstance(first, int) and (size := _following(values, known)) is not None:
                return size
        raise UnsupportedCodeError(f"it returns a {type(first).__name__} that changes from run to run")

    def _tensor(self, samples: list[Any], tensors: Sequence[Tensor], known: Sequence[Any]) -> Tensor:
        first = samples[0]
        forms = {(type(s), s.dtype, len(s.sizes), s.shares) for s in samples if isinstance(s, TensorSample)}
        if len(forms) != 1 or not all(isinstance(s, TensorSample) for s in samples):
            raise UnsupportedCodeError("it returns tensors of another type at other sizes")
        sizes = [self._size([s.sizes[dim] for s in samples], known) for dim in range(len(first.sizes))]
        if first.shares is not None:
            return self._shared(tensors[first.shares], first, sizes)
        with self._env.operator():
            return torch.empty_permuted(sizes, first.order, dtype=first.dtype, device=first.device)

    def _shared(self, owner: Tensor, sample: TensorSample, sizes: list[Any]) -> Tensor:
        """A tensor in the memory of an argument."""
        if sample.dtype != owner.dtype or not isinstance(owner, FakeTensor):
            raise UnsupportedCodeError("it returns another view of a parameter or of an input's memory")
        strides: dict[int, Any] = {}
        step: Any = 1
        for dim in reversed(sample.order):
            strides[dim] = step
            step = step * sizes[dim]
        with self._env.lenient(), self._env.operator():
            return owner.as_strided(sizes, [strides[dim] for dim in range(len(sizes))])

    def _size(self, values: Sequence[int], known: Sequence[Any]) -> Any:
        size = _following(values, known)
        return unknown_size(self._env) if size is None else size


def _following(values: Sequence[int], known: Sequence[tuple[Any, tuple[int, ...]]]) -> Any:
    """What makes ``values`` from the known sizes in all runs, or None.

    In this order: a number; one size or the product of two, times a factor, plus a number; a fraction of a size.
    """
    if len(set(values)) == 1:
        return values[0]
    pairs = [(a * b, tuple(x * y for x, y in zip(u, v, strict=True))) for a, u in known for b, v in known]
    for size, sizes in [*known, *pairs]:
        factor, offset = _line(values, sizes)
        if factor > 0 and all(v == factor * s + offset for v, s in zip(values, sizes, strict=True)):
            return factor * size + offset
    for size, sizes in known:
        part = round(max(sizes) / max(1, *values))
        if part > 1 and all(v == s // part for v, s in zip(values, sizes, strict=True)):
            return size // part
        if part > 1 and all(v == -(-s // part) for v, s in zip(values, sizes, strict=True)):
            return (size + part - 1) // part
    return None


def _line(values: Sequence[int], sizes: Sequence[int]) -> tuple[int, int]:
    """Factor and offset of the line through the values at two different sizes; a factor of zero if there are none."""
    for value, size in zip(values, sizes, strict=True):
        if size != sizes[0]:
            factor = (value - values[0]) // (size - sizes[0])
            return factor, values[0] - factor * sizes[0]
    return 0, values[0]


def _symbol_values(run: RealRun, specs: Mapping[str, Any]) -> dict[sympy.Symbol, sympy.Integer]:
    return {
        size: sympy.Integer(run.sizes[path, dim])
        for path, spec in specs.items()
        if isinstance(spec, TensorSpec)
        for dim, size in enumerate(spec.sizes)
        if not isinstance(size, int)
    }
