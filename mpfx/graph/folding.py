"""Folds permutations and scales of channels into dense weights, so that the model computes the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mpfx.graph.linear import is_experts, is_linear, linear_weight
from mpfx.graph.producers import PermutationFold, ScaleFold
from mpfx.graph.recognition import experts_inputs, matrix_input


def channel_order(fold: PermutationFold, order: Tensor) -> Tensor:
    """The order of the consumers' input channels that an order of the units gives.

    Args:
        fold: From `permutation_folds`.
        order: int64 ``(units,)``: unit u of the new model is unit ``order[u]`` of the old one.

    Returns:
        int64 ``(in,)``: new input channel j is old channel ``result[j]``.

    Raises:
        ValueError: If ``order`` is no permutation of the units, or moves one out of its cell.
    """
    order = _checked(fold, order)
    units = len(fold.cell)
    channel = torch.zeros((int(fold.image.max()) + 1) * units, dtype=torch.int64)
    channel[fold.image * units + fold.unit] = torch.arange(len(fold.unit))
    return channel[fold.image * units + order[fold.unit]]


def row_order(fold: PermutationFold, order: Tensor) -> dict[str, Tensor]:
    """The order of the producers' rows that an order of the units gives.

    Args:
        fold: From `permutation_folds`.
        order: int64 ``(units,)``: unit u of the new model is unit ``order[u]`` of the old one.

    Returns:
        int64 ``(out,)`` by module path: new row r is old row ``result[r]``.

    Raises:
        ValueError: If ``order`` is no permutation of the units, or moves one out of its cell.
    """
    order = _checked(fold, order)
    result: dict[str, Tensor] = {}
    for (path, rows), width in zip(fold.producers, fold.out_features, strict=True):
        result.setdefault(path, torch.arange(width))[rows] = rows[order]
    return result


@torch.no_grad()
def permute(model: nn.Module, fold: PermutationFold, order: Tensor) -> None:
    """Reorder the units of a fold in place, in the rows of the producers and the columns of the consumers.

    Args:
        model: The traced module, or another one with the same paths. The modules of the fold must be dense.
        fold: From `permutation_folds`.
        order: int64 ``(units,)``: unit u of the new model is unit ``order[u]`` of the old one.

    Raises:
        ValueError: If ``order`` is no permutation of the units, or moves one out of its cell.
        TypeError: If a module of the fold is no linear layer any more. Nothing is changed then.
    """
    columns, rows = channel_order(fold, order), row_order(fold, order)
    weights = {path: linear_weight(model.get_submodule(path)) for path in (*fold.sites, *rows)}
    for path, new_rows in rows.items():
        _reorder(weights[path], new_rows, dim=0)
        for bias in _bias(model.get_submodule(path)):
            _reorder(bias, new_rows, dim=0)
    for path in fold.sites:
        _reorder(weights[path], columns, dim=1)


@torch.no_grad()
def rescale(model: nn.Module, fold: ScaleFold, scales: Tensor) -> None:
    """Multiply factors into the columns of all consumers of a fold and divide them out of its producer, in place.

    The arithmetic is done in float64 and rounded once to the type of each weight.

    Args:
        model: The traced module, or another one with the same paths. The modules of the fold must be dense.
        fold: From `scale_folds`.
        scales: Floating point ``(units,)``, all positive and finite.

    Raises:
        ValueError: If ``scales`` has another shape, or a factor is not positive and finite.
        TypeError: If a module of the fold has been replaced by one of another kind. Nothing is changed then.
    """
    if scales.shape != fold.rows.shape or not bool((scales.isfinite() & (scales > 0)).all()):
        raise ValueError(
            f"Expected `scales` to hold one positive, finite factor for each of the {len(fold.rows)} units of "
            f"`{fold.producer}` but got shape {tuple(scales.shape)} with a minimum of "
            f"{scales.min().item() if scales.numel() else 'nothing'}."
        )
    scales = scales.detach().cpu().double()
    padded = torch.cat([scales, torch.ones(1, dtype=torch.float64)])  # the last one is for channels of no unit
    columns = [
        (weight, dim, padded[unit])
        for path, unit in fold.consumers
        for weight, dim in _input_weights(model.get_submodule(path), path, len(unit))
    ]
    divisors = torch.ones(_width(model, fold), dtype=torch.float64)
    divisors[fold.rows] = scales
    _divide(model.get_submodule(fold.producer), fold, divisors)
    for weight, dim, factors in columns:
        _multiply(weight, dim, factors)


def _checked(fold: PermutationFold, order: Tensor) -> Tensor:
    order, units = order.detach().cpu(), torch.arange(len(fold.cell))
    what = f"the order of the input channels of `{fold.sites[0]}`"
    if order.shape != units.shape or order.is_floating_point() or not torch.equal(order.sort().values, units):
        raise ValueError(f"Expected {what} to be a permutation of its {len(units)} units.")
    moved = (fold.cell[order] != fold.cell).nonzero().flatten()
    if len(moved):
        unit = int(moved[0])
        raise ValueError(
            f"Expected {what} to keep every unit in its cell (an attention head, for example), but unit {unit} of cell "
            f"{int(fold.cell[unit])} would become one of cell {int(fold.cell[order[unit]])}. Permute inside cells."
        )
    return order


def _reorder(weight: Tensor, order: Tensor, dim: int) -> None:
    weight.copy_(weight.index_select(dim, order.to(weight.device)))


def _bias(module: nn.Module) -> Iterator[Tensor]:
    bias = module._parameters.get("bias")
    if bias is not None:
        yield bias.detach()


def _input_weights(module: nn.Module, path: str, width: int) -> list[tuple[Tensor, int]]:
    """The weights that read ``width`` input channels, each with the dimension of these."""
    if is_linear(module):
        return [(linear_weight(module), 1)]
    if is_experts(module):
        found = [(module._parameters[name], dim) for name, dim in experts_inputs(module, width) or ()]
    else:
        dim = matrix_input(module, width)
        found = [] if dim is None else [(module._parameters["weight"], dim)]
    if not found:
        raise TypeError(
            f"Expected `{path}` to read {width} channels through dense weights but got {type(module).__name__}."
        )
    return [(weight.detach(), dim) for weight, dim in found if weight is not None]


def _width(model: nn.Module, fold: ScaleFold) -> int:
    module = model.get_submodule(fold.producer)
    if fold.kind == "linear":
        return linear_weight(module).shape[0]
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1:
        raise TypeError(f"Expected `{fold.producer}` to be a norm but got {type(module).__name__}.")
    return weight.shape[0]


def _divide(module: nn.Module, fold: ScaleFold, divisors: Tensor) -> None:
    if fold.kind == "linear":
        _multiply(linear_weight(module), 0, 1 / divisors)
    else:
        weight = module._parameters["weight"]
        assert weight is not None
        offset = 1 if fold.kind == "norm_plus_one" else 0
        scaled = (weight.detach().double() + offset) / divisors.to(weight.device) - offset
        weight.detach().copy_(scaled)
    for bias in _bias(module):
        _multiply(bias, 0, 1 / divisors)


def _multiply(weight: Tensor, dim: int, factors: Tensor) -> None:
    shape = [1] * weight.dim()
    shape[dim] = -1
    weight.copy_(weight.double() * factors.to(weight.device).view(shape))
