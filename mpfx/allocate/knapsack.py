"""The multiple-choice knapsack with modes that allocation solves: its groups, checked and stacked into one table.

Every row of the table is a unit in a mode, with the lower convex hull of its options over bytes and distortion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Mode:
    """One way to store an input group: dense codes, a bitmask with the surviving codes, ...

    Attributes:
        stored: bytes of every unit at every option, ``(units, options)`` int64.
        distortion: harm of every unit at every option, ``(units, options)`` float64; inf where it is not allowed.
        base: bytes of the mode whatever its options (permutation, mask, tables).
    """

    stored: np.ndarray
    distortion: np.ndarray
    base: int = 0


@dataclass(frozen=True)
class Solution:
    """The decision for every group and unit.

    Attributes:
        modes: of every group.
        options: of every unit, ``(units,)`` int64 for every group.
        stored: bytes in all, never above the budget.
        distortion: in all.
        bound: no solution within the budget has less distortion. The Lagrangian dual, or more where the search went
            to its end: equal to ``distortion`` where that is proven optimal.
        multiplier: distortion per byte at which the budget was met; 0 where more bytes buy nothing.
    """

    modes: tuple[int, ...]
    options: tuple[np.ndarray, ...]
    stored: int
    distortion: float
    bound: float
    multiplier: float


# The model: all modes of all groups below one another. A row is a unit in a mode; modes are counted through the model.


class Choice(NamedTuple):
    """A mode for every group, ``(groups,)``, and an option for every unit of theirs, ``(units,)``."""

    modes: np.ndarray
    options: np.ndarray
    stored: int
    distortion: float


class Priced(NamedTuple):
    """The best option of every row at some multiplier, ``(rows,)``, and what every mode comes to, ``(modes,)``."""

    options: np.ndarray
    stored: np.ndarray
    distortion: np.ndarray


class Steps(NamedTuple):
    """Steps along hulls, steepest first, ``(steps,)`` each: their row, bytes, and distortion saved per byte."""

    row: np.ndarray
    stored: np.ndarray
    slope: np.ndarray


@dataclass(frozen=True)
class Model:
    """Tables of all rows.

    Attributes:
        stored: ``(rows, options)``.
        distortion: ``(rows, options)``, inf where not allowed.
        base: bytes of every mode, ``(modes,)``.
        start: first row of every mode, ``(modes + 1,)``.
        group: of every mode, ``(modes,)``, ascending.
        path: options along the lower convex hull of every row, ``(rows, steps + 1)``, the last one repeated.
        slope: distortion saved per byte by every step, ``(rows, steps)``, never rising, 0 after the last one.
    """

    stored: np.ndarray
    distortion: np.ndarray
    base: np.ndarray
    start: np.ndarray
    group: np.ndarray
    path: np.ndarray
    slope: np.ndarray

    @cached_property
    def first(self) -> np.ndarray:
        """First mode of every group."""
        return np.flatnonzero(np.diff(self.group, prepend=-1))

    @cached_property
    def mode(self) -> np.ndarray:
        """Of every row."""
        return np.repeat(np.arange(len(self.base)), np.diff(self.start))

    @cached_property
    def fewest(self) -> np.ndarray:
        """Bytes of every row at the least."""
        return at(self.stored, self.path[:, 0])

    @cached_property
    def grains(self) -> np.ndarray:
        """Of every mode: its bytes exceed its fewest by multiples of this; 0 if they never do."""
        excess = np.where(np.isfinite(self.distortion), self.stored - self.fewest[:, None], 0)
        return np.gcd.reduceat(np.gcd.reduce(excess, axis=1), self.start[:-1])

    @cached_property
    def grain(self) -> int:
        """Bytes of all choices exceed the fewest by multiples of this."""
        floor = np.add.reduceat(self.fewest, self.start[:-1]) + self.base
        between = floor - floor[self.first][self.group]
        return max(1, int(np.gcd.reduce(np.append(self.grains, between))))

    @cached_property
    def steps(self) -> Steps:
        """Of all rows. Of equally steep ones first steps come before second ones, so that none overtakes another."""
        slope = self.slope.T.ravel()
        order = np.argsort(-slope, kind="stable")[: np.count_nonzero(slope)]
        stored = np.diff(np.take_along_axis(self.stored, self.path, 1), axis=1).T.ravel()
        return Steps(order % len(self.stored), stored[order], slope[order])

    @cached_property
    def cheapest(self) -> Choice:
        """The fewest bytes, and of such choices the least distortion."""
        priced = self.priced(np.inf)
        return self.pick(priced, priced.stored, priced.distortion)

    @cached_property
    def finest(self) -> Choice:
        """The least distortion, and of such choices the fewest bytes."""
        priced = self.priced(0.0)
        return self.pick(priced, priced.distortion, priced.stored)

    def priced(self, multiplier: float) -> Priced:
        """Let every row choose where a byte costs so much distortion; of equals it takes the fewest bytes."""
        options = at(self.path, (self.slope > multiplier).sum(1))
        stored = np.add.reduceat(at(self.stored, options), self.start[:-1])
        distortion = np.add.reduceat(at(self.distortion, options), self.start[:-1])
        return Priced(options, stored + self.base, distortion)

    def pick(self, priced: Priced, value: np.ndarray, tie: np.ndarray) -> Choice:
        """Take the mode of least value for every group, of equals the one of least ``tie``."""
        modes = np.lexsort((tie, value, self.group))[self.first]
        return self.choice(modes, priced.options[self.rows(modes)])

    def choice(self, modes: np.ndarray, options: np.ndarray) -> Choice:
        """Sum up a choice."""
        rows = self.rows(modes)
        stored = int(self.stored[rows, options].sum() + self.base[modes].sum())
        return Choice(modes, options, stored, float(self.distortion[rows, options].sum()))

    def rows(self, modes: np.ndarray) -> np.ndarray:
        """Rows of some modes, one mode of every group."""
        return np.flatnonzero(self.chosen(modes)[self.mode])

    def chosen(self, modes: np.ndarray) -> np.ndarray:
        """Whether a mode is one of these, for every mode."""
        chosen = np.zeros(len(self.base), dtype=bool)
        chosen[modes] = True
        return chosen


def at(table: np.ndarray, column: np.ndarray) -> np.ndarray:
    """One entry of every row."""
    return np.take_along_axis(table, column[:, None], 1)[:, 0]


def stack(groups: Sequence[Sequence[Mode]]) -> Model:
    """Check the modes and put them below one another; options that only others have are not allowed ones."""
    if not groups or not all(groups):
        raise ValueError(
            f"Expected `groups` to hold at least one mode each but got {[len(group) for group in groups]}."
        )
    for number, group in enumerate(groups):
        for mode in group:
            _check(mode, len(group[0].stored), f"of group {number}")
    modes = [mode for group in groups for mode in group]
    options = max(mode.stored.shape[1] for mode in modes)
    stored = np.concatenate([_widened(mode.stored.astype(np.int64), options, 0) for mode in modes])
    distortion = np.concatenate([_widened(mode.distortion.astype(np.float64), options, np.inf) for mode in modes])
    base = np.array([mode.base for mode in modes], dtype=np.int64)
    start = np.cumsum([0, *(len(mode.stored) for mode in modes)])
    group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    return Model(stored, distortion, base, start, group_of, *_hull(stored, distortion))


def _widened(table: np.ndarray, options: int, fill: float) -> np.ndarray:
    return np.pad(table, ((0, 0), (0, options - table.shape[1])), constant_values=fill)


def _check(mode: Mode, units: int, where: str) -> None:
    stored, distortion = mode.stored, mode.distortion
    if stored.ndim != 2 or not stored.size or stored.shape != distortion.shape:
        raise ValueError(
            f"Expected `stored` and `distortion` {where} to be of one shape (units, options), not empty, "
            f"but got {stored.shape} and {distortion.shape}."
        )
    if len(stored) != units:
        raise ValueError(
            f"Expected `stored` {where} to have as many units in every mode but got {units}, {len(stored)}."
        )
    if not np.issubdtype(stored.dtype, np.integer):
        raise ValueError(f"Expected `stored` {where} to be integers but got {stored.dtype}.")
    if min(mode.base, int(stored.min())) < 0:
        raise ValueError(
            f"Expected `base` and `stored` {where} to be at least 0 but got {mode.base} and {stored.min()}."
        )
    if not (distortion > -np.inf).all():
        raise ValueError(f"Expected `distortion` {where} to be finite, or inf if not allowed, but got NaN or -inf.")
    barred = np.isinf(distortion).all(1)
    if barred.any():
        raise ValueError(
            f"Expected `distortion` {where} to allow every unit an option but got none for unit {barred.argmax()}."
        )


def _hull(stored: np.ndarray, distortion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Walk down the lower convex hull of every row over (bytes, distortion), from its fewest bytes.

    Options on a line between two others are stepped on: small steps meet a budget more closely.

    Args:
        stored: ``(rows, options)``.
        distortion: ``(rows, options)``.

    Returns:
        ``path`` and ``slope`` of the model.
    """
    most = np.iinfo(np.int64).max
    fewest = np.where(np.isfinite(distortion), stored, most).min(1, keepdims=True)
    here = np.where(stored == fewest, distortion, np.inf).argmin(1)
    path, slopes = [here], [np.full(len(here), np.inf)]
    while True:
        cost = stored - at(stored, here)[:, None]
        saved = at(distortion, here)[:, None] - distortion
        slope = np.divide(saved, cost, out=np.zeros(cost.shape), where=(cost > 0) & (saved > 0))
        steepest = slope.max(1)
        if not steepest.any():
            return np.stack(path, axis=1), np.stack(slopes, axis=1)[:, 1:]
        nearest = np.where(slope == steepest[:, None], stored, most).argmin(1)
        here = np.where(steepest > 0, nearest, here)
        path.append(here)
        slopes.append(np.minimum(steepest, slopes[-1]))  # on a line rounding may lift a step above the one before it
