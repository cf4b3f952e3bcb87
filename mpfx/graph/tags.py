"""Tensors of channel ids that stand for the values of a graph, and how they combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_CHANNEL = -1
"""Id of a position that holds no tracked channel."""


@dataclass(frozen=True)
class Layer:
    """Channels of one factor of a value: the value at a position depends on the channel that ``ids`` holds there.

    Attributes:
        ids: int64, of the value's form; `NO_CHANNEL` where there is none.
        scales: Whether a positive factor on a channel is the same factor on the value.
    """

    ids: Tensor
    scales: bool


@dataclass(frozen=True)
class Tags:
    """The tracked channels of a value.

    Attributes:
        layers: One for each factor.
        context: int64 of the value's form. Positions with the same number are the same function of their channels;
            None where all are.
        sum: Where channels of different modules were added up, in words, or None.
    """

    layers: tuple[Layer, ...]
    context: Tensor | None = None
    sum: str | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> Tags:
        """The tags after a movement of data."""
        layers = tuple(Layer(move(layer.ids), layer.scales) for layer in self.layers)
        return Tags(layers, None if self.context is None else move(self.context), self.sum)

    @property
    def form(self) -> torch.Size:
        """The sizes of the value."""
        return self.layers[0].ids.shape

    def untracked(self) -> bool:
        """Whether there are positions without any channel."""
        return bool(torch.stack([layer.ids == NO_CHANNEL for layer in self.layers]).all(0).any())


Operand = Tags | tuple[int, ...]
"""The tags of an argument, or its sizes where it is not tracked."""


def sizes_of(operand: Operand) -> tuple[int, ...]:
    """The sizes of a value, tracked or not."""
    return tuple(operand.form) if isinstance(operand, Tags) else operand


def context_of(operand: Operand) -> Tensor | None:
    """The context of a value, None where it is not tracked."""
    return operand.context if isinstance(operand, Tags) else None


def layer_ids(operand: Operand, index: int) -> Tensor:
    """Ids of one layer, `NO_CHANNEL` throughout where there is no such layer."""
    if isinstance(operand, Tags) and index < len(operand.layers):
        return operand.layers[index].ids
    return torch.full(sizes_of(operand), NO_CHANNEL)


def summed_over(value: Tags, dim: int) -> Tags | None:
    """Tags of a weighted sum over one dimension (kept, of size 1), None if it sums different channels."""
    if any(not bool((layer.ids == layer.ids.narrow(dim, 0, 1)).all()) for layer in value.layers):
        return None
    context = None
    for part in () if value.context is None else value.context.split(1, dim):
        context = mixed(context, part)
    layers = tuple(Layer(layer.ids.narrow(dim, 0, 1), layer.scales) for layer in value.layers)
    return Tags(layers, context, value.sum)


def weighted(value: Tags, sizes: tuple[int, ...], weights: tuple[int, ...]) -> Tags:
    """A sum over ``value`` with weights that differ along the dimensions of ``weights`` other than 1."""
    value = value.moved(lambda x: x.expand(sizes))
    return Tags(value.layers, mixed(value.context, positions(weights, sizes)), value.sum)


def first_sum(values: Sequence[Tags]) -> str | None:
    """Where channels of different modules were first added up on the way to these values."""
    return next((value.sum for value in values if value.sum is not None), None)


def varies_with(form: tuple[int, ...], value: Tags) -> bool:
    """Whether something of the sizes ``form`` may differ in every dimension in which the channels of ``value`` do."""
    padded = (1,) * (len(value.form) - len(form)) + tuple(form)
    dims = [d for d in range(len(value.form)) if _differ_along(value, d)]
    return bool(dims) and all(padded[d] > 1 for d in dims)


def _differ_along(value: Tags, dim: int) -> bool:
    return any(not bool((layer.ids == layer.ids.narrow(dim, 0, 1)).all()) for layer in value.layers)


def product_layers(operands: Sequence[Operand], sizes: tuple[int, ...], quotient: bool) -> tuple[Layer, ...]:
    """Layers of a product or quotient. What two factors share is squared, and so passes no scale on."""
    layers: list[Layer] = []
    for position, operand in enumerate(operands):
        for layer in operand.layers if isinstance(operand, Tags) else ():
            ids = layer.ids.expand(sizes)
            scales = layer.scales and not (quotient and position > 0)
            shared = [i for i, other in enumerate(layers) if bool(((other.ids == ids) & (ids != NO_CHANNEL)).any())]
            for i in shared:
                layers[i] = Layer(layers[i].ids, scales=False)
            if not any(torch.equal(layers[i].ids, ids) for i in shared):
                layers.append(Layer(ids, scales and not shared))
    return tuple(layers)


def sum_layers(terms: Sequence[Tags], homogeneous: bool) -> tuple[Layer, ...]:
    """Layers of a sum, or of another function of several values that works position by position.

    Args:
        terms: The tracked values, of one form.
        homogeneous: Whether a positive factor on all arguments is the same factor on the result. A scale is passed
            on only in this case, and where all arguments are multiples of the same channels.
    """
    found: list[Layer] = []
    for layer in (layer for value in terms for layer in value.layers):
        if not any(torch.equal(layer.ids, other.ids) for other in found):
            found.append(layer)
    scales = homogeneous and len(found) == 1 and all(layer.scales for value in terms for layer in value.layers)
    return tuple(Layer(layer.ids, scales) for layer in found)


# Contexts: numbers that tell positions apart by all that has met them on their way


def positions(form: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor | None:
    """Number the positions of a tensor of ``sizes`` along those dimensions in which ``form`` is not 1."""
    padded = (1,) * (len(sizes) - len(form)) + tuple(form)
    if all(size == 1 for size in padded):
        return None
    numbers = torch.arange(torch.Size(padded).numel())
    return numbers.view(padded).expand(sizes)


def mixed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The context of something that has met both."""
    if a is None or b is None:
        return b if a is None else a
    return hash_pairs(a, b)


def hash_pairs(a: Tensor, b: Tensor) -> Tensor:
    """A 64-bit hash of every pair ``(a[i], b[i])``; integer overflow wraps around."""
    mixed = a * 6364136223846793005 + b * 2862933555777941757 + 3037000493
    mixed = (mixed ^ (mixed >> 29)) * -49064778989728563
    return mixed ^ (mixed >> 32)
