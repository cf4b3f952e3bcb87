"""Triton kernels against float64 products of the dense weight, on poisoned buffers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mpfx.nn import Layout, PackedWeight, pack
from mpfx.nn.kernels import packed_linear
from tests.nn.test_packing import random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Of the sum of the absolute products: what rounding the result and, for few rows, the activations may cost.
TOLERANCE = {torch.float32: 3e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
LAYOUTS = [Layout(96, (bits,) * 3, 32) for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16)] + [
    Layout(200, (8, 6, 5, 5, 3, 1, 0), 64),
    Layout(256, (16, 7, 4, 4, 3, 2, 2, 0), None),
    Layout(4096, (6,) * 20 + (5,) * 30 + (4,) * 40 + (3,) * 38, 64),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote to holds NaN."""
    empty = torch.empty

    def poison(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        made.view(torch.uint8).fill_(255) if made.numel() else None
        return made

    monkeypatch.setattr(torch, "empty", poison)


def on_device(weight: PackedWeight) -> PackedWeight:
    parts = {name: None if part is None else part.cuda() for name, part in weight.parts.items()}
    return PackedWeight.of(parts, weight.layout)


CASES = [(layout, torch.bfloat16, 144, plain) for layout in LAYOUTS for plain in (False, True)]
CASES += [(LAYOUTS[-2], dtype, 37, False) for dtype in TOLERANCE] + [(LAYOUTS[-1], torch.float16, 515, True)]


@pytest.mark.parametrize(("layout", "dtype", "out", "plain"), CASES, ids=str)
def test_products_are_those_of_the_dense_weight(layout: Layout, dtype: torch.dtype, out: int, plain: bool) -> None:
    weight = random_weight(layout, out, symmetric=plain, coded=not plain)
    dense, packed = weight.dequantize().double().cuda(), on_device(pack(weight))
    order = None if plain else torch.randperm(layout.in_features).to(torch.uint16).cuda()
    bias = None if plain else torch.randn(out, dtype=dtype, device="cuda")
    for rows in (1, 3, 8, 20):
        x = torch.randn(rows, layout.in_features, dtype=dtype, device="cuda")
        moved = x.double() if order is None else x.double()[:, order.long()]
        size = moved.abs() @ dense.abs().t() + 1e-6
        expected = moved @ dense.t() + (0 if bias is None else bias.double())
        found = packed_linear(x, packed, order, bias)
        assert found.dtype == dtype
        assert float(((found.double() - expected).abs() / (size + expected.abs())).max()) <= TOLERANCE[dtype]
        assert torch.equal(found, packed_linear(x, packed, order, bias))


def test_what_is_not_finite_stays_so() -> None:
    packed = on_device(pack(random_weight(Layout(128, (4,) * 4, 64), 64, coded=True)))
    for value in (float("nan"), float("inf")):
        x = torch.randn(1, 128, device="cuda")
        x[0, 70] = value
        assert not bool(torch.isfinite(packed_linear(x, packed, None, None)).any())


def test_graphs_and_compilers_take_it() -> None:
    packed = on_device(pack(random_weight(Layout(256, (5, 5, 4, 4, 3, 3, 3, 3), 64), 320, coded=True)))
    x = torch.randn(1, 256, dtype=torch.bfloat16, device="cuda")
    expected = packed_linear(x, packed, None, None)
    with torch.no_grad():
        compiled = torch.compile(lambda t: packed_linear(t, packed, None, None), fullgraph=True)
        assert torch.equal(compiled(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = packed_linear(x, packed, None, None)
    for _ in range(3):
        graph.replay()
    assert torch.equal(found, expected)
