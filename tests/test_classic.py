"""The founding interface: the script shape people hold, and its numbers."""

import io
import logging

import pytest
import torch
from rich.console import Console
from torch import nn

from mpfx import QuantizationStats, Quantizer, SparseGPT


def calibrated(layer: nn.Module, channels: int = 80, seed: int = 0) -> tuple[SparseGPT, QuantizationStats]:
    generator = torch.Generator().manual_seed(seed)
    stats = QuantizationStats()
    sparsegpt = SparseGPT(layer, layer_name="layer_0", stats_collector=stats)
    scale = torch.logspace(-1, 1, channels)
    for _ in range(3):
        inp = torch.randn(4, 30, channels, generator=generator) * scale
        sparsegpt.add_batch(inp, layer(inp))
    return sparsegpt, stats


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(80, 24)


def printed(stats: QuantizationStats) -> str:
    console = Console(file=io.StringIO(), width=140)
    stats.print_summary(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_founding_script() -> None:
    linear = layer()
    sparsegpt, stats = calibrated(linear)
    before = linear.weight.detach().clone()
    sparsegpt.quantizer = Quantizer()
    sparsegpt.quantizer.configure(bits=4, perchannel=True, sym=True)
    sparsegpt.fasterprune(sparsity=0.5, target_avg_bits=4.0, bit_allocation_method="quantile")
    text = printed(stats)
    sparsegpt.free()
    assert "80 channels, 4.600 bits on average" in text
    for row in ("2 │       16 │    20.0", "8 │       16 │    20.0", "layer_0", "4.000", "0.500"):
        assert row in text
    assert float((linear.weight == 0).float().mean()) >= 0.5
    assert not torch.equal(linear.weight, before)
    for bits, column in zip(stats.layers["layer_0"].bits.tolist(), linear.weight.detach().t(), strict=True):
        assert len(column.unique()) <= 24 + 1  # a scale per row ...
        assert all(len((column[r] / column[r].abs()).unique()) <= 2**bits for r in range(24))


def test_budget_is_exact_per_channel() -> None:
    sparsegpt, stats = calibrated(layer())
    sparsegpt.quantizer = Quantizer()
    sparsegpt.fasterprune(target_avg_bits=3.7, bit_allocation_method="budget")
    assert stats.average_bits == pytest.approx(3.7)
    bits, score = stats.layers["layer_0"].bits, stats.layers["layer_0"].importance
    ordered = bits[score.argsort(descending=True)]
    assert bool((ordered[1:] <= ordered[:-1]).all())


@pytest.mark.parametrize("method", ["fixed", "threshold", "quantile", "budget"])
def test_error_is_that_of_the_outputs(method: str) -> None:
    linear = layer()
    dense = linear.weight.detach().clone()
    sparsegpt, stats = calibrated(linear)
    sparsegpt.quantizer = Quantizer()
    sparsegpt.quantizer.configure(bits=3, sym=False)
    sparsegpt.fasterprune(sparsity=0.25, target_avg_bits=4.0, bit_allocation_method=method)  # type: ignore[arg-type]
    generator, scale = torch.Generator().manual_seed(0), torch.logspace(-1, 1, 80)
    x = torch.cat([(torch.randn(4, 30, 80, generator=generator) * scale).flatten(0, 1) for _ in range(3)])
    change = (x @ (linear.weight.detach() - dense).t()).square().sum() / (x @ dense.t()).square().sum()
    assert stats.layers["layer_0"].error == pytest.approx(float(change), rel=1e-3)


def test_without_a_quantizer_weights_are_only_pruned() -> None:
    linear = layer()
    sparsegpt, stats = calibrated(linear)
    sparsegpt.fasterprune(prunen=2, prunem=4)
    groups = linear.weight.detach().unflatten(1, (-1, 4))
    assert bool(((groups == 0).sum(-1) == 2).all())
    assert len(linear.weight.unique()) > 500
    assert stats.layers["layer_0"].sparsity == pytest.approx(0.5)


@pytest.mark.parametrize("method", ["fixed", "quantile", "threshold", "budget"])
@pytest.mark.parametrize("channels", [80, 50])
def test_n_of_m_holds_in_the_layers_own_order(method: str, channels: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(channels, 16)
    sparsegpt, _ = calibrated(linear, channels)
    sparsegpt.quantizer = Quantizer()
    sparsegpt.quantizer.configure(bits=8)
    sparsegpt.fasterprune("2:4", target_avg_bits=4.0, bit_allocation_method=method)  # type: ignore[arg-type]
    whole = channels // 4 * 4
    zeros = (linear.weight.detach()[:, :whole] == 0).unflatten(1, (-1, 4)).sum(-1)
    assert bool((zeros >= 2).all())


def test_conv1d_is_solved_in_its_own_orientation() -> None:
    from transformers.pytorch_utils import Conv1D

    linear = layer()
    conv = Conv1D(24, 80)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
        conv.bias.copy_(linear.bias)
    for module in (linear, conv):
        sparsegpt, _ = calibrated(module)
        sparsegpt.quantizer = Quantizer()
        sparsegpt.fasterprune(sparsity=0.5, bit_allocation_method="quantile")
    torch.testing.assert_close(conv.weight.t(), linear.weight)


def test_debug_logging_shows_scores_and_errors(caplog: pytest.LogCaptureFixture) -> None:
    sparsegpt, _ = calibrated(layer())
    with caplog.at_level(logging.DEBUG, logger="mpfx"):
        sparsegpt.fasterprune(sparsity=0.5)
    assert "layer_0: importance [" in caplog.text
    assert "relative error" in caplog.text


def test_an_empty_summary_prints() -> None:
    assert "0 channels" in printed(QuantizationStats())


def test_wrong_input_is_refused() -> None:
    with pytest.raises(TypeError, match=r"nn\.Linear or a GPT-2 Conv1D but got ReLU"):
        SparseGPT(nn.ReLU())
    with pytest.raises(ValueError, match="`bits` to be a whole number"):
        Quantizer().configure(bits=9)
    with pytest.raises(ValueError, match="`perchannel`"):
        Quantizer().configure(bits=4, perchannel=False)
    with pytest.raises(ValueError, match="no token"):
        SparseGPT(layer()).fasterprune(sparsity=0.5)
    sparsegpt, _ = calibrated(layer())
    with pytest.raises(ValueError, match=r"\(\.\.\., 80\)"):
        sparsegpt.add_batch(torch.zeros(3, 79))
    with pytest.raises(ValueError, match="`bit_allocation_method`"):
        sparsegpt.fasterprune(bit_allocation_method="best")  # type: ignore[arg-type]
    sparsegpt.quantizer = Quantizer()
    with pytest.raises(ValueError, match="`target_avg_bits`"):
        sparsegpt.fasterprune(bit_allocation_method="budget")
    sparsegpt.free()
    with pytest.raises(RuntimeError, match="layer_0: the statistics were freed"):
        sparsegpt.fasterprune(sparsity=0.5)
