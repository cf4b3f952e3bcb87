"""The sweep against exact least squares and a naive implementation in float64."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from mpfx.nn import CodedScales, Layout, QuantizedWeight, decoded, pack, unpack
from mpfx.solve import GridConfig, Sparsity, factorise, layer_error, measured_sweep, sweep
from mpfx.solve.grid import fit_grid


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
    grid = {c: g for g, group in enumerate(solved.layout.grids) for c in range(group.start, group.stop)}
    scales = decoded(solved.scales, solved.layout).double().numpy()
    for j in range(w.shape[1]):
        q = np.zeros(len(w))
        if j in grid:
            bits, scale = solved.layout.grids[grid[j]].bits, scales[:, grid[j]]
            zero = np.full(len(w), 2.0 ** (bits - 1))
            if solved.zeros is not None:
                zero = solved.zeros[:, grid[j]].double().numpy()
            q = (np.clip(np.round(w[:, j] / scale) + zero, 0, 2**bits - 1) - zero) * scale
        if solved.kept is not None:
            q = np.where(solved.kept[:, j].numpy(), q, 0.0)
        w -= np.outer((w[:, j] - q) / inverse[j, j], inverse[j])
        w[:, j] = q
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.from_numpy(w)


CONFIGS = [
    GridConfig(),
    GridConfig(symmetric=True),
    GridConfig(scale_bits=16),
    GridConfig(group_size=None, scale_bits=16),
]


@pytest.mark.parametrize("widths", [(4, 4, 4), (8, 4, 2), (3, 3, 1), (4, 0, 3), (0, 3, 3)])
@pytest.mark.parametrize("sparsity", [None, 0.5, "2:4"])
@pytest.mark.parametrize("config", CONFIGS)
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
    solved = sweep(weight, upper_of(h), Layout(300, (4, 4, 0, 0, *(4,) * 6)), GridConfig(), Sparsity(0.5))
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


def test_left_out_channels_leave_the_exact_least_squares_solution() -> None:
    """Leaving channels out is pruning them: channels kept raw take over what they can, to float16."""
    weight, h = problem(6, 96, seed=1)
    solved = sweep(weight, upper_of(h), Layout(96, (0, 16, 16)), GridConfig())
    after = solved.dequantize().double()
    assert torch.equal(after[:, :32], torch.zeros(6, 32, dtype=torch.float64))
    gain = scipy.linalg.solve(h[32:, 32:].double().numpy(), h[32:, :32].double().numpy())
    rest = weight[:, 32:].double() + weight[:, :32].double() @ torch.from_numpy(gain).t()
    torch.testing.assert_close(after[:, 32:], rest, rtol=2e-3, atol=2e-3)
    assert float((after[:, 32:] - weight[:, 32:]).abs().max()) > 0.1  # there was something to take over


@pytest.mark.parametrize("sparsity", [None, 0.5, "2:4"])
@pytest.mark.parametrize("scale_bits", [4, 16])
def test_a_weight_that_is_left_out_as_a_whole(sparsity: float | str | None, scale_bits: int) -> None:
    weight, h = problem(5, 80)
    grid = GridConfig(scale_bits=scale_bits)
    solved = sweep(weight, upper_of(h), Layout(80, (0, 0, 0)), grid, Sparsity.parse(sparsity))
    back = unpack(pack(solved))
    for part in (solved, back):
        assert torch.equal(part.dequantize(), torch.zeros(5, 80))
        assert part.kept is None or not bool(part.kept.any())
    assert (solved.kept is None) == (sparsity is None)


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_masks_keep_nothing_of_what_is_left_out(sparsity: float | str) -> None:
    weight, h = problem(5, 128)
    pattern = Sparsity.parse(sparsity)
    solved = sweep(weight, upper_of(h), Layout(128, (4, 0, 0, 4)), GridConfig(), pattern)
    assert solved.kept is not None
    assert not bool(solved.kept[:, 32:96].any())
    for inside in (slice(0, 32), slice(96, 128)):
        assert int((~solved.kept[:, inside]).sum()) == pattern.pruned(5, 32)
    assert torch.equal(unpack(pack(solved)).dequantize(), solved.dequantize())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sparsity", [None, 0.5])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e3])
def test_coded_scales_lose_next_to_nothing(bits: int, sparsity: float | None, symmetric: bool, scale: float) -> None:
    weight, h = problem(64, 256, seed=bits)
    weight *= scale * torch.linspace(-2, 2, 64).exp()[:, None] * torch.linspace(-1, 1, 256).exp()
    layout, errors, sizes = Layout(256, (bits,) * 8), [], []
    for scale_bits in (4, 16):
        grid = GridConfig(scale_bits=scale_bits, symmetric=symmetric)
        solved = sweep(weight, upper_of(h), layout, grid, Sparsity.parse(sparsity))
        errors.append(layer_error(weight, solved.dequantize(), h))
        sizes.append(solved.scales.nbytes)
    assert errors[0] < 1.15 * errors[1]
    assert sizes[0] == 4 * (64 * 4 // 8) + 2 * 64 + 2 * 4  # of four groups


def test_coded_scales_have_room_for_what_compensation_adds() -> None:
    weight, h = problem(16, 128, seed=3)
    errors = [
        layer_error(weight, sweep(weight, upper_of(h), Layout(128, (0, 8, 8, 8), 32), grid).dequantize(), h)
        for grid in (GridConfig(group_size=32), GridConfig(group_size=32, scale_bits=16))
    ]
    assert errors[0] < 1.2 * errors[1]


def test_groups_that_are_all_zero() -> None:
    weight, h = problem(8, 128)
    weight[:, 64:] = 0
    weight[3] = 0
    solved = sweep(weight, upper_of(h), Layout(128, (4,) * 4), GridConfig())
    assert isinstance(solved.scales, CodedScales)
    assert bool((solved.scales.row > 0).all())
    assert bool((solved.scales.group > 0).all())
    assert torch.equal(solved.dequantize()[3], torch.zeros(128))
    error = layer_error(weight, solved.dequantize(), h)
    assert error < 1.1 * layer_error(
        weight, sweep(weight, upper_of(h), Layout(128, (4,) * 4), GridConfig(scale_bits=16)).dequantize(), h
    )
    nothing = sweep(weight * 0, upper_of(h), Layout(128, (4,) * 4), GridConfig())
    assert torch.equal(nothing.dequantize(), torch.zeros(8, 128))


@pytest.mark.parametrize(
    ("value", "message"), [(1e7, "float16 scale"), (float("inf"), "infinity"), (float("nan"), "NaN")]
)
@pytest.mark.parametrize("scale_bits", [4, 16])
def test_weights_that_no_grid_can_hold_are_refused(value: float, message: str, scale_bits: int) -> None:
    weight, h = problem(8, 64)
    for row in (slice(None), 5):
        damaged = weight.clone()
        damaged[row, 40] = value
        with pytest.raises(ValueError, match=message):
            sweep(damaged, upper_of(h), Layout(64, (4, 4)), GridConfig(scale_bits=scale_bits))


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
    assert decoded(solved.scales, solved.layout).shape == (4, 0)


def test_layer_error_by_hand() -> None:
    weight, solved = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    h = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    assert layer_error(weight, solved, h) == pytest.approx(4 / (16 + 2 * 2 + 2))
    assert layer_error(torch.zeros(1, 2), torch.zeros(1, 2), h) == 0


@pytest.mark.parametrize("widths", [(4,) * 10, (8, 3, 3, 2, 0, 16, 4, 4, 1, 0)])
@pytest.mark.parametrize("sparsity", [None, 0.5, "2:4"])
@pytest.mark.parametrize("group_size", [64, 160])
@pytest.mark.parametrize("damping", [0.01, 1e-5])
def test_a_sweep_knows_the_error_of_every_row(
    widths: tuple[int, ...], sparsity: float | str | None, group_size: int, damping: float
) -> None:
    weight, h = problem(24, 293)
    weight[7] *= 100
    factor = factorise(h, damping)
    layout = Layout(293, widths, group_size)
    solved, damped = measured_sweep(weight, factor.upper, layout, GridConfig(), Sparsity.parse(sparsity))
    off, exact = weight.double() - solved.dequantize().double(), h.double() + factor.ridge * torch.eye(293)
    torch.testing.assert_close(damped, ((off @ exact) * off).sum(1), rtol=2e-4, atol=0)
    error = layer_error(weight.double(), solved.dequantize().double(), h.double())
    assert layer_error(weight, solved.dequantize(), h, damped, factor.ridge) == pytest.approx(error, rel=2e-4)


@pytest.mark.parametrize("loud", [1.0, 30.0, 1e3, 1e4])
def test_the_error_is_right_where_damping_makes_most_of_it(loud: float) -> None:
    """One direction of the input drowns all others, and with it the damping that goes by the mean diagonal."""
    weight, h = problem(24, 256)
    direction = torch.randn(256, generator=torch.Generator().manual_seed(1))
    h += (loud * direction).outer(loud * direction)
    factor = factorise(h, 0.01)
    solved, damped = measured_sweep(weight, factor.upper, Layout(256, (4,) * 8), GridConfig())
    error = layer_error(weight.double(), solved.dequantize().double(), h.double())
    assert layer_error(weight, solved.dequantize(), h, damped, factor.ridge) == pytest.approx(error, rel=3e-3)


def test_the_known_error_is_what_is_told() -> None:
    weight, solved, h = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    known = torch.tensor([8.5], dtype=torch.float64)
    assert layer_error(weight, solved, h, known, 0.5) == pytest.approx((8.5 - 0.5) / 22)  # not what a product gives
    assert layer_error(weight, solved, h, known, 8.4) == pytest.approx(4 / 22)  # where little is left of it
    assert layer_error(torch.zeros(1, 2), torch.zeros(1, 2), h * 0, known, 0.0) == 0


def test_a_group_longer_than_a_panel_is_fitted_on_weights_that_are_up_to_date() -> None:
    """It starts inside of a panel; all channels before it are made up for, which has a closed form."""
    weight, h = problem(64, 320)
    config, done = GridConfig(group_size=160, scale_bits=16), slice(0, 160)
    solved = sweep(weight, upper_of(h), Layout(320, (4,) * 10, 160), config)
    rest, exact = slice(160, 320), h.double()
    errors = (weight - solved.dequantize())[:, done].double()
    moved = weight[:, rest].double() + errors @ exact[done, rest] @ torch.linalg.inv(exact[rest, rest])
    expected = fit_grid(moved.t().float(), 4, config).scale
    alike = (decoded(solved.scales, solved.layout)[:, 1] / expected - 1).abs() < 2e-3
    assert float(alike.double().mean()) > 0.95
