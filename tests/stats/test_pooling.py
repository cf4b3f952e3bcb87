"""Topped-up statistics against those of tokens that really lie side by side."""

import pytest
import torch
from torch import Tensor

from mpfx.stats import MomentAccumulator, Moments
from mpfx.stats.pooling import pooled, topped_up

FIELDS = ("hessian", "mean_abs", "mean", "variance")


def tokens(count: int, scale: float, shift: float, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) * scale + shift


def accumulated(*parts: Tensor) -> MomentAccumulator:
    accumulator = MomentAccumulator(6)
    for part in parts:
        accumulator.update(part)
    return accumulator


def assert_same(found: Moments, expected: Moments) -> None:
    for name in FIELDS:  # relative and tight: a factor that is off shows
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert found.tokens == expected.tokens


@pytest.mark.parametrize(("saw", "missing"), [(12, 52), (1, 63), (63, 1), (30, 10)])
def test_as_if_the_missing_tokens_were_the_pools(saw: int, missing: int) -> None:
    own, other = tokens(saw, 0.5, 3.0), tokens(missing, 20.0, -7.0, seed=1)
    found, note = topped_up(accumulated(own).finalise(), accumulated(other).finalise(), saw + missing)
    assert_same(found, accumulated(torch.cat([own, other])).finalise())
    assert note is not None
    assert note.startswith(f"saw {saw} of {saw + missing} tokens")


def test_the_size_of_the_pool_does_not_matter() -> None:
    own, other = tokens(12, 0.5, 3.0), tokens(52, 20.0, -7.0, seed=1)
    pool = accumulated(*[other] * 5).finalise()
    found, note = topped_up(accumulated(own).finalise(), pool, 64)
    assert_same(found, accumulated(own, other).finalise())
    assert note == "saw 12 of 64 tokens that its statistics need; 81% pooled from all experts"


@pytest.mark.parametrize("saw", [64, 65, 300])
def test_enough_tokens_stay_alone(saw: int) -> None:
    moments = accumulated(tokens(saw, 1.0, 0.0)).finalise()
    assert topped_up(moments, accumulated(tokens(9, 50.0, 9.0)).finalise(), 64) == (moments, None)


def test_an_expert_without_a_token_takes_the_pool() -> None:
    pool = accumulated(tokens(9, 50.0, 9.0)).finalise()
    found, note = topped_up(None, pool, 64)
    assert found is pool
    assert note == "saw no token; it takes the statistics of all experts (9 tokens)"


def test_weights_of_tokens_are_kept() -> None:
    own, other, weight = tokens(4, 1.0, 0.0), tokens(12, 5.0, 1.0, seed=1), torch.rand(12) * 3
    both, pool = accumulated(own), MomentAccumulator(6)
    both.update(other, weight)
    pool.update(other, weight)
    found, _ = topped_up(accumulated(own).finalise(), pool.finalise(), 16)
    assert_same(found, both.finalise())


def test_pooled_merges_and_leaves_its_arguments_alone() -> None:
    parts = [tokens(5, 2.0, 1.0, seed) for seed in range(3)]
    separate = [accumulated(part) for part in parts]
    assert_same(pooled([*separate, MomentAccumulator(6)]).finalise(), accumulated(torch.cat(parts)).finalise())
    assert [accumulator.tokens for accumulator in separate] == [5, 5, 5]
    assert_same(separate[0].finalise(), accumulated(parts[0]).finalise())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one accumulator"):
        pooled([])
    pool = accumulated(tokens(9, 1.0, 0.0)).finalise()
    with pytest.raises(ValueError, match="at least 0 tokens but got -1"):
        topped_up(pool, pool, -1)
    narrow = MomentAccumulator(5)
    narrow.update(torch.ones(2, 5))
    with pytest.raises(ValueError, match="to have 5 channels but they have 6"):
        topped_up(narrow.finalise(), pool, 64)
