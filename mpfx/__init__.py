"""Pick a size, get the best language model of that size."""

from mpfx.classic import QuantizationStats, Quantizer, SparseGPT
from mpfx.graph import sites, trace
from mpfx.hub.checkpoint import load, save

__all__ = ["QuantizationStats", "Quantizer", "SparseGPT", "load", "save", "sites", "trace"]
__version__ = "0.1.0"
