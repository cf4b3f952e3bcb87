"""Later blocks make up for the error of earlier ones; refinement and guidance reach the solve."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpfx
from mpfx.allocate import GroupPlan
from mpfx.graph import bind_inputs, blocks
from mpfx.passes import (
    Allocate,
    CompressionConfig,
    PruneAndQuantize,
    SolveConfig,
    analysis,
    located,
    run_passes,
    solve_group,
    solved_groups,
)
from mpfx.passes.solve import corrected
from mpfx.solve import GridConfig, Sparsity, factorise
from mpfx.stats import MomentAccumulator


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(x)))
        return out


def residual_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), Block()).eval()


def test_only_what_reaches_past_other_sites_is_corrected() -> None:
    gm = mpfx.trace(residual_net(), (torch.randn(8, 32),))
    first, second, third = blocks(gm)
    assert first.direct == frozenset()
    assert second.direct == {"1.up"}
    assert third.direct == {"2.up"}


def test_a_linear_chain_has_only_direct_sites() -> None:
    torch.manual_seed(0)
    gm = mpfx.trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), (torch.randn(4, 8),))
    assert {path for block in blocks(gm) for path in block.direct} == {"2"}


def test_the_correction_is_the_least_squares_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator)
    y = x + 0.3 * torch.randn(500, 12, generator=generator) + 0.2 * x.roll(1, 1)
    weight, c = torch.randn(5, 12, generator=generator), torch.rand(500, generator=generator) + 0.1
    accumulator = MomentAccumulator(12)
    accumulator.update(x, c, y)
    moments = accumulator.finalise()
    upper = factorise(moments.hessian, 1e-6).upper
    root = c.sqrt()[:, None]
    fit = torch.linalg.lstsq((root * x).double(), (root * (y @ weight.t())).double()).solution.t()
    assert torch.allclose(corrected(weight, moments, upper, 1.0).double(), fit, rtol=1e-3, atol=1e-4)
    half = corrected(weight, moments, upper, 0.5)
    assert torch.allclose(half.double(), (weight.double() + fit) / 2, rtol=1e-3, atol=1e-4)


def compressed(net: nn.Module, x: Tensor, config: SolveConfig, bits: int = 2) -> Any:
    gm = run_passes(mpfx.trace(net, (x,)), analysis())
    batch = bind_inputs(gm, (x,))
    plan = CompressionConfig(code_bits=bits, allocation="fixed", grid=GridConfig(group_size=32))
    run_passes(gm, [Allocate(plan), PruneAndQuantize([batch], config)])
    return gm


def output(gm: Any, net: nn.Module, x: Tensor) -> Tensor:
    from mpfx.passes.solve import solved_weights

    with torch.no_grad(), solved_weights(gm, solved_groups(gm)):
        result: Tensor = net(x)
        return result


def test_a_corrected_layer_ends_nearer_to_the_dense_model() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval(), torch.randn(4096, 32)
    with torch.no_grad():
        dense = net(x)
    errors = {}
    for share in (0.0, 0.5, 1.0):
        gm = compressed(net, x, SolveConfig(correction=share))
        errors[share] = float((output(gm, net, x) - dense).norm() / dense.norm())
    assert errors[0.5] < 0.98 * errors[0.0]
    assert errors[1.0] < errors[0.5]  # nothing comes after it that would overshoot


def test_the_dense_model_is_untouched_by_a_corrected_solve() -> None:
    net, x = residual_net(), torch.randn(256, 32)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    compressed(net, x, SolveConfig(correction=0.5))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_refinement_lowers_the_error_of_a_pruned_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    accumulator = MomentAccumulator(64)
    accumulator.update(torch.randn(800, 64, generator=generator) @ torch.randn(64, 64, generator=generator))
    moments, weight = accumulator.finalise(), torch.randn(40, 64, generator=generator)
    plan = GroupPlan("w", {"w": 40}, torch.full((64,), 4, dtype=torch.uint8), Sparsity(0.5), True, GridConfig())
    errors = [
        solve_group(plan, {"w": weight}, moments, SolveConfig(refine=rounds)).relative_error["w"] for rounds in (0, 1)
    ]
    assert errors[1] < 0.95 * errors[0]


def test_sensitivities_of_other_calls_are_left_away_and_told_of() -> None:
    from mpfx.stats import Sensitivity

    net, x = residual_net(), torch.randn(64, 32)
    gm = run_passes(mpfx.trace(net, (x,)), analysis())
    batch = bind_inputs(gm, (x,))
    plan = CompressionConfig(code_bits=3, allocation="fixed")
    wrong = {group.name: Sensitivity.of([[torch.ones(63)]]) for group in located(gm)}
    solve = PruneAndQuantize([batch], SolveConfig(guidance=0.5), wrong)
    solved = solved_groups(run_passes(gm, [Allocate(plan), solve]))
    assert all("reads other tokens" in str(group.fallback) for group in solved)
    with pytest.raises(Exception, match="`strict` allows no fallback"):
        run_passes(gm, [Allocate(plan), replace(solve, strict=True)])
    with pytest.raises(Exception, match=r"sensitivities of 2 batches.* but got some of \[1\]"):
        run_passes(gm, [Allocate(plan), replace(solve, batches=[batch, batch])])
