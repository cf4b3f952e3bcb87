"""Weights of experts that are multiplied as they are packed: what the code of a user's experts module finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mpfx.nn.kernels import packed_linear
from mpfx.nn.packing import PackedWeight

_SAME = ("aten.detach", "aten.alias", "aten.clone", "aten._to_copy", "aten.lift_fresh")


class Stack(Protocol):
    """What a :class:`mpfx.nn.experts.PackedStack` offers to products."""

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""

    @property
    def device(self) -> torch.device:
        """Of the packed tensors."""

    out_features: int
    transposed: bool

    def packed(self, expert: int) -> PackedWeight:
        """The packed weight of one expert."""

    def order(self, expert: int) -> Tensor | None:
        """The permutation of one expert."""

    def dense(self, expert: int) -> Tensor:
        """The dense weight of one expert, ``(out, in)``."""


@dataclass(frozen=True)
class _Matrices:
    """Some of the matrices of a stack.

    Attributes:
        stack: that has them.
        experts: whose matrices, in this order.
        single: whether there is one, without a dimension of experts.
        contracts_first: whether their rows are input channels: ``(in, out)``.
    """

    stack: Stack
    experts: tuple[int, ...]
    single: bool
    contracts_first: bool

    @property
    def shape(self) -> tuple[int, ...]:
        first, second = self.stack.shape[1:]
        sizes = (first, second) if self.contracts_first == self.stack.transposed else (second, first)
        return sizes if self.single else (len(self.experts), *sizes)

    def dense(self, dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):  # as the operand itself, of which it may become a view
            whole = torch.empty(self.shape, dtype=dtype, device=self.stack.device)
        for matrix, expert in zip([whole] if self.single else whole, self.experts, strict=True):
            dense = self.stack.dense(expert)
            matrix.copy_(dense.t() if self.contracts_first else dense)
        return whole

    def product(self, expert: int, x: Tensor) -> Tensor:
        """That of one expert with ``(..., in)``."""
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], self.stack.out_features)
        return packed_linear(x, self.stack.packed(expert), self.stack.order(expert), None)

    def products(self, x: Tensor) -> Tensor:
        """Those of every matrix with its own ``(rows, in)``, of ``(matrices, rows, in)``: each expert's at once."""
        places: dict[int, list[int]] = {}
        for place, expert in enumerate(self.experts):
            places.setdefault(expert, []).append(place)
        out = x.new_empty(*x.shape[:-1], self.stack.out_features)
        for expert, own in places.items():
            out[own] = self.product(expert, x[own])
        return out

    def grouped(self, x: Tensor, ends: Sequence[int]) -> Tensor:
        """Those of rows ``ends[k-1] .. ends[k] - 1`` with matrix k; rows behind the last end are zero."""
        out = x.new_zeros(len(x), self.stack.out_features)
        start = 0
        for expert, end in zip(self.experts, ends, strict=True):
            if end > start:
                out[start:end] = self.product(expert, x[start:end])
            start = end
        return out


class PackedOperand(Tensor):
    """The parameter of a packed stack, or some of its matrices, as long as they are only multiplied.

    Selecting experts and turning matrices over select and turn packed ones. Their products with activations of the same
    dtype are those of :func:`mpfx.nn.kernels.packed_linear`, of one expert at a time and only of those that have
    activations. For all else (products over output channels, as of a backward pass, parts of a matrix, arithmetic) the
    matrices that are asked for are dense, for the length of that operation.

    Args:
        stack: packed.
        dtype: that the parameter is said to be of.
    """

    matrices: _Matrices

    @classmethod
    def of(cls, stack: Stack, dtype: torch.dtype) -> PackedOperand:
        """The whole parameter of a stack."""
        return cls._wrapped(_Matrices(stack, tuple(range(stack.shape[0])), False, stack.transposed), dtype)

    @classmethod
    def _wrapped(cls, matrices: _Matrices, dtype: torch.dtype) -> PackedOperand:
        with torch.inference_mode(False):  # views are what they are views of, and a call may change the mode
            made: PackedOperand = Tensor._make_wrapper_subclass(
                cls, matrices.shape, dtype=dtype, device=matrices.stack.device
            )
        made.matrices = matrices
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        if all(kind in (cls, Tensor, torch.nn.Parameter) for kind in types):
            rule = _RULES.get(str(func.overloadpacket))
            with torch.no_grad():  # what wants a gradient is recorded above
                out = NotImplemented if rule is None else rule(*args, **kwargs)
            if out is NotImplemented:
                out = func.decompose(*args, **kwargs)  # inference mode hands over operators that consist of others
            if out is not NotImplemented:
                return out
        args, kwargs = tree_map_only(PackedOperand, lambda m: m.matrices.dense(m.dtype), (args, kwargs))
        return func(*args, **kwargs)


def _same(weight: Any, *_: Any, dtype: torch.dtype | None = None, **options: Any) -> Any:
    device = options.get("device")
    if device is not None and torch.device(device) != weight.device:
        return NotImplemented
    return PackedOperand._wrapped(weight.matrices, dtype or weight.dtype)


def _reshaped(weight: Any, shape: Sequence[int], **_: Any) -> Any:
    """What broadcasting makes of a matrix that it leaves as it is."""
    sizes = [old if new == -1 else new for old, new in zip(weight.shape, shape, strict=False)]
    return _same(weight) if len(sizes) == len(shape) and sizes == list(weight.shape) else NotImplemented


def _turned(weight: Any, *dims: Any) -> Any:
    last = weight.dim() - 1
    swaps = {dim % weight.dim() for dim in dims} == {last - 1, last} if dims else last == 1
    return _swapped(weight) if swaps else NotImplemented


def _permuted(weight: Any, dims: Sequence[int]) -> Any:
    last = weight.dim() - 1
    swaps = [dim % weight.dim() for dim in dims] == [*range(last - 1), last, last - 1]
    return _swapped(weight) if swaps else NotImplemented


def _swapped(weight: Any) -> Any:
    found: _Matrices = weight.matrices
    turned = replace(found, contracts_first=not found.contracts_first)
    return PackedOperand._wrapped(turned, weight.dtype)


def _selected(weight: Any, dim: int, index: int) -> Any:
    found: _Matrices = weight.matrices
    if found.single or dim % weight.dim() != 0 or not -len(found.experts) <= index < len(found.experts):
        return NotImplemented
    return PackedOperand._wrapped(replace(found, experts=(found.experts[index],), single=True), weight.dtype)


def _picked(weight: Any, indices: Sequence[Tensor | None]) -> Any:
    """``weight[experts]``."""
    found: _Matrices = weight.matrices
    chosen = indices[0] if len(indices) == 1 else None
    if found.single or chosen is None or chosen.dim() > 1 or chosen.dtype in (torch.bool, torch.uint8):
        return NotImplemented
    places = [int(place) for place in chosen.reshape(-1).tolist()]
    if not all(-len(found.experts) <= place < len(found.experts) for place in places):
        return NotImplemented  # torch says so
    experts = tuple(found.experts[place] for place in places)
    return PackedOperand._wrapped(replace(found, experts=experts, single=chosen.dim() == 0), weight.dtype)


def _index_selected(weight: Any, dim: int, index: Tensor) -> Any:
    return _picked(weight, [index.reshape(-1)]) if dim % weight.dim() == 0 else NotImplemented


def _multiplied(left: Any, right: Any) -> Any:
    """``left @ right`` of two or three dimensions each, where one is activations and the other packed."""
    turned = isinstance(left, PackedOperand)
    weight, x = (left, right) if turned else (right, left)
    if isinstance(x, PackedOperand) or not isinstance(weight, PackedOperand) or not _fits(weight, x, turned):
        return NotImplemented
    rows = x.mT if turned and x.dim() > 1 else x
    found = weight.matrices
    out = found.product(found.experts[0], rows) if found.single else found.products(rows)
    return out.mT if turned and x.dim() > 1 else out


def _fits(weight: PackedOperand, x: Tensor, turned: bool) -> bool:
    """Whether it is a product over input channels, of operands that torch would multiply."""
    found = weight.matrices
    channels = weight.shape[-1 if turned else -2]
    contracted = x.shape[-2 if turned and x.dim() > 1 else -1]
    batches = x.dim() in (1, 2) if found.single else x.dim() == 3 and len(x) == len(found.experts)
    same = x.dtype == weight.dtype and x.device == weight.device
    return same and batches and contracted == channels and found.contracts_first != turned


def _added(bias: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1, **options: Any) -> Any:
    if isinstance(bias, PackedOperand) or (beta, alpha) != (1, 1) or any(options.values()):
        return NotImplemented
    out = _multiplied(left, right)
    return out if out is NotImplemented else out + bias


def _grouped(x: Any, weight: Any, offs: Any = None, *rest: Any, **options: Any) -> Any:
    known = isinstance(offs, Tensor) and not any(option is not None for option in (*rest, *options.values()))
    if not known or isinstance(x, PackedOperand) or x.dim() != 2 or weight.dim() != 3 or len(offs) != len(weight):
        return NotImplemented
    same = x.dtype == weight.dtype and x.shape[1] == weight.shape[1] and weight.matrices.contracts_first
    return weight.matrices.grouped(x, offs.tolist()) if same else NotImplemented


_RULES: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(("aten.view", "aten._unsafe_view", "aten.expand", "aten.reshape"), _reshaped),
    **dict.fromkeys(("aten.t", "aten.transpose"), _turned),
    **dict.fromkeys(("aten.mm", "aten.bmm", "aten.mv"), _multiplied),
    **dict.fromkeys(("aten.addmm", "aten.addmv", "aten.baddbmm"), _added),
    **dict.fromkeys(("aten._grouped_mm", "transformers.grouped_mm_fallback"), _grouped),
    "aten.permute": _permuted,
    "aten.select": _selected,
    "aten.index": _picked,
    "aten.index_select": _index_selected,
}
"""What is done with packed matrices; NotImplemented where it takes dense ones."""
