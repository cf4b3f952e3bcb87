"""From scores to widths: the founding strategies, each a pure function.

``scores`` is one number per unit, ``(n,)``, larger = more important; a unit is a channel or a segment of channels.
Every function returns the unit's width in bits, ``(n,)`` int64, never larger for a lower score. Equal scores go in
order of index.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


def budget(scores: Tensor, target: float, widths: Sequence[int] = TierConfig.widths) -> Tensor:
    """Spend an average of ``target`` bits where the score says that they count most.

    Rounding to b bits costs a unit about ``score * 4^-b``. Units climb from the narrowest width along the menu in
    the order of cost saved per bit, most first (O(n log n)), until the next climb does not fit; one or two last
    moves then meet the target exactly, at the least cost, wherever the menu can: ``sum(bits) == floor(target * n)``,
    else the next sum below that such moves reach.

    Args:
        scores: ``(n,)``, not negative.
        target: average bits, between the least and the largest width.
        widths: the menu, ascending.

    Raises:
        ValueError: if the target lies outside of the menu.
    """
    if not widths[0] <= target <= widths[-1]:
        raise ValueError(f"Expected a target of {widths[0]} to {widths[-1]} bits on average but got {target:g}.")
    count = len(scores)
    # Ordered by importance, so that ties are decided once and widths never rise as scores fall.
    order = np.argsort(-scores.detach().cpu().double().numpy(), kind="stable")
    value = np.maximum(scores.detach().cpu().double().numpy()[order], 1e-300)
    total = int(target * count + 1e-9)
    tiers = _climb(value, np.asarray(widths), total - widths[0] * count)
    tiers = _settle(tiers, value, np.asarray(widths), total)
    bits = torch.empty(count, dtype=torch.int64)
    bits[torch.from_numpy(order)] = torch.from_numpy(np.sort(np.asarray(widths)[tiers])[::-1].copy())
    return bits


def _climb(value: np.ndarray, widths: np.ndarray, spare: int) -> np.ndarray:
    """Tier of every unit after as many climbs, best first, as ``spare`` bits pay for."""
    step = np.diff(widths)
    gain = (4.0 ** -widths[:-1] - 4.0 ** -widths[1:]) / step  # per bit and unit of value; falls from tier to tier
    worth = np.log(value)[:, None] + np.log(gain)[None]  # (n, tiers - 1)
    order = np.argsort(-worth, axis=None, kind="stable")
    cost = np.cumsum(np.broadcast_to(step, worth.shape).ravel()[order])
    taken = order[: int(np.searchsorted(cost, spare, side="right"))]
    return np.bincount(taken // max(len(step), 1), minlength=len(value))


def _settle(tiers: np.ndarray, value: np.ndarray, widths: np.ndarray, total: int) -> np.ndarray:
    """Spend what the climbs left over with the cheapest one or two moves between tiers."""
    left = total - int(widths[tiers].sum())
    moves = _best_moves(tiers, value, widths)
    for goal in range(left, 0, -1):
        plans: list[tuple[float, tuple[tuple[int, int], ...]]]
        plans = [(cost, ((unit, to),)) for (bits, unit), (cost, to) in moves.items() if bits == goal]
        plans += [
            (c1 + c2, ((u1, t1), (u2, t2)))
            for (b1, u1), (c1, t1) in moves.items()
            for (b2, u2), (c2, t2) in moves.items()
            if b1 + b2 == goal and u1 != u2
        ]
        if plans:
            tiers = tiers.copy()
            for unit, to in min(plans)[1]:
                tiers[unit] = to
            break
    return tiers


def _best_moves(tiers: np.ndarray, value: np.ndarray, widths: np.ndarray) -> dict[tuple[int, int], tuple[float, int]]:
    """(bits, unit) -> (cost, new tier) of the cheapest move between every two tiers.

    Units are ordered by value: moving up costs least for the first of a tier, moving down for the last; the second
    best stands by for a plan that moves two units of one tier.
    """
    moves: dict[tuple[int, int], tuple[float, int]] = {}
    for start in np.unique(tiers):
        units = np.flatnonzero(tiers == start)
        for to in range(len(widths)):
            for unit in () if to == start else (units[:2] if to > start else units[-2:]):
                cost = float(value[unit]) * (4.0 ** -float(widths[to]) - 4.0 ** -float(widths[start]))
                moves[int(widths[to] - widths[start]), int(unit)] = (cost, to)
    return moves
