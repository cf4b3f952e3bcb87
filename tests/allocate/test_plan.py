"""Plans: order, layout and bytes."""

import pytest
import torch

from mpfx.allocate import GroupPlan, stored_bits_per_weight
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
