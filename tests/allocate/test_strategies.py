"""Strategies against cases worked out by hand and brute force."""

import itertools
import time

import pytest
import torch

from mpfx.allocate import ThresholdConfig, TierConfig, budget, fixed, quantile, threshold


def test_fixed() -> None:
    assert fixed(torch.rand(3), 5).tolist() == [5, 5, 5]


def test_threshold_by_hand() -> None:
    scores = torch.tensor([0.0, 0.49, 0.5, 1.0, 1.2, 1.21, 9.0])
    assert threshold(scores, ThresholdConfig()).tolist() == [2, 2, 4, 4, 4, 8, 8]
    config = ThresholdConfig(lower=1.0, upper=1.0, widths=(1, 3, 5))
    assert threshold(scores, config).tolist() == [1, 1, 1, 3, 5, 5, 5]


def test_quantile_by_hand() -> None:
    scores = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2, 0.7, 0.4, 0.6, 0.5, 1.0])
    assert quantile(scores, TierConfig()).tolist() == [2, 8, 3, 6, 2, 6, 3, 4, 4, 8]
    config = TierConfig(widths=(2, 4, 8), quantiles=(0.3, 0.7))
    assert quantile(scores, config).tolist() == [2, 8, 2, 8, 2, 4, 4, 4, 4, 8]


def test_seven_tiers() -> None:
    bits = quantile(torch.arange(70.0), TierConfig(widths=(1, 2, 3, 4, 5, 6, 8)))
    assert bits.tolist() == [b for b in (1, 2, 3, 4, 5, 6, 8) for _ in range(10)]


def test_equal_scores_go_in_order_of_index() -> None:
    assert quantile(torch.ones(5), TierConfig()).tolist() == [8, 6, 4, 3, 2]
    assert budget(torch.ones(4), 2.5).tolist() == [3, 3, 2, 2]


def test_budget_by_hand() -> None:
    # From 2 bits up, a bit costs 1, 1, 2, 2: [100, 1, 1, 1] with 16 bits lifts the first to 8 (6 bits), then two by
    # one.
    assert budget(torch.tensor([1.0, 1e9, 1.0, 1.0]), 4.0).tolist() == [3, 8, 3, 2]
    assert budget(torch.tensor([1.0, 1.0]), 4.0).tolist() == [4, 4]


@pytest.mark.parametrize("widths", [(2, 3, 4, 6, 8), (1, 2, 3, 4, 5, 6, 7, 8), (2, 4, 8), (3, 5)])
@pytest.mark.parametrize("target", [3.0, 3.3, 3.5, 4.0, 4.75])
def test_budget_meets_the_target_and_is_nearly_optimal(widths: tuple[int, ...], target: float) -> None:
    for seed in range(4):
        scores = torch.rand(6, generator=torch.Generator().manual_seed(seed)) * 3
        bits = budget(scores, target, widths)
        reachable = {sum(c) for c in itertools.combinations_with_replacement(widths, 6)}
        assert int(bits.sum()) == max(s for s in reachable if s <= target * 6 + 1e-9)
        cost = float((scores.double() * 4.0 ** -bits.double()).sum())
        options = torch.tensor(list(itertools.product(widths, repeat=6)))
        fits = options[options.sum(1) <= target * 6 + 1e-9]
        best = float((scores.double() * 4.0 ** -fits.double()).sum(1).min())
        assert best <= cost <= 1.35 * best  # greedy on a coarse menu of six units; exact where steps are equal
        if widths == tuple(range(1, 9)):
            assert cost == pytest.approx(best)


@pytest.mark.parametrize("count", [18, 100, 577])
@pytest.mark.parametrize("target", [2, 2.01, 3.14159, 4, 5.5, 7.99, 8])
def test_budget_is_exact_for_any_target(count: int, target: float) -> None:
    scores = torch.rand(count, generator=torch.Generator().manual_seed(count))
    bits = budget(scores, target)
    total = int(bits.sum())
    assert total == int(target * count + 1e-9) or (target * count > 8 * count - 2 and total == 8 * count - 2)
    ordered = bits[scores.argsort(descending=True)]
    assert bool((ordered[1:] <= ordered[:-1]).all())


def test_units_of_several_channels_count_by_their_size() -> None:
    scores, sizes = torch.tensor([3.0, 2.0, 1.0]), [32, 32, 8]
    for target in (2, 2.5, 3, 3.5, 4, 5, 7, 8):
        bits = budget(scores, target, sizes=sizes)
        spent = sum(b * n for b, n in zip(bits.tolist(), sizes, strict=True))
        reachable = {
            sum(b * n for b, n in zip(c, sizes, strict=True)) for c in itertools.product((2, 3, 4, 6, 8), repeat=3)
        }
        assert spent == max(total for total in reachable if total <= target * 72)


def test_a_long_tail_of_sizes_never_exceeds_the_target() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        sizes = [32] * int(torch.randint(1, 20, (), generator=generator)) + [
            int(torch.randint(1, 32, (), generator=generator))
        ]
        scores = torch.rand(len(sizes), generator=generator).sort(descending=True).values
        target = 2 + 6 * float(torch.rand((), generator=generator))
        bits = budget(scores, target, sizes=sizes)
        spent = sum(b * n for b, n in zip(bits.tolist(), sizes, strict=True))
        assert target * sum(sizes) - 64 <= spent <= target * sum(sizes) + 1e-6


def test_budget_is_fast() -> None:
    scores = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    assert int(budget(scores, 4.3).sum()) == 860_000
    assert time.perf_counter() - started < 5  # a loop over channels and tiers would take minutes


@pytest.mark.parametrize("target", [1.9, 8.1])
def test_budgets_outside_of_the_menu_are_refused(target: float) -> None:
    with pytest.raises(ValueError, match="target of 2 to 8 bits"):
        budget(torch.rand(4), target)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TierConfig(widths=(4, 2)), "tiers.widths"),
        (lambda: TierConfig(widths=(2, 9)), "tiers.widths"),
        (lambda: TierConfig(widths=()), "tiers.widths"),
        (lambda: TierConfig(widths=(2, 4), quantiles=(0.2, 0.4)), "1 ascending numbers"),
        (lambda: TierConfig(widths=(2, 4, 8), quantiles=(0.7, 0.3)), "2 ascending numbers"),
        (lambda: TierConfig(widths=(2, 4), quantiles=(1.0,)), "between 0 and 1"),
        (lambda: ThresholdConfig(lower=2.0), "threshold.lower"),
        (lambda: ThresholdConfig(widths=(2, 4)), "3 widths"),
    ],
)
def test_impossible_configs_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
