"""Grids: exact on grid points, optimal against brute force, scale-sensitive."""

import numpy as np
import pytest
import torch

from mpfx.nn import Layout
from mpfx.solve import Grid, GridConfig, fit_bases, fit_coded_grid, fit_grid


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


def test_row_scales_need_16_bits() -> None:
    with pytest.raises(ValueError, match=r"set grid\.scale_bits to 16"):
        GridConfig(group_size=None)
    assert GridConfig(group_size=None, scale_bits=16).scale_bits == 16
    for bits in (0, 3, 8):
        with pytest.raises(ValueError, match=r"`grid\.scale_bits` to be 4 or 16"):
            GridConfig(scale_bits=bits)


def ranges(weight: np.ndarray, symmetric: bool) -> np.ndarray:
    high, low = np.maximum(weight.max(0), 0), np.minimum(weight.min(0), 0)
    found: np.ndarray = 2 * np.maximum(high, -low) if symmetric else high - low
    return found


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("left_out", "headroom"), [(0, 0.75), (16, 0.25)])
def test_bases_are_those_of_the_definition(symmetric: bool, scale: float, left_out: int, headroom: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(224, 9, generator=generator) * scale * torch.linspace(-1, 1, 9).exp()
    layout = Layout(224, (4, 4, left_out, 16, 3, 3, 3), 64)
    bases = fit_bases(weight, layout, GridConfig(symmetric=symmetric))
    grids = [(0, 64), (128, 192), (192, 224)]
    octaves = np.log2([ranges(weight[a:b].double().numpy(), symmetric) for a, b in grids])
    group = 2 ** np.median(octaves, 1)
    np.testing.assert_allclose(bases.group.numpy(), group, rtol=1e-3)
    row = 2 ** ((octaves - np.log2(bases.group.double().numpy())[:, None]).max(0) + headroom)
    np.testing.assert_allclose(bases.row.numpy(), row, rtol=1e-3)
    for part in (bases.row, bases.group):
        assert torch.equal(part.half().float(), part)
    for grid, span in enumerate(2**octaves):
        assert bool((bases.product(grid).numpy() > 0.998 * 2**headroom * span).all())


def coded_errors(weight: torch.Tensor, bits: int, base: torch.Tensor, symmetric: bool) -> np.ndarray:
    """The error of every code for every row, ``(rows, 16)``, in float64."""
    w, top = weight.double().numpy(), 2**bits - 1
    low, span = np.minimum(w.min(0), 0), ranges(w, symmetric)
    errors = []
    for code in range(16):
        full = base.double().numpy() * 2 ** (-code / 4)
        share, scale = full / span, full / top
        zero = np.full(w.shape[1], 2.0 ** (bits - 1)) if symmetric else np.clip(np.round(-low * share / scale), 0, top)
        back = (np.clip(np.round(w / scale) + zero, 0, top) - zero) * scale
        errors.append((np.abs(back - w) ** 2.4).sum(0))
    return np.stack(errors, 1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_best_of_the_codes_is_found(bits: int, symmetric: bool, scale: float) -> None:
    weight = torch.randn(64, 40, generator=torch.Generator().manual_seed(bits)) * scale
    config = GridConfig(symmetric=symmetric)
    base = torch.from_numpy(ranges(weight.double().numpy(), symmetric)).float() * torch.linspace(0.7, 9, 40)
    grid, codes = fit_coded_grid(weight, bits, config, base)
    errors, rows = coded_errors(weight, bits, base, symmetric), np.arange(40)
    first = np.floor(4 * np.log2(base.double().numpy() / ranges(weight.double().numpy(), symmetric))).clip(0, 15)
    tried = np.stack([errors[rows, np.minimum(first.astype(int) + k, 15)] for k in range(7)], 1)
    np.testing.assert_allclose(errors[rows, codes.numpy()], tried.min(1), rtol=1e-3)
    np.testing.assert_allclose(grid.scale, base.numpy() * 2 ** (-codes.numpy() / 4) / (2**bits - 1), rtol=1e-6)
    ours = (grid.dequantize(grid.quantize(weight)) - weight).double().abs().pow(2.4).sum(0)
    np.testing.assert_allclose(ours, tried.min(1), rtol=1e-3)
    _, nearest = fit_coded_grid(weight, bits, GridConfig(symmetric=symmetric, clip_search=False), base)
    np.testing.assert_allclose(errors[rows, nearest.numpy()], tried[:, :2].min(1), rtol=1e-3)
    assert bool(np.isin(nearest.numpy() - first, (0, 1)).all())


def test_codes_stay_within_four_bits() -> None:
    weight = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    span = weight.amax(0) - weight.amin(0)
    grid, codes = fit_coded_grid(weight, 4, GridConfig(), span * torch.tensor([0.1, 1, 100, 1e6]))
    assert codes[0] == 0
    assert codes[2] == codes[3] == 15
    assert bool(torch.isfinite(grid.dequantize(grid.quantize(weight))).all())


def test_coded_grids_of_zeros_and_of_damaged_weights() -> None:
    grid, codes = fit_coded_grid(torch.zeros(32, 2), 4, GridConfig(), torch.tensor([1.0, 2.0]))
    assert torch.equal(grid.dequantize(grid.quantize(torch.zeros(32, 2))), torch.zeros(32, 2))
    assert bool((codes >= 0).all())
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            fit_coded_grid(torch.full((32, 2), value), 4, GridConfig(), torch.ones(2))


def test_bases_of_nothing() -> None:
    weight = torch.zeros(96, 3)
    weight[:32, :2] = torch.tensor([1.0, 2.0])
    bases = fit_bases(weight, Layout(96, (4, 4, 4), 32), GridConfig(group_size=32))
    assert bases.row[2] == 1
    assert bases.group.tolist() == [1, 1, 1]  # the lower of the two ranges; the usual range where there are none
    assert fit_bases(weight * 0, Layout(96, (4, 4, 4), 32), GridConfig()).group.tolist() == [1, 1, 1]
    assert fit_bases(weight, Layout(96, (0, 16, 16), 32), GridConfig()).group.shape == (0,)


def test_grids_read_back_what_they_quantize() -> None:
    grid = Grid(torch.tensor([0.5]), torch.tensor([1.0]), 2)
    assert grid.dequantize(grid.quantize(torch.tensor([[-9.0], [0.6], [9.0]]))).flatten().tolist() == [-0.5, 0.5, 1.0]
