"""Channel scales against a search by hand."""

import pytest
import torch
from torch import Tensor

from mpfx.allocate import search_scales
from mpfx.allocate.scaling import EXPONENTS
from mpfx.nn import Layout
from mpfx.solve import GridConfig
from mpfx.stats import ChannelMoments

UNIFORM = Layout(80, (3, 3, 3), 32)


def moments_of(hessian: Tensor, size: Tensor) -> ChannelMoments:
    return ChannelMoments(hessian.diagonal(), size)


def uneven(channels: int = 80, tokens: int = 500) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, Hessian and sizes of an input of which few channels are large."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(tokens, channels, generator=generator)
        * torch.rand(channels, generator=generator).add(0.1).pow(3)
        * 30
    )
    return torch.randn(48, channels, generator=generator), 2 / tokens * x.t() @ x, x.abs().mean(0)


def rounded(weight: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Round every row of 32 columns to ``2**bits`` levels between its least and its largest value, 0 included."""
    out = torch.empty_like(weight)
    for row in range(len(weight)):
        for bits, start in zip(widths, range(0, weight.shape[1], 32), strict=True):
            part = weight[row, start : start + 32]
            low, high = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
            step = float(torch.tensor((high - low) / (2**bits - 1)).half())
            zero = round(-low / (high - low) * (2**bits - 1))
            codes = (part / step).round().add(zero).clamp(0, 2**bits - 1)
            out[row, start : start + 32] = (codes - zero) * step
    return out


def test_the_least_error_wins() -> None:
    weight, hessian, size = uneven()
    layout, grid = Layout(80, (4, 2, 3), 32), GridConfig(group_size=32, clip_search=False)
    found = search_scales(weight, moments_of(hessian, size), torch.arange(80), layout, grid)
    errors = {}
    for exponent in EXPONENTS:
        scales = (size / size.log().mean().exp()).pow(exponent)
        columns = weight * scales
        change = (rounded(columns, (4, 2, 3)) - columns) / scales
        errors[exponent] = float((change.double().square() @ hessian.double().diagonal()).sum())
    best = min(errors, key=lambda exponent: errors[exponent])
    assert found.exponent == best
    assert best > 0
    assert found.gain == pytest.approx(errors[best] / errors[0.0], rel=1e-3)
    assert found.gain < 0.95
    torch.testing.assert_close(found.scales, (size / size.log().mean().exp()).pow(best), rtol=1e-4, atol=1e-6)


def test_channels_of_one_unit_share_a_factor() -> None:
    weight, hessian, size = uneven()
    unit = torch.arange(80) % 40
    found = search_scales(weight, moments_of(hessian, size), unit, UNIFORM, GridConfig(group_size=32))
    assert found.scales.shape == (40,)
    assert float(found.scales.log().mean()) == pytest.approx(0, abs=1e-5)
    pooled = (size[:40] + size[40:]) / 2
    ranked = pooled.argsort()
    assert bool((found.scales[ranked].diff() >= 0).all())


def test_equal_channels_are_left_alone() -> None:
    found = search_scales(
        torch.randn(8, 64),
        moments_of(torch.eye(64), torch.ones(64)),
        torch.arange(64),
        Layout(64, (4, 4)),
        GridConfig(),
    )
    assert found.exponent == 0
    assert torch.equal(found.scales, torch.ones(64))
    assert found.gain == 1


def test_channels_that_never_carry_anything_do_no_harm() -> None:
    weight, hessian, size = uneven()
    size[:5] = 0
    hessian[:5], hessian[:, :5] = 0, 0
    found = search_scales(weight, moments_of(hessian, size), torch.arange(80), UNIFORM, GridConfig())
    assert bool(torch.isfinite(found.scales).all())
    assert bool((found.scales > 0).all())
    nothing = search_scales(weight, moments_of(hessian * 0, size * 0), torch.arange(80), UNIFORM, GridConfig())
    assert torch.equal(nothing.scales, torch.ones(80))


def test_powers_of_two_only_where_asked() -> None:
    weight, hessian, size = uneven()
    found = search_scales(
        weight, moments_of(hessian, size), torch.arange(80), UNIFORM, GridConfig(), powers_of_two=True
    )
    exponents = found.scales.log2()
    assert torch.equal(exponents, exponents.round())
    assert len(exponents.unique()) > 1
    assert found.gain < 1
