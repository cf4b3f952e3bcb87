"""The factor against the explicit inverse."""

import math

import pytest
import torch

from mpfx.solve import factor_diagonal, factorise
from mpfx.solve.factor import invert_by_products, is_finite


def hessian(channels: int, tokens: int) -> torch.Tensor:
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    return (2 / tokens * x.t() @ x).float()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_is_the_upper_factor_of_the_damped_inverse(scale: float) -> None:
    h = hessian(20, 100) * scale
    factor = factorise(h, 0.02)
    damped = h.double() + 0.02 * h.diagonal().double().mean() * torch.eye(20, dtype=torch.float64)
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(factor.inverse_diagonal.double(), damped.inverse().diagonal(), rtol=1e-4, atol=0)
    assert (factor.damping, factor.fallback) == (0.02, None)
    assert factor.ridge == pytest.approx(0.02 * float(h.diagonal().mean()))


@pytest.mark.parametrize("channels", [1, 7, 40])
def test_triangles_are_inverted_by_products(channels: int) -> None:
    lower = torch.linalg.cholesky(hessian(channels, 400).double())
    expected = torch.linalg.inv(lower)
    found = invert_by_products(lower.clone(), 4)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(found, found.tril())


def test_the_diagonal_alone_climbs_the_same_ladder() -> None:
    h = hessian(20, 100)
    torch.testing.assert_close(factor_diagonal(h, 0.02), factorise(h, 0.02).upper.diagonal())
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.05]))
    torch.testing.assert_close(factor_diagonal(indefinite), factorise(indefinite).upper.diagonal())
    assert torch.equal(factor_diagonal(torch.zeros(3, 3)), torch.ones(3))


def test_dead_channels_are_decoupled() -> None:
    h = hessian(6, 50)
    h[2], h[:, 2] = 0, 0
    upper = factorise(h).upper
    others = [0, 1, 3, 4, 5]
    assert bool((upper[2, others] == 0).all())
    assert bool((upper[others, 2] == 0).all())


def test_fewer_tokens_than_channels_work() -> None:
    assert factorise(hessian(64, 8)).fallback is None


def test_an_unfactorisable_hessian_climbs_the_ladder_and_says_so() -> None:
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.05]))  # needs more than 0.01 of the mean diagonal
    factor = factorise(indefinite, 0.01)
    assert factor.damping == pytest.approx(0.1)
    assert factor.ridge == pytest.approx(0.1 * 1.95 / 3)
    assert factor.fallback is not None
    assert "damping 0.01 in float32" in factor.fallback


def test_a_hopeless_hessian_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be factorised; tried .*float64.*Calibrate on more tokens"):
        factorise(torch.diag(torch.tensor([10.0, 10.0, -15.0])))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_hessians_are_refused(value: float) -> None:
    h = hessian(4, 20)
    h[1, 1] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        factorise(h)


def test_no_activation_at_all_is_recorded() -> None:
    factor = factorise(torch.zeros(3, 3))
    assert torch.equal(factor.upper, torch.eye(3))
    assert factor.fallback is not None
    assert "rounded to nearest" in factor.fallback


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(device: str, dtype: torch.dtype) -> None:
    values = torch.full((3, 67), torch.finfo(dtype).max, dtype=dtype, device=device)  # no sum of these is finite
    assert is_finite(values)
    assert is_finite(values[:0])
    for wrong in (math.nan, math.inf, -math.inf):
        for at in (0, 31, 66):
            damaged = values.clone()
            damaged[1, at] = wrong
            assert not is_finite(damaged)
            assert not is_finite(damaged.t())
            assert is_finite(damaged[0])
