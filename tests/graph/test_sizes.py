from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpfx.graph import bind_inputs, opaque_parts, trace


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


class Block(nn.Module):
    """Runs ``body(self, x)``; has a child, so that it is no leaf."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.body = nn.Linear(4, 4), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class Stack(nn.Module):
    """Layers in a list, and ``around(x)`` in the forward that calls them."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], around: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.layers, self.around = nn.ModuleList(Block(body) for _ in range(2)), around

    def forward(self, x: Tensor) -> Tensor:
        x = self.around(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def token_by_token(self: Any, x: Tensor) -> Any:
    h, out = torch.zeros_like(x[:, 0]), []
    for step in range(x.shape[1]):
        h = torch.tanh(self.a(x[:, step] + h))
        out.append(h)
    return torch.stack(out, 1)


def chunk_by_chunk(self: Any, x: Tensor) -> Tensor:
    padding = -x.shape[1] % 4
    padded = nn.functional.pad(x, (0, 0, 0, padding))
    chunks = [self.a(chunk).cumsum(1) for chunk in padded.split(4, 1)]
    return torch.cat(chunks, 1)[:, : x.shape[1]]


def unbound(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.a(token) for token in x.unbind(1)], 1)


def short_or_long(self: Any, x: Tensor) -> Any:
    return self.a(x) if x.shape[1] < 9 else -self.a(x)


def odd_or_even(self: Any, x: Tensor) -> Any:
    return self.a(x) if x.shape[1] % 2 else -self.a(x)


FIXING = [token_by_token, chunk_by_chunk, unbound, short_or_long, odd_or_even]


@pytest.mark.parametrize("body", FIXING)
def test_layer_that_fixes_a_size_is_called_as_it_is(body: Any) -> None:
    module = Stack(body)
    gm = trace(module, (torch.randn(2, 5, 4),))
    assert [part.path for part in opaque_parts(gm)] == ["layers.0", "layers.1"]
    assert all("test_sizes.py:" in part.where and "size" in part.problem for part in opaque_parts(gm))
    for batch, length in [(3, 5), (2, 8), (1, 13), (4, 2)]:
        x = torch.randn(batch, length, 4)
        assert torch.equal(gm(x), module(x))


def test_far_bounds_and_single_sizes_fix_nothing() -> None:
    def checked(self: Any, x: Tensor) -> Any:
        if x.shape[1] > 64:
            raise ValueError("too long")
        return self.a(x) if x.shape[1] != 3 and x.shape[0] > 1 else -self.a(x)

    module = Stack(checked)
    gm, x = trace(module, (torch.randn(2, 5, 4),)), torch.randn(3, 30, 4)
    assert opaque_parts(gm) == ()
    assert torch.equal(gm(x), module(x))
    with pytest.raises(ValueError, match=r"`x.shape\[1\]` = 3"):
        gm(torch.randn(2, 3, 4))


def test_size_that_the_caller_of_the_layers_fixes_is_a_rule_with_its_place() -> None:
    module = Stack(lambda self, x: self.a(x), around=lambda x: torch.stack([x[:, i] for i in range(x.shape[1])], 1))
    gm, x = trace(nn.Sequential(module), (torch.randn(2, 5, 4),)), torch.randn(3, 5, 4)
    assert opaque_parts(gm) == ()
    assert torch.equal(gm(x), module(x))
    with pytest.raises(ValueError, match=r"`0` at .*test_sizes.py:\d+.*`input.shape\[1\]` = 6"):
        gm(torch.randn(3, 6, 4))


def test_layer_without_weights_keeps_its_rule() -> None:
    gm = trace(Stack(token_by_token).to("meta"), (torch.randn(2, 5, 4, device="meta"),))
    assert opaque_parts(gm) == ()
    with pytest.raises(ValueError, match=r"`x.shape\[1\]` = 6"):
        gm(torch.randn(2, 6, 4, device="meta"))


def test_layer_that_runs_at_one_size_only_leaves_the_rule() -> None:
    def one_size(self: Any, x: Tensor) -> Any:
        if x.shape[1] != 5:
            raise ValueError("five tokens only")
        return token_by_token(self, x)

    module = Stack(one_size)
    gm, x = trace(module, (torch.randn(2, 5, 4),)), torch.randn(3, 5, 4)
    assert torch.equal(gm(x), module(x))
    with pytest.raises(ValueError, match=r"1\]` = 6"):
        gm(torch.randn(2, 6, 4))


def test_sizes_of_images_become_numbers_where_code_fixes_them() -> None:
    module = Stack(lambda s, x: torch.cat([s.a(x[:, :, i : i + 4]) for i in range(0, x.shape[2], 4)], 2))
    gm, x = trace(module, (torch.randn(2, 3, 8, 4),)), torch.randn(5, 3, 8, 4)
    assert opaque_parts(gm) == ()
    assert torch.equal(gm(x), module(x))
    with pytest.raises(ValueError, match=r"`x.shape\[2\]` to be 8"):
        gm(torch.randn(5, 3, 12, 4))


COMPUTED = [
    lambda n: math.ceil(n / 2),
    lambda n: math.floor(n / 2),
    lambda n: math.trunc(n / 2),
    lambda n: round(n / 3),
    lambda n: round(n / 3, 1),
    lambda n: math.ceil(n * 1.5) - n,
]


@pytest.mark.parametrize("compute", COMPUTED)
def test_rounded_sizes(compute: Any) -> None:
    module = Block(lambda s, x: s.a(x) * torch.full((4,), compute(x.shape[0])))
    gm = trace(module, (torch.randn(6, 4),), whole=True)
    for rows in (1, 5, 9):
        x = torch.randn(rows, 4)
        assert torch.equal(gm(x), module(x))
