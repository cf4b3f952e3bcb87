"""Which weights go: unstructured within a panel, or n of every m."""

import re
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sparsity:
    """A sparsity pattern.

    Attributes:
        fraction: of the weights that are pruned, in [0, 1).
        keep_n: at most so many weights are kept ...
        group_m: ... of so many adjacent channels of a row; both 0 where the pattern is unstructured.
    """

    fraction: float = 0.0
    keep_n: int = 0
    group_m: int = 0

    @classmethod
    def parse(cls, value: "float | str | Sparsity | None") -> Self:
        """Read ``0.5``, ``"2:4"`` (2 kept of 4) or None.

        Raises:
            ValueError: saying what is allowed.
        """
        if isinstance(value, cls):
            return value
        text = "0" if value is None else str(value).strip()
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            keep, group = int(found[1]), int(found[2])
            if 0 < keep < group <= 32 and 32 % group == 0:
                return cls(1 - keep / group, keep, group)
        else:
            try:
                fraction = float(text)
            except ValueError:
                fraction = -1.0
            if 0 <= fraction < 1:
                return cls(fraction)
        raise ValueError(
            "Expected `sparsity` to be a fraction in [0, 1) such as 0.5, or n:m with n < m and m one of 2, 4, 8, 16, "
            '32 such as "2:4" (n of m adjacent weights are kept; in YAML it needs the quotes) '
            f"but got {value!r}."
        )

    def __bool__(self) -> bool:
        return self.fraction > 0

    def __str__(self) -> str:
        return f"{self.keep_n}:{self.group_m}" if self.group_m else f"{self.fraction:g}"

    def pruned(self, rows: int, channels: int) -> int:
        """Weights pruned of a panel ``rows x channels``."""
        if self.group_m:
            return rows * (channels // self.group_m) * (self.group_m - self.keep_n)
        return int(rows * channels * self.fraction)


def prune_lowest(saliency: Tensor, count: int) -> Tensor:
    """Mark the ``count`` least salient weights.

    Ties go in storage order, so that the count is exact and the choice deterministic.

    Args:
        saliency: non-negative, any shape.
        count: how many to mark, 0 .. saliency.numel().

    Returns:
        bool of the same shape, True where pruned.
    """
    if count == 0:
        return torch.zeros_like(saliency, dtype=torch.bool)
    if saliency.device.type == "cuda":  # where selecting runs on a single multiprocessor, and sorting on all
        pruned = torch.zeros_like(saliency, dtype=torch.bool)
        pruned.view(-1)[saliency.flatten().sort(stable=True).indices[:count]] = True
        return pruned
    threshold = saliency.flatten().kthvalue(count).values
    pruned = saliency < threshold
    ties = (saliency == threshold).flatten().nonzero()[: count - int(pruned.sum()), 0]
    pruned.view(-1)[ties] = True
    return pruned


def prune_n_of_m(saliency: Tensor, sparsity: Sparsity) -> Tensor:
    """Mark the least salient weights of every ``group_m`` adjacent channels.

    Args:
        saliency: ``(channels, rows)``; channels left over behind the last whole group are not pruned.
        sparsity: an n:m pattern.

    Returns:
        bool ``(channels, rows)``, True where pruned: ``group_m - keep_n`` of every m.
    """
    whole = len(saliency) // sparsity.group_m * sparsity.group_m
    rank = saliency[:whole].unflatten(0, (-1, sparsity.group_m)).argsort(dim=1, stable=True).argsort(dim=1)
    pruned = torch.zeros_like(saliency, dtype=torch.bool)
    pruned[:whole] = (rank < sparsity.group_m - sparsity.keep_n).flatten(0, 1)
    return pruned
