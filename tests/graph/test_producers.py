from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpfx.graph import trace
from mpfx.graph.live import note_outside
from mpfx.graph.producers import PermutationFold, Producer, ScaleFold, permutation_folds, producers, scale_folds


def by_path(gm: Any) -> dict[str, Producer]:
    return {producer.path: producer for producer in producers(gm)}


def short(path: str) -> str:
    return path.rpartition(".")[2]


def readers(producer: Producer) -> list[tuple[str, bool]]:
    return [(short(c.path), c.scalable) for c in producer.consumers]


def makers(fold: PermutationFold) -> tuple[list[str], list[str]]:
    return [short(path) for path in fold.sites], [short(path) for path, _ in fold.producers]


def scaled(folds: tuple[ScaleFold, ...]) -> dict[str, list[str]]:
    return {fold.producer: [short(path) for path, _ in fold.consumers] for fold in folds}


# Families


def test_llama(family: Any) -> None:
    model, sample = family("llama")
    gm = trace(model, (), sample(2, 5))
    found, layer = by_path(gm), "model.layers.1"
    norm = found[f"{layer}.input_layernorm"]
    assert (norm.kind, readers(norm)) == ("norm", [("q_proj", True), ("k_proj", True), ("v_proj", True)])
    assert norm.closed.all()
    assert norm.reason is None
    assert readers(found["model.norm"]) == [("lm_head", True)]
    gate, up = found[f"{layer}.mlp.gate_proj"], found[f"{layer}.mlp.up_proj"]
    assert (readers(gate), readers(up)) == ([("down_proj", False)], [("down_proj", True)])
    assert gate.cell.unique().tolist() == [0]
    assert torch.equal(up.consumers[0].channels, torch.arange(96))
    down = found[f"{layer}.mlp.down_proj"]
    assert not down.closed.any()
    assert down.cell.unique().tolist() == [-1]
    assert down.reason == f"it is combined with another value by `add` in `{layer}`, as in a residual stream"
    assert found["lm_head"].reason == "the model returns it"
    assert "decides the weights of attention" in str(found[f"{layer}.self_attn.q_proj"].reason)


def test_grouped_heads_share_units(family: Any) -> None:
    model, sample = family("llama")  # 4 heads of 16 channels, 2 of keys and values
    gm = trace(model, (), sample(2, 5))
    value = by_path(gm)["model.layers.0.self_attn.v_proj"]
    heads = torch.arange(2).repeat_interleave(16)
    assert torch.equal(value.cell, heads)
    channels = torch.arange(32).view(2, 1, 16).expand(2, 2, 16).flatten()
    assert torch.equal(value.consumers[0].channels, channels)
    fold = permutation_folds(gm)[0]
    assert makers(fold) == (["o_proj"], ["v_proj"])
    assert torch.equal(fold.unit, channels)
    assert torch.equal(fold.image, torch.arange(4).repeat_interleave(16))
    assert torch.equal(fold.cell, heads)
    assert torch.equal(fold.producers[0][1], torch.arange(32))
    assert makers(permutation_folds(gm)[1]) == (["down_proj"], ["gate_proj", "up_proj"])


def test_opt(family: Any) -> None:
    model, sample = family("opt")
    gm = trace(model, (), sample(2, 5))
    layer = "model.decoder.layers.0"
    found = scaled(scale_folds(gm))
    assert found[f"{layer}.self_attn_layer_norm"] == ["q_proj", "k_proj", "v_proj"]
    assert found[f"{layer}.self_attn.v_proj"] == ["out_proj"]
    assert found[f"{layer}.fc1"] == ["fc2"]  # a positive factor passes through ReLU
    assert [makers(fold) for fold in permutation_folds(gm)] == 2 * [(["out_proj"], ["v_proj"]), (["fc2"], ["fc1"])]
    reason = by_path(gm)["model.decoder.final_layer_norm"].reason
    assert reason is not None
    assert "`lm_head`" in reason
    assert "shared with another module (tied)" in reason


def test_gpt2_values_are_the_last_third(family: Any) -> None:
    model, sample = family("gpt2")
    gm = trace(model, (), sample(2, 5))
    attention, mlp = permutation_folds(gm)[:2]
    assert makers(attention) == (["c_proj"], ["c_attn"])
    assert torch.equal(attention.producers[0][1], torch.arange(128, 192))
    assert attention.out_features == (192,)
    assert torch.equal(attention.cell, torch.arange(4).repeat_interleave(16))
    assert makers(mlp) == (["c_proj"], ["c_fc"])
    fused = by_path(gm)["transformer.h.0.attn.c_attn"]
    assert torch.equal(fused.closed, torch.arange(192) >= 128)
    assert "attention" in str(fused.reason)
    assert "transformer.h.0.mlp.c_fc" not in scaled(scale_folds(gm))  # GELU passes no factor


def test_phi3_reads_two_halves_of_one_layer(family: Any) -> None:
    model, sample = family("phi3")
    gm = trace(model, (), sample(2, 5))
    fold = permutation_folds(gm)[1]
    assert makers(fold) == (["down_proj"], ["gate_up_proj", "gate_up_proj"])
    assert [rows.tolist() for _, rows in fold.producers] == [list(range(96)), list(range(96, 192))]
    [up] = [f for f in scale_folds(gm) if f.producer == "model.layers.0.mlp.gate_up_proj"]
    assert up.rows.tolist() == list(range(96, 192))


def test_gemma2_norms_multiply_by_one_more(family: Any) -> None:
    model, sample = family("gemma2")
    gm = trace(model, (), sample(2, 5))
    found = by_path(gm)
    assert {p.kind for p in producers(gm)} == {"norm_plus_one", "linear"}
    assert readers(found["model.layers.0.pre_feedforward_layernorm"]) == [("gate_proj", True), ("up_proj", True)]
    after = found["model.layers.0.post_attention_layernorm"]
    assert not after.closed.any()
    assert "`add` in `model.layers.0`" in str(after.reason)


@pytest.mark.parametrize(("name", "path"), [("olmo2", "model.layers.0"), ("bert", "bert.encoder.layer.0.output")])
def test_norms_after_the_sum_are_not_closed(family: Any, name: str, path: str) -> None:
    model, sample = family(name)
    found = [p for p in producers(trace(model, (), sample(2, 5))) if p.kind == "norm" and p.path.startswith(path)]
    after = [p for p in found if "_norm" not in short(p.path)]  # but for those of queries and keys
    assert after
    assert not any(p.closed.any() for p in after)
    assert all("as in a residual stream" in str(p.reason) for p in after)


def test_mixture_of_experts(family: Any) -> None:
    model, sample = family("mixtral")
    found = scaled(scale_folds(trace(model, (), sample(2, 5))))
    assert found["model.layers.0.post_attention_layernorm"] == ["gate", "experts"]


def test_meta_models_have_the_same_relations(family: Any) -> None:
    model, sample = family("llama")
    real = producers(trace(model, (), sample(2, 5)))
    meta = producers(trace(model.to("meta"), (), sample(2, 5)))
    assert [(p.path, p.kind, readers(p)) for p in meta] == [(p.path, p.kind, readers(p)) for p in real]


# Small modules


class Pair(nn.Module):
    """Linear layers a and b with a function between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
        self.wide = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.between(self.a(x)))
        return out

    def between(self, y: Tensor) -> Tensor:
        return y


def found_in(between: Any, **modules: nn.Module) -> tuple[bool, bool, str | None]:
    """Whether a's rows permute and scale, and why not, with ``between`` on the way to b."""
    model = Pair()
    if "c" in between.__code__.co_names:
        model.c = nn.Linear(6, 4)
    for name, module in modules.items():
        model.add_module(name, module)
    model.between = lambda y: between(model, y)  # type: ignore[method-assign]
    gm = trace(model.eval(), (torch.randn(2, 3, 4),))
    permuted = any("a" in dict(fold.producers) for fold in permutation_folds(gm))
    return permuted, any(fold.producer == "a" for fold in scale_folds(gm)), by_path(gm)["a"].reason


@pytest.mark.parametrize(
    ("between", "permutes", "scales"),
    [
        (lambda m, y: y, True, True),
        (lambda m, y: F.gelu(y), True, False),
        (lambda m, y: F.leaky_relu(y) * 2, True, True),
        (lambda m, y: y.clamp(-100, 100), True, False),
        (lambda m, y: y.relu_(), True, True),
        (lambda m, y: y * m.wide, False, True),
        (lambda m, y: y + 1, True, False),
        (lambda m, y: y + m.wide, False, False),
        (lambda m, y: y * y, True, False),
        (lambda m, y: y * y.relu(), True, False),
        (lambda m, y: y + 3 * y, True, True),
        (lambda m, y: 1 / y, True, False),
        (lambda m, y: y / m.wide, False, True),
        (lambda m, y: y.softmax(-1), False, False),
        (lambda m, y: y / y.norm(dim=-1, keepdim=True), False, False),
        (lambda m, y: y.softmax(1), False, False),
        (lambda m, y: F.layer_norm(y, (6,)), False, False),
        (lambda m, y: y.flip(-1), True, True),
        (lambda m, y: y.mean(1, keepdim=True), True, True),
        (lambda m, y: y.mean(-1, keepdim=True).expand(-1, -1, 6), False, False),
        (lambda m, y: y @ m.wide.diag(), False, False),
        (lambda m, y: torch.ones(3, 3) @ y, True, True),
        (lambda m, y: y.cumsum(1), False, False),
        (lambda m, y: torch.cat([y[..., 3:], y[..., :3]], -1), True, True),
        (lambda m, y: torch.cat([F.gelu(y[..., :3]), F.silu(y[..., 3:])], -1), True, False),
        (lambda m, y: y.view(*y.shape[:2], 3, 2).transpose(2, 3).reshape(y.shape), True, True),
        (lambda m, y: y + m.b(y).sum(), True, False),
        (lambda m, y: y.to(torch.int64).float(), False, False),
        (lambda m, y: y[:, torch.tensor([0, 1])], False, False),
        (lambda m, y: y[:, 1:], True, True),
        (lambda m, y: y * m.c(y).mean(), True, True),
    ],
)
def test_what_passes(between: Any, permutes: bool, scales: bool) -> None:
    assert found_in(between)[:2] == (permutes, scales)


def test_contexts_keep_differently_treated_channels_apart() -> None:
    model = Pair()
    model.between = lambda y: torch.cat([F.gelu(y[..., :3]), F.silu(y[..., 3:])], -1)  # type: ignore[method-assign]
    [fold] = permutation_folds(trace(model, (torch.randn(2, 4),)))
    assert fold.cell.tolist() == [0, 0, 0, 1, 1, 1]


class ParameterFreeNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.ReLU(inplace=True), (True, True)),
        (nn.Dropout(0.5), (True, True)),
        (nn.SiLU(), (True, False)),
        (nn.PReLU(), (True, True)),
        (nn.Softmax(-1), (False, False)),
        (ParameterFreeNorm(), (False, False)),
        (nn.LayerNorm(6), (False, False)),
        (nn.Sequential(nn.ReLU()), (True, True)),
    ],
)
def test_modules_are_judged_by_what_they_compute(module: nn.Module, expected: tuple[bool, bool]) -> None:
    assert found_in(lambda m, y: m.act(y), act=module)[:2] == expected


def test_a_scale_of_its_own_is_a_norm() -> None:
    model = nn.Sequential(nn.Softmax(-1), Scale(), nn.Linear(6, 2))
    [fold] = scale_folds(trace(model, (torch.randn(2, 6),)))
    assert (fold.producer, fold.kind, [path for path, _ in fold.consumers]) == ("1", "norm", ["2"])


def test_reason_names_where_the_channels_go() -> None:
    assert found_in(lambda m, y: y.cumsum(1))[2] == (
        "it goes through `cumsum` in the traced module's own forward, which is not known to keep channels apart"
    )
    assert found_in(lambda m, y: m.act(y), act=nn.Softmax(-1))[2] == (
        "it goes through module `act`, which is not known to keep channels apart"
    )


# Who takes no part


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.b(self.a(x)).relu())
        return out


def pairs(model: nn.Module) -> list[str]:
    gm = trace(model, (torch.randn(2, 4),))
    folds = {f"{fold.producer}{path}" for fold in scale_folds(gm) for path, _ in fold.consumers}
    assert {f"{path}{site}" for f in permutation_folds(gm) for path, _ in f.producers for site in f.sites} == folds
    return sorted(folds)


def test_chain_of_linear_layers() -> None:
    assert pairs(Chain()) == ["ab", "bc"]


def test_tied_weights_take_no_part() -> None:
    model = Chain()
    model.c.weight = model.a.weight
    assert pairs(model) == []


def test_weights_in_one_place_take_no_part() -> None:
    model = Chain()
    model.c.weight.data = model.a.weight.data
    assert pairs(model) == []


def test_shared_biases_take_no_part() -> None:
    model = Chain()
    model.c.bias = model.b.bias
    assert pairs(model) == []


def test_hooked_modules_take_no_part() -> None:
    model = Chain()
    model.c.register_forward_hook(lambda *_: None)
    assert pairs(model) == ["ab"]


def test_parametrized_modules_take_no_part() -> None:
    model = Chain()
    nn.utils.parametrizations.weight_norm(model.c)
    assert pairs(model) == ["ab"]


def test_modules_under_two_paths_take_no_part() -> None:
    model = Chain()
    model.again = model.c
    assert pairs(model) == ["ab"]


class Elsewhere(Chain):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) + self.c(x)
        return out


def test_a_reader_of_another_value_takes_no_part() -> None:
    model = Elsewhere()
    assert pairs(model) == ["ab"]
    assert by_path(trace(model, (torch.randn(2, 4),)))["b"].reason == "`c` is also called on another value"


class Twice(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(2 * x)


def test_layers_that_always_follow_each_other_take_part() -> None:
    assert pairs(Twice()) == ["ab", "bc"]


class Direct(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.n = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.n(x)) + F.linear(x, self.c.weight) + x * self.n.weight


def test_weights_that_other_code_reads_take_no_part() -> None:
    assert pairs(Direct()) == ["ab"]


class InPlace(Chain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = y.view(-1, 4)
        y.mul_(torch.rand(4))
        out: Tensor = self.c(self.b(z))
        return out


def test_memory_that_is_written_to_under_a_reader_ends_the_channels() -> None:
    model = InPlace()
    assert pairs(model) == ["bc"]
    assert "in place" in str(by_path(trace(model, (torch.randn(2, 4),)))["a"].reason)


class TwoReaders(Chain):
    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        out: Tensor = self.b(y) + self.c(y if self.joined else y.flip(-1))
        return out


@pytest.mark.parametrize(("joined", "expected"), [(True, [["b", "c"]]), (False, [])])
def test_all_readers_share_one_order(joined: bool, expected: list[list[str]]) -> None:
    gm = trace(TwoReaders(joined), (torch.randn(2, 4),))
    assert [list(fold.sites) for fold in permutation_folds(gm)] == expected
    assert scaled(scale_folds(gm)) == {"a": ["b", "c"]}


def test_results_are_kept() -> None:
    gm = trace(Chain(), (torch.randn(2, 4),))
    assert producers(gm) is producers(gm)
    assert permutation_folds(gm) is permutation_folds(gm)
    assert scale_folds(gm) is scale_folds(gm)


def test_graph_from_elsewhere_is_refused() -> None:
    with pytest.raises(TypeError, match=r"mpfx\.graph\.trace"):
        producers(torch.fx.symbolic_trace(nn.Linear(2, 2)))


class TwoHeads(nn.Module):
    """Has a head that the traced call leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor, second: bool = False) -> Tensor:
        x = self.norm(torch.relu(self.body(x)))
        out: Tensor = self.second(x) if second else self.first(x)
        return out


def test_layers_that_the_traced_call_does_not_reach_may_read_channels_too() -> None:
    gm = trace(TwoHeads(), (torch.randn(2, 6),))
    assert scale_folds(gm) == ()
    reason = {producer.path: producer.reason for producer in producers(gm)}["norm"]
    assert reason == "`second`, which the traced call does not reach, may read it in another"


def test_modules_that_others_use_too_take_no_part() -> None:
    class Actor(nn.Module):
        def __init__(self, trunk: nn.Module) -> None:
            super().__init__()
            self.trunk, self.head = trunk, nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.trunk(x))
            return out

    trunk = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
    both = nn.ModuleDict({"actor": Actor(trunk), "critic": Actor(trunk)})
    alone, together = (trace(both["actor"], (torch.randn(2, 6),)) for _ in range(2))
    note_outside(alone, both["actor"])
    note_outside(together, both)
    assert len(scale_folds(alone)) == 1
    assert scale_folds(together) == ()
