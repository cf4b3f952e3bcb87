"""The layer-level interface of the founding scripts: a thin face over statistics, allocation and sweep.

The class and method names are those of the SparseGPT reference code (Frantar & Alistarh, 2023), which scripts in
this shape were written against.
"""

import logging
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mpfx.allocate import (
    ImportanceConfig,
    ThresholdConfig,
    TierConfig,
    block_means,
    budget,
    fixed,
    importance,
    quantile,
    signals,
    threshold,
)
from mpfx.graph import is_linear, linear_weight
from mpfx.nn import RAW_BITS, WIDTHS, Layout, QuantizedWeight
from mpfx.solve import GridConfig, Sparsity, factorise, layer_error, sweep
from mpfx.stats import MomentAccumulator

logger = logging.getLogger("mpfx.classic")

Method = Literal["fixed", "threshold", "quantile", "budget"]


class Quantizer:
    """What a layer's weights are rounded to.

    Example:
        >>> quantizer = Quantizer()
        >>> quantizer.configure(bits=3, perchannel=True, sym=False)
        >>> quantizer.bits
        3
    """

    def __init__(self) -> None:
        self.bits, self.perchannel, self.sym, self.mse = 4, True, True, True

    def configure(self, bits: int, perchannel: bool = True, sym: bool = True, mse: bool = True) -> None:
        """Set the grid.

        Args:
            bits: width with allocation "fixed", 1..8, or 16 to prune only.
            perchannel: one scale per output row and width; False is not offered: a single scale for a whole weight
                loses on every model measured.
            sym: the zero point is the middle code.
            mse: search for the clipping range with the least error.

        Raises:
            ValueError: saying what is allowed.
        """
        if bits not in (*WIDTHS, RAW_BITS):
            raise ValueError(f"Expected `bits` to be a whole number from 1 to 8, or 16 but got {bits}.")
        if not perchannel:
            raise ValueError("Expected `perchannel` to be True: one scale per output row.")
        self.bits, self.perchannel, self.sym, self.mse = bits, perchannel, sym, mse


@dataclass(frozen=True)
class LayerStats:
    """How one layer came out.

    Attributes:
        bits: of every channel, ``(in,)``.
        importance: of every channel, ``(in,)``.
        target: average bits that were asked for; None: none.
        sparsity: share of the weights that are pruned.
        error: squared error of the output over the squared output.
    """

    bits: Tensor
    importance: Tensor
    target: float | None
    sparsity: float
    error: float

    @property
    def average_bits(self) -> float:
        """Mean width over the channels."""
        return float(self.bits.double().mean())


@dataclass
class QuantizationStats:
    """Statistics of all layers that were compressed with it as `stats_collector`."""

    layers: dict[str, LayerStats] = field(default_factory=dict)

    def record(self, name: str, stats: LayerStats) -> None:
        """Take in one layer."""
        self.layers[name] = stats

    @property
    def average_bits(self) -> float:
        """Mean width over the channels of all layers; 0 without layers."""
        bits = [layer.bits for layer in self.layers.values()]
        return float(torch.cat(bits).double().mean()) if bits else 0.0

    def print_summary(self, console: Console | None = None) -> None:
        """Print channels per width, then every layer; says where tiers overruled a target average."""
        console = console or Console()
        bits = torch.cat([torch.empty(0, dtype=torch.int64), *(layer.bits for layer in self.layers.values())])
        console.print(f"{len(bits)} channels, {self.average_bits:.3f} bits on average", highlight=False)
        widths = Table()
        for name in ("bits", "channels", "percent"):
            widths.add_column(name, justify="right")
        for width, count in zip(*bits.unique(return_counts=True), strict=True):
            widths.add_row(str(int(width)), str(int(count)), f"{100 * int(count) / len(bits):.1f}")
        console.print(widths)
        layers = Table()
        for name in ("layer", "average bits", "asked for", "importance", "sparsity", "relative error"):
            layers.add_column(name, justify="left" if name == "layer" else "right")
        for name, layer in self.layers.items():
            score = f"{float(layer.importance.min()):.3f} .. {float(layer.importance.max()):.3f}"
            asked = "" if layer.target is None else f"{layer.target:.3f}"
            numbers = (f"{layer.average_bits:.3f}", asked, score, f"{layer.sparsity:.3f}", f"{layer.error:.5f}")
            layers.add_row(name, *numbers)
        console.print(layers)


class SparseGPT:
    """Prune and quantize one Linear (or GPT-2 Conv1D) in place.

    Args:
        layer: whose weight is replaced by :meth:`fasterprune`.
        layer_name: in the statistics.
        stats_collector: gets this layer's statistics.

    Attributes:
        quantizer: the grid; None: prune only.
        importance: weights of the five signals.
        tiers: of "quantile", and the widths of "budget".
        thresholds: of "threshold".

    Example:
        >>> import torch
        >>> from mpfx import QuantizationStats, Quantizer, SparseGPT
        >>> _ = torch.manual_seed(0)
        >>> layer, stats = torch.nn.Linear(40, 16), QuantizationStats()
        >>> inp = torch.randn(8, 32, 40)
        >>> out = layer(inp)
        >>> sparsegpt = SparseGPT(layer, layer_name="layer_0", stats_collector=stats)
        >>> sparsegpt.quantizer = Quantizer()
        >>> sparsegpt.quantizer.configure(bits=4, perchannel=True, sym=True)
        >>> sparsegpt.add_batch(inp, out)
        >>> sparsegpt.fasterprune(sparsity=0.5, target_avg_bits=4.0, bit_allocation_method="quantile")
        >>> stats.print_summary()  # doctest: +NORMALIZE_WHITESPACE +ELLIPSIS
        40 channels, 4.600 bits on average
        ...
        >>> sparsegpt.free()
        >>> print(f"{(layer.weight == 0).float().mean():.2f}")
        0.50
    """

    def __init__(
        self, layer: nn.Module, layer_name: str = "layer", stats_collector: QuantizationStats | None = None
    ) -> None:
        if not is_linear(layer):
            raise TypeError(f"Expected `layer` to be an nn.Linear or a GPT-2 Conv1D but got {type(layer).__name__}.")
        self.layer, self.layer_name, self.stats_collector = layer, layer_name, stats_collector
        self.quantizer: Quantizer | None = None
        self.importance, self.tiers, self.thresholds = ImportanceConfig(), TierConfig(), ThresholdConfig()
        weight = linear_weight(layer)
        self._moments: MomentAccumulator | None = MomentAccumulator(weight.shape[1], weight.device)

    def add_batch(self, inp: Tensor, out: Tensor | None = None) -> None:
        """Take in a batch of the layer's inputs.

        Args:
            inp: ``(..., in)``.
            out: the layer's outputs; taken for the sake of scripts that hand them over, not needed.

        Raises:
            ValueError: if the number of channels is not the layer's.
            RuntimeError: after :meth:`free`.
        """
        channels = linear_weight(self.layer).shape[1]
        if inp.shape[-1] != channels:
            raise ValueError(f"Expected `inp` of shape (..., {channels}) but got {tuple(inp.shape)}.")
        self._accumulator().update(inp)

    @torch.no_grad()
    def fasterprune(
        self,
        sparsity: float | str = 0.0,
        *,
        target_avg_bits: float | None = None,
        bit_allocation_method: Method = "fixed",
        prunen: int = 0,
        prunem: int = 0,
        percdamp: float = 0.01,
    ) -> None:
        """Prune and quantize the layer's weight in place.

        Without a `quantizer` the weight is only pruned; what is left are float16 values.

        Args:
            sparsity: fraction to prune, or "n:m".
            target_avg_bits: average width; met exactly by "budget". "threshold" and "quantile" follow their tiers, and
                the summary states both numbers.
            bit_allocation_method: "fixed" (the quantizer's bits), "threshold", "quantile" or "budget".
            prunen: with `prunem`: prune so many of every `prunem` adjacent channels, as the reference code counts.
            prunem: see `prunen`.
            percdamp: damping of the Hessian.

        Raises:
            ValueError: for values out of range, or without a batch.
            RuntimeError: after :meth:`free`.
        """
        pattern = Sparsity.parse(f"{prunem - prunen}:{prunem}" if prunem else sparsity)
        weight, moments = linear_weight(self.layer), self._accumulator().finalise()
        inverse_diagonal = factorise(moments.hessian, percdamp).inverse_diagonal
        score = importance(signals(weight.float(), moments, inverse_diagonal), self.importance).cpu()
        unit = (
            pattern.group_m or 1
        )  # channels that an n:m mask chooses among keep one width, so that they stay together
        sizes = [len(block) for block in score.split(unit)]
        units = self._bits(block_means(score, unit)[::unit], sizes, bit_allocation_method, target_avg_bits)
        bits = units.repeat_interleave(torch.tensor(sizes))
        solved, error = self._solve(weight, moments.hessian, bits, pattern, percdamp)
        logger.debug("%s: importance %s", self.layer_name, score.tolist())
        logger.debug("%s: bits %s, relative error %.4g", self.layer_name, bits.tolist(), error)
        if self.stats_collector is not None:
            pruned = 0.0 if solved.kept is None else 1 - float(solved.kept.float().mean())
            self.stats_collector.record(self.layer_name, LayerStats(bits, score, target_avg_bits, pruned, error))

    def _bits(self, score: Tensor, sizes: list[int], method: Method, target: float | None) -> Tensor:
        """Width of every unit of adjacent channels."""
        if method not in get_args(Method):
            raise ValueError(f"Expected `bit_allocation_method` to be one of {get_args(Method)} but got {method!r}.")
        if self.quantizer is None:
            return fixed(score, RAW_BITS)
        if method == "fixed":
            return fixed(score, self.quantizer.bits)
        if method == "threshold":
            return threshold(score, self.thresholds)
        if method == "quantile":
            return quantile(score, self.tiers)
        if target is None:
            raise ValueError("Expected `target_avg_bits` with bit_allocation_method 'budget' but got None.")
        return budget(score, target, self.tiers.widths, sizes)

    def _solve(
        self, weight: Tensor, hessian: Tensor, bits: Tensor, pattern: Sparsity, damping: float
    ) -> tuple[QuantizedWeight, float]:
        """Sweep the weight in place, wide channels first; returns what was solved and its relative error."""
        quantizer = self.quantizer or Quantizer()
        order = bits.argsort(descending=True, stable=True).to(weight.device)
        layout = Layout(len(bits), tuple(bits[order.cpu()].tolist()), None, segment=1)
        grid = GridConfig(group_size=None, symmetric=quantizer.sym, clip_search=quantizer.mse, scale_bits=16)
        hessian, before = hessian[order][:, order], weight.float()[:, order]
        solved = sweep(before, factorise(hessian, damping).upper, layout, grid, pattern)
        after = solved.dequantize()
        weight.index_copy_(1, order, after.to(weight.dtype))
        return solved, layer_error(before, after, hessian)

    def free(self) -> None:
        """Drop the statistics."""
        self._moments = None

    def _accumulator(self) -> MomentAccumulator:
        if self._moments is None:
            raise RuntimeError(f"{self.layer_name}: the statistics were freed; make a new SparseGPT for this layer.")
        return self._moments
