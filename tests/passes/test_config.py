"""Sizes that contradict each other or cannot be are refused when the config is made."""

from typing import Any

import pytest

from mpfx.passes import CompressionConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of `bits_per_weight`"),
        ({"bits_per_weight": 4.0, "code_bits": 4}, r"both \(4.0 and 4\)"),
        ({"bits_per_weight": 0.1}, "`bits_per_weight` to be stored bits between"),
        ({"bits_per_weight": 64}, "`bits_per_weight` to be stored bits between"),
        ({"code_bits": 3.5, "allocation": "fixed"}, "allocation budget"),
        ({"code_bits": 9, "allocation": "fixed"}, "whole number from 1 to 8"),
        ({"code_bits": 16, "sparsity": 0.5}, "allocation fixed"),
        ({"code_bits": 1.5, "allocation": "budget"}, "tiers.widths"),
        ({"code_bits": 0, "allocation": "quantile"}, "above 0"),
        ({"code_bits": 4, "allocation": "best"}, "`allocation` to be fixed"),
        ({"code_bits": 4, "sparsity": 1.5}, "`sparsity`"),
        ({"code_bits": 4, "damping": 0.0}, "`damping`"),
        ({"code_bits": 4, "order": "random"}, "`order`"),
        ({"code_bits": 4, "allocation": "quantile", "block_bits": {"a": 3}}, "no `block_bits`"),
        ({"code_bits": 4, "allocation": "fixed", "block_bits": {"a": 3.3}}, "`block_bits.a`"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionConfig(**fields)


def test_order_follows_the_sparsity() -> None:
    assert CompressionConfig(code_bits=4, allocation="fixed").activation_order
    assert CompressionConfig(code_bits=4, sparsity=0.5, allocation="fixed").activation_order
    assert not CompressionConfig(code_bits=4, sparsity="2:4", allocation="fixed").activation_order
    assert CompressionConfig(code_bits=4, sparsity="2:4", order="activation", allocation="fixed").activation_order
    assert not CompressionConfig(code_bits=4, order="natural", allocation="fixed").activation_order
