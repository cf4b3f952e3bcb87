"""What bits are given by, and what is made ready meanwhile."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from mpfx.graph import bind_inputs, trace
from mpfx.passes import (
    Calibration,
    CompressionConfig,
    PruneAndQuantize,
    Runner,
    Sensed,
    analysis,
    located,
    pipeline,
    run_passes,
)
from mpfx.passes.pipeline import _spread, compress_calibrated
from mpfx.solve import Sparsity
from mpfx.stats import Sensitivity

Batches = list[dict[str, Tensor]]


def test_some_batches_stand_for_all() -> None:
    assert _spread([10] * 8, None) == list(range(8))
    assert _spread([10] * 8, 80) == list(range(8))
    assert _spread([10] * 8, 40) == [0, 2, 5, 7]
    assert _spread([10] * 8, 31) == [0, 2, 5, 7]
    assert _spread([10] * 8, 1) == [0]
    assert _spread([5, 100, 5, 5], 30) == [0, 1, 2]


@pytest.mark.parametrize(("count", "number"), [(32, 8), (64, 8), (128, 32), (31, 8), (30, 8), (256, 64), (9, 8)])
def test_all_processes_have_some_of_them(count: int, number: int) -> None:
    """Batches are dealt out in turn; the choice knows nothing of how many processes there are."""
    chosen = _spread([10] * count, 10 * number)
    assert len(chosen) == number
    assert all(index * count // number <= n < (index + 1) * count // number for index, n in enumerate(chosen))
    for processes in (2, 4, 8):
        shares = [sum(n % processes == rank for n in chosen) for rank in range(processes)]
        assert max(shares) - number / processes < 2


def test_the_others_are_not_observed(llama: Any, batches: Batches) -> None:
    gm = run_passes(trace(llama, (), {**batches[0], "use_cache": False}), analysis())
    calls = [bind_inputs(gm, (), {**batch, "use_cache": False}) for batch in batches]
    first = calls[0]["input_ids"].numel()
    tokens = tuple(torch.full((call["input_ids"].numel(),), 1.0 + i) for i, call in enumerate(calls))
    sensed = Sensed({group.name: Sensitivity.of([[call] for call in tokens]) for group in located(gm)})
    with torch.no_grad():
        some = dict(Calibration(gm, calls, sensed).statistics(_config(first), Runner()))
        alone = dict(Calibration(gm, calls[:1], sensed.of([0], 1 / len(calls))).statistics(_config(None), Runner()))
    assert {moments.tokens for moments in some.values()} == {first}
    assert all(torch.equal(moments.hessian, alone[name].hessian) for name, moments in some.items())
    assert len(batches) > 1
    with pytest.raises(ValueError, match="`allocation_tokens` of 1 or more"):
        _config(0)


@pytest.mark.parametrize(("sparsity", "refined"), [(None, False), ("2:4", True)])
def test_kernels_are_made_ready_before_anything_is_solved(
    llama: Any, batches: Batches, monkeypatch: pytest.MonkeyPatch, sparsity: str | None, refined: bool
) -> None:
    gm = run_passes(trace(llama, (), {**batches[0], "use_cache": False}), analysis())
    calls = [bind_inputs(gm, (), {**batch, "use_cache": False}) for batch in batches]
    config = CompressionConfig(bits_per_weight=5, guidance=0, correction=0, sparsity=sparsity)
    done: list[Any] = []

    def prepare(*given: Any) -> None:
        time.sleep(0.2)
        done.append(given)

    def solve(*args: Any) -> Any:
        assert done
        return original(*args)

    original = PruneAndQuantize.__call__
    monkeypatch.setattr(pipeline, "prepare", prepare)
    monkeypatch.setattr(PruneAndQuantize, "__call__", solve)
    compress_calibrated(Calibration(gm, calls), config, runner=Runner(torch.device("cpu")))
    assert done == [(config.grid, Sparsity.parse(sparsity), refined, torch.device("cpu"))]


def _config(tokens: int | None) -> CompressionConfig:
    return CompressionConfig(bits_per_weight=4, allocation_tokens=tokens)
