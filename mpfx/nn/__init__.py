"""Packed weights: their layout, their bits, and the module that runs them."""

from mpfx.nn.experts import PackedExperts, PackedStack, split_stack
from mpfx.nn.layout import PANEL, RAW_BITS, SEGMENT, WIDTHS, Bytes, Layout, Span, permutation_bytes, stored_bytes
from mpfx.nn.packed import MixedPrecisionLinear, own_order, pack_permutation
from mpfx.nn.packing import PackedWeight, QuantizedWeight, pack, reordered_rows, unpack, validate

__all__ = [
    "PANEL",
    "RAW_BITS",
    "SEGMENT",
    "WIDTHS",
    "Bytes",
    "Layout",
    "MixedPrecisionLinear",
    "PackedExperts",
    "PackedStack",
    "PackedWeight",
    "QuantizedWeight",
    "Span",
    "own_order",
    "pack",
    "pack_permutation",
    "permutation_bytes",
    "reordered_rows",
    "split_stack",
    "stored_bytes",
    "unpack",
    "validate",
]
