from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpfx.graph import sites, trace


class Upcast(nn.Module):
    """Reads a value again after a cast that changes nothing while tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.a(x)
        wide, dropped = h.to(torch.float32), self.drop(h)
        return h, wide, dropped


def test_cast_that_does_nothing_is_no_second_name_of_its_input() -> None:
    module, x = Upcast().eval(), torch.randn(3, 4)
    gm = trace(module, (torch.randn(2, 4),))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [value.dtype for value in gm(x=x)] == [torch.bfloat16, torch.float32, torch.bfloat16]
    module.train()
    h, _, dropped = gm(x=x)
    assert torch.equal(h, module.a(x))
    assert (dropped == 0).any()


class Operations(nn.Module):
    """Writes in place in several ways, and reads parameters, buffers and results with several parts."""

    n: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))
        self.register_buffer("n", torch.zeros(4))
        self.register_buffer("scale", torch.tensor(2.5))

    def forward(self, x: Tensor) -> Any:
        self.n.zero_()
        torch._foreach_add_([self.n], [x.mean(0)])
        self.n[0] = 3
        z = torch.empty_like(x)
        torch.add(x, 1, out=z)
        z[x > 0] = 0
        largest, index = x.max(-1)
        y = self.a(z)[:, None].expand(-1, 2, -1).flatten(1)[..., :4] * self.scale.item()
        y += self.w.data.T.sum() + self.n + largest[:, None] + torch.gather(x, 1, index[:, None])
        return y, torch.stack([*self.w.unbind(0)]), self.w, x.new_ones(x.shape[0] * 2 + x.shape[-1] // 2)


def test_operations_of_many_kinds() -> None:
    module, x = Operations().requires_grad_(False), torch.randn(5, 4)
    gm = trace(module, (torch.randn(2, 4),))
    assert not module.n.any()
    expected, written = module(x), module.n.clone()
    module.n.fill_(7)
    result = gm(x=x)
    assert torch.equal(module.n, written)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


class Rows(nn.Module):
    """The number of rows depends on the values; nothing else does."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = (x[:, 0] > 0).nonzero().squeeze(-1)
        return torch.zeros_like(x).index_add(0, rows, self.a(x[rows]))


def test_selected_rows() -> None:
    module, x = Rows(), torch.randn(9, 4)
    gm = trace(module, (torch.randn(4, 4),))
    assert torch.equal(gm(x=x), module(x))


def test_recurrent_and_attention_layers_are_leaves() -> None:
    lstm = nn.LSTM(4, 4, batch_first=True)
    gm, x = trace(nn.Sequential(lstm), (torch.randn(2, 5, 4),)), torch.randn(3, 8, 4)
    assert torch.equal(gm(input=x)[0], lstm(x)[0])
    assert sites(gm) == ()


POWERS = [
    lambda x: x**2,
    lambda x: x**0.5,
    lambda x: 2**x,
    lambda x: x**x,
    lambda x: x.clone().__ipow__(2),
    lambda x: pow(x, 2),
    lambda x: torch.pow(x, 2),
    lambda x: x.pow(2),
    lambda x: 7 // x + 7 % x - 1 / x + x.__rsub__(1),
]


@pytest.mark.parametrize("function", POWERS)
def test_powers_and_reflected_operators(function: Callable[[Tensor], Tensor]) -> None:
    class Applies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(function(x.abs() + 1))
            return y

    module, x = Applies(), torch.randn(5, 4)
    assert torch.equal(trace(module, (torch.randn(2, 4),), whole=True)(x), module(x))


class Unembed(nn.Module):
    """Reads the weight of the module that it is handed."""

    def forward(self, x: Tensor, embedding: nn.Embedding) -> Tensor:
        return x @ embedding.weight.T


class HandsOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.a, self.unembed = nn.Embedding(9, 4), nn.Linear(4, 4), Unembed()

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.unembed(self.a(self.embedding(ids)), self.embedding)
        return y


def test_module_as_an_argument_of_a_leaf() -> None:
    module, ids = HandsOn(), torch.randint(9, (3, 5))
    gm = trace(module, (torch.randint(9, (2, 4)),), whole=True)
    assert torch.equal(gm(ids), module(ids))
    module.set_submodule("embedding", nn.Embedding(11, 4))
    assert torch.equal(gm(ids), module(ids))
    assert gm(ids).shape[-1] == 11
