"""Pick a size, get the best language model of that size."""

from mpfx.classic import QuantizationStats, Quantizer, SparseGPT
from mpfx.graph import blocks, input_groups, producers, sites, trace
from mpfx.hub.checkpoint import load, save
from mpfx.passes import Pass, PassResult, run_passes

__all__ = [
    "Pass",
    "PassResult",
    "QuantizationStats",
    "Quantizer",
    "SparseGPT",
    "blocks",
    "input_groups",
    "load",
    "producers",
    "run_passes",
    "save",
    "sites",
    "trace",
]
__version__ = "0.1.0"
