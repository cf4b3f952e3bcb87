"""The packed module against a dense Linear."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mpfx.nn import Layout, MixedPrecisionLinear, PackedWeight, pack, pack_permutation, unpack
from mpfx.solve import GridConfig, Sparsity, sweep


def packed_weight(
    rows: int = 24, channels: int = 100, sparsity: str | None = None, scale_bits: int = 4
) -> PackedWeight:
    weight = torch.randn(rows, channels, generator=torch.Generator().manual_seed(3))
    layout, grid = Layout(channels, (8, 6, 3, 0), 64), GridConfig(scale_bits=scale_bits)
    return pack(sweep(weight, torch.eye(channels), layout, grid, Sparsity.parse(sparsity)))


@pytest.mark.parametrize("sparsity", [None, "0.5", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(100,), (5, 100), (2, 3, 100), (0, 100)])
@pytest.mark.parametrize("scale_bits", [4, 16])
def test_runs_as_the_dense_layer_does(
    sparsity: str | None, dtype: torch.dtype, shape: tuple[int, ...], scale_bits: int
) -> None:
    weight = packed_weight(sparsity=sparsity, scale_bits=scale_bits)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    bias = nn.Parameter(torch.randn(24))
    module = MixedPrecisionLinear(weight, permutation=pack_permutation(order), bias=bias).to(dtype)
    dense = torch.empty(24, 100).index_copy_(1, order, unpack(weight).dequantize()).to(dtype)
    assert torch.equal(module.weight, dense)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = nn.functional.linear(x, dense, bias.to(dtype))
    found, expected = module(x).detach(), expected.detach()
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    assert float((found - expected).double().norm()) <= tolerance * float(expected.double().norm())


SCALES = {4: {"scale_codes", "row_scales", "group_scales"}, 16: {"scales"}}


@pytest.mark.parametrize("scale_bits", [4, 16])
@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=lambda f: f.__name__)
def test_a_change_of_dtype_leaves_the_stored_weight_alone(scale_bits: int, move: Callable[[nn.Module], Any]) -> None:
    module = MixedPrecisionLinear(packed_weight(scale_bits=scale_bits), bias=nn.Parameter(torch.zeros(24)))
    before, parts = module.weight, module.packed.parts
    moved = move(copy.deepcopy(module))
    assert moved.weight.dtype == moved.weight_dtype == moved.bias.dtype != torch.float32
    for name in SCALES[scale_bits]:
        part = parts[name]
        assert part is not None
        assert getattr(moved, name).dtype == part.dtype
        assert torch.equal(getattr(moved, name), part)
    assert torch.equal(moved.float().weight, before)
    meta = copy.deepcopy(module).to("meta").to(torch.bfloat16)
    assert all(getattr(meta, name).dtype == getattr(module, name).dtype for name in SCALES[scale_bits])


@pytest.mark.parametrize("scale_bits", [4, 16])
def test_state_dict_round_trip(scale_bits: int) -> None:
    weight = packed_weight(sparsity="0.5", scale_bits=scale_bits)
    module = MixedPrecisionLinear(weight, permutation=pack_permutation(torch.arange(100)))
    other = copy.deepcopy(module)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)
    assert set(module.state_dict()) == {*SCALES[scale_bits], "codes", "zeros", "mask", "widths", "permutation"}


def test_large_permutations_are_kept_whole() -> None:
    assert pack_permutation(torch.arange(65536)).dtype == torch.uint16
    assert pack_permutation(torch.arange(65536)).long().max() == 65535
    assert pack_permutation(torch.arange(65537)).dtype == torch.int32


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity", [None, "0.5", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(sparsity: str | None, dtype: torch.dtype) -> None:
    order = pack_permutation(torch.randperm(100, generator=torch.Generator().manual_seed(0)))
    module = MixedPrecisionLinear(packed_weight(sparsity=sparsity), permutation=order).to(dtype)
    dense = module.weight
    moved = copy.deepcopy(module).cuda()
    assert torch.equal(moved.weight.cpu(), dense)
    x = torch.randn(5, 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(moved(x.cuda()).cpu(), module(x), rtol=tolerance, atol=tolerance * 10)
