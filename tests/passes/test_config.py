"""Sizes that contradict each other or cannot be are refused when the config is made."""

from typing import Any

import pytest

from mpfx.passes import CompressionConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of `bits_per_weight`"),
        ({"bits_per_weight": 4.0, "code_bits": 4}, r"both \(4.0 and 4\)"),
        ({"bits_per_weight": 2.2}, r"`bits_per_weight` to be stored bits from 2\.281 .*got 2\.2"),
        ({"bits_per_weight": 1.2, "allocation": "fixed"}, r"from 1\.266"),
        ({"bits_per_weight": 2.2, "allocation": "fixed", "block_bits": {"a": 1.0}}, r"`block_bits\.a`"),
        ({"bits_per_weight": 64}, "to 32 but got 64"),
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


def test_what_no_weight_can_do_without() -> None:
    from mpfx.nn import Layout, stored_bytes
    from mpfx.solve import GridConfig

    huge = 1 << 12
    for fields, bits in (({"allocation": "fixed"}, 1), ({}, 2), ({"grid": GridConfig(symmetric=True)}, 2)):
        config = CompressionConfig(bits_per_weight=8, **fields)
        size = stored_bytes(Layout(huge, (bits,) * (huge // 32)), huge, symmetric=config.grid.symmetric)
        assert config.least_bits_per_weight == pytest.approx(8 * size.total / huge**2, rel=1e-4)
    assert CompressionConfig(bits_per_weight=8, sparsity=0.5).least_bits_per_weight == 2 * 0.5 + 1 + 18 / 64
