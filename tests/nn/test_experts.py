"""Packed experts against the same module with the dequantized weights written into it.

Their products are those of the kernels, whose own tests tell how far they may be off.
"""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpfx.nn import (
    CodedScales,
    Layout,
    MixedPrecisionLinear,
    PackedWeight,
    QuantizedWeight,
    Scales,
    fill_masks,
    filled,
    pack,
    pack_permutation,
)
from mpfx.nn.experts import PackedExperts, PackedStack, split_stack
from mpfx.nn.packing import PARTS


def packed_weight(
    rows: int,
    channels: int,
    seed: int,
    *,
    masked: bool = False,
    symmetric: bool = False,
    raw: bool = False,
    coded: bool = False,
    left_out: bool = False,
) -> PackedWeight:
    """A weight with widths that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    segments = -(-channels // 32)
    widths = [16] * segments if raw else (torch.randint(2, 9, (segments,), generator=generator)).tolist()
    if left_out:  # another segment of every expert, and one expert as a whole
        widths = [0] * segments if seed == 1 else [0 if k == seed % segments else w for k, w in enumerate(widths)]
    layout = Layout(channels, tuple(widths), 32)
    grids = len(layout.grids)
    codes = torch.cat(
        [torch.randint(0, 1 << min(g.bits, 13), (rows, g.channels), generator=generator) for g in layout.groups], 1
    )
    kept = torch.rand(rows, channels, generator=generator) < 0.6 if masked else None
    for run in layout.runs:
        if kept is not None and run.bits == 0:
            kept[:, run.start : run.stop] = False
    zeros = [torch.randint(0, 1 << g.bits, (rows,), generator=generator) for g in layout.grids]
    scales: Scales = torch.rand(rows, grids, generator=generator).half() / 50
    if coded:
        bases = torch.rand(rows, generator=generator), torch.rand(grids, generator=generator) + 0.1
        scales = CodedScales.of(torch.randint(0, 16, (rows, grids), generator=generator), *bases)
    return pack(
        QuantizedWeight(
            codes=(codes if kept is None else codes * kept).int(),
            scales=scales,
            zeros=None if symmetric else (torch.stack(zeros, 1) if zeros else torch.empty(rows, 0)).to(torch.uint8),
            kept=kept,
            layout=layout,
        )
    )


def packed_stack(
    experts: int, rows: int, channels: int, *, ordered: bool = True, transposed: bool = False, **kinds: bool
) -> PackedStack:
    weights = [packed_weight(rows, channels, seed, **kinds) for seed in range(experts)]
    orders = [torch.randperm(channels, generator=torch.Generator().manual_seed(s)) for s in range(experts)]
    return PackedStack(weights, permutation=orders if ordered else None, transposed=transposed)


KINDS: list[dict[str, bool]] = [
    {},
    {"masked": True},
    {"symmetric": True},
    {"masked": True, "symmetric": True},
    {"raw": True},
    {"coded": True},
    {"coded": True, "masked": True, "left_out": True},
    {"coded": True, "raw": True},
    {"left_out": True},
]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("kinds", KINDS)
def test_every_expert_is_the_layer_of_its_own_weight(kinds: dict[str, bool], ordered: bool) -> None:
    stack = packed_stack(5, 24, 70, ordered=ordered, **kinds)
    for expert in range(5):
        order = torch.randperm(70, generator=torch.Generator().manual_seed(expert))
        layer = MixedPrecisionLinear(
            packed_weight(24, 70, expert, **kinds), permutation=pack_permutation(order) if ordered else None
        )
        assert torch.equal(stack.dense(expert), layer.weight)
        assert torch.equal(stack.stacked()[expert], layer.weight)
        for name, part in stack.packed(expert).parts.items():
            original, whole = layer.packed.parts[name], getattr(stack, name)
            assert (part is None) == (original is None)
            if part is not None and original is not None:
                assert torch.equal(part, original)
                assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()  # a view
    assert stack.nbytes == sum(packed_weight(24, 70, expert, **kinds).nbytes for expert in range(5))
    assert stack.shape == (5, 24, 70)
    if ordered:
        assert stack.permutation is not None
        assert stack.permutation.dtype == torch.uint16


def test_transposed_stacks() -> None:
    stack = packed_stack(3, 24, 70, transposed=True)
    assert stack.shape == (3, 70, 24)
    assert stack.stacked().is_contiguous()
    assert torch.equal(stack.stacked(), packed_stack(3, 24, 70).stacked().mT)


@pytest.mark.parametrize("kinds", KINDS)
def test_taken_apart_and_put_together(kinds: dict[str, bool]) -> None:
    stack = packed_stack(4, 24, 70, **kinds)
    parts = {name: getattr(stack, name) for name in PARTS}
    weights = split_stack(parts, out_features=24, in_features=70, group_size=32)
    again = PackedStack(weights, permutation=stack.permutation)
    assert torch.equal(again.stacked(), stack.stacked())
    assert again.permutation is stack.permutation
    assert all(torch.equal(value, stack.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": lambda t: None}, "one of them is missing"),
        ({"codes": lambda t: t[:-1]}, r"`codes` of shape \(\d+,\) but got"),
        ({"codes": lambda t: t.float()}, "expert 0: Expected `codes` to be torch.int32"),
        ({"scales": lambda t: t[1:]}, "Expected `scales` of shape"),
        ({"scales": lambda t: t * float("nan")}, "expert 0: Expected `scales` to be finite"),
        ({"scales": torch.neg}, "expert 0: .* negative"),
        ({"zeros": lambda t: t[:-1]}, "Expected `zeros` of shape"),
        ({"mask": lambda t: t[:, 1:]}, "Expected `mask` to be int32 of shape"),
        ({"mask": lambda t: t.float()}, "Expected `mask` to be int32"),
        ({"mask": torch.zeros_like}, "Expected `codes`"),
        ({"widths": lambda t: t[0]}, "Expected `widths` of shape"),
        ({"widths": lambda t: t[:0]}, "Expected `widths` of shape"),
        ({"widths": lambda t: t * 0 + 77}, "widths in 0..8"),
        ({"widths": lambda t: t[:, 1:]}, "Expected 3 widths"),
    ],
)
def test_damaged_stacks_are_refused(change: dict[str, Callable[[Tensor], Any]], message: str) -> None:
    stack = packed_stack(4, 24, 70, masked=True)
    parts: dict[str, Any] = {name: getattr(stack, name) for name in PARTS}
    for name, damage in change.items():
        parts[name] = damage(parts[name])
    with pytest.raises(ValueError, match=message):
        split_stack(parts, out_features=24, in_features=70, group_size=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_codes": lambda t: t[:-1]}, "Expected `scale_codes` of shape"),
        ({"scale_codes": lambda t: t.float()}, "expert 0: Expected `scale_codes` to be torch.int32"),
        ({"scale_codes": lambda t: None}, "expert 0: Expected either `scales`, or"),
        ({"row_scales": lambda t: t[1:]}, "Expected `row_scales` to be float16 of shape"),
        ({"row_scales": lambda t: t[:, 1:]}, "Expected `row_scales` to be float16 of shape"),
        ({"row_scales": lambda t: t.float()}, "Expected `row_scales` to be float16"),
        ({"row_scales": torch.neg}, "expert 0: Expected `row_scales` to be finite"),
        ({"group_scales": lambda t: t[1:]}, "Expected `group_scales` of shape"),
        ({"group_scales": lambda t: t * float("inf")}, "expert 0: Expected `group_scales` to be finite"),
        ({"group_scales": lambda t: None}, "expert 0: Expected either `scales`, or"),
        ({"mask": lambda t: t | 1}, "expert 0: Expected `mask` to keep nothing"),
    ],
)
def test_damaged_coded_stacks_are_refused(change: dict[str, Callable[[Tensor], Any]], message: str) -> None:
    stack = packed_stack(4, 24, 70, masked=True, coded=True, left_out=True)
    parts: dict[str, Any] = {name: getattr(stack, name) for name in PARTS}
    split_stack(parts, out_features=24, in_features=70, group_size=32)
    for name, damage in change.items():
        parts[name] = damage(parts[name])
    with pytest.raises(ValueError, match=message):
        split_stack(parts, out_features=24, in_features=70, group_size=32)


def test_weights_that_do_not_go_together_are_refused() -> None:
    first = packed_weight(24, 70, 0)
    for other, message in [
        (packed_weight(25, 70, 1), "number of rows to be that of expert 0, 24, but expert 1 has 25"),
        (packed_weight(24, 71, 1), "number of channels"),
        (packed_weight(24, 70, 1, masked=True), "use of a mask"),
        (packed_weight(24, 70, 1, symmetric=True), "use of zeros"),
        (packed_weight(24, 70, 1, coded=True), "use of coded scales"),
    ]:
        with pytest.raises(ValueError, match=message):
            PackedStack([first, other])
    with pytest.raises(ValueError, match="at least one expert"):
        PackedStack([])
    with pytest.raises(ValueError, match=r"`permutation` of shape \(1, 70\) but got \(1, 69\)"):
        PackedStack([first], permutation=[torch.arange(69)])
    with pytest.raises(IndexError, match=r"0 \.\. 0 but got 1"):
        PackedStack([first]).packed(1)


@pytest.mark.parametrize("coded", [False, True])
def test_a_change_of_dtype_leaves_the_stored_weights_alone(coded: bool) -> None:
    stack = packed_stack(3, 24, 70, coded=coded)
    before, moved = stack.stacked(), copy.deepcopy(stack).to(torch.bfloat16)
    for name in ("row_scales", "group_scales") if coded else ("scales",):
        assert getattr(moved, name).dtype == torch.float16
    assert moved.weight_dtype == moved.stacked().dtype == moved.dense(0).dtype == torch.bfloat16
    assert torch.equal(moved.float().stacked(), before)
    assert copy.deepcopy(stack).half().stacked().dtype == torch.float16


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def close(found: Tensor, expected: Tensor, most: float = 3e-4) -> bool:
    same = found.shape == expected.shape and found.dtype == expected.dtype and found.isfinite().all()
    return bool(same) and error(found, expected) < most


class Experts(nn.Module):
    """A user's own: a loop, biases, a buffer, a child, something it counts."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        up, down = (4, 40, 64), (4, 64, 40)
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn((4, 64, 40) if transposed else up))
        self.down = nn.Parameter(torch.randn((4, 40, 64) if transposed else down))
        self.up_bias = nn.Parameter(torch.randn(4, 40))
        self.register_buffer("scale", torch.tensor(0.5))
        self.norm = nn.LayerNorm(40)
        self.num_experts, self.calls, self.transposed = 4, 0, transposed

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ (weight if self.transposed else weight.t())

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.calls += 1
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, k = torch.where(index == expert)
            inner = self.norm(self.product(x[token], self.up[expert]) + self.up_bias[expert]).relu()
            out.index_add_(0, token, self.product(inner, self.down[expert]) * weights[token, k, None])
        return out * self.get_buffer("scale")


def inputs(tokens: int = 9, width: int = 64, experts: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)])
    return torch.randn(tokens, width, generator=generator), index, torch.rand(tokens, 2, generator=generator)


def stacks_for(module: nn.Module, transposed: bool, **kinds: bool) -> dict[str, PackedStack]:
    stacks = {}
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3:
            count, rows, channels = parameter.shape
            sizes = (channels, rows) if transposed else (rows, channels)
            stacks[name] = packed_stack(count, *sizes, transposed=transposed, **kinds).to(parameter.dtype)
    return stacks


@contextmanager
def nothing_dense(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, no matrix of an expert is unpacked."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a matrix is unpacked")

    with monkeypatch.context() as patch:
        patch.setattr("mpfx.nn.experts.unpack", refuse)
        yield


def packed_pair(module: Any, transposed: bool = False, **kinds: bool) -> tuple[PackedExperts, Any]:
    """The packed module, and a dense one with the same weights."""
    stacks = stacks_for(module, transposed, **kinds)
    dense = copy.deepcopy(module)
    with torch.no_grad():
        for name, stack in stacks.items():
            dense.get_parameter(name).copy_(stack.stacked())
    return PackedExperts(module, stacks), dense


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kinds", KINDS)
def test_the_users_code_runs(kinds: dict[str, bool], transposed: bool, mode: Any) -> None:
    packed, dense = packed_pair(Experts(transposed).eval(), transposed, **kinds)
    with mode():
        for _ in range(2):
            assert close(packed(*inputs()), dense(*inputs()))


def test_gradients_reach_the_inputs_and_what_stayed_dense() -> None:
    packed, dense = packed_pair(Experts())
    found = []
    for module in (packed, dense):
        x, index, weights = inputs()
        x.requires_grad_()
        module(x, index, weights).square().sum().backward()
        assert module.up_bias.grad is not None
        assert module.norm.weight.grad is not None
        found.append((x.grad, module.up_bias.grad, module.norm.weight.grad))
    assert all(close(a, b) for a, b in zip(*found, strict=True))


def test_what_is_stored_and_what_is_gone() -> None:
    module = Experts()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    packed = PackedExperts(module, stacks_for(module, False))
    parts = {f"{n}.{p}" for n in ("up", "down") for p in ("codes", "scales", "zeros", "widths", "permutation")}
    assert set(packed.state_dict()) == {*parts, "up_bias", "scale", "norm.weight", "norm.bias"}
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())  # not touched
    assert packed.up_bias is module.up_bias
    assert packed.norm is module.norm
    gone = weakref.ref(module.up)
    del module, before
    gc.collect()
    assert gone() is None
    packed(*inputs())
    real = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and not o.is_meta]
    shapes = [tuple(o.shape) for o in real if all(isinstance(size, int) for size in o.shape)]
    assert (4, 40) in shapes  # it would be found
    assert not {(4, 40, 64), (4, 64, 40)} & set(shapes)


def test_nothing_of_a_call_stays() -> None:
    packed, _ = packed_pair(Experts())
    inner = vars(packed)["_inner"]
    seen: list[bool] = []
    packed.norm.register_forward_hook(lambda *_: seen.append("up" in vars(inner)))
    packed(*inputs())
    assert seen
    assert all(seen)
    assert not {"up", "down"} & set(vars(inner))
    with pytest.raises(IndexError):
        packed(torch.randn(2, 64), *inputs()[1:])
    assert not {"up", "down"} & set(vars(inner))


def activations(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


GROUPED: Any = nn.functional.grouped_mm
PRODUCTS: dict[str, Callable[[Any], Tensor]] = {  # of a stack (5, 24, 72)
    "linear": lambda w: nn.functional.linear(activations(3, 72), w[2]),
    "linear with a bias": lambda w: nn.functional.linear(activations(3, 72), w[2], activations(24)),
    "many rows": lambda w: nn.functional.linear(activations(50, 72), w[-1]),
    "no rows": lambda w: nn.functional.linear(activations(0, 72), w[2]),
    "three dimensions": lambda w: nn.functional.linear(activations(2, 3, 72), w[0]),
    "one row": lambda w: nn.functional.linear(activations(72), w[0]),
    "a tensor as index": lambda w: activations(3, 72) @ w[torch.tensor(3)].t(),
    "from the left": lambda w: w[1] @ activations(72, 3),
    "from the left, a vector": lambda w: w[1] @ activations(72),
    "batched": lambda w: torch.bmm(activations(5, 3, 72), w.mT),
    "batched from the left": lambda w: torch.bmm(w, activations(5, 72, 3)),
    "chosen": lambda w: torch.bmm(activations(4, 1, 72), w[torch.tensor([1, 4, 1, 0])].transpose(1, 2)),
    "chosen from the left": lambda w: torch.bmm(w[torch.tensor([1, -1, 1, 0])], activations(4, 72, 1)),
    "selected": lambda w: torch.bmm(activations(2, 2, 72), w.index_select(0, torch.tensor([3, 3])).permute(0, 2, 1)),
    "grouped": lambda w: GROUPED(
        activations(9, 72), w.transpose(-2, -1), offs=torch.tensor([2, 2, 5, 5, 9], dtype=torch.int32)
    ),
    "added": lambda w: torch.baddbmm(activations(5, 3, 24), activations(5, 3, 72), w.mT),
}
OTHERS: dict[str, Callable[[Any], Tensor]] = {
    "another dimension": lambda w: activations(3, 24) @ w[2],
    "some rows": lambda w: activations(3, 72) @ w[2, :8].t(),
    "arithmetic": lambda w: w * 2 + w[0],
    "a sum": lambda w: w.sum(0),
    "scaled": lambda w: torch.addmm(activations(24), activations(3, 72), w[1].t(), beta=0.5, alpha=2.0),
    "with itself": lambda w: w[0] @ w[1].t(),
    "einsum": lambda w: torch.einsum("ti,eoi->teo", activations(3, 72), w),
    "a table of experts": lambda w: w[torch.tensor([[0, 1], [2, 2]])],
    "experts turned": lambda w: w.transpose(0, 1),
    "as another type": lambda w: activations(3, 72).double() @ w[2].double().t(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("what", [*PRODUCTS, *OTHERS])
def test_what_code_does_with_weights(what: str, transposed: bool, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = packed_stack(5, 24, 72, transposed=transposed)
    dense, operand = stack.stacked(), stack.operand()
    assert (operand.shape, operand.dtype, operand.device) == (dense.shape, dense.dtype, dense.device)
    run = (PRODUCTS | OTHERS)[what]
    with mode():
        expected = run(dense.mT if transposed else dense)
        with nothing_dense(monkeypatch) if what in PRODUCTS else nullcontext():
            found = run(operand.mT if transposed else operand)
    assert type(found) is Tensor or what in ("a table of experts", "experts turned")
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if expected.numel():
        assert error(found, expected) < 1e-4


@pytest.mark.parametrize(
    "wrong",
    [
        lambda w: activations(3, 73) @ w[0].t(),
        lambda w: activations(3, 72).double() @ w[0].t(),
        lambda w: w[5],
        lambda w: w[torch.tensor([0, 5])],
        lambda w: torch.bmm(activations(4, 3, 72), w.mT),
        lambda w: w.t(),
    ],
)
def test_what_torch_refuses_is_refused(wrong: Callable[[Any], Tensor]) -> None:
    stack = packed_stack(5, 24, 72)
    with pytest.raises((RuntimeError, IndexError)) as expected:
        wrong(stack.stacked())
    with pytest.raises(type(expected.value)):
        wrong(stack.operand())


def test_only_experts_with_activations_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = packed_stack(5, 24, 72)
    seen: list[int] = []
    packed = stack.packed

    def watched(expert: int) -> PackedWeight:
        seen.append(expert)
        return packed(expert)

    monkeypatch.setattr(stack, "packed", watched)
    w = stack.operand()
    torch.bmm(activations(4, 1, 72), w[torch.tensor([1, 4, 1, 1])].mT)
    assert seen == [1, 4]
    GROUPED(activations(9, 72), w.mT, offs=torch.tensor([0, 5, 5, 9, 9], dtype=torch.int32))
    assert seen == [1, 4, 1, 3]


def test_what_is_known_of_a_weight_is_known_at_its_next_product() -> None:
    stack = packed_stack(3, 24, 72, masked=True)
    known = stack.packed(1)
    assert stack.packed(1) is known
    before = activations(3, 72) @ stack.operand()[1].t()
    moved = copy.deepcopy(stack)
    assert moved.packed(1) is not known
    moved.double()
    assert moved.packed(1) is moved.packed(1)
    stack.load_state_dict({**stack.state_dict(), "scales": stack.get_buffer("scales") * 2}, assign=True)
    assert stack.packed(1) is not known
    assert close(activations(3, 72) @ stack.operand()[1].t(), 2 * before, 1e-4)


def test_it_stays_the_users_module() -> None:
    module = Experts()
    packed, dense = packed_pair(module)
    assert packed.num_experts == 4
    assert packed.original_type is Experts
    assert packed.calls == 0
    packed(*inputs())
    packed(*inputs())
    assert packed.calls == 2
    assert module.calls == 0
    with pytest.raises(AttributeError, match="nothing"):
        _ = packed.nothing
    assert packed.training
    assert not packed.eval().norm.training
    assert not vars(packed)["_inner"].training or packed(*inputs()) is not None
    assert not vars(packed)["_inner"].training
    assert "Experts" in repr(packed)
    dense.eval()
    torch.save(packed, file := io.BytesIO())
    file.seek(0)
    for moved in (copy.deepcopy(packed), torch.load(file, weights_only=False)):
        assert close(moved(*inputs()), dense(*inputs()))
        moved.up_bias.data.zero_()
        assert not close(moved(*inputs()), dense(*inputs()))
    assert close(packed(*inputs()), dense(*inputs()))  # the copies shared nothing


def test_other_dtypes() -> None:
    packed, dense = packed_pair(Experts().eval())
    x, index, weights = inputs()
    packed.to(torch.bfloat16)
    dense.to(torch.bfloat16)
    assert packed.packed_stacks["up"].get_buffer("scales").dtype == torch.float16
    arguments = (x.bfloat16(), index, weights.bfloat16())
    assert close(packed(*arguments), dense(*arguments), 2e-2)


def test_loaded_parameters_reach_the_users_code() -> None:
    packed, dense = packed_pair(Experts())
    state = {**packed.state_dict(), "up_bias": torch.full((4, 40), 3.0), "scale": torch.tensor(2.0)}
    packed.load_state_dict(state, assign=True)
    dense.up_bias.data.fill_(3.0)
    dense.scale.fill_(2.0)
    assert close(packed(*inputs()), dense(*inputs()))


def test_a_packed_module_can_be_given_other_stacks() -> None:
    packed, _ = packed_pair(Experts())
    again, dense = PackedExperts(packed, stacks_for(Experts(), False, masked=True)), Experts()
    with torch.no_grad():
        for name, stack in again.packed_stacks.items():
            dense.get_parameter(name).copy_(stack.stacked())
    assert close(again(*inputs()), dense(*inputs()))
    with pytest.raises(ValueError, match=r"stacks for \['down', 'up'\], which are packed, but got \['up'\]"):
        PackedExperts(packed, {"up": again.packed_stacks["up"]})


def test_what_does_not_fit_is_refused() -> None:
    module = Experts()
    stack = packed_stack(4, 40, 64)
    with pytest.raises(ValueError, match="names of parameters of Experts but got 'other'"):
        PackedExperts(module, {"other": stack})
    with pytest.raises(ValueError, match=r"shape \[4, 64, 40\] for 'down' but got \[4, 40, 64\]"):
        PackedExperts(module, {"down": stack})
    module.forward = module.forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="its own was replaced"):
        PackedExperts(module, {"up": stack})


def transformers_model(name: str) -> tuple[Any, str, bool]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 96, "num_local_experts": 4, "head_dim": 8, "pad_token_id": 0}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    extra: dict[str, Any] = {"rope_parameters": {}} if name == "GptOss" else {}
    extra |= {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1} if name == "Llama4" else {}
    config = getattr(transformers, "Llama4TextConfig" if name == "Llama4" else f"{name}Config")(**sizes, **extra)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    path = "model.layers.0.feed_forward.experts" if name == "Llama4" else "model.layers.0.mlp.experts"
    return model, path, name != "Mixtral"


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Llama4"])
def test_in_models_of_transformers(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, path, transposed = transformers_model(name)
    packed = copy.deepcopy(dense)
    experts, reference = packed_pair(packed.get_submodule(path), transposed)
    packed.set_submodule(path, experts)
    dense.set_submodule(path, reference)
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))
    if name != "Llama4":
        reference.config = dense.get_submodule("model").config
    for model in (packed, dense):
        if name != "Llama4":
            model.set_experts_implementation(implementation)
            assert model.get_submodule(path).config._experts_implementation == implementation
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode(), nothing_dense(monkeypatch):
        assert close(packed(ids).logits, dense(ids).logits, 1e-3)
        assert torch.equal(packed.generate(ids, **options), dense.generate(ids, **options))
    packed(ids).logits.sum().backward()


def test_compilers_take_experts_as_one_graph() -> None:
    dense, path, transposed = transformers_model("Mixtral")
    packed = copy.deepcopy(dense)
    experts, reference = packed_pair(packed.get_submodule(path), transposed)
    packed.set_submodule(path, experts)
    dense.set_submodule(path, reference)
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))
    packed.set_experts_implementation("batched_mm")
    compiled: Any = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert close(compiled(ids, use_cache=False).logits, dense(ids).logits, 1e-5)


MASKED = [kinds for kinds in (*KINDS, {"coded": True, "masked": True}) if kinds.get("masked")]


@pytest.mark.parametrize("kinds", MASKED)
def test_a_filled_stack_is_the_same_weights(kinds: dict[str, bool]) -> None:
    stack = packed_stack(5, 24, 70, **kinds)
    dense, shallow = stack.stacked(), copy.copy(stack)
    codes, mask = weakref.ref(stack.codes), weakref.ref(stack.mask)
    assert fill_masks(nn.Sequential(stack)) == 5
    assert codes() is mask() is None  # their memory is free before the next product
    assert torch.equal(stack.stacked(), dense)
    assert torch.equal(shallow.stacked(), dense)  # it has the same buffers
    assert stack.nbytes == sum(filled(packed_weight(24, 70, expert, **kinds)).nbytes for expert in range(5))
    assert "mask" not in stack.state_dict()
    parts = {name: getattr(stack, name) for name in PARTS}
    again = PackedStack(
        split_stack(parts, out_features=24, in_features=70, group_size=32), permutation=stack.permutation
    )
    assert torch.equal(again.stacked(), dense)
    assert torch.equal(copy.deepcopy(stack).to(torch.bfloat16).float().stacked(), dense)
    assert fill_masks(stack) == 0


@torch.no_grad()
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kinds", MASKED)
def test_filled_experts_run(kinds: dict[str, bool], transposed: bool) -> None:
    packed, dense = packed_pair(Experts(transposed).eval(), transposed, **kinds)
    before = packed(*inputs())
    assert fill_masks(packed) == 2 * 4
    found = packed(*inputs())
    assert close(found, dense(*inputs()))
    assert close(found, before)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kinds", MASKED)
def test_filled_on_a_gpu(kinds: dict[str, bool], dtype: torch.dtype) -> None:
    packed, dense = packed_pair(Experts().eval(), **kinds)
    packed.to("cuda", dtype)
    dense.to("cuda", dtype)
    x, index, weights = (t.cuda() for t in inputs())
    arguments = (x.to(dtype), index, weights.to(dtype))
    before = packed(*arguments)
    unpacked = {name: stack.stacked() for name, stack in packed.packed_stacks.items()}
    assert fill_masks(packed) == 2 * 4
    assert all(torch.equal(stack.stacked(), unpacked[name]) for name, stack in packed.packed_stacks.items())
    assert close(packed(*arguments), dense(*arguments), 2e-2)
    assert close(packed(*arguments), before, 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kinds", KINDS)
def test_on_a_gpu(kinds: dict[str, bool], dtype: torch.dtype) -> None:
    packed, dense = packed_pair(Experts().eval(), **kinds)
    on_cpu = copy.deepcopy(packed).to(dtype)
    packed.to("cuda", dtype)
    dense.to("cuda", dtype)
    x, index, weights = (t.cuda() for t in inputs())
    arguments = (x.to(dtype), index, weights.to(dtype))
    assert close(packed(*arguments), dense(*arguments), 2e-2)
    for name, stack in packed.packed_stacks.items():
        assert torch.equal(stack.stacked().cpu(), on_cpu.packed_stacks[name].stacked())
