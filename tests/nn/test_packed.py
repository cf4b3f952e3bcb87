"""The packed module against a dense Linear."""

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpfx.nn import (
    Layout,
    MixedPrecisionLinear,
    PackedWeight,
    fill_masks,
    join_input_groups,
    kernels,
    pack,
    pack_permutation,
    packed,
    unpack,
)
from mpfx.nn.kernels import reference
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


def masked_layer(scale_bits: int = 4) -> MixedPrecisionLinear:
    order = pack_permutation(torch.randperm(100, generator=torch.Generator().manual_seed(0)))
    weight = packed_weight(sparsity="0.5", scale_bits=scale_bits)
    return MixedPrecisionLinear(weight, permutation=order, bias=nn.Parameter(torch.ones(24)))


@torch.no_grad()
@pytest.mark.parametrize("scale_bits", [4, 16])
def test_a_filled_module_is_the_same_layer(scale_bits: int) -> None:
    module, x = masked_layer(scale_bits), torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    weight, found = module.weight, module(x)
    exact = reference(x, module.packed, module.permutation, module.bias)
    codes, mask = weakref.ref(module.codes), weakref.ref(module.mask)
    model = nn.Sequential(module, nn.Linear(24, 2))
    assert fill_masks(model) == 1
    assert codes() is mask() is None  # their memory is free before the next product
    assert model[0] is module
    assert module.packed.mask is None
    assert torch.equal(module.weight, weight)
    assert torch.equal(reference(x, module.packed, module.permutation, module.bias), exact)
    torch.testing.assert_close(module(x), found, rtol=1e-4, atol=1e-3)
    assert set(module.state_dict()) == {*SCALES[scale_bits], "codes", "zeros", "widths", "permutation", "bias"}
    assert "sparse" not in repr(module)
    assert fill_masks(model) == 0


@torch.no_grad()
def test_a_filled_module_moves_copies_and_loads() -> None:
    module = masked_layer()
    fill_masks(module)
    copied = copy.deepcopy(module).to(torch.bfloat16).float()
    assert torch.equal(copied.weight, module.weight)
    copied.codes.zero_()
    copied.load_state_dict(module.state_dict())
    assert torch.equal(copied.weight, module.weight)
    with pytest.raises(RuntimeError, match=r"Missing key.* \"mask\""):
        masked_layer().load_state_dict(module.state_dict())


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


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_filled_on_a_gpu(dtype: torch.dtype, rows: int) -> None:
    on_cpu, x = Attention("0.5").to(dtype), torch.randn(rows, 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    model = copy.deepcopy(on_cpu).cuda()
    join_input_groups(model)
    masked = model(x.cuda())
    assert fill_masks(model) == fill_masks(on_cpu) == 4
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer.cpu(), on_cpu.get_buffer(name))
    found = model(x.cuda())
    tolerance = 5e-4 if dtype == torch.float32 else 2e-2
    for expected in (masked.cpu(), on_cpu(x)):
        assert float((found.cpu() - expected).float().norm()) <= tolerance * float(expected.float().norm())


class Attention(nn.Module):
    """Layers that read the same input, and one that does not."""

    def __init__(self, sparsity: str | None = None) -> None:
        super().__init__()
        order = pack_permutation(torch.randperm(100, generator=torch.Generator().manual_seed(0)))
        bias, of_rows = nn.Parameter(torch.randn(8)), partial(packed_weight, sparsity=sparsity)
        self.q = MixedPrecisionLinear(of_rows(24), permutation=order)
        self.k = MixedPrecisionLinear(of_rows(8), permutation=order, bias=bias)
        self.v = MixedPrecisionLinear(of_rows(8, scale_bits=16), permutation=order)
        self.other = MixedPrecisionLinear(of_rows(100), permutation=order.clone())

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(x)
        return torch.cat([self.k(x), self.q(x), self.v(x)], -1)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Products of input groups are made together on the CPU too; returns of how many weights each call was."""
    calls: list[int] = []
    make = kernels.packed_linears

    def counted(x: Tensor, weights: Any, *rest: Any) -> list[Tensor]:
        calls.append(len(weights))
        return make(x, weights, *rest)

    monkeypatch.setattr(packed, "TOGETHER", ("cpu",))
    monkeypatch.setattr(packed, "packed_linears", counted)
    return calls


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_layers_of_an_input_group_multiply_together(rows: int, together: list[int]) -> None:
    model, x = Attention(), torch.randn(rows, 100)
    expected = model(x).detach()
    join_input_groups(model)
    for _ in range(5):
        with torch.no_grad():
            assert torch.equal(model(x), expected)
    assert together == ([3] * 5 if rows <= packed.TOGETHER_ROWS else [])


@torch.no_grad()
def test_an_input_group_that_is_filled_stays_one(together: list[int]) -> None:
    model, x = Attention("0.5"), torch.randn(1, 100, generator=torch.Generator().manual_seed(1))
    join_input_groups(model)
    before = model(x)
    assert fill_masks(model) == 4
    after = model(x)
    assert together == [3, 3]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-3)
    alone = copy.deepcopy(model)  # copies are on their own
    assert torch.equal(alone(x), after)
    assert together == [3, 3]


def test_products_with_gradients_are_not_made_together(together: list[int]) -> None:
    model, x = Attention(), torch.randn(2, 100, requires_grad=True)
    join_input_groups(model)
    model(x).sum().backward()
    assert x.grad is not None
    assert model.k.bias is not None
    assert torch.equal(model.k.bias.grad, torch.full((8,), 2.0))  # type: ignore[arg-type]
    assert together == []


@torch.no_grad()
def test_layers_that_are_not_all_called_are_on_their_own_again(together: list[int]) -> None:
    model = Attention()
    expected = [model.q(x) for x in torch.ones(1, 9, 100).cumsum(1)[0]]
    join_input_groups(model)
    for x, wanted in zip(torch.ones(1, 9, 100).cumsum(1)[0], expected, strict=True):
        assert torch.equal(model.q(x), wanted)
    assert together == [3] * 4


@torch.no_grad()
def test_equal_inputs_are_not_the_same_input(together: list[int]) -> None:
    model, x, y = Attention(), torch.randn(1, 100), torch.randn(1, 100)
    wanted = [model.q(x), model.k(y), model.v(x.clone())]
    join_input_groups(model)
    found = [model.q(x), model.k(y), model.v(x.clone())]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@torch.no_grad()
def test_what_was_written_to_is_multiplied_anew(together: list[int]) -> None:
    model, x = Attention(), torch.randn(1, 100)
    join_input_groups(model)
    model.q(x)
    x.mul_(2)
    found = model.k(x)
    assert together == [3, 3]
    join_input_groups(nn.ModuleList([model.k]))
    assert torch.equal(found, model.k(x))


def test_each_multiplies_for_itself_where_writes_are_not_seen(together: list[int]) -> None:
    model = Attention()
    join_input_groups(model)
    with torch.inference_mode():
        model(torch.randn(1, 100))
    assert together == []


def test_copies_are_on_their_own(together: list[int]) -> None:
    model, x = Attention(), torch.randn(1, 100)
    join_input_groups(model)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert together == [3]


@torch.no_grad()
def test_input_groups_compile_as_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "TOGETHER", ("cpu",))
    model, x = Attention(), torch.randn(1, 100)
    join_input_groups(model)
    expected, graphs = model(x), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(x), expected)
    assert len(graphs) == 1
    assert [str(graphs[0].code).count(f"mpfx.{name}(") for name in ("linears", "linear")] == [1, 1]
    torch._dynamo.reset()
