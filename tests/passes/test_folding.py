"""Reordered rows instead of gathers, and channel scales, on tiny models."""

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mpfx.graph import bind_inputs, trace
from mpfx.nn import MixedPrecisionLinear
from mpfx.passes import (
    Allocate,
    CompressionConfig,
    FoldPermutations,
    FoldScales,
    Pack,
    PassError,
    PruneAndQuantize,
    Scope,
    analysis,
    finalised,
    located,
    observed,
    run_passes,
    solved_groups,
)
from mpfx.stats import ChannelMoments, Moments

Batches = list[dict[str, Tensor]]


def analysed(model: nn.Module, batches: Batches, **scope: Any) -> tuple[fx.GraphModule, list[dict[str, Any]]]:
    gm = run_passes(trace(model, (), {**batches[0], "use_cache": False}), analysis(Scope(**scope)))
    return gm, [bind_inputs(gm, (), {**batch, "use_cache": False}) for batch in batches]


@torch.no_grad()
def moments_of(gm: fx.GraphModule, values: list[dict[str, Any]]) -> dict[str, Moments]:
    with observed(gm, located(gm)) as accumulators:
        for batch in values:
            gm(**batch)
    return {g.name: moments for g, moments, _ in finalised(accumulators, located(gm)) if moments is not None}


def channels_of(moments: dict[str, Moments]) -> dict[str, ChannelMoments]:
    return {name: found.channels for name, found in moments.items()}


def disturb_biases(model: nn.Module) -> None:
    """Biases are zero at first, which would hide that they were not reordered."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def gathers(model: nn.Module) -> set[str]:
    packed = {n: m for n, m in model.named_modules() if isinstance(m, MixedPrecisionLinear)}
    return {name for name, module in packed.items() if module.permutation is not None}


CONFIGS = [
    CompressionConfig(code_bits=4, allocation="fixed"),
    CompressionConfig(bits_per_weight=4.5),
    CompressionConfig(code_bits=4, sparsity=0.5),
    CompressionConfig(code_bits=5, allocation="quantile", sparsity="2:4"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.allocation}-{c.sparsity}")
def test_folded_models_compute_the_same_without_gathers(
    language_model: Any, batches: Batches, config: CompressionConfig
) -> None:
    disturb_biases(language_model)
    gm, values = analysed(language_model, batches)
    moments = moments_of(gm, values)
    run_passes(gm, [Allocate(config, moments.items()), PruneAndQuantize(values), Pack()])
    probe = {"input_ids": batches[1]["input_ids"][:2, :19]}
    unfolded, names = language_model(**probe).logits.detach(), gathers(language_model)
    run_passes(gm, [FoldPermutations()], values[:1])
    folded = language_model(**probe).logits.detach()
    assert float((folded - unfolded).abs().max() / unfolded.abs().max()) < 1e-5
    left = gathers(language_model)
    assert left < names or not names
    assert not any(part in name for name in left for part in ("o_proj", "out_proj", "down_proj", "fc2", "c_proj"))
    groups = solved_groups(gm)
    assert sum(g.stored_bytes for g in groups) <= sum(g.plan.stored_bytes() for g in groups)
    for group in groups:
        for path, weight in group.weights.items():
            module = language_model.get_submodule(path)
            assert torch.equal(module.codes, weight.codes)
            assert torch.equal(module.weight, group.dense(path))


def test_rows_of_sites_that_stay_dense_are_reordered_too(llama: Any, batches: Batches) -> None:
    gm, values = analysed(llama, batches, exclude=("*.up_proj",))
    before = {n: m for n, m in llama.named_modules() if n.endswith("up_proj")}
    weights = {name: module.weight.detach().clone() for name, module in before.items()}
    config = CompressionConfig(code_bits=4, allocation="fixed")
    run_passes(gm, [Allocate(config), PruneAndQuantize(values), Pack()])
    unfolded = llama(**batches[1]).logits.detach()
    run_passes(gm, [FoldPermutations()], values[:1])
    folded = llama(**batches[1]).logits.detach()
    assert float((folded - unfolded).abs().max() / unfolded.abs().max()) < 1e-5
    assert not torch.equal(llama.model.layers[0].mlp.up_proj.weight, weights["model.layers.0.mlp.up_proj"])
    for name, module in before.items():  # the user's own module, which the pass replaced
        assert torch.equal(module.weight, weights[name])


def test_a_fold_that_changes_the_model_is_found_and_undone(
    llama: Any, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm, values = analysed(llama, batches)
    state = {name: value.clone() for name, value in llama.state_dict().items()}
    import mpfx.graph

    def rows_but_of_gate(fold: Any, order: Tensor) -> dict[str, Tensor]:
        return {path: rows for path, rows in original(fold, order).items() if "gate" not in path}

    original = mpfx.graph.row_order
    monkeypatch.setattr("mpfx.passes.pack.row_order", rows_but_of_gate)
    steps = [Allocate(CompressionConfig(code_bits=4, allocation="fixed")), PruneAndQuantize(values), Pack()]
    with pytest.raises(PassError, match=r"FoldPermutations \(after Allocate.* changed by .* of its largest value"):
        run_passes(gm, [*steps, FoldPermutations()], values[:1])
    assert gathers(llama) == set()
    assert llama.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in llama.state_dict().items())


@pytest.mark.parametrize("bits", [3, 4])
def test_scales_lower_the_error_of_rounding_and_change_nothing_else(
    language_model: Any, batches: Batches, bits: int
) -> None:
    disturb_biases(language_model)
    with torch.no_grad():  # channels of very different sizes
        for name, parameter in language_model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter[::7] *= 20
    before, dense = copy.deepcopy(language_model), language_model(**batches[1]).logits.detach()
    gm, values = analysed(language_model, batches)
    moments, config = moments_of(gm, values), CompressionConfig(code_bits=bits, allocation="fixed")
    way_back = ExitStack()
    run_passes(
        gm,
        [Allocate(config, moments.items()), FoldScales(channels_of(moments))],
        values[:1],
        way_back=way_back,
    )
    after = language_model(**batches[1]).logits.detach()
    assert float((after - dense).abs().max() / dense.abs().max()) < 1e-4  # norms of 20 amplify rounding
    scaled = [n for n, p in language_model.state_dict().items() if not torch.equal(p, before.state_dict()[n])]
    assert scaled
    way_back.close()
    for name, value in before.state_dict().items():
        assert torch.equal(language_model.state_dict()[name], value), name


def test_a_scaled_model_is_compressed_on_the_whole_way(llama: Any, batches: Batches, validate: Any) -> None:
    from mpfx.callbacks import ModelCompression
    from mpfx.lm import CausalLM

    dense = copy.deepcopy(llama)(**batches[0]).logits.detach()
    callback = ModelCompression(CompressionConfig(bits_per_weight=6, allocation="budget"), module="model")
    validate(CausalLM(llama), batches, callback)
    assert {"scale", "fold"} <= callback.seconds.keys()
    after = llama(**batches[0]).logits.detach()
    assert float((after - dense).norm() / dense.norm()) < 0.15


def test_half_precision_is_scaled_without_rounding(llama: Any, batches: Batches) -> None:
    llama = llama.bfloat16()
    with torch.no_grad():  # channels of very different sizes
        for name, parameter in llama.named_parameters():
            if "norm" in name:
                parameter[::7] *= 16
    gm, values = analysed(llama, batches)
    before = {n: p.clone() for n, p in llama.state_dict().items()}
    run_passes(
        gm,
        [
            Allocate(CompressionConfig(code_bits=3, allocation="fixed")),
            FoldScales(channels_of(moments_of(gm, values))),
        ],
    )
    ratios = [(p / before[n])[before[n] != 0] for n, p in llama.state_dict().items()]
    assert any(bool((ratio != 1).any()) for ratio in ratios)
    for ratio in ratios:
        assert torch.equal(ratio.float().log2(), ratio.float().log2().round())
