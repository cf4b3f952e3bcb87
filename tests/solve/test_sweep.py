"""The sweep against exact least squares and a naive implementation in float64."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from mpfx.nn import Layout, QuantizedWeight
from mpfx.solve import GridConfig, Sparsity, factorise, layer_error, sweep


def problem(rows: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.logspace(0, -2, channels, dtype=torch.float64)
    mixing = spectrum[:, None] * torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    x = torch.randn(8 * channels, channels, generator=generator, dtype=torch.float64) @ mixing
    h = 2 / len(x) * x.t() @ x
    h += 0.001 * h.diagonal().mean() * torch.eye(channels, dtype=torch.float64)
    return torch.randn(rows, channels, generator=generator), h.float()


def upper_of(h: Tensor) -> Tensor:
    return factorise(h.double().float(), 1e-9).upper


def naive(weight: Tensor, h: Tensor, solved: QuantizedWeight) -> Tensor:
    """Remove one channel after the other from an explicit inverse, on the grids and mask that were chosen."""
    w, inverse = weight.double().numpy().copy(), np.linalg.inv(h.double().numpy())
    grid = {c: g for g, group in enumerate(solved.layout.groups) for c in range(group.start, group.stop)}
    for j in range(w.shape[1]):
        group = solved.layout.groups[grid[j]]
        scale, zero = solved.scales[:, grid[j]].double().numpy(), np.full(len(w), 2.0 ** (group.bits - 1))
        if solved.zeros is not None:
            zero = solved.zeros[:, grid[j]].double().numpy()
        q = (np.clip(np.round(w[:, j] / scale) + zero, 0, 2**group.bits - 1) - zero) * scale
        if solved.kept is not None:
            q = np.where(solved.kept[:, j].numpy(), q, 0.0)
        w -= np.outer((w[:, j] - q) / inverse[j, j], inverse[j])
        w[:, j] = q
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.from_numpy(w)


@pytest.mark.parametrize("widths", [(4, 4, 4), (8, 4, 2), (3, 3, 1)])
@pytest.mark.parametrize("sparsity", [None, 0.5, "2:4"])
@pytest.mark.parametrize("config", [GridConfig(), GridConfig(symmetric=True), GridConfig(group_size=None)])
def test_agrees_with_naive_elimination(
    widths: tuple[int, ...], sparsity: float | str | None, config: GridConfig
) -> None:
    weight, h = problem(5, 80)
    solved = sweep(weight, upper_of(h), Layout(80, widths, config.group_size), config, Sparsity.parse(sparsity))
    off = (solved.dequantize().double() - naive(weight, h, solved)).abs()
    # A value within float32's error of the middle between two codes may fall on either side, and is then made up for.
    assert float((off > 1e-4).double().mean()) < 0.02
    error = layer_error(weight.double(), solved.dequantize().double(), h.double())
    assert error == pytest.approx(layer_error(weight.double(), naive(weight, h, solved), h.double()), rel=0.02)


def test_long_sweeps_carry_errors_across_panels() -> None:
    weight, h = problem(3, 300, seed=4)
    solved = sweep(weight, upper_of(h), Layout(300, (4,) * 10), GridConfig(), Sparsity(0.5))
    assert float((solved.dequantize().double() - naive(weight, h, solved)).abs().median()) < 1e-5


def test_what_is_left_is_the_exact_least_squares_solution() -> None:
    """After the first channels are rounded, those kept raw solve the least squares problem that is left, to float16."""
    weight, h = problem(6, 96)
    solved = sweep(weight, upper_of(h), Layout(96, (3, 16, 16)), GridConfig())
    after, first = solved.dequantize().double(), slice(0, 32)
    change = weight[:, first].double() - after[:, first]
    rest = weight[:, 32:].double() + torch.from_numpy(
        scipy.linalg.solve(h[32:, 32:].double().numpy(), h[32:, first].double().numpy() @ change.t().numpy()).T
    )
    torch.testing.assert_close(after[:, 32:], rest, rtol=2e-3, atol=2e-3)


def test_pruned_first_channels_leave_the_exact_least_squares_solution() -> None:
    """With the pruned weights first in the order, the surviving ones are the best that survivors can be."""
    weight, h = problem(4, 64)
    weight[:, :32] *= 1e-3  # the least salient half
    solved = sweep(weight, upper_of(h), Layout(64, (16, 16)), GridConfig(), Sparsity(0.5))
    assert solved.kept is not None
    assert not bool(solved.kept[:, :32].any())
    chol = np.linalg.cholesky(h.double().numpy()).T  # rows of a design whose Gram matrix is H
    for row in range(4):
        best, *_ = np.linalg.lstsq(chol[:, 32:], chol @ weight[row].double().numpy(), rcond=None)
        np.testing.assert_allclose(solved.dequantize()[row, 32:].numpy(), best, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_beats_rounding_to_nearest(bits: int, scale: float) -> None:
    weight, h = problem(32, 128, seed=bits)
    weight *= scale
    layout = Layout(128, (bits,) * 4)
    ours = sweep(weight, upper_of(h), layout, GridConfig()).dequantize()
    nearest = sweep(weight, torch.eye(128), layout, GridConfig()).dequantize()  # identity: no compensation
    assert layer_error(weight, ours, h) < 0.6 * layer_error(weight, nearest, h)


def test_beats_magnitude_pruning_and_stays_above_least_squares() -> None:
    weight, h = problem(8, 64)
    solved = sweep(weight, upper_of(h), Layout(64, (16, 16)), GridConfig(), Sparsity(0.5))
    assert solved.kept is not None
    magnitude = weight * (weight.abs() > weight.abs().median())
    assert layer_error(weight, solved.dequantize(), h) < 0.7 * layer_error(weight, magnitude, h)
    chol = torch.linalg.cholesky(h.double()).t()
    best = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(solved.kept):
        best[row, kept] = torch.linalg.lstsq(chol[:, kept], (chol @ weight[row].double())[:, None]).solution[:, 0]
    assert layer_error(weight.double(), best, h.double()) <= layer_error(weight, solved.dequantize(), h) * 1.001


def test_the_mask_is_the_lowest_saliency_of_the_panel() -> None:
    weight, h = problem(7, 64)
    upper = upper_of(h)
    solved = sweep(weight, upper, Layout(64, (4, 4)), GridConfig(), Sparsity(0.25))
    saliency = (weight / upper.diagonal()).square()
    assert solved.kept is not None
    assert torch.equal(~solved.kept, saliency < saliency.flatten().sort().values[7 * 16])


@pytest.mark.parametrize("sparsity", [0.3, "2:4", "1:8"])
@pytest.mark.parametrize("widths", [(4, 4, 4, 4), (8, 4, 3, 16)])
def test_masked_weights_are_exactly_zero(sparsity: float | str, widths: tuple[int, ...]) -> None:
    weight, h = problem(9, 128)
    pattern = Sparsity.parse(sparsity)
    solved = sweep(weight, upper_of(h), Layout(128, widths), GridConfig(), pattern)
    assert solved.kept is not None
    assert bool((solved.dequantize()[~solved.kept] == 0).all())
    assert int((~solved.kept).sum()) == sum(pattern.pruned(9, p.channels) for p in solved.layout.panels)


def test_the_given_weight_is_not_changed() -> None:
    weight, h = problem(3, 64)
    for given in (weight, weight.t().contiguous().t()):  # also where the transpose is no copy
        before = given.clone()
        sweep(given, upper_of(h), Layout(64, (4, 4)), GridConfig(), Sparsity(0.5))
        assert torch.equal(given, before)


def test_raw_channels_are_float16_values() -> None:
    weight, h = problem(4, 32)
    solved = sweep(weight, upper_of(h), Layout(32, (16,)), GridConfig())
    assert torch.equal(solved.dequantize().half().float(), solved.dequantize())
    torch.testing.assert_close(solved.dequantize(), weight, rtol=2e-2, atol=2e-2)
    assert solved.scales.shape == (4, 0)


def test_layer_error_by_hand() -> None:
    weight, solved = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    h = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    assert layer_error(weight, solved, h) == pytest.approx(4 / (16 + 2 * 2 + 2))
    assert layer_error(torch.zeros(1, 2), torch.zeros(1, 2), h) == 0
