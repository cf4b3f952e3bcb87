"""The module that runs a packed weight."""

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, Self

import torch
from torch import Tensor, nn

from mpfx.nn.kernels import packed_linear, packed_linears, wants_gradient
from mpfx.nn.layout import permutation_bytes
from mpfx.nn.packing import FLOAT_PARTS, PARTS, PackedWeight, filled, own_order, unpack

TOGETHER = ("cuda",)
"""Kinds of devices where layers that read the same activations multiply together."""

TOGETHER_ROWS = 8
"""Rows of activations up to which they do."""

_PATIENCE = 3


def pack_permutation(order: Tensor) -> Tensor:
    """Store a permutation of the channels in as few bytes as its length allows: uint16, or int32 from 65537 on."""
    dtype = torch.uint16 if order.numel() <= 1 << 16 else torch.int32
    packed = order.to(dtype)
    assert packed.nbytes == permutation_bytes(order.numel())
    return packed


class PackedModule(nn.Module):
    """What packed modules have in common: moved to another dtype, their scales stay what they are."""

    mask: Tensor | None
    _known: Any  # packed weights over the module's buffers

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # A change of dtype (`.half()`, `.to(torch.bfloat16)`) is meant for computing; the stored scales stay what
        # they are.
        before = {name: part for name in FLOAT_PARTS if (part := getattr(self, name)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._known = None  # would keep the memory that was moved away from
        for name, scales in before.items():
            moved: Tensor = getattr(self, name)
            if moved.dtype != scales.dtype:
                setattr(self, name, moved.to(scales.dtype) if scales.is_meta else scales.to(moved.device))
        return self

    def fill_mask(self) -> int:
        """Do what :func:`fill_masks` does to this module alone."""
        raise NotImplementedError


def fill_masks(model: nn.Module) -> int:
    """Let weights under a bitmask be dense codes from now on, in place: more memory, for the speed of dense codes.

    Under a bitmask only the codes of surviving weights are stored, but finding them takes a GPU longer than reading
    those of all. Once it is filled, a weight takes the memory and the time of one that was never pruned: half pruned at
    4 bits, some 4.13 bits instead of 3.13. Its values stay what they are, bit for bit, as pruned ones get codes that
    stand for 0; products are the same but for rounding (those of a row that is pruned as a whole are close to 0, not
    exactly 0). Saved afterwards, the model is as large as it is in memory.

    Weights are filled where they are, one after the other. A CUDA graph captured before must be captured anew: it would
    read memory that was given back.

    Args:
        model: with packed modules, or one.

    Returns:
        How many weights were filled; those of experts count one by one.
    """
    return sum(module.fill_mask() for module in model.modules() if isinstance(module, PackedModule))


def has_masks(model: nn.Module) -> bool:
    """Whether there are weights under a bitmask, which :func:`fill_masks` would fill."""
    return any(module.mask is not None for module in model.modules() if isinstance(module, PackedModule))


class InputGroup:
    """Packed layers that read the same activations: the first one that is called multiplies for all of them.

    Few rows of activations take a GPU so little time that a launch and the work that has to be done before the first
    product count; here both are done once. Whoever calls the other layers with the same tensor gets what is already
    there, unless it was written to in between; where nothing tells whether it was (inference mode), each multiplies for
    itself. A model that does not call them all is found out, and its layers are on their own again.

    Args:
        members: that share a permutation.
    """

    def __init__(self, members: Sequence["MixedPrecisionLinear"]) -> None:
        self._members = tuple(members)
        self._input: Tensor | None = None
        self._version = 0  # of the input
        self._products: list[Tensor | None] = []
        self._left_over = 0  # times that products were not asked for

    def multiplies(self, x: Tensor) -> bool:
        """Whether the products of ``(..., in)`` are best made together."""
        first = self._members[0]
        if not (x.device.type in TOGETHER and x.numel() <= TOGETHER_ROWS * first.in_features):
            return False
        if not torch.compiler.is_compiling() and x.is_inference():
            return False
        return self._left_over < _PATIENCE and not wants_gradient(x, *(member.bias for member in self._members))

    def product(self, place: int, x: Tensor) -> Tensor:
        """That of the member at this place with ``(..., in)``."""
        version = 0 if torch.compiler.is_compiling() else x._version  # compilers see what is written to
        known = self._input is x and self._version == version
        product = self._products[place] if known else None
        if product is None:
            self._left_over = 0 if self._input is None else self._left_over + 1
            weights, biases = [m.packed for m in self._members], [m.bias for m in self._members]
            self._input, self._version = x, version
            self._products = list(packed_linears(x, weights, self._members[0].permutation, biases))
            product = self._products[place]
        assert product is not None
        self._products[place] = None
        if all(other is None for other in self._products):
            self._input, self._products = None, []
        return product


def join_input_groups(model: nn.Module) -> None:
    """Let packed layers that share a permutation multiply together; those joined before are joined anew.

    Args:
        model: where the sites of an input group hold one and the same tensor as permutation.
    """
    groups: dict[int, list[MixedPrecisionLinear]] = {}
    for module in model.modules():
        if isinstance(module, MixedPrecisionLinear):
            module._input_group = None
            if module.permutation is not None:
                groups.setdefault(id(module.permutation), []).append(module)
    for members in groups.values():
        group = InputGroup(members) if len(members) > 1 else None
        for place, member in enumerate(members):
            member._input_group, member._place = group, place


class MixedPrecisionLinear(PackedModule):
    """A Linear layer over a :class:`PackedWeight`: any mix of widths, optional bitmask, optional channel order.

    Runs on any device and in any floating dtype of the input; which kernel does it, :mod:`mpfx.nn.kernels` tells. Its
    buffers are the tensors of :attr:`PackedWeight.parts`.

    Args:
        weight: packed, its channels in sweep order.
        permutation: integers ``(in,)``; channel ``permutation[k]`` of the input meets channel k of the weight. The
            sites of an input group hand over one and the same tensor. None: the order is the input's own.
        bias: ``(out,)`` or None.
        dtype: of the layer that this one stands for, what ``weight`` is returned in.
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
    bias: nn.Parameter | None
    _dtype: Tensor

    def __init__(
        self,
        weight: PackedWeight,
        *,
        permutation: Tensor | None = None,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._known: tuple[tuple[Tensor | None, ...], PackedWeight] | None = None  # of these buffers; kernels keep more
        self._input_group: InputGroup | None = None
        self._place = 0  # in its input group
        self.layout = weight.layout
        self.in_features, self.out_features = weight.layout.in_features, weight.out_features
        for name, part in weight.parts.items():
            self.register_buffer(name, part)
        self.register_buffer("permutation", permutation)
        self.register_parameter("bias", bias)
        # Holds no element; its dtype follows `.to(dtype)`, which must not touch the scales.
        self.register_buffer("_dtype", torch.empty(0, dtype=dtype, device=weight.codes.device), persistent=False)

    @property
    def packed(self) -> PackedWeight:
        """The packed tensors."""
        if torch.compiler.is_compiling():
            return PackedWeight.of({name: getattr(self, name) for name in PARTS}, self.layout)
        buffers = tuple(map(self._buffers.get, PARTS))
        known = self._known
        if known is None or not all(map(is_, known[0], buffers)):
            weight = PackedWeight.of(dict(zip(PARTS, buffers, strict=True)), self.layout)
            known = self._known = (buffers, weight)
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None, "_input_group": None}

    @property
    def weight_dtype(self) -> torch.dtype:
        """What ``weight`` is returned in: the dtype of the layer that this one stands for."""
        return self._dtype.dtype

    @property
    def weight(self) -> Tensor:
        """The dense weight ``(out, in)`` in the input's own channel order; made anew at every access."""
        return own_order(unpack(self.packed).dequantize().to(self.weight_dtype), self.permutation)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``(..., in)``; returns ``(..., out)``."""
        if torch.is_autocast_enabled(x.device.type):  # as nn.Linear does there
            with torch.autocast(x.device.type, enabled=False):
                return packed_linear(
                    x.to(torch.get_autocast_dtype(x.device.type)), self.packed, self.permutation, self.bias
                )
        if self._input_group is not None and self._input_group.multiplies(x):
            return self._input_group.product(self._place, x)
        return packed_linear(x, self.packed, self.permutation, self.bias)

    def fill_mask(self) -> int:
        """Do what :func:`fill_masks` does to this module alone."""
        if self.mask is None:
            return 0
        self.codes, self.mask, self._known = filled(self.packed).codes, None, None
        return 1

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear shows them, and the code bits."""
        sparse = "" if self.mask is None else ", sparse"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"code_bits={self.layout.code_bits:.2f}{sparse}"
        )
