"""The core, the units that lose least by deciding otherwise than the walk, and its exact search: a dynamic programme.

Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", European Journal of Operational Research
83(2), 1995.
"""

from typing import NamedTuple

import numpy as np

from mpfx.allocate.knapsack import Model, at
from mpfx.allocate.walk import Walk

MAX_STATES = 1 << 11  # of a dynamic programme after every unit


class Core(NamedTuple):
    """The units that may decide otherwise than the walk, those that lose least by it first.

    Attributes:
        units: ``(core,)``.
        cost: bytes more than at the walk's option, ``(core, options)``.
        reduced: cost of every option where bytes are paid for at the walk's multiplier, ``(core, options)``: 0 at the
            walk's.
        least: of the reduced costs but the walk's, of a unit and all after it, ``(core + 1,)``.
        less: the same per byte, of options with fewer bytes than the walk's.
        more: the same per byte, of options with more bytes than the walk's.
        reach: most bytes by which one unit's options can differ from the walk's.
    """

    units: np.ndarray
    cost: np.ndarray
    reduced: np.ndarray
    least: np.ndarray
    less: np.ndarray
    more: np.ndarray
    reach: int


def collect_core(model: Model, walk: Walk, gap: float) -> Core:
    """Collect the units with another option whose reduced cost alone is below the gap."""
    stored, distortion = model.stored[walk.rows], model.distortion[walk.rows]
    cost = stored - at(stored, walk.options)[:, None]
    reduced = np.maximum(distortion - at(distortion, walk.options)[:, None] + walk.multiplier * cost, 0.0)
    other = np.arange(cost.shape[1]) != walk.options[:, None]
    nearest = np.where(other, reduced, np.inf).min(1)
    units = np.flatnonzero(nearest < gap)
    units = units[np.argsort(nearest[units], kind="stable")]
    cost, reduced = cost[units], reduced[units]
    rate = np.divide(reduced, abs(cost), out=np.full(cost.shape, np.inf), where=cost != 0)
    return Core(
        units,
        cost,
        reduced,
        np.append(nearest[units], np.inf),
        _least_from_here(np.where(cost < 0, rate, np.inf)),
        _least_from_here(np.where(cost > 0, rate, np.inf)),
        int(abs(cost[reduced < gap]).max(initial=0)),
    )


def _least_from_here(rate: np.ndarray) -> np.ndarray:
    """Minimum over a row and all after it, inf after the last: ``(rows + 1,)``."""
    return np.append(np.minimum.accumulate(rate.min(1)[::-1])[::-1], np.inf)


class Search(NamedTuple):
    """Options better than what was to be beaten, ``(units,)``, None if none were found; the transitions it took.

    ``exact``: nothing better exists.
    """

    options: np.ndarray | None
    work: int
    exact: bool


def search_core(core: Core, walk: Walk, gap: float, most: int) -> Search:
    """Look for the best options of fixed modes by dynamic programming, one unit of the core after the other.

    A state is the bytes left and the sum of the reduced costs so far, its excess. ``distortion - bound`` of a choice
    is its excess and ``multiplier`` times its bytes left; the search is for one where that is below the gap.

    Args:
        core: of the walk.
        walk: where to start.
        gap: what to beat.
        most: transitions.
    """
    left, excess = np.array([walk.left]), np.zeros(1)
    stages: list[tuple[np.ndarray, np.ndarray]] = []  # option and predecessor of every state
    best: tuple[int, int, int] | None = None  # stage, predecessor and option
    work, exact = 0, True
    for stage in range(len(core.units)):
        menu, states = np.flatnonzero(core.reduced[stage] < gap), len(left)
        if not states:
            break
        if work + states * len(menu) > most:
            exact = False
            break
        work += states * len(menu)
        left = (left - core.cost[stage, menu][:, None]).ravel()
        excess = (excess + core.reduced[stage, menu][:, None]).ravel()
        value = np.where(left >= 0, excess + walk.multiplier * left, np.inf)
        lowest = int(value.argmin())
        if value[lowest] < gap:
            gap, best = float(value[lowest]), (stage, lowest % states, int(menu[lowest // states]))
        kept = np.flatnonzero(_outlook(core, stage + 1, left, excess, walk.multiplier) < gap)
        kept = kept[_undominated(left[kept], excess[kept] + walk.multiplier * left[kept])]
        if len(kept) > MAX_STATES:
            exact, kept = False, kept[_thinned(left[kept], excess[kept], core.reach)]
        stages.append((menu[kept // states], kept % states))
        left, excess = left[kept], excess[kept]
    return Search(None if best is None else _traced(core, walk, stages, best), work, exact)


def _outlook(core: Core, stage: int, left: np.ndarray, excess: np.ndarray, multiplier: float) -> np.ndarray:
    """Lower bound of what states can come to if one more unit at least decides otherwise than the walk.

    A byte above the budget has to be saved, a byte left is either spent or lost.
    """
    per_byte = np.where(left < 0, -core.less[stage], min(multiplier, core.more[stage]))
    outlook: np.ndarray = excess + np.maximum(core.least[stage], per_byte * left)
    return outlook


def _undominated(left: np.ndarray, value: np.ndarray) -> np.ndarray:
    """States that no other beats in bytes and distortion, most bytes left first.

    ``value`` is the distortion but for a constant.
    """
    order = np.lexsort((value, -left))
    lowest = np.minimum.accumulate(value[order])
    undominated: np.ndarray = order[value[order] < np.append(np.inf, lowest[:-1])]
    return undominated


def _thinned(left: np.ndarray, excess: np.ndarray, reach: int) -> np.ndarray:
    """Keep the state of least excess in every stretch of bytes left, finely where single units reach the budget."""
    window = np.clip(left, -reach, reach)
    stretch = (window + reach) * MAX_STATES // (2 * reach + 1)
    order = np.lexsort((excess, -stretch))
    first: np.ndarray = order[np.flatnonzero(np.diff(stretch[order], prepend=-1))]
    return first


def _traced(
    core: Core, walk: Walk, stages: list[tuple[np.ndarray, np.ndarray]], best: tuple[int, int, int]
) -> np.ndarray:
    """Options of all units on the way to the best state."""
    options = walk.options.copy()
    last, state, option = best
    options[core.units[last]] = option
    for stage in reversed(range(last)):
        taken, predecessor = stages[stage]
        options[core.units[stage]], state = taken[state], predecessor[state]
    return options
