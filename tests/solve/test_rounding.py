"""Rounding to nearest over a layout, against every group alone and against formulas."""

import pytest
import torch

from mpfx.nn import Layout
from mpfx.solve import GridConfig, round_nearest
from mpfx.solve.grid import fit_grid, nearest


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, None])
def test_every_group_is_rounded_on_a_grid_of_its_own(symmetric: bool, group: int | None) -> None:
    weight = torch.randn(20, 224, generator=torch.Generator().manual_seed(0)) * 0.1
    layout = Layout(224, (8, 8, 5, 5, 3, 1, 1), group)
    config = GridConfig(group_size=group, symmetric=symmetric, scale_bits=16)
    rounded = round_nearest(weight, layout, config)
    for span in layout.grids:
        part = weight[:, span.start : span.stop].t().contiguous()
        alone = nearest(part, fit_grid(part, span.bits, config))[1].t()
        assert torch.equal(rounded[:, span.start : span.stop], alone)
        levels = [len(row.unique()) for row in rounded[:, span.start : span.stop]]
        assert max(levels) <= 2**span.bits


def test_coded_scales_lose_little_against_float16_ones() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    layout = Layout(256, (4,) * 8, 64)
    errors = {
        bits: float((round_nearest(weight, layout, GridConfig(scale_bits=bits)) - weight).square().sum())
        for bits in (4, 16)
    }
    assert errors[16] < errors[4] < 1.15 * errors[16]
    assert errors[4] < 0.02 * float(weight.square().sum())


def test_raw_channels_are_float16_and_left_out_ones_zero() -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    rounded = round_nearest(weight, Layout(96, (16, 4, 0), 32), GridConfig(group_size=32))
    assert torch.equal(rounded[:, :32], weight[:, :32].half().float())
    assert not rounded[:, 64:].any()
    assert 0 < float((rounded[:, 32:64] - weight[:, 32:64]).abs().max()) < 1


def test_what_is_pruned_is_zero_and_does_not_widen_the_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    pruned = torch.rand(16, 64, generator=generator) < 0.5
    outliers = weight.masked_fill(pruned, 100.0)
    layout, config = Layout(64, (3, 3), 64), GridConfig(scale_bits=16)
    rounded = round_nearest(outliers, layout, config, pruned)
    assert not rounded[pruned].any()
    assert torch.equal(rounded, round_nearest(weight.masked_fill(pruned, 0.0), layout, config, pruned))


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [False, True])
def test_on_a_gpu_the_same(symmetric: bool) -> None:
    """There all candidates of the clip search are compared at once."""
    weight = torch.randn(48, 160, generator=torch.Generator().manual_seed(0))
    layout, config = Layout(160, (3, 4, 4, 8, 1), 64), GridConfig(symmetric=symmetric)
    there = round_nearest(weight.cuda(), layout, config).cpu()
    torch.testing.assert_close(there, round_nearest(weight, layout, config), rtol=1e-6, atol=1e-7)
