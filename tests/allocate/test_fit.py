"""Distortions predicted from signals: a law that holds is found, one that does not is said not to."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mpfx.allocate import Curve, Frontier, GroupFrontier, fit_signals
from mpfx.solve import GridConfig, Sparsity

WIDTHS = (2, 4)
ROWS, CHANNELS = (48, 96), (640, 1280)


def with_distortions(distortions: list[Tensor], patterns: tuple[Sparsity, ...] = (Sparsity(),)) -> Frontier:
    groups = []
    for rows, channels, distortion in zip(ROWS, CHANNELS, distortions, strict=True):
        curves = tuple(
            Curve(pattern, torch.ones(distortion.shape, dtype=torch.int64), distortion * 3**index, 0)
            for index, pattern in enumerate(patterns)
        )
        name = f"g{rows}"
        groups.append(GroupFrontier(name, {name: rows}, torch.arange(channels), 64, True, None, curves))
    return Frontier(WIDTHS, GridConfig(), tuple(groups))


def features(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(channels // 64, 2, generator=generator) * 10 + 0.1 for channels in CHANNELS]


def law(signals: Tensor, rows: int) -> Tensor:
    """Per unit of 64 channels: exponents and factors that differ from width to width."""
    per_weight = torch.stack([5 * signals[:, 0] ** 2 * signals[:, 1], 0.3 * signals[:, 0] ** 1.5], 1)
    return per_weight.double() * rows * 64


def test_a_product_of_powers_is_found_exactly() -> None:
    found = features()
    measured = with_distortions([law(s, rows) for s, rows in zip(found, ROWS, strict=True)])
    fit = fit_signals(measured, found)
    assert fit.explained == pytest.approx(1.0, abs=1e-9)
    for predicted, true in zip(fit.frontier.groups, measured.groups, strict=True):
        assert torch.allclose(predicted.curves[0].distortion, true.curves[0].distortion, rtol=1e-5)


def test_every_pattern_has_a_law_of_its_own() -> None:
    found = features()
    patterns = (Sparsity(), Sparsity(0.5))
    fit = fit_signals(with_distortions([law(s, rows) for s, rows in zip(found, ROWS, strict=True)], patterns), found)
    for group in fit.frontier.groups:
        dense, half = group.curves
        assert torch.allclose(half.distortion, 3 * dense.distortion, rtol=1e-6)
        assert half.sparsity == patterns[1]


def test_signals_that_tell_nothing_explain_nothing() -> None:
    found = features()
    measured = with_distortions([law(s, rows) for s, rows in zip(features(seed=1), ROWS, strict=True)])
    assert fit_signals(measured, found).explained < 0.3


def test_silent_signals_and_exact_widths_are_finite() -> None:
    found = [s * torch.tensor([1.0, 0.0]) for s in features()]
    distortions = [law(s, rows) * torch.tensor([1.0, 0.0]) for s, rows in zip(features(), ROWS, strict=True)]
    fit = fit_signals(with_distortions(distortions), found)
    for group in fit.frontier.groups:
        assert bool(torch.isfinite(group.curves[0].distortion).all())
        assert float(group.curves[0].distortion[:, 1].max()) < 1e-250


def test_the_measured_frontier_is_left_as_it_was() -> None:
    measured = with_distortions([law(s, rows) for s, rows in zip(features(), ROWS, strict=True)])
    before = [group.curves[0].distortion.clone() for group in measured.groups]
    fit = fit_signals(measured, features(seed=1))
    assert all(torch.equal(g.curves[0].distortion, d) for g, d in zip(measured.groups, before, strict=True))
    assert replace(fit.frontier, groups=()) == replace(measured, groups=())
