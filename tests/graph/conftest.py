"""Models that the graph tests trace: members of the zoo, and a small one made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mpfx.graph import OUTPUT, bind_inputs, blocks, run_block
from tests.zoo import Sample, build

Family = Callable[..., tuple[nn.Module, Callable[..., Sample]]]


@pytest.fixture
def family() -> Family:
    """Build ``(model, sample)``: the model in evaluation mode, and ``sample(batch, length, padded=True)``."""
    return build


@pytest.fixture
def run_in_blocks() -> Callable[..., Any]:
    """Run the blocks of a graph one after the other, each of them twice, as a solver does."""

    def run(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        parts = blocks(gm)
        env = bind_inputs(gm, args, kwargs)
        for block in parts:
            run_block(block, env, parts[block.index + 1 :])
            env = run_block(block, env, parts[block.index + 1 :])
        return env[OUTPUT]

    return run


@pytest.fixture
def chain() -> nn.Module:
    """Two MLPs, each of which reads its input twice, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(GatedMLP(8, 12), GatedMLP(8, 12), nn.Linear(8, 3)).eval()


class GatedMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return x + out
