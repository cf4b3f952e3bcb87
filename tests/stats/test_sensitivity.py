"""Sensitivities, and moments that know what another model reads."""

import pytest
import torch

from mpfx.stats import MomentAccumulator, Sensitivity


def test_weights_are_powers_relative_to_the_mean_over_all_batches() -> None:
    found = Sensitivity.of([[torch.tensor([1.0, 3.0])], [torch.tensor([4.0]), torch.tensor([0.0])]])
    assert found.mean == pytest.approx(2.0)
    assert torch.allclose(found.weights(0, 1.0)[0], torch.tensor([0.5, 1.5]))
    assert torch.allclose(found.weights(1, 0.5)[0], torch.tensor([2.0]).sqrt())
    assert found.weights(1, 0.5)[1].tolist() == [0.0]


def test_a_part_that_the_loss_does_not_need_counts_all_tokens_alike() -> None:
    found = Sensitivity.of([[torch.zeros(3)]])
    assert found.weights(0, 0.5)[0].tolist() == [1.0, 1.0, 1.0]


def test_drift_is_the_weighted_product_of_deviation_and_input() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 7, generator=generator), torch.randn(40, 7, generator=generator)
    c = torch.rand(40, generator=generator)
    c[::5] = 0  # padding
    accumulator = MomentAccumulator(7)
    for part in (slice(0, 13), slice(13, 40)):
        accumulator.update(x[part], c[part], y[part])
    tokens = int((c > 0).sum())
    expected = 2 / tokens * torch.einsum("t,ti,tj->ij", c.double(), (y - x).double(), x.double())
    moments = accumulator.finalise()
    assert moments.drift is not None
    assert torch.allclose(moments.drift.double(), expected, rtol=1e-5, atol=1e-6)
    order = torch.tensor([3, 1, 0, 2, 6, 5, 4])
    reordered = moments.reordered(order).drift
    assert reordered is not None
    assert torch.equal(reordered, moments.drift[order][:, order])


def test_drifts_of_two_accumulators_add_up() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 5, generator=generator), torch.randn(30, 5, generator=generator)
    one, two, both = (MomentAccumulator(5) for _ in range(3))
    one.update(x[:10], None, y[:10])
    two.update(x[10:], None, y[10:])
    both.update(x, None, y)
    one.merge(two)
    merged, whole = one.finalise().drift, both.finalise().drift
    assert merged is not None
    assert whole is not None
    assert torch.allclose(merged, whole, rtol=1e-5, atol=1e-6)
