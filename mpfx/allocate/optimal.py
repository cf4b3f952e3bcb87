"""The best widths of a whole model under one exact budget of bytes: a multiple-choice knapsack with modes.

The choices of modes near the multiplier of the dual problem are tried best first: each is solved by a walk down the
hulls of its units, and what that leaves of the budget is filled greedily, then exactly, over the core.
"""

from collections.abc import Sequence

import numpy as np

from mpfx.allocate.core import collect_core, search_core
from mpfx.allocate.dual import Dual, mode_choices, solve_dual
from mpfx.allocate.knapsack import Choice, Mode, Model, Solution, stack
from mpfx.allocate.walk import Walk, filled, walk_hulls

__all__ = ["Mode", "Solution", "feasible_range", "optimal"]

MIN_CHOICES, MAX_CHOICES = 8, 512  # choices of modes that are tried: at least and at most,
MAX_ROWS = 1 << 17  # in between as many as have so many units in all
MAX_TRANSITIONS = 1 << 20  # of all dynamic programmes together


def feasible_range(groups: Sequence[Sequence[Mode]]) -> tuple[int, int]:
    """Tell between which bytes a budget makes a difference.

    Args:
        groups: the modes of every group.

    Returns:
        The fewest bytes possible, and the bytes of the least-distortion solution, beyond which more buy nothing.

    Raises:
        ValueError: if the modes are not valid ones.
    """
    model = stack(groups)
    return model.cheapest.stored, model.finest.stored


def optimal(groups: Sequence[Sequence[Mode]], budget: int) -> Solution:
    """Choose a mode for every group and an option for every unit, at the least distortion within the budget.

    Every group takes one mode (a way to store all of its units, with bytes of its own) and every unit one option (a
    width). The work is capped. Within the caps the solution is optimal, and the bound says so by being equal to its
    distortion; beyond them the bound says how far from the optimum it is at most. Bytes are integers throughout, ties
    go to the lower index.

    Args:
        groups: the modes of every group.
        budget: bytes.

    Raises:
        ValueError: if the budget is below the fewest bytes possible, or the modes are not valid ones.
    """
    model = stack(groups)
    fewest, most = model.cheapest.stored, model.finest.stored
    if budget < fewest:
        raise ValueError(
            f"Expected `budget` to be at least {fewest} bytes (more than {most} buy nothing) but got {budget}."
        )
    if budget >= most:
        return _solution(model, model.finest, model.finest.distortion, 0.0)
    budget -= (budget - fewest) % model.grain  # nothing can spend these
    dual = solve_dual(model, budget)
    best, bound = _primal(model, dual, budget)
    return _solution(model, best, max(bound, dual.bound), dual.multiplier)


def _solution(model: Model, best: Choice, bound: float, multiplier: float) -> Solution:
    units = np.diff(model.start)[best.modes]
    return Solution(
        modes=tuple((best.modes - model.first).tolist()),
        options=tuple(np.split(best.options, np.cumsum(units)[:-1])),
        stored=best.stored,
        distortion=best.distortion,
        bound=min(bound, best.distortion),
        multiplier=multiplier,
    )


def _primal(model: Model, dual: Dual, budget: int) -> tuple[Choice, float]:
    """Try choices of modes, first with greedy filling, then exactly where they may still win.

    Returns:
        The best choice found, and a lower bound of all that were not tried to the end.
    """
    best, bound = dual.below, np.inf
    walks: list[Walk] = []
    most = max(MIN_CHOICES, min(MAX_CHOICES, MAX_ROWS // len(best.options)))
    for tried, (least, modes) in enumerate(mode_choices(model, dual, budget)):
        if least >= best.distortion or tried == most:
            bound = least
            break
        walk = walk_hulls(model, modes, budget)
        if walk is not None and walk.bound < best.distortion:
            walks.append(walk)
            best = _better(best, model.choice(modes, filled(model, walk)))
    work = MAX_TRANSITIONS
    for walk in sorted(walks, key=lambda walk: walk.bound):
        gap = best.distortion - walk.bound
        if gap <= 0:
            break
        search = search_core(collect_core(model, walk, gap), walk, gap, work // 2)
        work -= search.work
        if search.options is not None:
            best = _better(best, model.choice(walk.modes, search.options))
        if not search.exact:
            bound = min(bound, walk.bound)
    return best, bound


def _better(one: Choice, two: Choice) -> Choice:
    return two if two.distortion < one.distortion else one
