from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mpfx.graph import bind_inputs, trace


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 4)
        for step in range(x.shape[1]):
            h = torch.tanh(self.a(x[:, step] + h))
        return h


class Window(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x[:, :6])
        return y if x.shape[0] == 1 else -y


def test_loop_over_a_size_fixes_it() -> None:
    module = Loop()
    gm = trace(module, (torch.randn(2, 5, 4),))
    x = torch.randn(7, 5, 4)
    assert torch.equal(gm(x=x), module(x))
    with pytest.raises(ValueError, match=r"`x.shape\[1\]` = 6"):
        gm(x=torch.randn(7, 6, 4))
    with pytest.raises(ValueError, match=r"`x.shape\[1\]` = 6"):
        bind_inputs(gm, (torch.randn(7, 6, 4),))


def test_branches_on_sizes_are_kept() -> None:
    module = Window()
    gm = trace(module, (torch.randn(3, 9, 4),))
    x = torch.randn(2, 7, 4)
    assert torch.equal(gm(x=x), module(x))
    with pytest.raises(ValueError, match=r"x.shape\[1\] >= 6"):
        gm(x=torch.randn(2, 4, 4))
    with pytest.raises(ValueError, match=r"`x.shape\[0\]` = 1"):  # PyTorch itself takes this for impossible
        gm(x=torch.randn(1, 9, 4))


def test_fixed_and_empty_sizes() -> None:
    gm = trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), (torch.randn(3, 1, 4),))
    with pytest.raises(ValueError, match=r"`input.shape\[1\]` to be 1"):
        gm(input=torch.randn(3, 2, 4))
    with pytest.raises(ValueError, match=r"`input.shape\[0\]` to be 1 or more"):
        gm(input=torch.randn(0, 1, 4))
    with pytest.raises(ValueError, match=r"`input.shape\[2\]` = 5"):
        gm(input=torch.randn(3, 1, 5))


def test_convolution_kernels_bind_no_size() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    gm = trace(module, (torch.randn(4, 3, 8, 8),))
    x = torch.randn(1, 3, 40, 70)
    assert torch.equal(gm(input=x), module(x))
