"""From scores to widths: the founding strategies, each a pure function.

``scores`` is one number per unit, ``(n,)``, larger = more important; a unit is a channel or a segment of channels.
Every function returns the unit's width in bits, ``(n,)`` int64, never larger for a lower score. Equal scores go in
order of index.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpfx.nn.layout import RAW_BITS, WIDTHS


def _check_widths(name: str, widths: Sequence[int]) -> None:
    if not widths or list(widths) != sorted(set(widths)) or not set(widths) <= {*WIDTHS, RAW_BITS}:
        raise ValueError(f"Expected `{name}` to be ascending widths out of 1..8 (or 16) but got {list(widths)}.")


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig:
    """Three tiers by fixed thresholds of the score (whose mean is 1).

    Args:
        lower: scores below get the first width.
        upper: scores above get the last width.
        widths: three, ascending.
    """

    lower: float = 0.5
    upper: float = 1.2
    widths: tuple[int, ...] = (2, 4, 8)

    def __post_init__(self) -> None:
        _check_widths("threshold.widths", self.widths)
        if len(self.widths) != 3:
            raise ValueError(f"Expected `threshold.widths` to hold 3 widths but got {list(self.widths)}.")
        if not self.lower <= self.upper:
            raise ValueError(f"Expected `threshold.lower` <= `threshold.upper` but got {self.lower} and {self.upper}.")


@dataclass(frozen=True, kw_only=True)
class TierConfig:
    """Tiers by quantile of the score; `budget` takes the widths only.

    Args:
        widths: ascending, any number of them.
        quantiles: shares of the channels below each boundary, one fewer than widths. null: equal shares.
    """

    widths: tuple[int, ...] = (2, 3, 4, 6, 8)
    quantiles: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_widths("tiers.widths", self.widths)
        q = self.boundaries
        if len(q) != len(self.widths) - 1 or list(q) != sorted(q) or not all(0 < x < 1 for x in q):
            raise ValueError(
                f"Expected `tiers.quantiles` to be {len(self.widths) - 1} ascending numbers between 0 and 1 "
                f"(one fewer than the {len(self.widths)} widths) but got {list(q)}."
            )

    @property
    def boundaries(self) -> tuple[float, ...]:
        """The quantiles, equal shares spelled out."""
        if self.quantiles is not None:
            return self.quantiles
        return tuple(tier / len(self.widths) for tier in range(1, len(self.widths)))


def fixed(scores: Tensor, bits: int) -> Tensor:
    """Give every unit the same width (classic SparseGPT and GPTQ)."""
    return torch.full((len(scores),), bits)


def threshold(scores: Tensor, config: ThresholdConfig) -> Tensor:
    """Give scores above ``upper`` the widest, below ``lower`` the narrowest, the rest the middle width."""
    low, middle, high = config.widths
    bits = torch.full((len(scores),), middle)
    bits[(scores > config.upper).cpu()] = high
    bits[(scores < config.lower).cpu()] = low
    return bits


def quantile(scores: Tensor, config: TierConfig) -> Tensor:
    """Cut the ranking at the quantiles: by default a fifth of the units each for 2, 3, 4, 6 and 8 bits."""
    bounds = torch.tensor([round(q * len(scores)) for q in config.boundaries])
    tier = torch.bucketize(_rank(scores), bounds, right=True)
    return torch.tensor(config.widths)[tier]


def _rank(scores: Tensor) -> Tensor:
    """Position of every unit from the least important up; of equal scores the earlier unit ranks higher."""
    order = scores.detach().cpu().double().flip(0).argsort(stable=True)
    return (len(scores) - 1 - order).argsort()


def budget(
    scores: Tensor, target: float, widths: Sequence[int] = TierConfig.widths, sizes: Sequence[int] | None = None
) -> Tensor:
    """Spend an average of ``target`` bits where the score says that they count most.

    Rounding to b bits costs a channel about ``score * 4^-b``. Units climb from the narrowest width along the menu in
    the order of cost saved per bit, most first (O(n log n)), until the next climb does not fit; one or two last moves
    then meet the target exactly, at the least cost, wherever the menu can, else the next sum below that such moves
    reach. The target is never exceeded.

    Args:
        scores: ``(n,)``, not negative: of a unit, or the mean of its channels.
        target: average bits over the channels, between the least and the largest width.
        widths: the menu, ascending.
        sizes: channels of every unit; None: one each.

    Raises:
        ValueError: if the target lies outside of the menu.
    """
    if not widths[0] <= target <= widths[-1]:
        raise ValueError(f"Expected a target of {widths[0]} to {widths[-1]} bits on average but got {target:g}.")
    menu, value = np.asarray(widths), scores.detach().cpu().double().numpy()
    size = np.ones(len(value), dtype=np.int64) if sizes is None else np.asarray(sizes, dtype=np.int64)
    # Ordered by importance, so that ties are decided once and widths never rise as scores fall.
    order = np.argsort(-value, kind="stable")
    value, size = np.maximum(value[order], 1e-300), size[order]
    total = int(target * size.sum() + 1e-9)
    tiers = _climb(value, size, menu, total)
    left = total - int((menu[tiers] * size).sum())
    if left:
        tiers = _settle(tiers, value, size, menu, left)
    bits = torch.empty(len(value), dtype=torch.int64)
    bits[torch.from_numpy(order)] = torch.from_numpy(menu[tiers])
    return bits


def _climb(value: np.ndarray, size: np.ndarray, widths: np.ndarray, total: int) -> np.ndarray:
    """Tier of every unit after as many climbs, best first, as ``total`` bits pay for."""
    step = np.diff(widths)
    gain = (4.0 ** -widths[:-1] - 4.0 ** -widths[1:]) / step  # per bit and unit of value; falls from tier to tier
    worth = np.log(value)[:, None] + np.log(gain)[None]  # (n, tiers - 1)
    order = np.argsort(-worth, axis=None, kind="stable")
    cost = np.cumsum((size[:, None] * step[None]).ravel()[order])
    spare = total - int(widths[0] * size.sum())
    taken = order[: int(np.searchsorted(cost, spare, side="right"))]
    return np.bincount(taken // max(len(step), 1), minlength=len(value))


def _settle(tiers: np.ndarray, value: np.ndarray, size: np.ndarray, widths: np.ndarray, left: int) -> np.ndarray:
    """Spend what the climbs left over: as much as one or two moves can, at the least cost."""
    moves = _best_moves(tiers, value, size, widths)
    plans: list[tuple[int, float, tuple[_Move, ...]]]
    plans = [(-move.bits, move.cost, (move,)) for move in moves if 0 < move.bits <= left]
    plans += [
        (-one.bits - two.bits, one.cost + two.cost, (one, two))
        for one, two in combinations(moves, 2)
        if one.unit != two.unit and 0 < one.bits + two.bits <= left
    ]
    settled = tiers.copy()
    for move in min(plans, default=(0, 0.0, ()))[2]:
        settled[move.unit] = move.tier
    # Of equally large units the more important ones get the wider widths, whichever of them was moved.
    for channels in np.unique(size):
        alike = size == channels
        settled[alike] = np.sort(settled[alike])[::-1]
    return settled


class _Move(NamedTuple):
    bits: int
    cost: float
    unit: int
    tier: int


def _best_moves(tiers: np.ndarray, value: np.ndarray, size: np.ndarray, widths: np.ndarray) -> list[_Move]:
    """The cheapest moves between every two tiers, for every size of unit.

    Units are ordered by value: moving up costs least for the first of a tier, moving down for the last; the second best
    stands by for a plan that moves two units of one tier.
    """
    price = 4.0 ** -widths.astype(np.float64)
    moves = []
    for channels in np.unique(size):
        for start in np.unique(tiers):
            units = np.flatnonzero((tiers == start) & (size == channels))
            for to in range(len(widths)):
                for unit in () if to == start else units[:2] if to > start else units[-2:]:
                    cost = float(value[unit] * channels * (price[to] - price[start]))
                    moves.append(_Move(int(channels * (widths[to] - widths[start])), cost, int(unit), to))
    return moves
