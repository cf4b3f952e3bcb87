"""Accumulated statistics against numpy on all tokens at once."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from mpfx.stats import MomentAccumulator, Sums, exact_products


def tokens(count: int, channels: int = 7) -> torch.Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(count)) * 3 + 1


def test_against_numpy() -> None:
    x = tokens(50)
    accumulator = MomentAccumulator(7)
    for part in x.split(13):
        accumulator.update(part[None])
    seen = accumulator.finalise()
    a = x.double().numpy()
    np.testing.assert_allclose(seen.hessian, 2 / 50 * a.T @ a, rtol=1e-5)
    np.testing.assert_allclose(seen.mean_abs, np.abs(a).mean(0), rtol=1e-5)
    np.testing.assert_allclose(seen.mean, a.mean(0), rtol=1e-4)
    np.testing.assert_allclose(seen.variance, a.var(0), rtol=1e-5)
    np.testing.assert_allclose(seen.mean_square, (a**2).mean(0), rtol=1e-5)
    assert seen.tokens == 50


def test_merged_equals_seen_at_once() -> None:
    one, two, both = (MomentAccumulator(7) for _ in range(3))
    one.update(tokens(20))
    two.update(tokens(31))
    both.update(tokens(20))
    both.update(tokens(31))
    one.merge(two)
    torch.testing.assert_close(one.finalise().hessian, both.finalise().hessian)
    torch.testing.assert_close(one.finalise().variance, both.finalise().variance)
    assert one.finalise().tokens == 51


def test_tokens_of_weight_zero_do_not_count() -> None:
    x = tokens(10)
    padded, plain = MomentAccumulator(7), MomentAccumulator(7)
    padded.update(torch.cat([x, tokens(4) * 100]).view(2, 7, 7), torch.tensor([1] * 10 + [0] * 4).view(2, 7))
    plain.update(x)
    torch.testing.assert_close(padded.finalise().hessian, plain.finalise().hessian)
    torch.testing.assert_close(padded.finalise().mean_abs, plain.finalise().mean_abs)
    assert padded.finalise().tokens == 10


def test_weights_weigh_the_hessian() -> None:
    x, c = tokens(10), torch.rand(10)
    accumulator = MomentAccumulator(7)
    accumulator.update(x, c)
    torch.testing.assert_close(accumulator.finalise().hessian, 2 / 10 * (x * c[:, None]).t() @ x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = tokens(3000).to(dtype)
    accumulator = MomentAccumulator(7)
    accumulator.update(x)
    reference = x.double()
    torch.testing.assert_close(
        accumulator.finalise().hessian.double(), 2 / 3000 * reference.t() @ reference, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("channels", [5, 192, 450])
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_and_chunks_make_up_the_whole(channels: int, weighted: bool) -> None:
    x, y = tokens(4100, channels), tokens(4101, channels)[1:]
    c = torch.rand(4100) ** 4 * 1e-3 if weighted else None
    accumulator = MomentAccumulator(channels)
    accumulator.update(x, c, y)
    other = MomentAccumulator(channels)
    other.update(x[:7])
    accumulator.merge(other)
    seen, a = accumulator.finalise(), x.double()
    ca = a if c is None else a * c.double()[:, None]
    first = a[:7].t() @ a[:7]
    assert torch.equal(seen.hessian, seen.hessian.t())
    assert seen.drift is not None
    for found, expected in ((seen.hessian, ca.t() @ a + first), (seen.drift, (y.double() - a).t() @ ca)):
        torch.testing.assert_close(
            found.double(), 2 / 4107 * expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-9
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
@pytest.mark.parametrize("weighted", [False, True])
def test_half_precision_on_cuda(dtype: torch.dtype, rounding: float, weighted: bool) -> None:
    """Products are exact but for sums in float32; weights round every value once more, independently."""
    x, c = tokens(20000, 300).cuda().to(dtype), (torch.rand(20000) * 1e-6).cuda()
    accumulator = MomentAccumulator(300, "cuda")
    accumulator.update(x, c if weighted else None)
    seen, a = accumulator.finalise(), x.double()
    expected = 2 / 20000 * ((a * c[:, None]).t() @ a if weighted else a.t() @ a)
    error = float((seen.hessian.double() - expected).norm() / expected.norm())
    assert error < (0.2 * rounding if weighted else 1e-4)
    torch.testing.assert_close(seen.variance.double(), a.var(0, correction=0), rtol=1e-4, atol=0)


def test_no_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token"):
        MomentAccumulator(3).finalise()


def test_the_diagonal_alone_is_that_of_the_hessian() -> None:
    x, mask = torch.randn(30, 6), torch.ones(30)
    mask[20:] = 0
    whole, alone = MomentAccumulator(6), MomentAccumulator(6, taken=Sums(products=False))
    for accumulator in (whole, alone):
        accumulator.update(x[:15], mask[:15])
        other = copy.deepcopy(accumulator)
        other.update(x[15:], mask[15:])
        accumulator.merge(other)
    expected, found = whole.finalise(), alone.finalise()
    assert found.tokens == expected.tokens == 35
    assert torch.allclose(found.hessian, expected.hessian.diagonal().diag(), rtol=1e-5)
    assert torch.allclose(found.channels.power, expected.channels.power, rtol=1e-5)
    assert torch.allclose(found.mean_abs, expected.mean_abs, rtol=1e-5)
    with pytest.raises(ValueError, match="count alike"):
        alone.update(x, torch.full((30,), 0.5))


def test_channels_that_were_not_looked_at_are_no_numbers() -> None:
    x = torch.randn(30, 6)
    alone = MomentAccumulator(6, taken=Sums(channels=False))
    alone.update(x)
    moments = alone.finalise()
    assert torch.allclose(moments.hessian, 2 / 30 * x.t() @ x, atol=1e-6)
    assert all(bool(part.isnan().all()) for part in (moments.mean_abs, moments.mean, moments.variance))


@pytest.mark.parametrize("wanted", ["highest", "high", "medium"])
def test_products_are_exact_whatever_the_user_allows(wanted: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        allowed = torch.backends.cuda.matmul.allow_tf32
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == wanted
        assert torch.backends.cuda.matmul.allow_tf32 == allowed == (wanted != "highest")
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_is_set_for_one_backend_alone_is_back_afterwards() -> None:
    backend: Any = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        with exact_products():
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


@pytest.mark.gpu
def test_float32_hessians_are_not_rounded_to_tf32() -> None:
    x, before = tokens(3000, 64), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        accumulator = MomentAccumulator(64, "cuda")
        accumulator.update(x.cuda())
    finally:
        torch.set_float32_matmul_precision(before)
    exact = 2 / 3000 * x.double().t() @ x.double()
    torch.testing.assert_close(accumulator.finalise().hessian.cpu().double(), exact, rtol=1e-5, atol=1e-5)
