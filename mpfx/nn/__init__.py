"""Packed weights: their layout, their bits, and the module that runs them."""

from mpfx.nn.experts import PackedExperts, PackedStack, split_stack
from mpfx.nn.layout import (
    LAYOUT_WIDTHS,
    LEFT_OUT,
    PANEL,
    RAW_BITS,
    SCALE_BITS,
    SEGMENT,
    WIDTHS,
    Bytes,
    Layout,
    Span,
    permutation_bytes,
    stored_bytes,
)
from mpfx.nn.packed import InputGroup, MixedPrecisionLinear, fill_masks, has_masks, join_input_groups, pack_permutation
from mpfx.nn.packing import PackedWeight, QuantizedWeight, filled, own_order, pack, reordered_rows, unpack, validate
from mpfx.nn.scales import CodedScales, Scales, decoded, scale_values

__all__ = [
    "LAYOUT_WIDTHS",
    "LEFT_OUT",
    "PANEL",
    "RAW_BITS",
    "SCALE_BITS",
    "SEGMENT",
    "WIDTHS",
    "Bytes",
    "CodedScales",
    "InputGroup",
    "Layout",
    "MixedPrecisionLinear",
    "PackedExperts",
    "PackedStack",
    "PackedWeight",
    "QuantizedWeight",
    "Scales",
    "Span",
    "decoded",
    "fill_masks",
    "filled",
    "has_masks",
    "join_input_groups",
    "own_order",
    "pack",
    "pack_permutation",
    "permutation_bytes",
    "reordered_rows",
    "scale_values",
    "split_stack",
    "stored_bytes",
    "unpack",
    "validate",
]
