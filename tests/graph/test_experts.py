"""Fused experts: what they are found to be, and which tokens reach which expert."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpfx.graph.experts import (
    ExpertsFacts,
    UnwatchableError,
    describe_experts,
    expert_weight,
    watch_experts,
)

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
GATED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GATED, "num_local_experts": 4}),
    "qwen3": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**GATED, "num_experts": 6, "moe_intermediate_size": 24}),
    "deepseek": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**GATED, **LATENT, **GROUPS, "num_key_value_heads": 4},
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**GATED, "num_experts": 8}),
    "granite": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**GATED, "num_local_experts": 4}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GATED, "intermediate_size": 32, "num_local_experts": 4, "head_dim": 8, "rope_parameters": {}},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**GATED, "intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8, "interleave_moe_layer_step": 1},
    ),
}
TRANSPOSED = ("gpt_oss", "llama4")
EXPERTS_PER_TOKEN = {"num_experts_per_tok": 2}


def build(name: str, **overrides: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    model_name, config_name, settings = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**{**EXPERTS_PER_TOKEN, **settings, **overrides})
    model = getattr(transformers, model_name)(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(batch: int = 2, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, 96, (batch, length), generator=generator)}


Sums = dict[tuple[str, str, int], tuple[int, Tensor]]


@contextmanager
def watched(model: nn.Module, facts: Mapping[str, ExpertsFacts]) -> Iterator[Sums]:
    """Tokens and the sum of ``x^T x``, by path, parameter and expert."""
    sums: Sums = {}

    def sink_of(path: str) -> Callable[[str, int, Tensor], None]:
        def sink(name: str, expert: int, x: Tensor) -> None:
            count, total = sums.get((path, name, expert), (0, torch.zeros(x.shape[-1], x.shape[-1])))
            sums[path, name, expert] = (count + len(x), total + x.float().t() @ x.float())

        return sink

    with ExitStack() as stack:
        for path, fact in facts.items():
            stack.enter_context(watch_experts(model.get_submodule(path), fact, sink_of(path)))
        yield sums


@contextmanager
def calls_of(model: nn.Module, paths: Mapping[str, Any]) -> Iterator[dict[str, tuple[Any, ...]]]:
    calls: dict[str, tuple[Any, ...]] = {}

    def note(path: str) -> Callable[..., None]:
        return lambda _, args: calls.update({path: args})

    handles = [model.get_submodule(path).register_forward_pre_hook(note(path)) for path in paths]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def gate(module: Any, joined: Tensor) -> Tensor:
    if hasattr(module, "_apply_gate"):
        applied: Tensor = module._apply_gate(joined)
        return applied
    half, up = joined.chunk(2, -1)
    result: Tensor = module.act_fn(half) * up
    return result


def routed_by_hand(module: Any, args: tuple[Any, ...]) -> Iterator[tuple[str, int, Tensor]]:
    """The routing once more, expert by expert."""
    transposed = "Oss" in type(module).__name__ or len(args) == 1
    if len(args) == 1:  # every expert's tokens side by side, those of others zero
        parts = [part[part.abs().sum(-1) > 0] for part in args[0].view(module.num_experts, -1, args[0].shape[-1])]
    else:
        parts = [args[0][(args[1] == expert).any(-1)] for expert in range(module.num_experts)]
    for expert, x in enumerate(parts):
        weight, bias = module.gate_up_proj[expert], getattr(module, "gate_up_proj_bias", None)
        joined = x @ (weight if transposed else weight.t())
        inner = gate(module, joined if bias is None else joined + bias[expert])
        yield from (("gate_up_proj", expert, x), ("down_proj", expert, inner))


def check_sums(model: nn.Module, sums: Sums, calls: Mapping[str, tuple[Any, ...]]) -> None:
    expected = {}
    for path, args in calls.items():
        with torch.no_grad():
            for name, expert, x in routed_by_hand(model.get_submodule(path), args):
                if len(x):
                    expected[path, name, expert] = (len(x), x.t() @ x)
    assert {key: count for key, (count, _) in sums.items()} == {key: count for key, (count, _) in expected.items()}
    for key, (_, total) in expected.items():
        torch.testing.assert_close(sums[key][1], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_experts_are_described(name: str) -> None:
    model = build(name)
    facts = describe_experts(model)
    assert len(facts) == (1 if name == "deepseek" else 2)
    for path, fact in facts.items():
        assert fact.dense_reason is None
        module: Any = model.get_submodule(path)
        up, down = fact.stacks
        assert (up.module, up.parameter, down.parameter) == (path, "gate_up_proj", "down_proj")
        assert (up.in_features, down.out_features) == (32, 32)
        assert up.out_features == 2 * down.in_features
        assert up.experts == len(module.gate_up_proj)
        assert up.transposed == down.transposed == (name in TRANSPOSED)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_meta_device_is_enough(name: str) -> None:
    model = build(name)
    assert describe_experts(copy.deepcopy(model).to("meta")) == describe_experts(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_expert_sees_the_tokens_routed_to_it(name: str, implementation: str, mode: Any) -> None:
    model = build(name)
    if name != "llama4":
        model.set_experts_implementation(implementation)
    facts = describe_experts(model)
    with mode(), calls_of(model, facts) as calls:
        expected = model(**tokens()).logits
    with mode(), watched(model, facts) as sums:
        assert torch.equal(model(**tokens()).logits, expected)
    check_sums(model, sums, calls)
    assert getattr(model.config, "_experts_implementation", None) == ("eager" if name == "llama4" else implementation)


def test_other_kernels_make_way_for_the_modules_own_code() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def fused(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        raise AssertionError("not while it is watched")

    model = build("mixtral")
    facts = describe_experts(model)
    ALL_EXPERTS_FUNCTIONS.register("fused", fused)
    try:
        model.set_experts_implementation("fused")
        assert describe_experts(model) == facts
        with torch.no_grad(), watched(model, facts) as sums, calls_of(model, facts) as calls:
            model(**tokens())
        check_sums(model, sums, calls)
        assert model.config._experts_implementation == "fused"
    finally:
        del ALL_EXPERTS_FUNCTIONS._global_mapping["fused"]


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_under_autocast(name: str) -> None:
    model = build(name)
    facts = describe_experts(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), calls_of(model, facts):
        expected = model(**tokens()).logits
        with watched(model, facts) as sums:  # copies of the weights may be in the cache of autocast by now
            assert torch.equal(model(**tokens()).logits, expected)
    with torch.no_grad(), watched(model, facts) as exact:
        model(**tokens())
    first = next(iter(facts))
    for key in (key for key in exact if key[:2] == (first, "gate_up_proj")):
        assert sums[key][0] == exact[key][0]
        assert (sums[key][1] - exact[key][1]).norm() < 0.05 * exact[key][1].norm()


def test_watching_leaves_nothing_behind() -> None:
    model = build("mixtral")
    facts = describe_experts(model)
    path, fact = next(iter(facts.items()))
    module = model.get_submodule(path)
    before = dict(vars(module))

    def fail(*_: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), watch_experts(module, fact, fail), torch.no_grad():
        model(**tokens())
    assert vars(module) == before
    assert torch.is_autocast_cache_enabled()
    seen: list[int] = []
    with watch_experts(module, fact, lambda *_: seen.append(1)):
        pass
    model(**tokens())
    assert seen == []


def test_two_watches_at_once() -> None:
    model = build("mixtral")
    facts = describe_experts(model)
    with torch.no_grad(), watched(model, facts) as outer, watched(model, facts) as inner:
        model(**tokens())
    assert inner.keys() == outer.keys() != set()


def test_weights_can_be_written() -> None:
    for name in ("mixtral", "gpt_oss"):
        model = build(name)
        for fact in describe_experts(model).values():
            for stack in fact.stacks:
                weight = expert_weight(model, stack, stack.experts - 1)
                assert weight.shape == (stack.out_features, stack.in_features)
                weight.fill_(7.0)
                parameter = model.get_submodule(stack.module).get_parameter(stack.parameter)
                assert parameter[-1].eq(7).all()
                assert not parameter[0].eq(7).any()
    with pytest.raises(IndexError, match=r"0 \.\. 3 .* but got 4"):
        expert_weight(model, stack, 4)


class Stacked(nn.Module):
    """Experts of the user's own: what they compute is up to the class below."""

    def __init__(self, experts: int = 4, width: int = 8, inner: int = 12, transposed: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        up, down = (experts, inner, width), (experts, width, inner)
        if transposed:
            up, down = (experts, width, inner), (experts, inner, width)
        self.up = nn.Parameter(torch.randn(up, generator=generator))
        self.down = nn.Parameter(torch.randn(down, generator=generator))


class Loop(Stacked):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(len(self.up)):
            token, k = torch.where(index == expert)
            y = F.linear(F.linear(x[token], self.up[expert]).relu(), self.down[expert])
            out.index_add_(0, token, y * weights[token, k, None])
        return out


class Matmul(Stacked):
    """Transposed weights, tokens with a batch dimension."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = torch.zeros_like(flat)
        for expert in range(len(self.up)):
            chosen = (index == expert).any(-1)
            weight = (weights * (index == expert)).sum(-1)[chosen, None]
            out[chosen] += (flat[chosen] @ self.up[expert]).relu() @ self.down[expert] * weight
        return out.view_as(x)


class Gathered(Stacked):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        inner = torch.einsum("tkoi,ti->tko", self.up[index], x).relu()
        return torch.einsum("tkoi,tki,tk->to", self.down[index], inner, weights)


class Selected(Stacked):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        up, down = (w.index_select(0, index.flatten()) for w in (self.up, self.down))
        tokens = x.repeat_interleave(index.shape[1], 0)
        y = torch.bmm(down, torch.bmm(up, tokens[..., None]).relu())[..., 0]
        return (y.view(*index.shape, -1) * weights[..., None]).sum(1)


class Capacity(Stacked):
    """Tokens in as many places for every expert as there are tokens, the others zero; a bias before the second."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        table = F.one_hot(index, len(self.up)).sum(1).bool()
        slots = x.new_zeros(len(self.up), len(x), x.shape[1])
        for expert in range(len(self.up)):
            chosen = table[:, expert]
            slots[expert, : int(chosen.sum())] = x[chosen]
        y = torch.baddbmm(torch.zeros(()), torch.bmm(slots, self.up.mT) + 1, self.down.mT)
        out = torch.zeros_like(x)
        for expert in range(len(self.up)):
            chosen = table[:, expert]
            weight = (weights * (index == expert)).sum(-1)[chosen, None]
            out[chosen] += y[expert, : int(chosen.sum())] * weight
        return out


class EveryToken(Stacked):
    """Computes everything and chooses then."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        table = torch.zeros(len(x), len(self.up)).scatter(1, index, weights)
        y = torch.einsum("td,eod->eto", x, self.up).relu()
        return torch.einsum("te,eto->to", table, torch.bmm(y, self.down.mT))


class Expanded(Stacked):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        table = torch.zeros(len(x), len(self.up)).scatter(1, index, weights)
        y = x.expand(len(self.up), *x.shape) @ self.up.mT
        return ((y.relu() @ self.down.mT) * table.t()[..., None]).sum(0)


class Halves(Stacked):
    """Multiplies by the two halves of the first stack separately."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(len(self.up)):
            token, k = torch.where(index == expert)
            second, first = (F.linear(x[token], half) for half in self.up[expert].chunk(2)[::-1])
            y = F.linear(torch.cat([first, second], -1).relu(), self.down[expert])
            out.index_add_(0, token, y * weights[token, k, None])
        return out


class Cast(Stacked):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        up, down = self.up.double(), self.down.transpose(1, 2).contiguous().double()
        out = torch.zeros_like(x)
        for token, row in enumerate(x.double()):
            for k, expert in enumerate(index[token].tolist()):
                y = torch.mv(up[expert], row).relu() @ down[expert]
                out[token] += y.float() * weights[token, k]
        return out


WATCHABLE = [Loop, Matmul, Gathered, Selected, Capacity, Halves, Cast]


def routing(count: int = 11, experts: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(count)])
    index[index == 2] = 3  # nobody wants expert 2
    index[:, 1] = torch.where(index[:, 0] == index[:, 1], torch.zeros(()).long(), index[:, 1])
    return torch.randn(count, 8, generator=generator), index, torch.rand(count, 2, generator=generator)


def holder(experts: nn.Module) -> nn.Module:
    return nn.ModuleDict({"experts": experts})


def inputs_by_hand(module: Any, expert: int, x: Tensor, index: Tensor) -> dict[str, Tensor]:
    mine = x[(index == expert).any(-1)]
    weight = module.up[expert].detach()
    inner = mine @ (weight if isinstance(module, Matmul) else weight.t())
    return {"up": mine, "down": inner + 1 if isinstance(module, Capacity) else inner.relu()}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", WATCHABLE)
def test_experts_of_the_users_own(kind: type[Stacked], mode: Any) -> None:
    module = kind(transposed=kind is Matmul)
    facts = describe_experts(holder(module))
    assert facts["experts"].dense_reason is None
    assert [(s.out_features, s.in_features) for s in facts["experts"].stacks] == [(12, 8), (8, 12)]
    assert {s.transposed for s in facts["experts"].stacks} == {kind is Matmul}
    x, index, weights = routing()
    seen: dict[tuple[str, int], list[Tensor]] = {}
    with mode():
        expected = module(x, index, weights)
        with watch_experts(module, facts["experts"], lambda n, e, t: seen.setdefault((n, e), []).append(t.clone())):
            assert torch.equal(module(x, index, weights), expected)
    assert {expert for _, expert in seen} == {0, 1, 3}
    for (name, expert), parts in seen.items():
        wanted = inputs_by_hand(module, expert, x, index)[name]
        found = torch.cat(parts).float()
        assert len(found) == len(wanted) > 0
        torch.testing.assert_close(found.t() @ found, wanted.t() @ wanted, rtol=1e-4, atol=1e-4)


def test_square_weights_in_both_directions() -> None:
    """Sizes tell nothing here; only the use does."""
    for kind, transposed in ((Loop, False), (Matmul, True)):
        module = kind(width=8, inner=8, transposed=transposed)
        assert {s.transposed for s in describe_experts(holder(module))["experts"].stacks} == {transposed}


def test_weights_that_lie_transposed_in_memory() -> None:
    module = Loop()
    module.up = nn.Parameter(module.up.detach().transpose(1, 2).contiguous().transpose(1, 2))
    facts = describe_experts(holder(module))["experts"]
    assert [s.transposed for s in facts.stacks] == [False, False]
    x, index, weights = routing()
    with watch_experts(module, facts, lambda *_: None), torch.no_grad():
        module(x, index, weights)


@pytest.mark.parametrize("kind", [EveryToken, Expanded])
def test_experts_that_compute_every_token(kind: type[Stacked]) -> None:
    module = kind()
    facts = describe_experts(holder(module))["experts"]
    x, index, weights = routing()
    seen: dict[tuple[str, int], Tensor] = {}
    with watch_experts(module, facts, lambda n, e, t: seen.update({(n, e): t.detach()})):
        module(x, index, weights)
    assert {expert for _, expert in seen} == {0, 1, 3}
    for (name, expert), found in seen.items():
        torch.testing.assert_close(found, inputs_by_hand(module, expert, x, index)[name])


class OwnRouter(Stacked):
    """Routes by itself; one activation in, one out."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(5)))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, 8)
        weights, index = F.linear(flat, self.router).softmax(-1).topk(2)
        out: Tensor = Loop.forward(self, flat, index, weights)  # type: ignore[arg-type]
        return out.view_as(x)


def test_experts_with_a_router_inside() -> None:
    module = OwnRouter()
    facts = describe_experts(holder(module))["experts"]
    assert facts.dense_reason is None
    x = torch.randn(3, 5, 8)
    counts: dict[tuple[str, int], int] = {}
    with watch_experts(module, facts, lambda n, e, t: counts.update({(n, e): len(t)})), torch.no_grad():
        module(x)
    index = F.linear(x.view(-1, 8), module.router).topk(2).indices
    wanted = {e: int((index == e).sum()) for e in range(4) if (index == e).any()}
    assert counts == {(name, e): n for e, n in wanted.items() for name in ("up", "down")}


class Scaled(Stacked):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return Loop.forward(self, x @ (self.up[0] * 2).t() @ self.down[0].t(), index, weights)  # type: ignore[arg-type]


class Elementwise(Stacked):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return (self.down[0] * (self.up[0] * x[:, None]).sum(-1)[:, None]).sum(-1)


class OneForAll(Stacked):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return x @ self.up.view(-1, 8).t() @ self.down.transpose(1, 2).reshape(-1, 8)


class Flat(Stacked):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return x.repeat(1, 12) @ self.up.flatten(1).t()


class Split(Stacked):
    """Sums over the two halves of its input channels separately."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = x[:, :4] @ self.up[0, :, :4].t() + x[:, 4:] @ self.up[0, :, 4:].t()
        return y @ self.down[0].t()


class DifferentHalves(Stacked):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(len(self.up)):
            token, k = torch.where(index == expert)
            low, high = self.up[expert].chunk(2)
            inner = torch.cat([x[token] @ low.t(), x[token].flip(-1) @ high.t()], -1)
            out.index_add_(0, token, inner @ self.down[expert].t() * weights[token, k, None])
        return out


class TooMany(Loop):
    """Computes more tokens than are routed to each expert, but not all."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, index.clamp(min=1), weights) + super().forward(x[:3], index[:3], weights[:3]).sum()


class Unused(Stacked):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return Loop.forward(self, x, torch.zeros_like(index), weights) if self.training else x  # type: ignore[arg-type]


class Write(Stacked):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.up.data.mul_(0.5)
        return Loop.forward(self, x, index, weights)  # type: ignore[arg-type]


class ReadsValues(Stacked):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return Loop.forward(self, x * float(self.up[0, 0, 0]), index, weights)  # type: ignore[arg-type]


class OtherArguments(Stacked):
    def forward(self, *, x: Tensor, table: dict[str, Tensor]) -> Tensor:
        return Loop.forward(self, x, table["index"], table["weights"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Scaled, r"something else with its weights than to multiply by them \(aten\.mul\)"),
        (Elementwise, r"something else with its weights"),
        (OneForAll, "sums over experts where it multiplies by `down`"),
        (Flat, "`up` with several of its dimensions merged"),
        (TooMany, "the experts in its arguments ask for"),
        (Split, "parts of the input channels of `up` separately"),
        (Unused, r"in no direction|the experts in its arguments ask for"),
        (Write, r"writes to its weights.*aten\.mul_"),
        (ReadsValues, r"cannot be run on made-up tokens \(.*meta tensors"),
        (OtherArguments, "cannot be run on made-up tokens"),
    ],
)
def test_what_cannot_be_watched_stays_dense_with_a_reason(kind: type[Stacked], message: str) -> None:
    root = holder(kind())
    before = {name: value.clone() for name, value in root.state_dict().items()}
    (facts,) = describe_experts(root).values()
    assert facts.stacks == ()
    assert facts.dense_reason is not None
    assert re.search(message, facts.dense_reason), facts.dense_reason
    assert all(torch.equal(value, before[name]) for name, value in root.state_dict().items())
    with pytest.raises(ValueError, match="Expected experts that can be watched"), watch_experts(root, facts, print):
        pass


def test_example_arguments_help_where_the_usual_ones_do_not() -> None:
    module = OtherArguments()
    x, index, weights = routing()
    call = ((), {"x": x.to("meta"), "table": {"index": index.to("meta"), "weights": weights.to("meta")}})
    facts = describe_experts(holder(module), {"experts": call})["experts"]
    assert [s.parameter for s in facts.stacks] == ["up", "down"]
    seen: list[int] = []
    with watch_experts(module, facts, lambda *_: seen.append(1)), torch.no_grad():
        module(x=x, table={"index": index, "weights": weights})
    assert len(seen) == 6


def test_a_call_that_turns_out_unwatchable_is_an_error() -> None:
    module = DifferentHalves()
    facts = ExpertsFacts(describe_experts(holder(Loop()))["experts"].stacks, None)
    with (
        watch_experts(module, facts, lambda *_: None),
        torch.no_grad(),
        pytest.raises(UnwatchableError, match=r"DifferentHalves experts: it multiplies parts of .*Leave it dense"),
    ):
        module(*routing())
    other = TooMany()
    with (
        watch_experts(other, facts, lambda *_: None),
        torch.no_grad(),
        pytest.raises(
            UnwatchableError, match=r"TooMany experts: it computes .* the experts in its arguments ask for 22"
        ),
    ):
        other(*routing())
    assert "forward" not in vars(other) | vars(module)


def reasons(change: Callable[[Any], Any]) -> str | None:
    root: Any = nn.ModuleDict({"a": Loop(), "b": Loop()})
    change(root)
    return describe_experts(root)["a"].dense_reason


def test_reasons_of_the_module_itself() -> None:
    def tie(root: Any) -> None:
        root["b"].up = root["a"].up

    def share(root: Any) -> None:
        root["b"].up = nn.Parameter(root["a"].up.detach())

    def twice(root: Any) -> None:
        root["c"] = root["a"]

    def parametrize(root: Any) -> None:
        torch.nn.utils.parametrize.register_parametrization(root["a"], "up", nn.Identity())

    def store(root: Any) -> None:
        root["a"].up = nn.Parameter(root["a"].up.detach().to(torch.int8), requires_grad=False)

    def replace(root: Any) -> None:
        root["a"].forward = root["a"].forward

    assert reasons(lambda root: None) is None
    assert "its forward was replaced" in str(reasons(replace))
    assert "(tied)" in str(reasons(tie))
    assert "(tied)" in str(reasons(share))
    assert "more than one path" in str(reasons(twice))
    assert "`up` is stored as torch.int8" in str(reasons(store))
    assert "forward hooks" in str(reasons(lambda root: root["a"].register_forward_hook(lambda *_: None)))
    assert "forward hooks" in str(reasons(lambda root: root["a"].register_forward_pre_hook(lambda *_: None)))


def test_describing_runs_no_code_for_good() -> None:
    class Counting(Loop):
        calls = 0

        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            self.calls += 1
            torch.rand(3)
            return super().forward(x, index, weights)

    module = Counting()
    state, values = torch.get_rng_state(), module.up.detach().clone()
    assert describe_experts(holder(module))["experts"].dense_reason is None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module.up, values)
    assert "calls" not in vars(module)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    model = build(name).to("cuda", dtype)
    facts = describe_experts(model)
    batch = {key: value.cuda() for key, value in tokens().items()}
    with torch.inference_mode(), calls_of(model, facts) as calls:
        expected = model(**batch).logits
    counts: dict[tuple[str, str, int], int] = {}

    def count_into(path: str) -> Callable[[str, int, Tensor], None]:
        return lambda name, expert, x: counts.update({(path, name, expert): len(x)})

    with ExitStack() as stack, torch.inference_mode():
        for path, fact in facts.items():
            stack.enter_context(watch_experts(model.get_submodule(path), fact, count_into(path)))
        assert torch.equal(model(**batch).logits, expected)
    for path, args in calls.items():
        for key, expert, x in routed_by_hand(model.get_submodule(path), args):
            assert counts.get((path, key, expert), 0) == len(x)
