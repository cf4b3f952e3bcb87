"""Sizes that contradict each other or cannot be are refused when the config is made."""

from typing import Any

import pytest

from mpfx.allocate import ImportanceConfig, OptimalConfig
from mpfx.passes import CompressionConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of `bits_per_weight`"),
        ({"bits_per_weight": 4.0, "code_bits": 4}, r"both \(4.0 and 4\)"),
        ({"bits_per_weight": 2, "allocation": "budget"}, r"`bits_per_weight` to be stored bits from 2\.094 .*got 2"),
        ({"bits_per_weight": 1.0, "allocation": "fixed"}, r"from 1\.078"),
        ({"code_bits": 4, "guidance": 1.5}, "`guidance` to lie between 0 and 1"),
        ({"code_bits": 4, "correction": -0.5}, "`correction` to lie between 0 and 1"),
        ({"code_bits": 4, "refine": -1}, "`refine` of 0 or more"),
        ({"code_bits": 4, "sparsity": "auto"}, "`bits_per_weight` with sparsity auto"),
        ({"bits_per_weight": 4, "sparsity": "auto", "allocation": "budget"}, "allocation optimal"),
        ({"code_bits": 4, "block_bits": {"a": 16}}, "`optimal.widths`"),
        ({"code_bits": 4, "allocation": "budget", "distortion": "signals"}, "no `distortion` with allocation budget"),
        ({"code_bits": 4, "allocation": "fixed", "optimal": OptimalConfig(uniform=True)}, "no `optimal` with"),
        ({"code_bits": 4, "importance": ImportanceConfig(weight=1)}, "no `importance` with allocation optimal"),
        ({"code_bits": 4, "distortion": "guessed"}, "`distortion` to be measured or signals but got 'guessed'"),
        ({"bits_per_weight": 2.2, "allocation": "fixed", "block_bits": {"a": 1.0}}, r"`block_bits\.a`"),
        ({"bits_per_weight": 64}, "to 32 but got 64"),
        ({"code_bits": 3.5, "allocation": "fixed"}, "allocation budget"),
        ({"code_bits": 9, "allocation": "fixed"}, "whole number from 1 to 8"),
        ({"code_bits": 16, "sparsity": 0.5, "allocation": "budget"}, "allocation fixed"),
        ({"code_bits": 12, "sparsity": 0.5}, "16 .prune only."),
        ({"code_bits": 1.5, "allocation": "budget"}, "tiers.widths"),
        ({"code_bits": 0, "allocation": "quantile"}, "above 0"),
        ({"code_bits": 4, "allocation": "best"}, "`allocation` to be optimal, fixed"),
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
    for grid in (GridConfig(), GridConfig(scale_bits=16), GridConfig(symmetric=True)):
        config, layout = CompressionConfig(bits_per_weight=8, allocation="fixed", grid=grid), Layout(huge, (1,) * 128)
        size = stored_bytes(layout, huge, symmetric=grid.symmetric, scale_bits=grid.scale_bits)
        assert config.least_bits_per_weight == pytest.approx(8 * size.total / huge**2, rel=6e-3)  # bases are shared
        assert config.least_bits_per_weight <= 8 * size.total / huge**2
    budget = CompressionConfig(bits_per_weight=8, sparsity=0.5, allocation="budget")
    assert budget.least_bits_per_weight == 2 * 0.5 + 1 + 6 / 64
    assert CompressionConfig(bits_per_weight=8).least_bits_per_weight == 0  # channels may be left out


def test_optimal_is_guided_and_corrected_unless_told_otherwise() -> None:
    default, classic = CompressionConfig(bits_per_weight=4), CompressionConfig(code_bits=4, allocation="fixed")
    assert (default.allocation, default.power, default.corrected, default.scaled) == ("optimal", 0.5, 0.5, False)
    assert (classic.power, classic.corrected, classic.scaled) == (0, 0, True)
    assert CompressionConfig(bits_per_weight=4, guidance=0).scaled
    assert CompressionConfig(code_bits=16, sparsity=0.5).widths == (16,)


@pytest.mark.parametrize(
    ("fields", "measured"),
    [
        ({"allocation": "fixed", "fold_scales": False}, False),
        ({"allocation": "fixed", "sparsity": 0.5}, False),
        ({"allocation": "fixed"}, True),
        ({"allocation": "fixed", "fold_scales": False, "guidance": 0.5}, False),
        ({"allocation": "quantile"}, True),
        ({"guidance": 0}, True),
        ({}, True),
    ],
)
def test_statistics_are_taken_where_they_are_needed(fields: dict[str, Any], measured: bool) -> None:
    assert CompressionConfig(code_bits=4, **fields).measured is measured
