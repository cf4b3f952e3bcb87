"""The Lagrangian dual: one multiplier, distortion per byte, prices the bytes of the whole model.

Every group and every unit then chooses for itself; the largest value is a lower bound, and near its multiplier few
choices of modes can be optimal.
"""

from collections.abc import Iterator
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from mpfx.allocate.knapsack import Choice, Model

DUAL_ROUNDS = 200


class Dual(NamedTuple):
    """The best multiplier, its dual value, and the last choices on either side of the budget."""

    multiplier: float
    bound: float
    below: Choice
    above: Choice


def solve_dual(model: Model, budget: int) -> Dual:
    """Find the multiplier with the largest dual value.

    Every choice is a line over the multiplier, ``distortion + multiplier * (stored - budget)``, and the dual function
    the lower envelope of them all. Its top is approached by intersecting one rising and one falling line: the lowest
    line at that multiplier replaces one of the two, until none is lower (Kelley's cutting planes in one dimension).
    """
    below, above = model.cheapest, model.finest
    bound, multiplier = above.distortion, 0.0
    for _ in range(DUAL_ROUNDS):
        price = max(0.0, (below.distortion - above.distortion) / (above.stored - below.stored))
        priced = model.priced(price)
        lowest = model.pick(priced, priced.distortion + price * priced.stored, priced.stored)
        value = lowest.distortion + price * (lowest.stored - budget)
        if value >= bound:
            bound, multiplier = value, price
        if lowest.stored in (below.stored, above.stored):
            break
        below, above = (lowest, above) if lowest.stored <= budget else (below, lowest)
    return Dual(multiplier, bound, below, above)


def mode_choices(model: Model, dual: Dual, budget: int) -> Iterator[tuple[float, np.ndarray]]:
    """Modes of all groups with a lower bound of their distortion, least first, each once.

    Lawler, "A procedure for computing the k best solutions to discrete optimization problems", Management Science
    18(7), 1972, where the solutions are sums of one number out of each of several lists.
    """
    priced = model.priced(dual.multiplier)
    seed = _seed(model, dual, priced.stored, budget)
    yield dual.bound, seed
    score = priced.distortion + dual.multiplier * priced.stored
    ladders = _ladders(score - score[seed][model.group], model.group, seed)
    # Bound, ladder and rung of the last group that moved, and the modes of all groups that moved.
    queue: list[tuple[float, int, int, tuple[int, ...]]] = []
    if ladders:
        queue.append((dual.bound + ladders[0][0][0], 0, 0, (ladders[0][0][1],)))
    while queue:
        bound, place, rung, moved = heappop(queue)
        modes = seed.copy()
        modes[model.group[list(moved)]] = moved
        yield bound, modes
        back = bound - ladders[place][rung][0]
        if rung + 1 < len(ladders[place]):
            regret, mode = ladders[place][rung + 1]
            heappush(queue, (back + regret, place, rung + 1, (*moved[:-1], mode)))
        if place + 1 < len(ladders):
            regret, mode = ladders[place + 1][0]
            heappush(queue, (bound + regret, place + 1, 0, (*moved, mode)))
            if rung == 0:
                heappush(queue, (back + regret, place + 1, 0, (*moved[:-1], mode)))


def _seed(model: Model, dual: Dual, stored: np.ndarray, budget: int) -> np.ndarray:
    """Give the groups that are torn between two modes the larger one as long as it fits."""
    modes = dual.below.modes.copy()
    left = budget - int(stored[modes].sum())
    for group in np.flatnonzero(modes != dual.above.modes):
        cost = int(stored[dual.above.modes[group]] - stored[modes[group]])
        if cost <= left:
            modes[group] = dual.above.modes[group]
            left -= cost
    return modes


def _ladders(regret: np.ndarray, group: np.ndarray, seed: np.ndarray) -> list[list[tuple[float, int]]]:
    """Regrets and numbers of the modes not in the seed, least first, for every group that has some, least first."""
    ladders: list[list[tuple[float, int]]] = [[] for _ in seed]
    for mode, (cost, owner) in enumerate(zip(regret.tolist(), group.tolist(), strict=True)):
        if mode != seed[owner]:
            ladders[owner].append((max(cost, 0.0), mode))  # rounding may lift the seed above its equals
    return sorted(sorted(ladder) for ladder in ladders if ladder)
