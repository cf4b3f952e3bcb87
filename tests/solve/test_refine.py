"""Refinement against brute force in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from mpfx.nn import Layout, QuantizedWeight, decoded, pack, unpack
from mpfx.solve import GridConfig, Sparsity, factorise, layer_error, measured_refine, refine, sweep

DAMPING = 0.01


def problem(rows: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.logspace(0, -2, channels)[:, None] * torch.randn(channels, channels, generator=generator)
    x = torch.randn(8 * channels, channels, generator=generator) @ mixing
    return torch.randn(rows, channels, generator=generator), 2 / len(x) * x.t() @ x


def damped(h: Tensor, damping: float = DAMPING) -> Tensor:
    return h.double() + damping * h.double().diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def objective(weight: Tensor, solved: QuantizedWeight, h: Tensor, damping: float = DAMPING) -> float:
    off = weight.double() - solved.dequantize().double()
    return float(((off @ damped(h, damping)) * off).sum())


def values_of(solved: QuantizedWeight, row: int, channel: int) -> Tensor | None:
    """All values that a weight can take, float64; None for raw channels."""
    grids = solved.layout.grids
    for index, group in enumerate(grids):
        if group.start <= channel < group.stop:
            zero = 2.0 ** (group.bits - 1) if solved.zeros is None else float(solved.zeros[row, index])
            scale = decoded(solved.scales, solved.layout)[row, index].double()
            return (torch.arange(2**group.bits, dtype=torch.float64) - zero) * scale
    return None


def brute_force(weight: Tensor, solved: QuantizedWeight, h: Tensor) -> Tensor:
    """One cycle of coordinate descent, every value of every weight tried."""
    after, hessian = solved.dequantize().double(), damped(h)
    for row in range(len(weight)):
        for j in range(weight.shape[1]):
            values = values_of(solved, row, j)
            if values is None or (solved.kept is not None and not bool(solved.kept[row, j])):
                continue
            off = (weight[row].double() - after[row]).repeat(len(values), 1)
            off[:, j] = weight[row, j].double() - values
            after[row, j] = values[((off @ hessian) * off).sum(1).argmin()]
    return after


def solve(
    weight: Tensor, h: Tensor, widths: tuple[int, ...], sparsity: str | float | None, grid: GridConfig
) -> QuantizedWeight:
    layout = Layout(weight.shape[1], widths, grid.group_size)
    return sweep(weight, factorise(h, DAMPING).upper, layout, grid, Sparsity.parse(sparsity))


@pytest.mark.parametrize("widths", [(2, 3, 2, 1, 3), (3, 0, 2, 0, 2), (4,) * 5])
@pytest.mark.parametrize("sparsity", [None, 0.5, "2:4"])
@pytest.mark.parametrize("grid", [GridConfig(), GridConfig(symmetric=True), GridConfig(scale_bits=16)])
def test_one_pass_is_brute_force(widths: tuple[int, ...], sparsity: str | float | None, grid: GridConfig) -> None:
    weight, h = problem(4, 150)
    solved = solve(weight, h, widths, sparsity, grid)
    expected, found = brute_force(weight, solved, h), refine(weight, solved, h, DAMPING)
    off = (found.dequantize().double() - expected).abs()
    assert float((off > 1e-4).double().mean()) < 0.01  # a tie within float32's error falls on either side
    left = weight.double() - expected
    assert objective(weight, found, h) == pytest.approx(float(((left @ damped(h)) * left).sum()), rel=0.01)
    assert float((found.codes != solved.codes).double().mean()) > 0.005  # there was something to do


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("widths", [(3,) * 9, (4, 4, 4, 4, 4, 2, 2, 0, 16)])
@pytest.mark.parametrize("sparsity", [None, 0.5, "2:4"])
def test_the_objective_never_grows(scale: float, widths: tuple[int, ...], sparsity: str | float | None) -> None:
    weight, h = problem(24, 270, seed=1)
    weight, h = weight * scale, h * 1e-4
    solved = solve(weight, h, widths, sparsity, GridConfig())
    errors = [objective(weight, refine(weight, solved, h, DAMPING, passes), h) for passes in range(5)]
    assert errors[0] == pytest.approx(objective(weight, solved, h))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[1] < errors[0] * (0.9 if sparsity else 0.999)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("passes", [1, 3])
def test_it_tells_by_how_much_every_row_gains(scale: float, passes: int) -> None:
    weight, h = problem(24, 270)
    weight = weight * scale
    solved = solve(weight, h, (4, 4, 4, 4, 4, 2, 2, 0, 16), 0.5, GridConfig())
    refined, lowered = measured_refine(weight, solved, h, DAMPING, passes)
    before, after = (weight.double() - part.dequantize().double() for part in (solved, refined))
    gained = ((before @ damped(h)) * before).sum(1) - ((after @ damped(h)) * after).sum(1)
    torch.testing.assert_close(lowered, gained, rtol=1e-4, atol=0)


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
@pytest.mark.parametrize("bits", [3, 4])
def test_sparse_layers_gain_a_tenth(sparsity: str | float, bits: int) -> None:
    weight, h = problem(64, 256, seed=bits)
    solved = solve(weight, h, (bits,) * 8, sparsity, GridConfig())
    refined = refine(weight, solved, h, DAMPING)
    assert layer_error(weight, refined.dequantize(), h) < 0.9 * layer_error(weight, solved.dequantize(), h)


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_only_codes_change(sparsity: float | None) -> None:
    weight, h = problem(8, 160)
    solved = solve(weight, h, (4, 0, 16, 3, 2), sparsity, GridConfig())
    arguments = weight.clone(), solved.codes.clone(), h.clone()
    refined = refine(weight, solved, h, DAMPING, 3)
    assert all(torch.equal(a, b) for a, b in zip(arguments, (weight, solved.codes, h), strict=True))
    assert not torch.equal(refined.codes, solved.codes)
    assert refined.scales is solved.scales
    assert refined.zeros is solved.zeros
    assert refined.kept is solved.kept
    after = refined.dequantize()
    assert torch.equal(after[:, 32:64], torch.zeros(8, 32))
    if refined.kept is not None:
        assert bool((after[~refined.kept] == 0).all())
        assert bool((refined.codes[~refined.kept] == 0).all())
    assert torch.equal(unpack(pack(refined)).dequantize(), after)
    assert pack(refined).nbytes == pack(solved).nbytes


def test_raw_channels_reach_least_squares() -> None:
    """Coordinate descent over what survives of float16 values ends at the least squares solution, to float16."""
    weight, h = problem(4, 64)
    h = damped(h, 0.1).float()
    solved = sweep(weight, factorise(h, 1e-6).upper, Layout(64, (16, 16)), GridConfig(), Sparsity(0.5))
    refined = refine(weight, solved, h, 0.0, 200)
    assert refined.kept is not None
    root = np.linalg.cholesky(h.double().numpy()).T
    for row, kept in enumerate(refined.kept.numpy()):
        best, *_ = np.linalg.lstsq(root[:, kept], root @ weight[row].double().numpy(), rcond=None)
        np.testing.assert_allclose(refined.dequantize()[row, kept].numpy(), best, rtol=5e-3, atol=5e-3)


def test_raw_values_stay_finite() -> None:
    weight = torch.full((2, 32), 6.5e4)
    solved = sweep(weight, torch.eye(32), Layout(32, (16,)), GridConfig())
    refined = refine(weight * 100, solved, torch.eye(32))
    assert refined.dequantize().unique().tolist() == [65504.0]


def test_channels_without_input_stay() -> None:
    weight, h = problem(5, 64)
    h[7], h[:, 7] = 0, 0
    solved = solve(weight, h, (3, 3), 0.5, GridConfig())
    refined = refine(weight, solved, h, 0.0, 2)
    assert torch.equal(refined.codes[:, 7], solved.codes[:, 7])
    assert objective(weight, refined, h, 0.0) < objective(weight, solved, h, 0.0)
    assert torch.equal(refine(weight, solved, h * 0, DAMPING).codes, solved.codes)


def test_a_weight_that_is_left_out_stays_so() -> None:
    weight, h = problem(5, 64)
    solved = solve(weight, h, (0, 0), 0.5, GridConfig())
    assert torch.equal(refine(weight, solved, h).dequantize(), torch.zeros(5, 64))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    weight, h = problem(16, 160)
    solved = solve(weight, h, (4, 0, 16, 3, 2), 0.5, GridConfig())
    on_gpu = sweep(weight.cuda(), factorise(h.cuda(), DAMPING).upper, solved.layout, GridConfig(), Sparsity(0.5))
    refined = refine(weight.cuda(), on_gpu, h.cuda(), DAMPING, 2)
    assert layer_error(weight, refined.dequantize().cpu(), h) == pytest.approx(
        layer_error(weight, refine(weight, solved, h, DAMPING, 2).dequantize(), h), rel=0.05
    )
