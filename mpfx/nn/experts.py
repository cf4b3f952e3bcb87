"""Packed experts: the weights of all experts of a stack, and the module that runs a user's experts on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from math import prod
from operator import is_
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mpfx.nn.layout import SCALE_BITS, Layout, scale_shapes, stored_bytes, words
from mpfx.nn.operand import PackedOperand
from mpfx.nn.packed import PackedModule, pack_permutation
from mpfx.nn.packing import PARTS, PackedWeight, count_kept, filled, own_order, unpack, validate

_STACKED = ("row_scales", "mask", "widths")
"""Tensors of equal shape for every expert; all others lie one after the other."""


class PackedStack(PackedModule):
    """The packed weights of all experts in the place of one parameter ``(experts, ., .)``.

    Every expert has a layout of its own: its codes, scales and zero points lie one after the other in flat tensors.
    Which scales there are, float16 or coded, all experts have in common.

    Args:
        weights: of every expert; of equal sizes and group size, all with a mask or none, all with zero points or
            none, all with coded scales or none.
        permutation: integers ``(experts, in)`` or one ``(in,)`` per expert: channel ``permutation[e][k]`` of the input
            meets channel k of expert e. Stacks that read the same inputs may share one tensor. None: the order is the
            input's own.
        dtype: of the parameter that this stands for, what ``dense`` returns.
        transposed: whether that parameter is ``(experts, in, out)``.

    Attributes:
        codes: int32 ``(words,)``, expert after expert as in :class:`PackedWeight`.
        scales: float16 ``(numbers,)``, expert after expert; None if coded.
        scale_codes: int32 ``(words,)``, expert after expert; None if not coded, as are the next two.
        row_scales: float16 ``(experts, out)``.
        group_scales: float16 ``(numbers,)``, expert after expert.
        zeros: int32 ``(words,)``, expert after expert; None if symmetric.
        mask: int32 ``(experts, segments, out)`` or None.
        widths: uint8 ``(experts, segments)``.

    Raises:
        ValueError: if the weights or the permutations do not go together.
    """

    codes: Tensor
    scales: Tensor | None
    scale_codes: Tensor | None
    row_scales: Tensor | None
    group_scales: Tensor | None
    zeros: Tensor | None
    mask: Tensor | None
    widths: Tensor
    permutation: Tensor | None
    _dtype: Tensor

    def __init__(
        self,
        weights: Sequence[PackedWeight],
        *,
        permutation: Tensor | Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        _check_alike(weights)
        self._known: tuple[tuple[Tensor | None, ...], dict[int, PackedWeight]] | None = None  # of these buffers
        self.layouts = tuple(weight.layout for weight in weights)
        self.out_features, self.in_features = weights[0].out_features, weights[0].layout.in_features
        self.transposed = transposed
        self._ends = {name: _ends(_parts_of(weights, name)) for name in PARTS if name not in _STACKED}
        for name in PARTS:
            self.register_buffer(name, _joined(name, _parts_of(weights, name)))
        self.register_buffer("permutation", self._orders(permutation))
        # Holds no element; its dtype follows `.to(dtype)`, which must not touch the scales.
        self.register_buffer("_dtype", torch.empty(0, dtype=dtype, device=self.codes.device), persistent=False)

    def _orders(self, permutation: Tensor | Sequence[Tensor] | None) -> Tensor | None:
        if permutation is not None and not isinstance(permutation, Tensor):
            permutation = pack_permutation(torch.stack([order.long() for order in permutation]))
        wanted = (len(self.layouts), self.in_features)
        if permutation is not None and tuple(permutation.shape) != wanted:
            raise ValueError(f"Expected `permutation` of shape {wanted} but got {tuple(permutation.shape)}.")
        return permutation

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.layouts)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the parameter that this stands for."""
        return self._dtype.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the parameter that this stands for: ``(experts, out, in)``, or ``(experts, in, out)`` if transposed."""
        sizes = (self.out_features, self.in_features)
        return torch.Size((self.experts, *(reversed(sizes) if self.transposed else sizes)))

    @property
    def device(self) -> torch.device:
        """Of the packed tensors."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Stored bytes, without the permutations that stacks of the same input share."""
        return sum(part.nbytes for name in PARTS if (part := getattr(self, name)) is not None)

    @property
    def code_bits(self) -> float:
        """Average nominal width of a code, over the channels of all experts."""
        return sum(layout.code_bits for layout in self.layouts) / self.experts

    def packed(self, expert: int) -> PackedWeight:
        """The packed weight of one expert: views of this module's tensors.

        Raises:
            IndexError: if there is no such expert.
        """
        if not 0 <= expert < self.experts:
            raise IndexError(f"Expected an expert in 0 .. {self.experts - 1} but got {expert}.")
        known = self._weights_known()
        if expert not in known:
            parts = {name: self._part(name, expert) for name in PARTS}
            known[expert] = _shaped(parts, self.layouts[expert], self.out_features)
        return known[expert]

    def _weights_known(self) -> dict[int, PackedWeight]:
        """Those asked for so far, to which kernels add what they find out."""
        buffers = tuple(map(self._buffers.get, PARTS))
        if self._known is None or not all(map(is_, self._known[0], buffers)):
            self._known = (buffers, {})
        return self._known[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}

    def order(self, expert: int) -> Tensor | None:
        """The permutation of one expert's channels: channel ``order[k]`` of the input meets channel k; or None."""
        return None if self.permutation is None else self.permutation[expert]

    def _part(self, name: str, expert: int) -> Tensor | None:
        whole: Tensor | None = getattr(self, name)
        if whole is None or name in _STACKED:
            return None if whole is None else whole[expert]
        ends = self._ends[name]
        return whole[ends[expert - 1] if expert else 0 : ends[expert]]

    def fill_mask(self) -> int:
        """Do what :func:`mpfx.nn.fill_masks` does to this module alone."""
        if self.mask is None:
            return 0
        codes = [filled(self.packed(expert)).codes.view(-1) for expert in range(self.experts)]
        self._ends["codes"] = _ends(codes)
        self.codes, self.mask, self._known = torch.cat(codes), None, None
        return self.experts

    def dense(self, expert: int) -> Tensor:
        """The dense weight ``(out, in)`` of one expert in the input's own channel order; made anew at every call."""
        return own_order(unpack(self.packed(expert)).dequantize().to(self.weight_dtype), self.order(expert))

    def operand(self) -> Tensor:
        """What stands for the parameter in products, without being dense; no more than that, and without memory."""
        return PackedOperand.of(self, self.weight_dtype)

    def stacked(self) -> Tensor:
        """The whole parameter that this stands for, of shape ``shape``; made anew at every call."""
        whole = torch.empty(self.shape, dtype=self.weight_dtype, device=self.codes.device)
        for expert in range(self.experts):  # one at a time: what unpacking needs besides stays small
            dense = self.dense(expert)
            whole[expert] = dense.t() if self.transposed else dense
        return whole

    def extra_repr(self) -> str:
        """Sizes and code bits."""
        sparse = "" if self.mask is None else ", sparse"
        return (
            f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"code_bits={self.code_bits:.2f}{sparse}"
        )


class PackedExperts(nn.Module):
    """A user's experts module over packed weights: its own code runs, and what it multiplies with is packed.

    A product of activations with the matrix of an expert runs on the kernels of :class:`mpfx.nn.MixedPrecisionLinear`,
    if the expert has activations; :class:`mpfx.nn.operand.PackedOperand` tells what is dense, for the length of an
    operation. Under a compiler, which cannot see through that, the stacks are dense for the length of the call. Other
    parameters, buffers and children are shared with the module given, under the same names; the module itself stays as
    it is. What it offers besides (``config``, ``num_experts``) can be read here too.

    Args:
        experts: the module, or another packed one, all of whose stacks are replaced.
        stacks: by the names of its parameters ``(experts, ., .)``.

    Raises:
        ValueError: if a stack does not fit the parameter of its name.
    """

    traced_as_leaf: ClassVar[bool] = True
    """A graph calls this module as a whole, as it did with the one it stands for."""

    def __init__(self, experts: nn.Module, stacks: Mapping[str, PackedStack]) -> None:
        super().__init__()
        _check_stacks(experts, stacks)
        inner = _without(experts, set(stacks))
        # One set of dicts for both: what moves or loads this module moves the inner one, which is none of its children.
        self._parameters, self._buffers = inner._parameters, inner._buffers
        self._non_persistent_buffers_set = inner._non_persistent_buffers_set
        for name, child in inner._modules.items():
            self.add_module(name, child)
        for name, stack in stacks.items():
            self.add_module(name, stack)
        self.__dict__["_inner"] = inner
        self.__dict__["_stack_names"] = tuple(stacks)
        self.training = experts.training

    @property
    def packed_stacks(self) -> dict[str, PackedStack]:
        """The packed stacks by the names of the parameters that they stand for."""
        return {name: self._modules[name] for name in self.__dict__["_stack_names"]}  # type: ignore[misc]

    @property
    def original_type(self) -> type[nn.Module]:
        """The class of the module whose code runs."""
        return type(self.__dict__["_inner"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the user's forward."""
        with self._at_hand() as inner:
            return inner(*args, **kwargs)

    @contextmanager
    def _at_hand(self) -> Iterator[nn.Module]:
        inner: nn.Module = self.__dict__["_inner"]
        inner.training = self.training
        inner._modules = {name: child for name, child in self._modules.items() if name not in self.packed_stacks}
        try:
            for name, stack in self.packed_stacks.items():
                inner.__dict__[name] = stack.stacked() if torch.compiler.is_compiling() else stack.operand()
            yield inner
        finally:
            for name in self.packed_stacks:
                inner.__dict__.pop(name, None)

    def extra_repr(self) -> str:
        """The class of the user's module."""
        return self.original_type.__name__

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("_inner")  # none while a copy is being made
            if inner is None:
                raise
            return getattr(inner, name)


def split_stack(
    parts: Mapping[str, Tensor | None], *, out_features: int, in_features: int, group_size: int | None
) -> list[PackedWeight]:
    """Tell the packed weights of the experts apart; for data from outside, which is checked.

    Args:
        parts: the tensors of a :class:`PackedStack` by name; those that it lacks are None or not there.
        out_features: rows of every expert.
        in_features: channels of every expert.
        group_size: channels per scale; None: all of one width.

    Returns:
        Views of these tensors, one weight per expert.

    Raises:
        ValueError: naming the tensor, what it is, and what the sizes ask for.
    """
    widths, mask = parts.get("widths"), parts.get("mask")
    if widths is None or widths.dim() != 2 or len(widths) < 1:
        found = "none" if widths is None else f"one of {tuple(widths.shape)}"
        raise ValueError(f"Expected `widths` of shape (experts, segments) but got {found}.")
    layouts = [Layout(in_features, tuple(row), group_size) for row in widths.tolist()]
    table = (len(layouts), out_features)
    _check_stacked("mask", mask, (*widths.shape, out_features), torch.int32)
    _check_stacked("row_scales", parts.get("row_scales"), table, torch.float16)
    shapes = []
    for expert, layout in enumerate(layouts):
        with _naming(expert):
            kept = None if mask is None else count_kept(mask[expert], out_features, layout)
            shapes.append(_flat_shapes(parts, layout, out_features, kept))
    cut: dict[str, tuple[Tensor, ...]] = {}
    for name, whole in parts.items():
        if whole is not None:
            sizes = [of_expert[name] for of_expert in shapes] if name not in _STACKED else []
            cut[name] = tuple(whole) if name in _STACKED else _cut(name, whole, sizes)
    weights = []
    for expert, layout in enumerate(layouts):
        with _naming(expert):
            weights.append(_shaped({name: part[expert] for name, part in cut.items()}, layout, out_features))
            validate(weights[-1])
    return weights


@contextmanager
def _naming(expert: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"expert {expert}: {error}") from error


def _flat_shapes(
    parts: Mapping[str, Tensor | None], layout: Layout, rows: int, kept: tuple[int, ...] | None
) -> dict[str, int]:
    """Numbers that one expert has of the tensors that lie one after the other."""
    symmetric, scale_bits = parts.get("zeros") is None, 16 if parts.get("scale_codes") is None else SCALE_BITS
    size = stored_bytes(layout, rows, symmetric=symmetric, scale_bits=scale_bits, kept=kept)
    shapes = scale_shapes(layout, rows, 16) | scale_shapes(layout, rows, SCALE_BITS)
    scales = {name: prod(shape) for name, shape in shapes.items()}
    return {**scales, "codes": size.codes // 4, "zeros": size.zeros // 4}


def _shaped(parts: Mapping[str, Tensor | None], layout: Layout, rows: int) -> PackedWeight:
    """The weight of one expert, from its flat tensors."""
    tables = {"scales": (rows, len(layout.grids))}
    if parts.get("mask") is None:
        tables["codes"] = (sum(words(run.channels, run.bits) for run in layout.runs), rows)
    shaped = {n: t.view(tables[n]) if t is not None and n in tables else t for n, t in parts.items()}
    return PackedWeight.of(shaped, layout)


def _check_stacked(name: str, part: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if part is not None and (tuple(part.shape) != shape or part.dtype != dtype):
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"Expected `{name}` to be {kind} of shape {shape} but got {part.dtype} of {tuple(part.shape)}."
        )


def _cut(name: str, whole: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    if tuple(whole.shape) != (sum(sizes),):
        raise ValueError(f"Expected `{name}` of shape ({sum(sizes)},) but got {tuple(whole.shape)}.")
    parts: tuple[Tensor, ...] = whole.split(list(sizes))
    return parts


def _check_alike(weights: Sequence[PackedWeight]) -> None:
    if not weights:
        raise ValueError("Expected the weights of at least one expert but got none.")
    for expert, weight in enumerate(weights):
        for what, value, first in zip(_KINDS, _kind(weight), _kind(weights[0]), strict=True):
            if value != first:
                raise ValueError(f"Expected {what} to be that of expert 0, {first}, but expert {expert} has {value}.")


_KINDS = (
    "the number of rows",
    "the number of channels",
    "the group size",
    "the use of a mask",
    "the use of zeros",
    "the use of coded scales",
)


def _kind(weight: PackedWeight) -> tuple[int, int, int | None, bool, bool, bool]:
    layout, coded = weight.layout, not isinstance(weight.scales, Tensor)
    sizes = (weight.out_features, layout.in_features, layout.group_size)
    return (*sizes, weight.mask is not None, weight.zeros is not None, coded)


def _parts_of(weights: Sequence[PackedWeight], name: str) -> list[Tensor]:
    """One tensor of every weight, none where they have none."""
    return [part for weight in weights if (part := weight.parts[name]) is not None]


def _ends(parts: Sequence[Tensor]) -> tuple[int, ...]:
    """Where every part ends if they lie one after the other."""
    return tuple(accumulate(part.numel() for part in parts))


def _joined(name: str, parts: Sequence[Tensor]) -> Tensor | None:
    if not parts:
        return None
    return torch.stack(list(parts)) if name in _STACKED else torch.cat([part.reshape(-1) for part in parts])


def _check_stacks(experts: nn.Module, stacks: Mapping[str, PackedStack]) -> None:
    if isinstance(experts, PackedExperts):
        shapes = {name: stack.shape for name, stack in experts.packed_stacks.items()}
        if set(shapes) != set(stacks):
            raise ValueError(f"Expected stacks for {sorted(shapes)}, which are packed, but got {sorted(stacks)}.")
    else:
        shapes = {name: p.shape for name, p in experts._parameters.items() if p is not None}
    for name, stack in stacks.items():
        if name not in shapes:
            raise ValueError(f"Expected names of parameters of {type(experts).__name__} but got {name!r}.")
        if shapes[name] != stack.shape:
            raise ValueError(
                f"Expected a stack of shape {list(shapes[name])} for {name!r} but got {list(stack.shape)}."
            )


def _without(experts: nn.Module, names: set[str]) -> nn.Module:
    """A module that shares everything with another one but the parameters of these names."""
    if isinstance(experts, PackedExperts):
        experts = experts.__dict__["_inner"]
    if "forward" in experts.__dict__:
        raise ValueError(
            f"Expected {type(experts).__name__} to run the forward of its class, but its own was replaced (device "
            "hooks do that): remove what replaced it."
        )
    inner: nn.Module = object.__new__(type(experts))
    for name, value in experts.__dict__.items():
        bound = isinstance(value, MethodType) and value.__self__ is experts
        inner.__dict__[name] = MethodType(value.__func__, inner) if bound else value
    inner._parameters = {name: p for name, p in experts._parameters.items() if name not in names}
    inner._buffers = dict(experts._buffers)
    inner._modules = dict(experts._modules)
    inner._non_persistent_buffers_set = set(experts._non_persistent_buffers_set)
    return inner
