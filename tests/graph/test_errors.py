from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpfx.graph import TraceError, trace


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = BranchInner()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


class BranchInner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        if y.mean() > 0:  # the line that the error names
            y = -y
        return y


def test_data_dependent_branch_is_named() -> None:
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "the line that" in text)
    with pytest.raises(TraceError, match=rf"`inner` \(BranchInner\) at .*test_errors\.py:{line}: .*torch\.where"):
        trace(Branch(), (torch.randn(2, 4),), whole=True)


def test_nothing_is_left_behind_after_an_error() -> None:
    call, module = nn.Module.__call__, Branch()
    with pytest.raises(TraceError):
        trace(module, (torch.randn(2, 4),), whole=True)
    assert nn.Module.__call__ is call
    assert not torch.compiler.is_compiling()
    assert not torch.compiler.is_exporting()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())
    assert type(module(torch.randn(2, 4))) is Tensor


class Refused(nn.Module):
    def __init__(self, forward: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.body = nn.Linear(4, 4), forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self.a, x)


def with_autocast(a: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return a(x)


def with_data(a: nn.Module, x: Tensor) -> Any:
    x.data = a(x)
    return x


@pytest.mark.parametrize(
    ("forward", "problem"),
    [
        (lambda a, x: torch.vmap(a)(x), "torch.func"),
        (lambda a, x: torch.from_numpy(a(x).numpy()), "NumPy"),
        (with_autocast, "autocast"),
        (with_data, "copy_"),
        (lambda a, x: x.tolist(), "values of a tensor|returns no tensor"),
        (lambda a, x: 3, "returns no tensor"),
        (lambda a, x: a(x[:, :3]), "RuntimeError"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(forward: Any, problem: str) -> None:
    with pytest.raises(TraceError, match=problem):
        trace(Refused(forward), (torch.randn(2, 4),), whole=True)
