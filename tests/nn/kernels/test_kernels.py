"""The operator: what runs it, under compilers and with gradients, against the dense weight."""

import pytest
import torch
from torch import Tensor, nn

from mpfx.nn import Layout, MixedPrecisionLinear, PackedWeight, pack, pack_permutation
from mpfx.nn.kernels import packed_linear, reference
from mpfx.nn.kernels.tables import encoded, layout_of
from tests.nn.test_packing import random_weight

LAYOUT = Layout(200, (16, 8, 5, 4, 3, 1, 0), 64)


def module(density: float = 1.0) -> MixedPrecisionLinear:
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    bias = nn.Parameter(torch.randn(24, generator=torch.Generator().manual_seed(1)))
    weight = pack(random_weight(LAYOUT, 24, density=density, coded=True))
    return MixedPrecisionLinear(weight, permutation=pack_permutation(order), bias=bias)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).detach().norm()) <= tolerance * float(expected.detach().norm())


def test_layouts_survive_as_text() -> None:
    assert layout_of(200, encoded(LAYOUT.widths), 64) == LAYOUT
    assert layout_of(200, encoded(LAYOUT.widths), 0).group_size is None


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("rows", [1, 12])
def test_the_operator_is_the_reference(rows: int, density: float) -> None:
    packed, x = module(density), inputs(rows, 200)
    dense = nn.functional.linear(x, packed.weight, packed.bias)
    close(reference(x, packed.packed, packed.permutation, packed.bias), dense, 1e-6)
    close(packed_linear(x, packed.packed, packed.permutation, packed.bias), dense)
    with torch.no_grad():
        assert torch.equal(packed(x), packed(x.clone().requires_grad_()))  # called at once, and by the dispatcher


def test_gradients_reach_input_and_bias() -> None:
    packed, x = module(), inputs(3, 12, 200).requires_grad_()
    packed(x).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    bias = packed.bias.detach().clone().requires_grad_()  # type: ignore[union-attr]
    nn.functional.linear(other, packed.weight, bias).square().sum().backward()
    assert x.grad is not None
    assert other.grad is not None
    assert packed.bias is not None
    assert packed.bias.grad is not None
    assert bias.grad is not None
    close(x.grad, other.grad)
    close(packed.bias.grad, bias.grad)


def test_a_bias_has_a_gradient_though_the_input_has_none() -> None:
    packed = module()
    packed(inputs(3, 200)).sum().backward()
    assert packed.bias is not None
    assert packed.bias.grad is not None
    close(packed.bias.grad, torch.full((24,), 3.0))


def test_compilers_take_it_as_it_is() -> None:
    packed, x = module(), inputs(4, 200)
    with torch.no_grad():
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), packed(x))


def test_autocast_computes_in_half_precision() -> None:
    packed, x = module(), inputs(12, 200)
    with torch.autocast("cpu", torch.bfloat16):
        found = packed(x)
    assert found.dtype == torch.bfloat16
    close(found.float(), packed(x), 2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_row_and_other_dtypes_run_on_the_reference(dtype: torch.dtype) -> None:
    packed = module()
    assert packed(inputs(0, 200).to(dtype)).shape == (0, 24)
    x = inputs(2, 200).double()
    weight = PackedWeight.of(packed.packed.parts, LAYOUT)
    assert torch.equal(packed_linear(x, weight, None, None), reference(x, weight, None, None))


@pytest.mark.parametrize("away", ["codes", "scale_codes", "mask", "permutation", "bias"])
def test_what_lies_on_another_device_is_refused(away: str) -> None:
    packed = module(0.5)
    parts = {**packed.packed.parts, "permutation": packed.permutation, "bias": packed.bias}
    found = parts[away]
    assert found is not None
    parts[away] = found.detach().to("meta")
    permutation, bias = parts.pop("permutation"), parts.pop("bias")
    with pytest.raises(ValueError, match=f"on cpu, where its input is, but its `{away}` is on meta"), torch.no_grad():
        packed_linear(inputs(1, 200), PackedWeight.of(parts, LAYOUT), permutation, bias)
