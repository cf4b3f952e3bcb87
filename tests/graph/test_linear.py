from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpfx.graph import is_linear, linear_weight, sites, trace


class Spelled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + (0 if self.bias is None else self.bias)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.01


class Transposed(nn.Module):
    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_subclasses_are_judged_by_what_they_compute(bias: bool, device: str) -> None:
    assert is_linear(nn.Linear(6, 9, bias=bias, device=device))
    assert is_linear(Spelled(6, 9, bias=bias, device=device))
    assert not is_linear(Scaled(6, 9, bias=bias, device=device))


def test_transposed_layer_is_known_by_its_form() -> None:
    assert is_linear(Transposed(5, 3))
    assert not is_linear(nn.Bilinear(3, 3, 5))
    assert not is_linear(nn.Embedding(3, 5))
    assert not is_linear(nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize("layer", [nn.Linear(3, 5), Transposed(5, 3)])
def test_weight_is_a_view_with_outputs_first(layer: nn.Module) -> None:
    weight, x = linear_weight(layer), torch.randn(4, 3)
    assert weight.shape == (5, 3)
    torch.testing.assert_close(F.linear(x, weight, layer.bias), layer(x))  # type: ignore[arg-type]
    weight.zero_()
    torch.testing.assert_close(layer(x), layer.bias.expand(4, 5))  # type: ignore[operator]


def test_weight_of_something_else_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="Embedding"):
        linear_weight(nn.Embedding(3, 5))


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).to(self.b.weight.dtype))
        return F.linear(y, self.a.weight)


class TwoPaths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.alias = self.a

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y


def dense_reasons(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, str | None]:
    return {site.path: site.dense_reason for site in sites(trace(module, args, kwargs))}


def test_weight_that_other_code_reads_stays_dense() -> None:
    reasons = dense_reasons(Direct(), torch.randn(2, 4))
    assert "read directly" in str(reasons["a"])
    assert reasons["b"] is None  # only its dtype is read


def test_module_under_two_paths_stays_dense() -> None:
    assert "more than one path" in str(dense_reasons(TwoPaths(), torch.randn(2, 4))["a"])


def test_tied_head_stays_dense(family: Any) -> None:
    model, sample = family("llama", tie_word_embeddings=True)
    reasons = dense_reasons(model, **sample(2, 5))
    assert "tied" in str(reasons.pop("lm_head"))
    assert set(reasons.values()) == {None}


def test_computed_weight_stays_dense() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    torch.nn.utils.parametrizations.weight_norm(module[0])
    reasons = dense_reasons(module, torch.randn(2, 4))
    assert "computed" in str(reasons["0"])
    assert reasons["2"] is None


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_linear_with_forward_hooks_stays_dense(kind: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    handle = getattr(module[0], kind)(lambda *_: None)
    reasons = dense_reasons(module, torch.randn(2, 4))
    assert "forward hooks" in str(reasons["0"])
    assert reasons["2"] is None
    handle.remove()
    assert dense_reasons(module, torch.randn(2, 4)) == {"0": None, "2": None}


def test_projection_of_multihead_attention_is_no_site() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    gm, x = trace(layer, (torch.randn(2, 5, 8),)), torch.randn(3, 7, 8)
    assert [site.path for site in sites(gm)] == ["linear1", "linear2"]
    assert torch.equal(gm(src=x), layer(x))
