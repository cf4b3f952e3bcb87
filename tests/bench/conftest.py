"""A small model made by hand."""

import pytest
import torch
from torch import Tensor, nn


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
