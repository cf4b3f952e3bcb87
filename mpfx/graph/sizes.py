"""Symbolic sizes while tracing, and the check that a later batch keeps what the trace assumed about them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]

from mpfx.graph.compat import DATA_DEPENDENT_ERRORS, ShapeEnv
from mpfx.graph.errors import UnsupportedCodeError

_LARGE = 150  # parts of an expression; with the floors and remainders of windows SymPy needs seconds for larger ones


class SizeEnv(ShapeEnv):
    """The symbols of a trace, and every question that the forward asked about them.

    PyTorch takes every symbolic size to be two or more and keeps no guard for what follows from that. For its
    operators this is harmless, as they look again at run time, but not for Python code such as
    ``if x.shape[0] == 1``, whose branch is in the graph. So the answers that Python code got are kept here.

    Args:
        refused: Is told of questions of Python code that have no answer, as they are about the values of a tensor.
            The forward may catch the error and go on by another way than without a trace.
        fixed: Is told the symbols in an answer that fixes sizes, which means that it does not hold for others near
            them; it may raise an error.
        costly: Is told of questions about the sizes of images that take seconds to answer; it may raise an error.
        place: Says where the code is that asks.
    """

    def __init__(
        self,
        refused: Callable[[Exception], None] = lambda error: None,
        fixed: Callable[[Collection[sympy.Symbol]], None] = lambda symbols: None,
        costly: Callable[[], None] = lambda: None,
        place: Callable[[], str] = lambda: "",
    ) -> None:
        # Without duck shaping, two inputs of equal length get two symbols, and equality only where it is used.
        super().__init__(duck_shape=False)
        self._answers: dict[sympy.Basic, Any] = {}
        self._inputs: dict[sympy.Symbol, int] = {}
        self._images: set[sympy.Symbol] = set()
        self._places: dict[sympy.Basic, str] = {}
        self._operator_depth = 0
        self._refused, self._fixed, self._costly, self._place = refused, fixed, costly, place
        self._lenient_depth = 0
        self._pending: UnsupportedCodeError | None = None

    def add_input(self, symbol: sympy.Symbol, size: int, of_image: bool) -> None:
        """Note the size of an input that a symbol stands for, and whether it is the height or width of an image."""
        self._inputs[symbol] = size
        if of_image:
            self._images.add(symbol)

    def of_image(self, symbols: Collection[sympy.Symbol]) -> bool:
        """Whether one of the symbols is the height or width of an image."""
        return not self._images.isdisjoint(symbols)

    @contextmanager
    def operator(self) -> Iterator[None]:
        """Questions asked inside come from a PyTorch operator, not from Python code.

        What is wrong with one of them is raised at the end, as PyTorch logs errors inside of its operators.
        """
        self._operator_depth += 1
        try:
            yield
        finally:
            self._operator_depth -= 1
        if self._operator_depth == 0 and self._pending is not None:
            error, self._pending = self._pending, None
            raise error

    @contextmanager
    def lenient(self) -> Iterator[None]:
        """Inside, only equalities are kept: for PyTorch's own modules, which work for every size.

        Their operators ask about sizes to choose a kernel (a convolution, say), which binds no later run. Nor do
        equalities of fractions and remainders, which are no relation between sizes.
        """
        self._lenient_depth += 1
        try:
            yield
        finally:
            self._lenient_depth -= 1

    def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        """Answer a question about sizes by the example, and remember the answer where it binds later runs."""
        hint = args[0] if args else kwargs.get("hint")
        binds = isinstance(orig_expr, sympy.Eq) and hint and not orig_expr.atoms(sympy.Function)
        if self._lenient_depth and not binds:
            with self.suppress_guards():
                return super().evaluate_expr(orig_expr, *args, **kwargs)
        self._refuse_costly(orig_expr)
        guards = len(self.guards)
        try:
            answer = super().evaluate_expr(orig_expr, *args, **kwargs)
        except DATA_DEPENDENT_ERRORS as error:
            if not self._operator_depth:
                self._refused(error)
            raise
        if not (self._operator_depth or self._lenient_depth) and orig_expr not in self._answers:
            self._answers[orig_expr] = answer
            self._note(_as_rule(orig_expr, answer), isinstance(orig_expr, sympy.logic.boolalg.Boolean))
        for guard in self.guards[guards:]:
            self._note(guard.expr, True)
        return answer

    def _refuse_costly(self, question: sympy.Basic) -> None:
        if self.of_image(question.free_symbols) and sum(1 for _ in sympy.preorder_traversal(question)) > _LARGE:
            self._tell(self._costly)

    def _note(self, rule: sympy.Basic, is_comparison: bool) -> None:
        """Note where a rule comes from, and tell of one that fixes sizes; a number made of a size always does."""
        if rule in (sympy.true, sympy.false) or rule in self._places:
            return
        self._places[rule] = self._place()
        sizes = {symbol: self._inputs[symbol] for symbol in rule.free_symbols if symbol in self._inputs}
        # Operators compare sizes with those of weights, which no other code would change.
        plain = is_comparison and self._operator_depth and not rule.atoms(sympy.Function)
        if sizes and not (self._lenient_depth or plain or (is_comparison and _holds_nearby(rule, sizes))):
            self._tell(self._fixed, sizes)

    def _tell(self, listener: Callable[..., None], *args: Any) -> None:
        try:
            listener(*args)
        except UnsupportedCodeError as error:
            if not self._operator_depth:
                raise
            self._pending = self._pending or error

    def note_fixed(self, symbols: Collection[sympy.Symbol]) -> None:
        """Tell that code has made the symbols numbers, by another way than a question about them."""
        if not self._lenient_depth:
            self._fixed(symbols)

    def fixed_symbols(self) -> frozenset[sympy.Symbol]:
        """The symbols that code has made fixed numbers, such as a loop over a size."""
        return frozenset(symbol for symbol, value in self.replacements.items() if value.is_number)

    def rules(self) -> tuple[sympy.Basic, ...]:
        """Everything that a later run must keep, as boolean expressions of the symbols."""
        python = [_as_rule(question, answer) for question, answer in self._answers.items()]
        rules = dict.fromkeys([*(guard.expr for guard in self.guards), *python])
        return tuple(rule for rule in rules if rule != sympy.true)

    def places(self) -> dict[sympy.Basic, str]:
        """Where the code is that needs a rule, by the rule."""
        return dict(self._places)


def _holds_nearby(rule: sympy.Basic, sizes: Mapping[sympy.Symbol, int]) -> bool:
    """Whether a rule leaves open sizes as a user may have them in another batch.

    Sizes are changed together, as those of one batch belong together. One single size that is not allowed (one, most
    often) fixes nothing, and neither does a bound that is far away.
    """
    if isinstance(rule, sympy.Ne) and not rule.atoms(sympy.Function):
        return True
    changes: list[Callable[[int], int]] = [lambda n: n + 1, lambda n: max(2, n - 1), lambda n: 2 * n + 1]
    nearby = ({symbol: sympy.Integer(change(size)) for symbol, size in sizes.items()} for change in changes)
    return all(rule.xreplace(values) != sympy.false for values in nearby)


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
        places: For rules the module and the line of the code that needs it.
    """

    names: dict[sympy.Symbol, str]
    rules: tuple[sympy.Basic, ...]
    places: Mapping[sympy.Basic, str] = field(default_factory=dict)
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
        place = f" ({self.places[rule]})" if self.places.get(rule) else ""
        return f"Expected sizes with {readable}, as the branches taken while tracing need them{place}, but got {got}"


def _excludes_one_only(rule: sympy.Basic) -> bool:
    """Whether the rule says of one size that it is not one, in any of the forms that SymPy gives this."""
    if len(rule.free_symbols) != 1:
        return False
    (size,) = rule.free_symbols
    return rule in (sympy.Ne(size, 1), size > 1, size >= 2)
