"""Watches matrix products with stacked expert weights, below autograd and autocast, whatever code calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mpfx.graph.calls import tensors_in
from mpfx.graph.compat import TorchDispatchMode
from mpfx.graph.operands import Operand, Role, Stacks, UnwatchableError

PRODUCTS: Mapping[str, tuple[int, int]] = {
    **{"aten.mm": (0, 1), "aten.addmm": (1, 2), "aten._addmm_activation": (1, 2)},
    **{"aten.bmm": (0, 1), "aten.baddbmm": (1, 2), "aten.addbmm": (1, 2)},
    **{"aten.mv": (0, 1), "aten.addmv": (1, 2)},
    **{"aten._grouped_mm": (0, 1), "transformers.grouped_mm_fallback": (0, 1)},
}
"""Operators that multiply two matrices, or stacks of them, and the positions of these arguments."""

GROUPED = ("aten._grouped_mm", "transformers.grouped_mm_fallback")
"""Those that multiply rows ``offs[e-1] .. offs[e]`` with matrix e."""

_COPIES = ("aten.clone", "aten._to_copy", "aten.contiguous")
_GATHERS = ("aten.index", "aten.index_select")
_FACTORIES = ("aten.new_", "aten.empty", "aten.zeros", "aten.ones", "aten.full", "aten.rand")


@dataclass(frozen=True)
class Product:
    """One product of inputs with the weights of one expert, or the same one with each of several.

    Attributes:
        name: of the parameter.
        transposed: whether the parameter's first dimension, not its second, is the one of input channels.
        experts: of every batch.
        x: ``(batches, rows, in)``.
        stacked: whether the rows of the batches are of equal number because some of them are padding.
        rows: output channels ``start .. start+size-1`` that it computes; None: all of them.
    """

    name: str
    transposed: bool
    experts: tuple[int, ...]
    x: Tensor
    stacked: bool
    rows: tuple[int, int] | None


class ProductMode(TorchDispatchMode):
    """While active, hands over every product with the weights of watched stacks, just before it is computed.

    Args:
        stacks: parameters ``(experts, ., .)`` by name.
        report: gets the products; runs with the mode off.

    Raises:
        UnwatchableError: from the watched code, as soon as it does something else with the weights.
    """

    def __init__(self, stacks: Mapping[str, Tensor], report: Callable[[Product], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stacks = Stacks()
        for name, parameter in stacks.items():
            self._stacks.add_parameter(name, parameter)
        self._report = report

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        if not any(self._stacks.holds(t) for t in tensors_in((tuple(args), dict(kwargs)))):
            return func(*args, **kwargs)
        name = str(func.overloadpacket)
        if name in PRODUCTS:
            for product in self._products(name, args, kwargs):
                self._report(product)
            return func(*args, **kwargs)
        with self:  # inference mode hands over operators that consist of others
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        self._follow(name, args, kwargs, out)
        return out

    def _follow(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Keep track of what an operator made of weights."""
        shown = self._stacks.find(args[0]) if args and isinstance(args[0], Tensor) else None
        if name.endswith("_"):
            raise UnwatchableError(f"writes to its weights, or copies them to other tensors ({name})")
        if shown is not None and name in _COPIES:
            self._stacks.add_copy(shown, out)
        elif shown is not None and name in _GATHERS:
            self._stacks.add_copy(_gathered(shown, args), out)
        elif not name.startswith(_FACTORIES):
            made = [t for t in tensors_in(out) if t.is_floating_point() and not self._stacks.holds(t)]
            if made:
                raise UnwatchableError(f"does something else with its weights than to multiply by them ({name})")

    def _products(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Product]:
        left, right = (args[i] for i in PRODUCTS[name])
        shown_left, shown_right = self._stacks.find(left), self._stacks.find(right)
        if shown_right is not None and shown_left is None:
            if name in GROUPED:
                offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
                yield from _grouped(shown_right, left, offsets)
            else:
                contracted, other = -2, -1
                yield _product(shown_right, left, contracted, other)
        elif shown_left is not None and shown_right is None and name not in GROUPED:
            x = right[None] if right.dim() == 1 else right.mT
            yield _product(shown_left, x, -1, -2)
        elif shown_left is not None or shown_right is not None:
            raise UnwatchableError(f"multiplies its weights with each other, or as inputs ({name})")


def _product(shown: Operand, x: Tensor, contracted: int, other: int) -> Product:
    if shown.merged is not None and shown.merged == len(shown.roles) + contracted:
        raise UnwatchableError(f"sums over experts where it multiplies by `{shown.name}`")
    transposed, rows = _orientation(shown, shown.roles[contracted], shown.roles[other])
    batched = shown.roles[0] == "expert" and x.dim() == 3
    if shown.experts.dim() != batched + (shown.merged is not None):
        raise UnwatchableError(f"multiplies by several experts of `{shown.name}` as if they were one matrix")
    if not batched:  # the same experts, whatever the number of batches
        x = x.reshape(1, -1, x.shape[-1])
    experts = shown.experts.reshape(len(x), -1)
    x = x.repeat_interleave(experts.shape[1], 0)  # a batch may go to several experts at once
    chosen = tuple(experts.flatten().tolist())
    stacked = batched and shown.merged is None and len(set(chosen)) == len(chosen)
    return Product(shown.name, transposed, chosen, x, stacked, rows)


def _grouped(shown: Operand, x: Tensor, offsets: Tensor | None) -> Iterator[Product]:
    transposed, rows = _orientation(shown, shown.roles[-2], shown.roles[-1])
    if x.dim() != 2 or shown.experts.dim() != 1 or shown.merged is not None or offsets is None:
        raise UnwatchableError(f"multiplies `{shown.name}` group by group in an unknown way")
    start = 0
    for expert, stop in zip(shown.experts.tolist(), offsets.tolist(), strict=True):
        yield Product(shown.name, transposed, (expert,), x[None, start:stop], False, rows)
        start = stop


def _orientation(shown: Operand, contracted: Role | None, other: Role | None) -> tuple[bool, tuple[int, int] | None]:
    """Whether the input channels are the parameter's first dimension, and which outputs are computed."""
    if contracted not in ("first", "second") or other in ("expert", contracted):
        raise UnwatchableError(f"sums over experts where it multiplies by `{shown.name}`")
    if not shown.is_whole(contracted):
        raise UnwatchableError(f"multiplies by parts of the input channels of `{shown.name}` separately")
    output: Role = "second" if contracted == "first" else "first"
    axis = shown.axis(output)
    return contracted == "first", None if shown.is_whole(output) else (axis.start, axis.size)


def _gathered(shown: Operand, args: Sequence[Any]) -> Operand:
    """What ``weights[experts]`` shows: its dimensions of experts are those of the indices."""
    if len(args) == 3:  # index_select(weights, dim, indices)
        dim, indices = args[1], args[2]
    else:
        dim, indices = 0, args[1][0]
        if any(index is not None for index in args[1][1:]):
            indices = None
    if shown.roles[dim] != "expert" or dim != 0 or shown.experts.dim() != 1 or indices is None:
        raise UnwatchableError(f"picks single channels out of `{shown.name}`")
    experts = shown.experts[indices.cpu()]
    along: tuple[Role, ...] = ("expert",)
    roles = along * experts.dim() + shown.roles[1:]
    return Operand(shown.name, shown.shape, experts, roles, shown.first, shown.second)
