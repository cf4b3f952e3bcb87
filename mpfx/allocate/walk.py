"""The linear relaxation for fixed modes: one walk down the lower convex hulls of the units, steepest step first.

Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27(3), 1979.
"""

from typing import NamedTuple

import numpy as np

from mpfx.allocate.knapsack import Model, at


class Walk(NamedTuple):
    """Where the walk down the hulls meets the budget, for fixed modes, ``(groups,)``.

    ``rows`` are theirs and ``options`` those of the rows, ``(units,)``. ``left`` bytes of the budget are not spent: too
    few for the next step, which saves ``multiplier`` per byte. With these modes no distortion is below ``bound``.
    """

    modes: np.ndarray
    rows: np.ndarray
    options: np.ndarray
    left: int
    multiplier: float
    bound: float


def walk_hulls(model: Model, modes: np.ndarray, budget: int) -> Walk | None:
    """Solve the linear relaxation for fixed modes; None if they do not fit."""
    rows = model.rows(modes)
    left = budget - int(model.base[modes].sum() + model.fewest[rows].sum())
    if left < 0:
        return None
    left -= left % max(1, int(np.gcd.reduce(model.grains[modes])))  # nothing can spend these
    steps = np.flatnonzero(model.chosen(modes)[model.mode[model.steps.row]])
    spent = np.cumsum(model.steps.stored[steps])
    fitting = int(np.searchsorted(spent, left, side="right"))
    position = np.bincount(model.steps.row[steps[:fitting]], minlength=len(model.stored))[rows]
    options = model.path[rows, position]
    left -= int(spent[fitting - 1]) if fitting else 0
    multiplier = float(model.steps.slope[steps[fitting]]) if fitting < len(steps) else 0.0
    bound = float(model.distortion[rows, options].sum()) - multiplier * left
    return Walk(modes, rows, options, left, multiplier, bound)


def filled(model: Model, walk: Walk) -> np.ndarray:
    """Spend what is left on moves of single units, to any option, those that save most per byte first."""
    stored, distortion = model.stored[walk.rows], model.distortion[walk.rows]
    options, left = walk.options.copy(), walk.left
    while True:
        cost = stored - at(stored, options)[:, None]
        saved = at(distortion, options)[:, None] - distortion
        fits = (saved > 0) & (cost > 0) & (cost <= left)
        worth = np.divide(saved, cost, out=np.zeros(cost.shape), where=fits)
        move = worth.argmax(1)
        most = at(worth, move)
        units = np.argsort(-most, kind="stable")[: np.count_nonzero(most)]
        if not len(units):
            return options
        spent = np.cumsum(at(cost, move)[units])
        fitting = int(np.searchsorted(spent, left, side="right"))
        options[units[:fitting]] = move[units[:fitting]]
        left -= int(spent[fitting - 1])
