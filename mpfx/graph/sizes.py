"""Symbolic sizes while tracing, and the check that a later batch keeps what the trace assumed about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]

from mpfx.graph.compat import ShapeEnv


class SizeEnv(ShapeEnv):
    """The symbols of a trace, and every question that the forward asked about them.

    PyTorch takes every symbolic size to be two or more and keeps no guard for what follows from that. For its
    operators this is harmless, as they look again at run time, but not for Python code such as
    ``if x.shape[0] == 1``, whose branch is in the graph. So the answers that Python code got are kept here.
    """

    def __init__(self) -> None:
        # Without duck shaping, two inputs of equal length get two symbols, and equality only where it is used.
        super().__init__(duck_shape=False)
        self._answers: dict[sympy.Basic, Any] = {}
        self._operator_depth = 0
        self._lenient_depth = 0

    @contextmanager
    def operator(self) -> Iterator[None]:
        """Questions asked inside come from a PyTorch operator, not from Python code."""
        self._operator_depth += 1
        try:
            yield
        finally:
            self._operator_depth -= 1

    @contextmanager
    def lenient(self) -> Iterator[None]:
        """Inside, only equalities are kept: for PyTorch's own modules, which work for every size.

        Their operators ask about sizes to choose a kernel (a convolution, say), which binds no later run.
        """
        self._lenient_depth += 1
        try:
            yield
        finally:
            self._lenient_depth -= 1

    def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        """Answer a question about sizes by the example, and remember the answer where it binds later runs."""
        hint = args[0] if args else kwargs.get("hint")
        if self._lenient_depth and not (isinstance(orig_expr, sympy.Eq) and hint):
            with self.suppress_guards():
                return super().evaluate_expr(orig_expr, *args, **kwargs)
        answer = super().evaluate_expr(orig_expr, *args, **kwargs)
        if not (self._operator_depth or self._lenient_depth):
            self._answers[orig_expr] = answer
        return answer

    def rules(self) -> tuple[sympy.Basic, ...]:
        """Everything that a later run must keep, as boolean expressions of the symbols."""
        python = [_as_rule(question, answer) for question, answer in self._answers.items()]
        rules = dict.fromkeys([*(guard.expr for guard in self.guards), *python])
        return tuple(rule for rule in rules if rule != sympy.true)


def _as_rule(question: sympy.Basic, answer: Any) -> sympy.Basic:
    if answer in (True, sympy.true):
        return question
    if answer in (False, sympy.false):
        return sympy.Not(question)
    return sympy.Eq(question, answer)


@dataclass
class SizeRules:
    """What a trace assumed about the sizes of its inputs.

    Attributes:
        names: For every symbol the size that it stands for, such as ``input_ids.shape[1]``.
        rules: Boolean expressions of the symbols, true for the traced sizes.
    """

    names: dict[sympy.Symbol, str]
    rules: tuple[sympy.Basic, ...]
    _accepted: set[tuple[int, ...]] = field(default_factory=set, repr=False)

    def check(self, sizes: Mapping[sympy.Symbol, int], compare: Callable[[], str | None]) -> None:
        """Raise a ValueError naming the sizes where these break a rule.

        That a size is not one is in a trace by necessity: PyTorch takes it for granted. So a size that breaks nothing
        else may still be right, as where code broadcasts only what is not one already. There ``compare`` decides.

        Args:
            sizes: Of the call, by their symbols.
            compare: Runs model and graph on the batch in question; says what speaks against the graph.
        """
        key = tuple(sizes.get(symbol, -1) for symbol in self.names)
        if key in self._accepted:
            return
        for symbol, size in sizes.items():
            if size < 1:
                raise ValueError(f"Expected `{self.names[symbol]}` to be 1 or more but got {size}.")
        values = {symbol: sympy.Integer(size) for symbol, size in sizes.items()}
        broken = [rule for rule in self.rules if rule.xreplace(values) == sympy.false]
        if not broken:
            self._accepted.add(key)
        elif others := [rule for rule in broken if not _excludes_one_only(rule)]:
            advice = "Trace the module on a batch of this kind."
            raise ValueError(f"{self._message(others[0], sizes)}. {advice}")
        elif problem := compare():
            advice = "Use sizes of two or more, as a trace cannot have one as a dynamic size."
            raise ValueError(f"{self._message(broken[0], sizes)}: {problem}. {advice}")

    def _message(self, rule: sympy.Basic, sizes: Mapping[sympy.Symbol, int]) -> str:
        symbols = sorted(rule.free_symbols & sizes.keys(), key=str)
        got = ", ".join(f"`{self.names[s]}` = {sizes[s]}" for s in symbols)
        readable = rule.xreplace({s: sympy.Symbol(name) for s, name in self.names.items()})
        return f"Expected sizes with {readable}, as the branches taken while tracing need them, but got {got}"


def _excludes_one_only(rule: sympy.Basic) -> bool:
    """Whether the rule says of one size that it is not one, in any of the forms that SymPy gives this."""
    if len(rule.free_symbols) != 1:
        return False
    (size,) = rule.free_symbols
    return rule in (sympy.Ne(size, 1), size > 1, size >= 2)
