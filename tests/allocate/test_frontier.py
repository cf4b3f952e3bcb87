"""Masks that the frontier's curves are measured under."""

import pytest
import torch

from mpfx.allocate.frontier import _pruned
from mpfx.nn import Layout
from mpfx.solve import GridConfig, Sparsity, sweep


@pytest.mark.parametrize("channels", [5, 100, 128, 300])
@pytest.mark.parametrize("pattern", ["0.5", "0.37", "0.001", "2:4"])
def test_masks_are_those_of_a_sweep_that_makes_up_for_nothing(channels: int, pattern: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, diagonal = torch.randn(9, channels, generator=generator), torch.rand(channels, generator=generator) + 0.1
    raw = Layout(channels, (16,) * -(-channels // 32))
    solved = sweep(weight, diagonal.diag(), raw, GridConfig(), Sparsity.parse(pattern))
    found = _pruned(weight, diagonal, Sparsity.parse(pattern))
    assert solved.kept is not None
    assert found is not None
    assert torch.equal(found, ~solved.kept)


def test_of_equal_weights_all_are_pruned() -> None:
    weight = torch.tensor([[1.0, 2.0, 2.0, 3.0]])
    found = _pruned(weight, torch.ones(4), Sparsity(0.5))
    assert found is not None
    assert found.tolist() == [[True, True, True, False]]
