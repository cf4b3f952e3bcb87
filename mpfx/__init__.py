"""Pick a size, get the best language model of that size."""

from typing import TYPE_CHECKING, Any

from mpfx.classic import QuantizationStats, Quantizer, SparseGPT
from mpfx.graph import blocks, input_groups, producers, sites, trace
from mpfx.nn import fill_masks
from mpfx.passes import Pass, PassResult, run_passes

if TYPE_CHECKING:
    from mpfx.hub.checkpoint import load, save

__all__ = [
    "Pass",
    "PassResult",
    "QuantizationStats",
    "Quantizer",
    "SparseGPT",
    "blocks",
    "fill_masks",
    "input_groups",
    "load",
    "producers",
    "run_passes",
    "save",
    "sites",
    "trace",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # At first use: `mpfx.hub` imports transformers to register with it, which takes seconds.
    if name not in ("load", "save"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mpfx.hub import checkpoint

    return getattr(checkpoint, name)
