"""The best widths of a whole model under one exact budget of bytes: a multiple-choice knapsack with modes.

Every input group takes one mode (a way to store all of its units, with bytes of its own) and every unit one option (a
width), so that the bytes of the model stay within the budget at the least total distortion. Three steps:

1. Lagrangian relaxation: one multiplier, distortion per byte, prices the bytes of the whole model, and every group and
   every unit chooses for itself. The largest value of this dual problem is a lower bound.
2. Near that multiplier few choices of modes can be optimal; they are tried best first. With the modes fixed, the linear
   relaxation is one walk down the lower convex hulls of the units, steepest step first (Sinha and Zoltners, "The
   multiple-choice knapsack problem", Operations Research 27(3), 1979).
3. What the walk leaves of the budget is filled greedily, then exactly, by a dynamic programme over the core: the units
   that lose least by deciding otherwise (Pisinger, "A minimal algorithm for the multiple-choice knapsack problem",
   European Journal of Operational Research 83(2), 1995).

The work of steps 2 and 3 is capped. Within the caps the solution is optimal, and the bound says so by being equal to
its distortion; beyond them the bound says how far from the optimum it is at most. Bytes are integers throughout, ties
go to the lower index.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

DUAL_ROUNDS = 200
MIN_CHOICES, MAX_CHOICES = 8, 512  # choices of modes that are tried: at least and at most,
MAX_ROWS = 1 << 17  # in between as many as have so many units in all
MAX_STATES = 1 << 11  # of a dynamic programme after every unit
MAX_TRANSITIONS = 1 << 20  # of all dynamic programmes together


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


def feasible_range(groups: Sequence[Sequence[Mode]]) -> tuple[int, int]:
    """Tell between which bytes a budget makes a difference.

    Args:
        groups: the modes of every group.

    Returns:
        The fewest bytes possible, and the bytes of the least-distortion solution, beyond which more buy nothing.

    Raises:
        ValueError: if the modes are not valid ones.
    """
    model = _stack(groups)
    return model.cheapest.stored, model.finest.stored


def optimal(groups: Sequence[Sequence[Mode]], budget: int) -> Solution:
    """Choose a mode for every group and an option for every unit, at the least distortion within the budget.

    Args:
        groups: the modes of every group.
        budget: bytes.

    Raises:
        ValueError: if the budget is below the fewest bytes possible, or the modes are not valid ones.
    """
    model = _stack(groups)
    fewest, most = model.cheapest.stored, model.finest.stored
    if budget < fewest:
        raise ValueError(
            f"Expected `budget` to be at least {fewest} bytes (more than {most} buy nothing) but got {budget}."
        )
    if budget >= most:
        return _solution(model, model.finest, model.finest.distortion, 0.0)
    budget -= (budget - fewest) % model.grain  # nothing can spend these
    dual = _dual(model, budget)
    best, bound = _primal(model, dual, budget)
    return _solution(model, best, max(bound, dual.bound), dual.multiplier)


def _solution(model: "_Model", best: "_Choice", bound: float, multiplier: float) -> Solution:
    units = np.diff(model.start)[best.modes]
    return Solution(
        modes=tuple((best.modes - model.first).tolist()),
        options=tuple(np.split(best.options, np.cumsum(units)[:-1])),
        stored=best.stored,
        distortion=best.distortion,
        bound=min(bound, best.distortion),
        multiplier=multiplier,
    )


# The model: all modes of all groups below one another. A row is a unit in a mode; modes are counted through the model.


class _Choice(NamedTuple):
    """A mode for every group, ``(groups,)``, and an option for every unit of theirs, ``(units,)``."""

    modes: np.ndarray
    options: np.ndarray
    stored: int
    distortion: float


class _Priced(NamedTuple):
    """The best option of every row at some multiplier, ``(rows,)``, and what every mode comes to, ``(modes,)``."""

    options: np.ndarray
    stored: np.ndarray
    distortion: np.ndarray


class _Steps(NamedTuple):
    """Steps along hulls, steepest first, ``(steps,)`` each: their row, bytes, and distortion saved per byte."""

    row: np.ndarray
    stored: np.ndarray
    slope: np.ndarray


@dataclass(frozen=True)
class _Model:
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
        return _at(self.stored, self.path[:, 0])

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
    def steps(self) -> _Steps:
        """Of all rows. Of equally steep ones first steps come before second ones, so that none overtakes another."""
        slope = self.slope.T.ravel()
        order = np.argsort(-slope, kind="stable")[: np.count_nonzero(slope)]
        stored = np.diff(np.take_along_axis(self.stored, self.path, 1), axis=1).T.ravel()
        return _Steps(order % len(self.stored), stored[order], slope[order])

    @cached_property
    def cheapest(self) -> _Choice:
        """The fewest bytes, and of such choices the least distortion."""
        priced = self.priced(np.inf)
        return self.pick(priced, priced.stored, priced.distortion)

    @cached_property
    def finest(self) -> _Choice:
        """The least distortion, and of such choices the fewest bytes."""
        priced = self.priced(0.0)
        return self.pick(priced, priced.distortion, priced.stored)

    def priced(self, multiplier: float) -> _Priced:
        """Let every row choose where a byte costs so much distortion; of equals it takes the fewest bytes."""
        options = _at(self.path, (self.slope > multiplier).sum(1))
        stored = np.add.reduceat(_at(self.stored, options), self.start[:-1])
        distortion = np.add.reduceat(_at(self.distortion, options), self.start[:-1])
        return _Priced(options, stored + self.base, distortion)

    def pick(self, priced: _Priced, value: np.ndarray, tie: np.ndarray) -> _Choice:
        """Take the mode of least value for every group, of equals the one of least ``tie``."""
        modes = np.lexsort((tie, value, self.group))[self.first]
        return self.choice(modes, priced.options[self.rows(modes)])

    def choice(self, modes: np.ndarray, options: np.ndarray) -> _Choice:
        """Sum up a choice."""
        rows = self.rows(modes)
        stored = int(self.stored[rows, options].sum() + self.base[modes].sum())
        return _Choice(modes, options, stored, float(self.distortion[rows, options].sum()))

    def rows(self, modes: np.ndarray) -> np.ndarray:
        """Rows of some modes, one mode of every group."""
        return np.flatnonzero(self.chosen(modes)[self.mode])

    def chosen(self, modes: np.ndarray) -> np.ndarray:
        """Whether a mode is one of these, for every mode."""
        chosen = np.zeros(len(self.base), dtype=bool)
        chosen[modes] = True
        return chosen


def _at(table: np.ndarray, column: np.ndarray) -> np.ndarray:
    """One entry of every row."""
    return np.take_along_axis(table, column[:, None], 1)[:, 0]


def _stack(groups: Sequence[Sequence[Mode]]) -> _Model:
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
    return _Model(stored, distortion, base, start, group_of, *_hull(stored, distortion))


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
    at = np.where(stored == fewest, distortion, np.inf).argmin(1)
    path, slopes = [at], [np.full(len(at), np.inf)]
    while True:
        cost = stored - _at(stored, at)[:, None]
        saved = _at(distortion, at)[:, None] - distortion
        slope = np.divide(saved, cost, out=np.zeros(cost.shape), where=(cost > 0) & (saved > 0))
        steepest = slope.max(1)
        if not steepest.any():
            return np.stack(path, axis=1), np.stack(slopes, axis=1)[:, 1:]
        nearest = np.where(slope == steepest[:, None], stored, most).argmin(1)
        at = np.where(steepest > 0, nearest, at)
        path.append(at)
        slopes.append(np.minimum(steepest, slopes[-1]))  # on a line rounding may lift a step above the one before it


# The dual problem and the choices of modes near its multiplier


class _Dual(NamedTuple):
    """The best multiplier, its dual value, and the last choices on either side of the budget."""

    multiplier: float
    bound: float
    below: _Choice
    above: _Choice


def _dual(model: _Model, budget: int) -> _Dual:
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
    return _Dual(multiplier, bound, below, above)


def _mode_choices(model: _Model, dual: _Dual, budget: int) -> Iterator[tuple[float, np.ndarray]]:
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


def _seed(model: _Model, dual: _Dual, stored: np.ndarray, budget: int) -> np.ndarray:
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


# The primal problem: options for fixed modes


def _primal(model: _Model, dual: _Dual, budget: int) -> tuple[_Choice, float]:
    """Try choices of modes, first with greedy filling, then exactly where they may still win.

    Returns:
        The best choice found, and a lower bound of all that were not tried to the end.
    """
    best, bound = dual.below, np.inf
    walks: list[_Walk] = []
    most = max(MIN_CHOICES, min(MAX_CHOICES, MAX_ROWS // len(best.options)))
    for tried, (least, modes) in enumerate(_mode_choices(model, dual, budget)):
        if least >= best.distortion or tried == most:
            bound = least
            break
        walk = _walk(model, modes, budget)
        if walk is not None and walk.bound < best.distortion:
            walks.append(walk)
            best = _better(best, model.choice(modes, _filled(model, walk)))
    work = MAX_TRANSITIONS
    for walk in sorted(walks, key=lambda walk: walk.bound):
        gap = best.distortion - walk.bound
        if gap <= 0:
            break
        search = _search(_core(model, walk, gap), walk, gap, work // 2)
        work -= search.work
        if search.options is not None:
            best = _better(best, model.choice(walk.modes, search.options))
        if not search.exact:
            bound = min(bound, walk.bound)
    return best, bound


def _better(one: _Choice, two: _Choice) -> _Choice:
    return two if two.distortion < one.distortion else one


class _Walk(NamedTuple):
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


def _walk(model: _Model, modes: np.ndarray, budget: int) -> _Walk | None:
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
    return _Walk(modes, rows, options, left, multiplier, bound)


def _filled(model: _Model, walk: _Walk) -> np.ndarray:
    """Spend what is left on moves of single units, to any option, those that save most per byte first."""
    stored, distortion = model.stored[walk.rows], model.distortion[walk.rows]
    options, left = walk.options.copy(), walk.left
    while True:
        cost = stored - _at(stored, options)[:, None]
        saved = _at(distortion, options)[:, None] - distortion
        fits = (saved > 0) & (cost > 0) & (cost <= left)
        worth = np.divide(saved, cost, out=np.zeros(cost.shape), where=fits)
        move = worth.argmax(1)
        most = _at(worth, move)
        units = np.argsort(-most, kind="stable")[: np.count_nonzero(most)]
        if not len(units):
            return options
        spent = np.cumsum(_at(cost, move)[units])
        fitting = int(np.searchsorted(spent, left, side="right"))
        options[units[:fitting]] = move[units[:fitting]]
        left -= int(spent[fitting - 1])


class _Core(NamedTuple):
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


def _core(model: _Model, walk: _Walk, gap: float) -> _Core:
    """Collect the units with another option whose reduced cost alone is below the gap."""
    stored, distortion = model.stored[walk.rows], model.distortion[walk.rows]
    cost = stored - _at(stored, walk.options)[:, None]
    reduced = np.maximum(distortion - _at(distortion, walk.options)[:, None] + walk.multiplier * cost, 0.0)
    other = np.arange(cost.shape[1]) != walk.options[:, None]
    nearest = np.where(other, reduced, np.inf).min(1)
    units = np.flatnonzero(nearest < gap)
    units = units[np.argsort(nearest[units], kind="stable")]
    cost, reduced = cost[units], reduced[units]
    rate = np.divide(reduced, abs(cost), out=np.full(cost.shape, np.inf), where=cost != 0)
    return _Core(
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


class _Search(NamedTuple):
    """Options better than what was to be beaten, ``(units,)``, None if none were found; the transitions it took.

    ``exact``: nothing better exists.
    """

    options: np.ndarray | None
    work: int
    exact: bool


def _search(core: _Core, walk: _Walk, gap: float, most: int) -> _Search:
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
    return _Search(None if best is None else _traced(core, walk, stages, best), work, exact)


def _outlook(core: _Core, stage: int, left: np.ndarray, excess: np.ndarray, multiplier: float) -> np.ndarray:
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
    core: _Core, walk: _Walk, stages: list[tuple[np.ndarray, np.ndarray]], best: tuple[int, int, int]
) -> np.ndarray:
    """Options of all units on the way to the best state."""
    options = walk.options.copy()
    last, state, option = best
    options[core.units[last]] = option
    for stage in reversed(range(last)):
        taken, predecessor = stages[stage]
        options[core.units[stage]], state = taken[state], predecessor[state]
    return options
