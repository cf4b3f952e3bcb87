"""The plain loop: against rounding, and against what its steps are by definition."""

import pytest
import torch
from torch import Tensor

from mpfx.bench.plain import PlainHessian, plain_block, solve_plain
from mpfx.graph import bind_inputs, blocks, last_readers, trace


def correlated(tokens: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(channels, channels, generator=generator)
    return torch.randn(tokens, channels, generator=generator) @ (mix + 2 * torch.eye(channels))


def error(weight: Tensor, solved: Tensor, x: Tensor) -> float:
    return float((x @ (weight - solved).T).square().sum() / (x @ weight.T).square().sum())


def test_hessian_is_that_of_all_samples_at_once() -> None:
    x = correlated(60, 8)
    found = PlainHessian(8, x.device)
    for part in (x[:10], x[10:40].view(3, 10, 8), x[40:]):
        found.add(part)
    assert torch.allclose(found.hessian.double(), 2 / 60 * x.double().T @ x.double(), rtol=1e-4)


@pytest.mark.parametrize("channels", [64, 200])
def test_it_beats_rounding(channels: int) -> None:
    x, weight = correlated(400, channels), torch.randn(24, channels, generator=torch.Generator().manual_seed(1))
    hessian = 2 / 400 * x.T @ x
    rounded = solve_plain(weight, torch.eye(channels), 3, 64, 0.0)  # nothing to make up for
    solved = solve_plain(weight, hessian.clone(), 3, 64, 0.0)
    assert error(weight, solved, x) < 0.8 * error(weight, rounded, x)
    for row, group in ((0, 0), (5, 1), (23, 2)):
        values = solved[row].split(64)[min(group, -(-channels // 64) - 1)]
        assert len(values.unique()) <= 2**3
    pruned = solve_plain(weight, hessian.clone(), 8, 64, 0.5)
    assert float((pruned == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    masked = weight.masked_fill(weight.abs() <= weight.abs().median(), 0)
    assert error(weight, pruned, x) < 0.9 * error(weight, masked, x)


def test_a_block_is_solved_on_its_own_inputs(chain: torch.nn.Module) -> None:
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    gm = trace(chain, (x,))
    first, *_ = parts = blocks(gm)
    seen = {}

    def solve(weight: Tensor, hessian: Tensor) -> Tensor:
        seen[weight.shape] = hessian
        return 2 * weight

    gate = chain.get_submodule("0.gate").get_parameter("weight").clone()
    [after] = plain_block(gm, first, last_readers(parts), [bind_inputs(gm, (x,))], solve)
    rows = x.flatten(0, 1)
    assert torch.allclose(seen[gate.shape], 2 / 18 * rows.T @ rows, rtol=1e-4, atol=1e-6)
    assert torch.equal(chain.get_submodule("0.gate").get_parameter("weight"), 2 * gate)
    expected = chain.get_submodule("0")(x)
    assert any(torch.allclose(value, expected) for value in after.values())
