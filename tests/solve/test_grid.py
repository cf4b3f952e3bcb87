"""Grids: exact on grid points, optimal against brute force, scale-sensitive."""

import pytest
import torch

from mpfx.solve import GridConfig, fit_grid


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_points_of_a_grid_survive(bits: int, symmetric: bool) -> None:
    top = 2**bits - 1
    zero = 2 ** (bits - 1) if symmetric else min(1, top)
    codes = torch.arange(2**bits, dtype=torch.float32)[:, None]
    weight = (codes - zero) * 0.25
    config = GridConfig(symmetric=symmetric)
    grid = fit_grid(weight, bits, config)
    if symmetric:  # min and max: the range of a symmetric grid is twice the larger side
        assert float(grid.scale) <= 2 * 0.25 * zero / top + 1e-6
        assert torch.equal(grid.zero, torch.tensor([float(zero)]))
    else:
        assert torch.equal(grid.dequantize(grid.quantize(weight)), weight)


def test_no_finer_search_over_ranges_does_much_better() -> None:
    weight = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    grid = fit_grid(weight, 3, GridConfig())
    ours = (grid.dequantize(grid.quantize(weight)) - weight).abs().pow(2.4).sum(0)
    low, high = weight.amin(0), weight.amax(0)
    zero = (-low / (high - low) * 7).round()
    best = torch.full((5,), float("inf"))
    for shrink in torch.linspace(0.3, 1.0, 400):
        scale = (high - low) * shrink / 7
        back = ((weight / scale).round() + zero).clamp(0, 7).sub(zero) * scale
        best = torch.minimum(best, (back - weight).abs().pow(2.4).sum(0))
    assert bool((ours <= 1.03 * best).all())


def test_the_search_never_loses_to_min_and_max() -> None:
    weight = torch.randn(64, 200, generator=torch.Generator().manual_seed(1))
    errors = []
    for search in (True, False):
        grid = fit_grid(weight, 2, GridConfig(clip_search=search))
        errors.append((grid.dequantize(grid.quantize(weight)) - weight).abs().pow(2.4).sum(0))
    assert bool((errors[0] <= errors[1]).all())
    assert float(errors[0].sum()) < 0.8 * float(errors[1].sum())


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e4])
def test_scales_are_float16_values_and_zero_stays_zero(scale: float) -> None:
    weight = torch.randn(64, 7, generator=torch.Generator().manual_seed(2)) * scale
    weight[3] = 0
    grid = fit_grid(weight, 4, GridConfig())
    assert torch.equal(grid.scale.half().float(), grid.scale)
    assert bool((grid.dequantize(grid.quantize(weight))[3] == 0).all())
    if scale > 1e-6:
        relative = (grid.dequantize(grid.quantize(weight)) - weight).norm() / weight.norm()
        assert float(relative) < 0.15


def test_all_zero_weights_stay_zero() -> None:
    grid = fit_grid(torch.zeros(32, 2), 4, GridConfig())
    assert bool((grid.dequantize(grid.quantize(torch.zeros(32, 2))) == 0).all())


@pytest.mark.parametrize(("value", "message"), [(1e7, "float16 scale"), (float("inf"), "scale"), (float("nan"), "NaN")])
def test_weights_that_no_grid_can_hold_are_refused(value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_grid(torch.full((32, 2), value), 4, GridConfig())


@pytest.mark.parametrize("group", [0, 16, 48, -64])
def test_impossible_group_sizes_are_refused(group: int) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        GridConfig(group_size=group)
