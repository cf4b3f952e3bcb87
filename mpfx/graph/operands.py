"""What a tensor over the memory of stacked expert weights shows of them: which experts, which rows, which columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mpfx.graph.compat import storage_key

Role = Literal["expert", "first", "second"]
"""Dimension of the parameter ``(experts, first, second)`` that a dimension of a tensor runs along."""


class UnwatchableError(RuntimeError):
    """An experts module uses its weights in a way that the inputs of single experts cannot be told from."""


class Axis(NamedTuple):
    """Indices ``start, start + step, ...`` (``size`` of them) of one dimension of the parameter."""

    start: int
    size: int
    step: int


@dataclass(frozen=True)
class Operand:
    """A tensor that shows weights of a stack, unchanged.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        experts: int64 on the CPU, one dimension for each dimension of the tensor that runs along experts: which.
        roles: what every dimension of the tensor runs along, None for dimensions of size 1 and repeated ones.
        merged: the dimension that runs along experts and, inside each, along all of its rows or columns; it counts
            as one of experts too.
        first: the rows of every expert that it shows.
        second: the columns.
    """

    name: str
    shape: torch.Size
    experts: Tensor
    roles: tuple[Role | None, ...]
    first: Axis
    second: Axis
    merged: int | None = None

    def axis(self, role: Role) -> Axis:
        """The rows or the columns."""
        return self.first if role == "first" else self.second

    def is_whole(self, role: Role) -> bool:
        """Whether all rows or columns are shown, in order."""
        return self.axis(role) == (0, self.shape[1 if role == "first" else 2], 1)


@dataclass(frozen=True)
class _Memory:
    """Where weights lie: element (e, i, k) at ``offset + e * strides[0] + i * strides[1] + k * strides[2]``."""

    content: Operand  # its experts as one dimension
    offset: int
    sizes: tuple[int, int, int]
    strides: tuple[int, int, int]
    owner: Tensor  # kept alive, or its memory could become that of another tensor


_ROLES: tuple[Role, Role, Role] = ("expert", "first", "second")


class Stacks:
    """Knows the memory of stacked weights, and of copies of it."""

    def __init__(self) -> None:
        self._memories: dict[int, list[_Memory]] = {}

    def add_parameter(self, name: str, parameter: Tensor) -> None:
        """Watch the memory of a parameter ``(experts, first, second)``."""
        experts, first, second = parameter.shape
        axes = Axis(0, first, 1), Axis(0, second, 1)
        self._add(Operand(name, parameter.shape, torch.arange(experts), _ROLES, *axes), parameter)

    def add_copy(self, shown: Operand, copy: Tensor) -> None:
        """Watch the memory of a tensor that holds a copy of what another one shows, in the same dimensions.

        Raises:
            UnwatchableError: if the copy's dimensions of experts are not one after the other in memory.
        """
        along = [d for d, role in enumerate(shown.roles) if role == "expert"]
        if shown.merged is not None or any(
            copy.stride(a) != copy.stride(b) * copy.shape[b] for a, b in pairwise(along)
        ):
            raise UnwatchableError(f"copies `{shown.name}` into an order of experts that cannot be followed")
        self._add(shown, copy)

    def _add(self, content: Operand, owner: Tensor) -> None:
        place = {role: d for d, role in enumerate(content.roles) if role is not None}  # the last one of each role
        strides = [owner.stride(place[role]) if role in place else 0 for role in _ROLES]
        sizes = (content.experts.numel(), content.first.size, content.second.size)
        flat = Operand(content.name, content.shape, content.experts.reshape(-1), _ROLES, content.first, content.second)
        memory = _Memory(flat, int(owner.storage_offset()), sizes, (strides[0], strides[1], strides[2]), owner)
        self._memories.setdefault(storage_key(owner), []).append(memory)

    def find(self, tensor: Tensor) -> Operand | None:
        """What a tensor shows of a stack; None if it lies elsewhere.

        Raises:
            UnwatchableError: if one of its dimensions mixes experts, rows and columns.
        """
        if tensor.layout is not torch.strided:
            return None
        for memory in self._memories.get(storage_key(tensor), ()):
            last = sum(s * (n - 1) for s, n in zip(memory.strides, memory.sizes, strict=True))
            if memory.offset <= tensor.storage_offset() <= memory.offset + last:
                return _show(memory, tensor)
        return None

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in watched memory."""
        return tensor.layout is torch.strided and storage_key(tensor) in self._memories


def _show(memory: _Memory, tensor: Tensor) -> Operand:
    starts = dict(_starts(memory, int(tensor.storage_offset()) - memory.offset))
    found = [_along(memory, starts, size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    along = [(dim.experts, dim.expert_step) for dim in found if dim.experts]
    content = memory.content
    experts = content.experts.as_strided([n for n, _ in along], [step for _, step in along], starts["expert"])
    merged = [d for d, dim in enumerate(found) if dim.experts and dim.role != "expert"]
    axes = []
    for role, whole in zip(_ROLES[1:], (content.first, content.second), strict=True):
        dims = [dim for dim in found if dim.role == role]
        if len(dims) > 1 or len(merged) > 1:
            raise UnwatchableError(f"splits the channels of `{content.name}` into several dimensions")
        size, step = (dims[0].size, dims[0].step) if dims else (1, 1)
        axes.append(Axis(whole.start + starts[role] * whole.step, size, step * whole.step))
    roles = tuple(dim.role for dim in found)
    return Operand(content.name, content.shape, experts, roles, axes[0], axes[1], merged[0] if merged else None)


class _Dim(NamedTuple):
    """A dimension of a tensor: ``size`` indices of its role, ``step`` apart; of that many experts, if of any."""

    role: Role | None
    size: int
    step: int
    experts: int = 0
    expert_step: int = 0


def _by_stride(memory: _Memory) -> list[tuple[Role, int, int]]:
    """(role, size, stride) of the dimensions with more than one index, the widest stride first."""
    dims = zip(_ROLES, memory.sizes, memory.strides, strict=True)
    return sorted((dim for dim in dims if dim[1] > 1), key=lambda dim: -dim[2])


def _starts(memory: _Memory, offset: int) -> Iterator[tuple[Role, int]]:
    """The index of the first element along every role."""
    strided = _by_stride(memory)
    yield from ((role, 0) for role in _ROLES if role not in {dim[0] for dim in strided})
    for role, _, stride in strided:
        start, offset = divmod(offset, stride)
        yield role, start


def _along(memory: _Memory, starts: dict[Role, int], size: int, stride: int) -> _Dim:
    """What a dimension of a tensor runs along."""
    if size == 1 or stride == 0:
        return _Dim(None, size, 0)
    wider: tuple[Role, int, int] | None = None
    for role, whole, unit in _by_stride(memory):
        if unit <= stride and stride % unit == 0:
            step = stride // unit
            if starts[role] + step * (size - 1) < whole:
                return _Dim(role, size, step, *((size, step) if role == "expert" else ()))
            count = size // whole
            if wider == ("expert", memory.sizes[0], whole * unit) and (step, starts[role], size % whole) == (1, 0, 0):
                return _Dim(role, whole, 1, count, 1)
            break
        wider = (role, whole, unit)
    raise UnwatchableError(f"reads `{memory.content.name}` with several of its dimensions merged into one")
