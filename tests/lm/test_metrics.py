from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torchmetrics
from torch import Tensor
from torchmetrics.text.perplexity import Perplexity as TorchmetricsPerplexity

import mpfx.lm.metrics
from mpfx.lm import Perplexity, TokenLoss, target_log_probs


def random_case(dtype: torch.dtype = torch.float32, scale: float = 5.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(3, 7, 50, generator=generator) * scale).to(dtype)
    targets = torch.randint(50, (3, 7), generator=generator)
    targets[0, 4:] = -100
    targets[2] = -100
    return logits, targets


def mean_nll(logits: Tensor, targets: Tensor) -> float:
    """Float64, one position at a time."""
    total, count = 0.0, 0
    for row, labels in zip(logits.double(), targets, strict=True):
        for scores, label in zip(row, labels.tolist(), strict=True):
            if label != -100:
                shifted = scores - scores.max()
                total -= float(shifted[label] - shifted.exp().sum().log())
                count += 1
    return total / count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_perplexity_agrees_with_float64_in_every_dtype(dtype: torch.dtype) -> None:
    logits, targets = random_case(dtype)
    metric, loss = Perplexity(), TokenLoss()
    for part in (slice(0, 1), slice(1, 3)):
        metric.update(logits[part], targets[part])
        loss.update(logits[part], targets[part])
    expected = mean_nll(logits, targets)
    assert float(metric.compute()) == pytest.approx(math.exp(expected), rel=1e-5)
    assert float(loss.compute()) == pytest.approx(expected, rel=1e-5)


def test_agrees_with_torchmetrics_where_that_is_accurate() -> None:
    logits, targets = random_case(scale=1.0)
    theirs = TorchmetricsPerplexity(ignore_index=-100)
    theirs.update(logits, targets)
    ours = Perplexity()
    ours.update(logits, targets)
    assert isinstance(ours, TorchmetricsPerplexity)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_underflowing_probability_stays_finite_where_torchmetrics_is_infinite() -> None:
    logits = torch.tensor([[[0.0, 120.0], [0.0, 0.0], [3.0, 0.0]]])
    targets = torch.tensor([[0, 1, 0]])
    theirs = TorchmetricsPerplexity()
    theirs.update(logits, targets)
    assert math.isinf(float(theirs.compute()))
    ours = Perplexity()
    ours.update(logits, targets)
    expected = (120 + math.log(2) + math.log1p(math.exp(-3))) / 3
    assert float(ours.compute()) == pytest.approx(math.exp(expected), rel=1e-5)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = random_case()
    whole = target_log_probs(logits, targets)
    monkeypatch.setattr(mpfx.lm.metrics, "_CHUNK_ELEMENTS", 2 * 50)
    torch.testing.assert_close(target_log_probs(logits, targets), whole, rtol=0, atol=0)
    monkeypatch.setattr(mpfx.lm.metrics, "_CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(target_log_probs(logits, targets), whole, rtol=1e-6, atol=1e-6)


def test_log_probs_feed_the_metric_as_logits_do() -> None:
    logits, targets = random_case()
    direct, fed = Perplexity(), Perplexity()
    direct.update(logits, targets)
    fed.update(target_log_probs(logits, targets), targets)
    assert torch.equal(direct.compute(), fed.compute())
    assert int(fed.count) == 4 + 7


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_not_hidden(value: float) -> None:
    logits, targets = random_case()
    logits[1, 2, 0] = value
    metric = Perplexity()
    metric.update(logits, targets)
    assert not math.isfinite(float(metric.compute()))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_states_stay_float32_when_the_model_is_cast(
    cast: Callable[[torchmetrics.Metric], torchmetrics.Metric],
) -> None:
    metric = cast(Perplexity())
    assert isinstance(metric, Perplexity)
    assert metric.total_log_probs.dtype == metric.count.dtype == torch.float32
    metric.reset()
    assert metric.total_log_probs.dtype == metric.count.dtype == torch.float32


def test_states_follow_the_device() -> None:
    assert Perplexity().to("meta").total_log_probs.device.type == "meta"


def test_processes_are_summed() -> None:
    logits, targets = random_case()
    together = Perplexity()
    together.update(logits, targets)
    ranks = [Perplexity(), Perplexity()]
    ranks[0].update(logits[:1], targets[:1])
    ranks[1].update(logits[1:], targets[1:])
    assert set(ranks[0]._reductions) == {"total_log_probs", "count"}
    for name, reduce in ranks[0]._reductions.items():
        assert callable(reduce)
        setattr(ranks[0], name, reduce(torch.stack([getattr(rank, name) for rank in ranks])))
    torch.testing.assert_close(ranks[0].compute(), together.compute(), rtol=1e-6, atol=0)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 5\) and \(2, 4\)"):
        target_log_probs(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))
