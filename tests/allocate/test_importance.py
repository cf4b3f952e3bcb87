"""The five signals against their formulas, computed apart."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from mpfx.allocate import ImportanceConfig, importance, signals
from mpfx.solve import factorise
from mpfx.stats import MomentAccumulator


def test_every_signal_by_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 9, generator=generator) * torch.arange(1, 10) + 0.5
    w = torch.randn(5, 9, generator=generator)
    accumulator = MomentAccumulator(9)
    accumulator.update(x)
    moments = accumulator.finalise()
    parts = signals(w, moments, factorise(moments.hessian).inverse_diagonal)
    a, b = x.double().numpy(), w.double().numpy()
    h = 2 / 200 * a.T @ a
    inverse = np.linalg.inv(h + 0.01 * h.diagonal().mean() * np.eye(9))
    expected = {
        "activation": np.abs(a).mean(0),
        "hessian": 1 / inverse.diagonal(),
        "weight": np.abs(b).mean(0),
        "output": np.sqrt((b**2).mean(0) * (a**2).mean(0)),
        "stability": a.var(0),
    }
    assert list(parts) == [f.name for f in fields(ImportanceConfig)]
    for name, signal in expected.items():
        np.testing.assert_allclose(parts[name], signal / signal.mean(), rtol=1e-4)
    weights = {"activation": 0.25, "hessian": 0.25, "weight": 0.15, "output": 0.25, "stability": 0.1}
    total = sum(weights[name] * signal / signal.mean() for name, signal in expected.items())
    np.testing.assert_allclose(importance(parts, ImportanceConfig()), total, rtol=1e-4)


def test_a_unit_weight_is_an_ablation() -> None:
    parts = {name: torch.rand(4) for name in ("activation", "hessian", "weight", "output", "stability")}
    for chosen, part in parts.items():
        config = ImportanceConfig(**{name: 3.0 * (name == chosen) for name in parts})
        torch.testing.assert_close(importance(parts, config), part)


def test_a_signal_that_is_zero_everywhere_adds_nothing() -> None:
    accumulator = MomentAccumulator(3)
    accumulator.update(torch.ones(5, 3))
    parts = signals(torch.ones(2, 3), accumulator.finalise(), torch.ones(3))
    assert parts["stability"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_impossible_weights_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"importance\.weight"):
        ImportanceConfig(weight=value)
    with pytest.raises(ValueError, match="only zeros"):
        ImportanceConfig(activation=0, hessian=0, weight=0, output=0, stability=0)
