"""Which modules one trial tells about."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mpfx.graph.recognition import likeness


class Scaled(nn.Module):
    def __init__(self, factor: float, function: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.factor, self.function = factor, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.factor * x)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, out: -out)
    return module


@pytest.mark.parametrize(
    "make",
    [
        nn.SiLU,
        lambda: nn.LeakyReLU(0.3),
        lambda: nn.LayerNorm(8).to("meta"),
        lambda: nn.RMSNorm(8),
        lambda: Scaled(2.0),
    ],
)
def test_layers_that_repeat_are_alike(make: Callable[[], nn.Module]) -> None:
    assert likeness(make()) == likeness(make())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (nn.LeakyReLU(0.3), nn.LeakyReLU(0.2)),
        (nn.LayerNorm(8), nn.LayerNorm(9)),
        (nn.RMSNorm(8), nn.RMSNorm(8).double()),
        (Scaled(2.0), Scaled(3.0)),
        (Scaled(2.0), Scaled(2.0, torch.sigmoid)),
        (Scaled(1.0), Scaled(True)),
        (nn.SiLU(), nn.SiLU().eval()),
        (nn.SiLU(), hooked(nn.SiLU())),
        (nn.BatchNorm1d(8), nn.BatchNorm1d(8)),  # their buffers may differ
        (nn.Sequential(nn.SiLU()), nn.Sequential(nn.SiLU())),
    ],
)
def test_others_are_not(one: nn.Module, other: nn.Module) -> None:
    assert likeness(one) != likeness(other)
    assert likeness(one) == likeness(one)
