"""Random packed weights of any size."""

from collections import Counter

import pytest
import torch

from mpfx.bench.linear import SHAPES
from mpfx.bench.weights import mixed_layout, random_order, random_weight, stored_bits, uniform_layout
from mpfx.nn import unpack, validate


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4.0, 4.25, 5.0])
def test_widths_give_the_bits_asked_for(shape: str, bits: float) -> None:
    rows, channels = map(int, shape.split("x"))
    layout = mixed_layout(rows, channels, bits)
    assert set(layout.widths) == {3, 4, 5, 6}
    weight = random_weight(layout, 64, generator())  # per row all is the same but the bases of groups, and the order
    per_row = (weight.nbytes - 2 * len(layout.grids) - len(layout.widths)) / 64
    shared = 2 * channels + 2 * len(layout.grids) + len(layout.widths)
    assert stored_bits(round(per_row * rows) + shared, rows, channels) == pytest.approx(bits, abs=0.02)


def test_a_weight_counts_what_it_stores() -> None:
    layout = mixed_layout(4096, 4096, 4.25)
    weight, order = random_weight(layout, 4096, generator()), random_order(4096, generator())
    validate(weight)
    assert stored_bits(weight.nbytes + order.nbytes, 4096, 4096) == pytest.approx(4.25, abs=0.02)
    most = Counter(layout.widths).most_common()
    assert [bits for bits, _ in most] == [4, 5, 3, 6]
    assert list(layout.widths) == sorted(layout.widths, reverse=True)


def test_odd_sizes() -> None:
    for rows, channels in ((100, 200), (32, 70), (33, 1000)):
        layout = mixed_layout(rows, channels, 5.5)
        weight = random_weight(layout, rows, generator())
        validate(weight)
        assert unpack(weight).dequantize().shape == (rows, channels)
        assert sorted(random_order(channels, generator()).tolist()) == list(range(channels))


@pytest.mark.parametrize("bits", [2.9, 6.5])
def test_impossible_bits_are_refused(bits: float) -> None:
    with pytest.raises(ValueError, match=r"Expected `bits` from 3\.1.* to 6\.1.* for a weight of 4096x4096"):
        mixed_layout(4096, 4096, bits)


def test_a_bitmask_prunes_its_share() -> None:
    dense = random_weight(uniform_layout(1024, 4), 512, generator())
    sparse = random_weight(uniform_layout(1024, 4), 512, generator(), sparsity=0.7)
    validate(sparse)
    assert sparse.sparsity == pytest.approx(0.7, abs=0.01)
    assert float((unpack(sparse).dequantize() == 0).float().mean()) == pytest.approx(0.72, abs=0.03)
    assert dense.mask is None
    assert stored_bits(dense.nbytes - sparse.nbytes, 512, 1024) == pytest.approx(0.7 * 4 - 1, abs=0.05)


def test_products_are_as_large_as_the_activations() -> None:
    weight = unpack(random_weight(mixed_layout(1024, 1024, 4.25), 1024, generator())).dequantize()
    x = torch.randn(16, 1024, generator=generator())
    assert 0.3 < float((x @ weight.t()).std()) < 3
