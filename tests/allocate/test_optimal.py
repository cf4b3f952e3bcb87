"""The knapsack solver against brute force, against HiGHS, and against cases worked out by hand."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array

from mpfx.allocate.optimal import Mode, Solution, feasible_range, optimal

Groups = list[list[Mode]]


def mode(stored: Sequence[Sequence[int]], distortion: Sequence[Sequence[float]], base: int = 0) -> Mode:
    return Mode(np.array(stored), np.array(distortion, dtype=np.float64), base)


def check(groups: Groups, budget: int, solution: Solution) -> None:
    """The decision is a valid one, its sums are right and it keeps to the budget and the bound."""
    stored, distortion = 0, 0.0
    assert len(solution.modes) == len(solution.options) == len(groups)
    for group, chosen, options in zip(groups, solution.modes, solution.options, strict=True):
        taken = group[chosen]
        units = np.arange(len(taken.stored))
        assert options.dtype == np.int64
        stored += taken.base + int(taken.stored[units, options].sum())
        distortion += float(taken.distortion[units, options].sum())
    assert solution.stored == stored <= budget
    assert solution.distortion == pytest.approx(distortion, rel=1e-12, abs=1e-12)
    assert solution.bound <= solution.distortion < np.inf


def same(one: Solution, two: Solution) -> bool:
    return (one.modes, one.stored) == (two.modes, two.stored) and all(
        np.array_equal(a, b) for a, b in zip(one.options, two.options, strict=True)
    )


def everything(groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and distortion of every solution."""
    stored, distortion = np.zeros(1, dtype=np.int64), np.zeros(1)
    for group in groups:
        of_modes = [_all_options(taken) for taken in group]
        stored = np.add.outer(stored, np.concatenate([bytes_ for bytes_, _ in of_modes])).ravel()
        distortion = np.add.outer(distortion, np.concatenate([harm for _, harm in of_modes])).ravel()
    return stored, distortion


def _all_options(taken: Mode) -> tuple[np.ndarray, np.ndarray]:
    stored, distortion = np.array([taken.base]), np.zeros(1)
    for bytes_, harm in zip(taken.stored, taken.distortion, strict=True):
        allowed = np.isfinite(harm)
        stored = np.add.outer(stored, bytes_[allowed]).ravel()
        distortion = np.add.outer(distortion, harm[allowed]).ravel()
    return stored, distortion


Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
CURVES: dict[str, Draw] = {
    "any": lambda rng, shape: rng.random(shape),
    "convex": lambda rng, shape: rng.random((shape[0], 1)) * 4.0 ** -np.arange(shape[1]),
    "noisy": lambda rng, shape: 4.0 ** -np.arange(shape[1]) * np.exp(rng.normal(0, 0.5, shape)),
    "wide": lambda rng, shape: np.exp(rng.normal(0, 6, shape)),
    "ties": lambda rng, shape: rng.integers(0, 3, shape).astype(np.float64),
    "zero": lambda rng, shape: np.zeros(shape),
    "gains": lambda rng, shape: rng.normal(0, 1, shape),  # a measured harm can be below zero
}
SIZES: dict[str, Draw] = {
    "bytes": lambda rng, shape: rng.integers(0, 100, shape),
    "few": lambda rng, shape: rng.integers(0, 4, shape),
    "multiples": lambda rng, shape: 12 * rng.integers(0, 9, shape),
    "widths": lambda rng, shape: rng.integers(1, 4, (shape[0], 1)) * np.arange(shape[1]) * 8,
}


def small(seed: int, curve: str, size: str) -> Groups:
    """A few groups of up to three modes and three units, some options of which are not allowed."""
    rng = np.random.default_rng([seed, *curve.encode(), *size.encode()])
    groups: Groups = []
    for _ in range(rng.integers(1, 4)):
        units = int(rng.integers(1, 4))
        groups.append([])
        for _ in range(rng.integers(1, 4)):
            shape = (units, int(rng.integers(1, 5)))
            distortion = CURVES[curve](rng, shape)
            barred = rng.random(shape) < rng.choice([0.0, 0.3])
            barred[np.arange(units), rng.integers(0, shape[1], units)] = False
            base = int(rng.integers(0, 30)) * (12 if size == "multiples" else 1)
            groups[-1].append(Mode(SIZES[size](rng, shape), np.where(barred, np.inf, distortion), base))
    return groups


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("size", SIZES)
def test_small_models_are_solved_exactly(curve: str, size: str) -> None:
    rng = np.random.default_rng(0)
    for seed in range(8):
        groups = small(seed, curve, size)
        stored, distortion = everything(groups)
        fewest, most = feasible_range(groups)
        assert fewest == stored.min()
        assert most == stored[distortion <= distortion.min() + 1e-12].min()
        last = np.inf
        for budget in sorted({fewest, most, most + 7, *rng.integers(fewest, most + 1, 5).tolist()}):
            solution = optimal(groups, budget)
            check(groups, budget, solution)
            best = distortion[stored <= budget].min()
            assert solution.distortion == pytest.approx(best, rel=1e-12, abs=1e-12)
            assert solution.bound == solution.distortion  # and it is known to be
            assert solution.distortion <= last + 1e-12
            last = solution.distortion


@pytest.mark.parametrize(
    "caps",
    [
        {"optimal.MAX_TRANSITIONS": 0},
        {"optimal.MAX_TRANSITIONS": 16},
        {"core.MAX_STATES": 1},
        {"optimal.MAX_CHOICES": 1, "optimal.MIN_CHOICES": 1},
    ],
    ids=str,
)
def test_beyond_the_caps_the_bound_still_holds(caps: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cap in caps.items():
        monkeypatch.setattr(f"mpfx.allocate.{name}", cap)
    unproven = 0
    for seed in range(30):
        groups = small(seed, "noisy", "bytes")
        stored, distortion = everything(groups)
        budget = int(np.mean(feasible_range(groups)))
        solution = optimal(groups, budget)
        check(groups, budget, solution)
        best = distortion[stored <= budget].min()
        assert solution.bound <= best * (1 + 1e-12)
        assert best * (1 - 1e-12) <= solution.distortion
        unproven += solution.bound < solution.distortion
    assert unproven  # the caps were met


@dataclass(frozen=True)
class Shape:
    """Of a model whose groups are stored densely or with a bitmask, as bytes of ``widths`` bits per weight."""

    groups: int
    units: int
    rows: tuple[int, ...] = (8, 24, 40)
    widths: tuple[int, ...] = tuple(range(9))
    ragged: bool = False  # the surviving codes of a unit are counted, not assumed to be half


def model(shape: Shape, seed: int = 0) -> Groups:
    rng = np.random.default_rng(seed)
    bits = np.array(shape.widths)
    groups: Groups = []
    for _ in range(shape.groups):
        rows, units = int(rng.choice(shape.rows)), int(rng.integers(shape.units // 2, 2 * shape.units))
        scale = rows * np.exp(rng.normal(0, 1.5, (units, 1)) + rng.normal(0, 1))
        noise = np.exp(rng.normal(0, 0.2, (units, len(bits))))
        kept = rng.uniform(0.45, 0.55, (units, 1)) if shape.ragged else np.full((units, 1), 0.5)
        dense = np.where(bits > 0, rows * (8 * bits + 4), 0) * np.ones((units, 1))
        masked = np.where(bits > 0, rows * (8 * bits * kept + 12), 0)
        pruning = np.where(bits > 0, np.exp(rng.normal(-6, 1.5)), 0)
        groups.append(
            [
                Mode(dense.astype(np.int64), scale * 4.0**-bits * noise, 2 * units),
                Mode(masked.astype(np.int64), scale * (0.9 * 4.0**-bits + pruning) * noise, 2 * units + 9),
            ]
        )
    return groups


def within(groups: Groups, share: float) -> int:
    fewest, most = feasible_range(groups)
    return fewest + int(share * (most - fewest))


def highs(groups: Groups, budget: int) -> OptimizeResult:
    """Solve with a variable for every mode and every option of every unit in every mode."""
    cost: list[float] = []
    stored: list[int] = []
    entries: list[tuple[int, int, int]] = []
    right: list[int] = []
    for group in groups:
        of_modes = range(len(cost), len(cost) + len(group))
        cost += [0.0] * len(group)
        stored += [taken.base for taken in group]
        entries += [(len(right), variable, 1) for variable in of_modes]
        right.append(1)
        for variable, taken in zip(of_modes, group, strict=True):
            for bytes_, harm in zip(taken.stored.tolist(), taken.distortion.tolist(), strict=True):
                entries += [(len(right), variable, -1)]
                entries += [(len(right), len(cost) + option, 1) for option in range(len(harm))]
                cost += harm
                stored += bytes_
                right.append(0)
    rows, columns, values = zip(*entries, strict=True)
    exactly_one = coo_array((values, (rows, columns)), shape=(len(right), len(cost))).tocsr()
    return milp(
        cost,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(exactly_one, right, right),
            LinearConstraint(np.array([stored]), -np.inf, budget),
        ],
        options={"mip_rel_gap": 1e-7},
    )


@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize(
    "shape",
    [Shape(3, 70), Shape(8, 30), Shape(4, 40, ragged=True), Shape(5, 60, widths=(2, 3, 4, 8), rows=(7, 13))],
    ids=["few groups", "many groups", "ragged", "few widths"],
)
def test_middle_sized_models_against_highs(shape: Shape, share: float) -> None:
    groups = model(shape)
    budget = within(groups, share)
    solution, reference = optimal(groups, budget), highs(groups, budget)
    assert reference.status == 0
    check(groups, budget, solution)
    assert solution.bound <= reference.fun * (1 + 1e-6)
    assert reference.fun * (1 - 1e-6) <= solution.distortion <= reference.fun * (1 + 1e-6)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("transitions", [0, 1 << 20])  # filled greedily only, and exactly
def test_large_models_are_nearly_optimal_and_spend_the_budget(
    ragged: bool, transitions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpfx.allocate.optimal.MAX_TRANSITIONS", transitions)
    groups = model(Shape(40, 60, rows=(4096, 12288, 22016), ragged=ragged))
    for share in (0.05, 0.2, 0.4, 0.7, 0.95):
        budget = within(groups, share)
        solution = optimal(groups, budget)
        check(groups, budget, solution)
        assert solution.distortion <= (1.00001 if transitions else 1.001) * solution.bound
        assert 0.9999 * budget <= solution.stored
        assert solution.multiplier > 0
        assert not any(moves(groups, solution, budget - solution.stored))


def moves(groups: Groups, solution: Solution, left: int) -> Iterator[int]:
    """Number of options of single units that would fit and save distortion, for every group."""
    for group, chosen, options in zip(groups, solution.modes, solution.options, strict=True):
        cost = group[chosen].stored - np.take_along_axis(group[chosen].stored, options[:, None], 1)
        harm = group[chosen].distortion - np.take_along_axis(group[chosen].distortion, options[:, None], 1)
        yield int(((cost <= left) & (harm < 0)).sum())


def test_more_budget_never_more_distortion() -> None:
    groups = model(Shape(4, 30))
    fewest, most = feasible_range(groups)
    budgets = np.linspace(fewest, most, 40).astype(np.int64).tolist()
    budgets += range(budgets[10], budgets[10] + 40)  # and byte by byte
    solutions = [optimal(groups, budget) for budget in sorted(budgets)]
    distortion = np.array([solution.distortion for solution in solutions])
    assert (np.diff(distortion) <= 1e-12 * distortion[1:]).all()
    assert len(set(distortion)) > 40
    multiplier = np.array([solution.multiplier for solution in solutions])
    assert (np.diff(multiplier) <= 1e-12 * multiplier[:-1]).all()


def test_by_hand() -> None:
    # The second mode of the first group pays 5 bytes once to save a byte per step and unit. With 17 bytes that leaves
    # two steps and one (a distortion of 20) against two and two in the first mode; with 24, three and three.
    dense = mode([[0, 4, 8, 12]] * 2, [[64, 16, 4, 1]] * 2)
    masked = mode([[0, 3, 6, 9]] * 2, [[64, 16, 4, 1]] * 2, base=5)
    other = mode([[1]], [[7.0]])
    groups = [[dense, masked], [other]]
    assert feasible_range(groups) == (1, 24)
    solution = optimal(groups, 17)
    assert (solution.modes, [o.tolist() for o in solution.options]) == ((0, 0), [[2, 2], [0]])
    assert (solution.stored, solution.distortion) == (17, 15.0)
    solution = optimal(groups, 24)
    assert (solution.modes, [o.tolist() for o in solution.options]) == ((1, 0), [[3, 3], [0]])
    assert (solution.stored, solution.distortion, solution.bound, solution.multiplier) == (24, 9.0, 9.0, 0.0)


def test_options_above_the_hull_are_used_to_spend_the_budget() -> None:
    groups = [[mode([[0, 1, 4]], [[10, 9, 0]])]]  # one byte saves 1, four save 2.5 each
    assert [optimal(groups, budget).options[0].item() for budget in range(6)] == [0, 1, 1, 1, 2, 2]
    assert optimal(groups, 3).multiplier == 2.5


def test_two_units_are_traded_for_one() -> None:
    # Most per byte is the first unit's step, but it leaves no room for the two others.
    groups = [[mode([[0, 6], [0, 5], [0, 5]], [[7, 0], [5.5, 0], [5.5, 0]])]]
    solution = optimal(groups, 10)
    assert solution.options[0].tolist() == [0, 1, 1]
    assert solution.bound == solution.distortion == 7.0


def test_the_ends_of_the_range() -> None:
    groups = model(Shape(3, 10, widths=(2, 3, 4)))
    fewest, most = feasible_range(groups)
    least = optimal(groups, fewest)
    assert least.stored == fewest
    assert least.bound == least.distortion
    with pytest.raises(ValueError, match=rf"Expected `budget` to be at least {fewest} bytes .* got {fewest - 1}\."):
        optimal(groups, fewest - 1)
    best = optimal(groups, most)
    assert best.stored == most
    assert best.bound == best.distortion < optimal(groups, most - 1).distortion
    assert best.multiplier == 0 < least.multiplier
    assert same(optimal(groups, 10 * most), best)


def test_bytes_that_buy_nothing_are_not_spent() -> None:
    groups = [[mode([[3, 1, 2]], [[5, 5, 5]]), mode([[1]], [[5]], base=1)], [mode([[4, 2]], [[0, 0]])]]
    assert feasible_range(groups) == (3, 3)
    solution = optimal(groups, 100)
    assert (solution.modes, [o.tolist() for o in solution.options]) == ((0, 0), [[1], [1]])


def test_what_no_option_can_spend_does_not_loosen_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    for cap in ("MIN_CHOICES", "MAX_CHOICES"):  # of two equal modes only one is tried: the bound is the dual one
        monkeypatch.setattr(f"mpfx.allocate.optimal.{cap}", 1)
    eights = mode([[0, 8, 16, 5]] * 9, [[4, 2, 1, np.inf]] * 9, base=3)
    groups = [[eights, eights], [mode([[0, 8]], [[0, 0]])]]
    for budget in (3 + 24, 3 + 24 + 7):
        solution = optimal(groups, budget)
        assert (solution.stored, solution.distortion, solution.bound) == (27, 30.0, 30.0)


def test_ties_go_to_the_lower_index() -> None:
    groups = [[mode([[0, 1]] * 4, [[1, 0]] * 4)] * 2, [mode([[0, 1, 1]] * 2, [[1, 0, 0]] * 2)]]
    solution = optimal(groups, 5)
    assert solution.modes == (0, 0)
    assert [o.tolist() for o in solution.options] == [[1, 1, 1, 1], [1, 0]]


def test_the_same_model_has_the_same_solution_and_stays_as_it_is() -> None:
    groups, again = model(Shape(6, 40, ragged=True)), model(Shape(6, 40, ragged=True))
    budget = within(groups, 0.3)
    assert same(optimal(groups, budget), optimal(again, budget))
    for taken, copy in zip(chain(*groups), chain(*model(Shape(6, 40, ragged=True))), strict=True):
        assert np.array_equal(taken.stored, copy.stored)
        assert np.array_equal(taken.distortion, copy.distortion)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_unit_of_distortion_does_not_matter(scale: float) -> None:
    for seed in range(4):
        groups = model(Shape(6, 30), seed)
        scaled = [[Mode(taken.stored, taken.distortion * scale, taken.base) for taken in group] for group in groups]
        for share in (0.02, 0.3, 0.7):
            budget = within(groups, share)
            one, two = optimal(groups, budget), optimal(scaled, budget)
            assert same(one, two)
            assert two.distortion == pytest.approx(scale * one.distortion)
            assert two.multiplier == pytest.approx(scale * one.multiplier)


def test_identical_groups_share_out_their_modes() -> None:
    # All groups change modes at one multiplier; the best solutions have some in either mode.
    dense = mode([[0, 10, 20]] * 3, [[16, 4, 1]] * 3)
    masked = mode([[0, 6, 12]] * 3, [[16, 4.2, 1.2]] * 3, base=9)
    groups = [[dense, masked]] * 24
    best = least_at_every_size(groups)
    for budget in range(140, 1300, 77):
        solution = optimal(groups, budget)
        check(groups, budget, solution)
        assert solution.bound <= best[budget] * (1 + 1e-12)
        assert best[budget] * (1 - 1e-12) <= solution.distortion <= 1.001 * best[budget]
    assert set(optimal(groups, 300).modes) == {0, 1}


def least_at_every_size(groups: Groups) -> np.ndarray:
    """Least distortion within 0, 1, ... bytes: the textbook's dynamic programme."""
    best = np.zeros(1)
    for group in groups:
        stored, distortion = everything([group])
        wider = np.full(len(best) + int(stored.max()), np.inf)
        for bytes_, harm in zip(stored.tolist(), distortion.tolist(), strict=True):
            part = wider[bytes_ : bytes_ + len(best)]
            np.minimum(part, best + harm, out=part)
        best = wider
    return np.minimum.accumulate(best)


def test_where_all_options_are_worth_the_same_bytes_decide() -> None:
    # Every byte saves one: all choices that spend the budget are optimal, and there are too many to try them all.
    sizes = np.random.default_rng(0).integers(1, 10**6, (100, 1))
    groups = [[Mode(sizes * [0, 1], sizes * [1.0, 0.0])]]
    for share in (0.2, 0.6, 0.8):
        budget = int(share * sizes.sum())
        assert budget - 100 <= optimal(groups, budget).stored <= budget


def test_steps_on_a_line_are_taken_in_order_whatever_the_rounding() -> None:
    # In binary the second step is steeper than the first.
    row = [1.4, 0.5, 0.19999999999999996]
    assert (row[1] - row[2]) / 1 > (row[0] - row[1]) / 3
    groups = [[mode([[0, 3, 4]] * 3, [row] * 3)]]
    best = least_at_every_size(groups)
    for budget in range(13):
        solution = optimal(groups, budget)
        check(groups, budget, solution)
        assert solution.distortion == pytest.approx(best[budget], rel=1e-12)


GOOD = mode([[1, 2]], [[1.0, 0.0]])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "`groups` to hold at least one mode each but got []"),
        ([[GOOD], []], "`groups` to hold at least one mode each but got [1, 0]"),
        ([[mode([[1, 2]], [[1.0]])]], "`stored` and `distortion` of group 0 to be of one shape"),
        ([[Mode(np.zeros((0, 2), np.int64), np.zeros((0, 2)))]], "not empty, but got (0, 2) and (0, 2)"),
        ([[Mode(np.zeros(2, np.int64), np.zeros(2))]], "(units, options), not empty, but got (2,) and (2,)"),
        ([[GOOD, mode([[1]] * 2, [[1.0]] * 2)]], "as many units in every mode but got 1, 2"),
        ([[Mode(np.ones((1, 1)), np.ones((1, 1)))]], "`stored` of group 0 to be integers but got float64"),
        ([[mode([[-1]], [[1.0]])]], "`base` and `stored` of group 0 to be at least 0 but got 0 and -1"),
        ([[GOOD], [mode([[1]], [[1.0]], base=-2)]], "`base` and `stored` of group 1 to be at least 0 but got -2 and 1"),
        (
            [[mode([[1, 2]], [[1.0, np.nan]])]],
            "`distortion` of group 0 to be finite, or inf if not allowed, but got NaN",
        ),
        ([[mode([[1, 2]], [[1.0, -np.inf]])]], "but got NaN or -inf"),
        ([[GOOD], [mode([[1], [1]], [[1.0], [np.inf]])]], "`distortion` of group 1 to allow every unit an option"),
    ],
)
def test_what_is_not_a_model(groups: Groups, message: str) -> None:
    for solve in (feasible_range, lambda groups: optimal(groups, 10)):
        with pytest.raises(ValueError, match="Expected ") as caught:
            solve(groups)
        assert message in str(caught.value)
