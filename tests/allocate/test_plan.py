"""Plans: order, layout and bytes."""

from dataclasses import replace

import pytest
import torch

from mpfx.allocate import GroupPlan, confined_order, is_free, stored_bits_per_weight
from mpfx.graph import PermutationFold
from mpfx.nn import permutation_bytes
from mpfx.passes import solve_group
from mpfx.solve import GridConfig, Sparsity
from mpfx.stats import MomentAccumulator


def plan(bits: list[int], *, activation_order: bool = True, sparsity: str | None = None, rows: int = 40) -> GroupPlan:
    return GroupPlan(
        name="a",
        rows={"a": rows, "b": 2 * rows},
        bits=torch.tensor(bits, dtype=torch.uint8),
        sparsity=Sparsity.parse(sparsity),
        activation_order=activation_order,
        grid=GridConfig(),
    )


def test_order_is_by_width_then_activation() -> None:
    mixed = plan([2] * 32 + [4] * 32)
    activation = torch.arange(64.0)
    order = mixed.order(activation)
    assert order is not None
    assert order.tolist() == [*range(63, 31, -1), *range(31, -1, -1)]
    natural = plan([2] * 32 + [4] * 32, activation_order=False).order(activation)
    assert natural is not None
    assert natural.tolist() == [*range(32, 64), *range(32)]
    assert mixed.layout.widths == (4, 2)


def test_nothing_is_permuted_where_nothing_has_to_be() -> None:
    uniform = plan([4] * 64, activation_order=False)
    assert uniform.order(torch.rand(64)) is None
    assert not uniform.permuted
    assert uniform.stored_bytes() + permutation_bytes(64) == plan([4] * 64).stored_bytes()


@pytest.mark.parametrize("sparsity", [None, "0.5", "0.37", "2:4"])
@pytest.mark.parametrize("bits", [[4] * 128, [8] * 32 + [3] * 64 + [2] * 32, [5] * 96 + [1] * 8])
def test_bytes_are_those_of_the_solved_weights(sparsity: str | None, bits: list[int]) -> None:
    decided, generator = plan(bits, sparsity=sparsity), torch.Generator().manual_seed(0)
    accumulator = MomentAccumulator(len(bits))
    accumulator.update(torch.randn(500, len(bits), generator=generator))
    weights = {path: torch.randn(rows, len(bits), generator=generator) for path, rows in decided.rows.items()}
    weights["b"] *= 2  # so that the shared mask takes more of one site than of the other
    solved = solve_group(decided, weights, accumulator.finalise())
    if sparsity is None:
        assert solved.stored_bytes == decided.stored_bytes()
    else:  # at most, and not over by more than two blocks of 32 codes a site and width
        block = sum(4 * width for width in {*bits}) * len(weights)
        assert 0 <= decided.stored_bytes() - solved.stored_bytes <= 2 * block
    assert decided.code_bits == sum(bits) / len(bits)
    assert stored_bits_per_weight([decided]) == 8 * decided.stored_bytes() / (120 * len(bits))


def fold_of(unit: list[int], image: list[int], cell: list[int]) -> PermutationFold:
    return PermutationFold(
        sites=("a", "b"),
        unit=torch.tensor(unit),
        image=torch.tensor(image),
        cell=torch.tensor(cell),
        producers=(("p", torch.arange(len(cell))),),
        out_features=(len(cell),),
    )


def test_confined_channels_stay_in_their_cell_and_copies_move_together() -> None:
    """Two cells of two units; every cell has two images, as heads that share their values."""
    fold = fold_of([0, 1, 0, 1, 2, 3, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1])
    score = torch.tensor([1.0, 2.0, 5.0, 1.0, 1.0, 9.0, 1.0, 0.0])
    assert confined_order(fold, score).tolist() == [0, 1, 2, 3, 5, 4, 7, 6]  # 6 > 3 and 9 > 2, though 2 > 1
    assert not is_free(fold)
    assert is_free(fold_of([0, 1], [0, 0], [0, 0]))
    assert not is_free(fold_of([0, 0], [0, 1], [0]))  # two channels of one unit cannot go their own ways


def test_a_folded_order_costs_nothing() -> None:
    free = fold_of([*range(64)], [0] * 64, [0] * 64)
    decided = plan([4] * 32 + [2] * 32)
    folded = replace(decided, fold=free)
    assert folded.stored_bytes() == decided.stored_bytes() - permutation_bytes(64)
    activation = torch.rand(64)
    ours, theirs = folded.order(activation), decided.order(activation)
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours, theirs)
    assert folded.layout == decided.layout


def test_a_confined_plan_keeps_its_arrangement() -> None:
    heads = fold_of([*range(128)], [i // 64 for i in range(128)], [i // 64 for i in range(128)])
    uniform = replace(plan([4] * 128), fold=heads)
    order = uniform.order(torch.arange(128.0))
    assert order is not None
    assert order.tolist() == [*range(63, -1, -1), *range(127, 63, -1)]
    arrangement = torch.tensor([*range(32, 64), *range(32), *range(64, 128)])
    mixed = replace(plan([2] * 32 + [4] * 64 + [8] * 32), fold=heads, arrangement=arrangement)
    assert mixed.layout.widths == (4, 2, 4, 8)
    kept = mixed.order(torch.rand(128))
    assert kept is not None
    assert torch.equal(kept, arrangement)
    assert not replace(plan([4] * 128, activation_order=False), fold=heads).permuted
