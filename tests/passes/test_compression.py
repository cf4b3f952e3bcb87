"""Locate, allocate, solve, pack: the passes on tiny models, called without a Trainer."""

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mpfx.allocate import OptimalConfig, code_bits_per_weight
from mpfx.graph import bind_inputs, linear_weight, trace
from mpfx.nn import MixedPrecisionLinear
from mpfx.passes import (
    Allocate,
    CompressionConfig,
    FoldPermutations,
    LocateSites,
    Pack,
    PassError,
    PruneAndQuantize,
    Reading,
    Scope,
    SolvedGroup,
    analysis,
    check_feasible,
    finalised,
    located,
    observed,
    padding_masks,
    run_passes,
    solved_groups,
)
from mpfx.passes.allocate import PLAN
from mpfx.passes.locate import annotations
from mpfx.stats import Moments
from tests.zoo import build

Batches = list[dict[str, Tensor]]


def located_graph(model: nn.Module, batch: dict[str, Any], **scope: Any) -> fx.GraphModule:
    return run_passes(trace(model, (), {**batch, "use_cache": False}), analysis(Scope(**scope)))


def bound(gm: fx.GraphModule, batches: Batches) -> list[dict[str, Any]]:
    return [bind_inputs(gm, (), {**batch, "use_cache": False}) for batch in batches]


@torch.no_grad()
def dense_moments(gm: fx.GraphModule, batches: Batches) -> dict[str, Moments]:
    with observed(gm, located(gm)) as accumulators:
        for values in bound(gm, batches):
            gm(**values)
    return {g.name: moments for g, moments, _ in finalised(accumulators, located(gm)) if moments is not None}


def compressed(model: nn.Module, batches: Batches, config: CompressionConfig) -> tuple[SolvedGroup, ...]:
    gm = located_graph(model, batches[0])
    moments = dense_moments(gm, batches) if config.scored else {}
    values = bound(gm, batches)
    run_passes(
        gm, [Allocate(config, moments.items()), PruneAndQuantize(values), Pack(), FoldPermutations()], values[:1]
    )
    return solved_groups(gm)


@pytest.mark.parametrize(
    "config",
    [
        CompressionConfig(code_bits=8, allocation="fixed"),
        CompressionConfig(code_bits=4, sparsity=0.5, allocation="fixed"),
        CompressionConfig(code_bits=16, sparsity="2:4", allocation="fixed"),
        CompressionConfig(code_bits=4, allocation="quantile"),
        CompressionConfig(bits_per_weight=5.5, allocation="budget"),
        CompressionConfig(code_bits=4, allocation="threshold", sparsity=0.3),
    ],
    ids=lambda c: f"{c.allocation}-{c.code_bits}-{c.sparsity}",
)
def test_every_architecture_and_strategy(language_model: Any, batches: Batches, config: CompressionConfig) -> None:
    dense = copy.deepcopy(language_model)
    groups = compressed(language_model, batches, config)
    packed = {name for name, m in language_model.named_modules() if isinstance(m, MixedPrecisionLinear)}
    linear = {n for n, m in dense.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    assert packed == linear - {"lm_head"} == {path for group in groups for path in group.weights}
    others = {n: p for n, p in dense.state_dict().items() if n.rpartition(".")[0] not in packed or n.endswith(".bias")}
    for name, value in others.items():  # nothing but the weights of the sites has changed
        assert torch.equal(language_model.state_dict()[name], value), name
    for group in groups:
        for path in group.weights:
            assert torch.equal(language_model.get_submodule(path).weight, group.dense(path))
        zeros = sum(int((group.dense(path) == 0).sum()) for path in group.weights)
        assert zeros / group.plan.numel >= config.pattern.fraction - 0.01
        for entry in group.reports():
            assert 0 <= entry.relative_error < (0.1 if config.code_bits == 8 else 0.6)
            assert entry.fallback is None
    out = language_model(**batches[0]).logits
    assert bool(torch.isfinite(out).all())


def test_eight_bits_hardly_change_the_output(language_model: Any, batches: Batches) -> None:
    before = language_model(**batches[1]).logits.detach()
    compressed(language_model, batches, CompressionConfig(code_bits=8, allocation="fixed"))
    after = language_model(**batches[1]).logits.detach()
    assert float((after - before).norm() / before.norm()) < 0.03
    assert not torch.equal(after, before)


def test_more_bits_come_closer(llama: Any, batches: Batches) -> None:
    before = llama(**batches[1]).logits.detach()
    errors = []
    for bits in (2, 4, 6, 8):
        model = copy.deepcopy(llama)
        compressed(model, batches, CompressionConfig(code_bits=bits, allocation="fixed"))
        errors.append(float((model(**batches[1]).logits.detach() - before).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 4 * errors[-1]


def test_sparsity_is_exact_over_each_group(llama: Any, batches: Batches) -> None:
    for group in compressed(llama, batches, CompressionConfig(code_bits=4, sparsity=0.5, allocation="fixed")):
        zeros = sum(int((group.dense(path) == 0).sum()) for path in group.weights)
        assert zeros >= group.plan.numel // 2 - len(group.plan.layout.panels)
        kept = sum(round((1 - w.sparsity) * w.out_features * w.layout.in_features) for w in group.weights.values())
        assert abs(kept - group.plan.numel / 2) <= len(group.plan.layout.panels)


@pytest.mark.parametrize("target", [3.0, 4.36, 6.0])
@pytest.mark.parametrize("allocation", ["fixed", "budget"])
@pytest.mark.parametrize("sparsity", [None, 0.5, "2:4"])
def test_a_stored_budget_is_met_from_below(
    llama: Any, batches: Batches, target: float, allocation: Any, sparsity: Any
) -> None:
    config = CompressionConfig(bits_per_weight=target, allocation=allocation, sparsity=sparsity)
    groups = compressed(llama, batches, config)
    numel = sum(group.plan.numel for group in groups)
    stored = 8 * sum(group.stored_bytes for group in groups) / numel
    assert stored <= target
    assert sum(group.stored_bytes for group in groups) <= sum(group.plan.stored_bytes() for group in groups)
    if allocation == "fixed":  # one width more would not fit
        bits = {int(b) for group in groups for b in group.plan.bits.unique()}
        assert len(bits) == 1
        assert stored > target - 2 or bits == {8}
    elif not sparsity and target < 6:
        assert stored > target - 0.08


@pytest.mark.parametrize("hidden", [64, 72])  # whole segments, and a last one of 8 channels
def test_budget_spreads_code_bits_over_the_model(make_llama: Any, batches: Batches, hidden: int) -> None:
    model = make_llama(hidden_size=hidden)
    gm = located_graph(model, batches[0])
    moments = dense_moments(gm, batches)
    for target in (2.0, 3.0, 3.37, 4.0, 5.0, 7.0, 8.0):
        run_passes(gm, [Allocate(CompressionConfig(code_bits=target, allocation="budget"), moments.items())])
        plans = list(annotations(gm, PLAN).values())
        step = min(32 * sum(plan.rows.values()) for plan in plans)  # one bit for one segment of the smallest group
        missing = (target - code_bits_per_weight(plans)) * sum(plan.numel for plan in plans)
        assert -1e-6 <= missing <= step


@pytest.mark.parametrize("allocation", ["budget", "quantile", "fixed"])
def test_n_of_m_holds_in_the_models_own_order(llama: Any, batches: Batches, allocation: Any) -> None:
    config = CompressionConfig(code_bits=8, allocation=allocation, sparsity="2:4")
    for group in compressed(llama, batches, config):
        for path in group.weights:
            zeros = (group.dense(path) == 0).unflatten(1, (-1, 4)).sum(-1)
            assert bool((zeros >= 2).all())


def test_the_models_own_head_stays_dense_unless_asked(llama: Any, batches: Batches) -> None:
    gm = run_passes(trace(llama, (), batches[0]), analysis(Scope()))
    assert "lm_head" not in {site.path for group in located(gm) for site in group.sites}
    assert LocateSites().reasons(gm) == {"lm_head": "it is the output head (`scope.head`)"}
    gm = run_passes(trace(llama, (), batches[0]), analysis(Scope(head=True)))
    assert "lm_head" in {site.path for group in located(gm) for site in group.sites}


def test_blocks_can_have_budgets_of_their_own(llama: Any, batches: Batches) -> None:
    config = CompressionConfig(code_bits=4, block_bits={"model.layers.0": 8, "*.2": 2}, allocation="fixed")
    widths = {group.plan.name: set(group.plan.bits.tolist()) for group in compressed(llama, batches, config)}
    assert all(bits == {8 if "layers.0" in name else 2 if "layers.2" in name else 4} for name, bits in widths.items())


def test_a_pattern_that_matches_no_block_is_refused(llama: Any, batches: Batches) -> None:
    gm = located_graph(llama, batches[0])
    with pytest.raises(PassError, match=r"'layer.7' matches none of .*model\.layers\.0"):
        run_passes(gm, [Allocate(CompressionConfig(code_bits=4, block_bits={"layer.7": 3}, allocation="fixed"))])


def test_a_tie_across_budgets_is_refused(llama: Any, batches: Batches) -> None:
    ties = (("*.down_proj",),)
    gm, config = (
        located_graph(llama, batches[0]),
        CompressionConfig(bits_per_weight=4, optimal=OptimalConfig(ties=ties)),
    )
    check_feasible(gm, config)
    with pytest.raises(ValueError, match=r"share one budget but `block_bits` parts \['\*\.down_proj'\]: .*layers\.0"):
        check_feasible(gm, replace(config, block_bits={"model.layers.0": 6}))


@pytest.mark.parametrize(("allocation", "target"), [("fixed", 1.3), ("budget", 2.3)])
def test_an_infeasible_budget_is_refused_with_the_range(
    llama: Any, batches: Batches, allocation: Any, target: float
) -> None:
    gm = located_graph(llama, batches[0])
    with pytest.raises(ValueError, match=r"at least [12]\.\d+ \(up to .* got [12]\.3"):
        check_feasible(gm, CompressionConfig(bits_per_weight=target, allocation=allocation))
    check_feasible(gm, CompressionConfig(bits_per_weight=4.5, allocation=allocation))


def test_patterns_keep_modules_dense(llama: Any, batches: Batches) -> None:
    gm = located_graph(llama, batches[0], exclude=("*.down_proj", "model.layers.0.*"))
    paths = {site.path for group in located(gm) for site in group.sites}
    assert paths
    assert not any("down_proj" in p or "layers.0." in p for p in paths)
    with pytest.raises(PassError, match="'nope' matches none of"):
        located_graph(llama, batches[0], exclude=("nope",))
    with pytest.raises(PassError, match="no Linear is left to compress"):
        located_graph(llama, batches[0], exclude=("*",))


def test_sequential_solving_sees_the_compressed_prefix(llama: Any, batches: Batches) -> None:
    """The second block's Hessian comes from inputs that passed the first block's solved weights."""
    gm = located_graph(llama, batches[0])
    seen: list[Moments] = []
    from mpfx.passes import solve as room

    original = room.solve_group

    def spy(plan: Any, weights: Any, moments: Moments, *rest: Any) -> SolvedGroup:
        seen.append(moments)
        return original(plan, weights, moments, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "solve_group", spy)
        run_passes(
            gm, [Allocate(CompressionConfig(code_bits=2, allocation="fixed")), PruneAndQuantize(bound(gm, batches))]
        )
    dense = list(dense_moments(gm, batches).values())
    assert torch.allclose(seen[0].hessian, dense[0].hessian)  # nothing is solved before the first block
    assert not torch.allclose(seen[4].hessian, dense[4].hessian, rtol=1e-2)
    with torch.no_grad():  # by hand: install block 0's solved weights and look again
        for group in solved_groups(gm)[:4]:
            for path in group.weights:
                linear_weight(llama.get_submodule(path)).copy_(group.dense(path))
    by_hand = list(dense_moments(gm, batches).values())
    torch.testing.assert_close(seen[4].hessian, by_hand[4].hessian, rtol=1e-4, atol=1e-4)


def test_solving_leaves_the_model_alone_also_after_a_failure(llama: Any, batches: Batches) -> None:
    gm = located_graph(llama, batches[0])
    before = {n: p.clone() for n, p in llama.state_dict().items()}
    solve = PruneAndQuantize(bound(gm, batches))
    run_passes(gm, [Allocate(CompressionConfig(code_bits=3, allocation="fixed")), solve])
    assert all(torch.equal(p, before[n]) for n, p in llama.state_dict().items())

    def stop(name: str, share: float) -> None:
        if name.endswith("2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_passes(gm, [PruneAndQuantize(bound(gm, batches), on_block=stop)])
    assert all(torch.equal(p, before[n]) for n, p in llama.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in llama.modules())


def test_progress_goes_from_block_to_block_to_the_end(llama: Any, batches: Batches) -> None:
    gm = located_graph(llama, batches[0])
    told: list[tuple[str, float]] = []
    solve = PruneAndQuantize(bound(gm, batches), on_block=lambda name, share: told.append((name, share)))
    run_passes(gm, [Allocate(CompressionConfig(code_bits=3, allocation="fixed")), solve])
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert {"model.layers.0", "model.layers.1", "model.layers.2"} <= {name for name, _ in told}


def test_activations_that_are_not_finite_name_the_sites(llama: Any, batches: Batches) -> None:
    with torch.no_grad():
        llama.model.layers[1].post_attention_layernorm.weight[0] = float("nan")
    gm = located_graph(llama, batches[0])
    with pytest.raises(PassError, match=r"model\.layers\.1.*gate_proj.*NaN or infinity"):
        run_passes(
            gm, [Allocate(CompressionConfig(code_bits=4, allocation="fixed")), PruneAndQuantize(bound(gm, batches))]
        )


def test_statistics_that_are_not_finite_name_the_sites(llama: Any, batches: Batches) -> None:
    with torch.no_grad():
        llama.model.layers[1].post_attention_layernorm.weight[0] = float("nan")
    gm = located_graph(llama, batches[0])
    config = CompressionConfig(code_bits=4, allocation="budget")
    with pytest.raises(PassError, match=r"sites model\.layers\.1.*gate_proj.*NaN or infinity"):
        run_passes(gm, [Allocate(config, dense_moments(gm, batches).items())])


def test_padding_does_not_count(llama: Any, batches: Batches) -> None:
    """A batch padded on the right gives the same plan and weights as the same texts without padding."""
    plain = [{"input_ids": b["input_ids"][:, :32], "attention_mask": torch.ones(4, 32).long()} for b in batches]
    padded = [
        {
            "input_ids": torch.nn.functional.pad(b["input_ids"], (0, 16), value=7),
            "attention_mask": torch.nn.functional.pad(b["attention_mask"], (0, 16)),
        }
        for b in plain
    ]
    twin = copy.deepcopy(llama)
    one, two = (
        compressed(m, b, CompressionConfig(code_bits=4, allocation="fixed"))
        for m, b in ((llama, plain), (twin, padded))
    )
    for a, b in zip(one, two, strict=True):
        for path in a.weights:
            assert float((a.dense(path) - b.dense(path)).abs().mean() / a.dense(path).abs().mean()) < 0.02


def test_debug_logging_shows_scores_and_errors(llama: Any, batches: Batches, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="mpfx"):
        compressed(llama, batches, CompressionConfig(code_bits=4, allocation="quantile"))
    text = caplog.text
    assert "model.layers.0.self_attn.q_proj: hessian" in text
    assert "importance" in text
    assert "model.layers.2.mlp.down_proj: relative error" in text


def test_passes_say_what_has_to_run_before(llama: Any, batches: Batches) -> None:
    gm = trace(llama, (), batches[0])
    config = CompressionConfig(code_bits=4, allocation="quantile")
    with pytest.raises(PassError, match="run LocateSites and GroupInputs before"):
        run_passes(gm, [Allocate(config)])
    run_passes(gm, analysis(Scope()))
    with pytest.raises(PassError, match="statistics of every input group"):
        run_passes(gm, [Allocate(config)])
    with pytest.raises(PassError, match="run Allocate before"):
        run_passes(gm, [PruneAndQuantize(batches)])
    with pytest.raises(PassError, match="run PruneAndQuantize before"):
        run_passes(gm, [Pack()])
    run_passes(gm, [Allocate(CompressionConfig(code_bits=4, allocation="fixed"))])
    with pytest.raises(PassError, match="at least one calibration batch"):
        run_passes(gm, [PruneAndQuantize([])])


def test_a_plain_module(batches: Batches) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(100, 40)
    before = model(x).detach()
    gm = run_passes(trace(model, (x,)), analysis(Scope()))
    solve = PruneAndQuantize([bind_inputs(gm, (x,), {})])
    run_passes(gm, [Allocate(CompressionConfig(code_bits=6, allocation="fixed")), solve, Pack()])
    assert [type(m).__name__ for m in model] == [
        *("MixedPrecisionLinear", "GELU", "MixedPrecisionLinear", "ReLU", "MixedPrecisionLinear")
    ]
    assert float((model(x).detach() - before).norm() / before.norm()) < 0.1
    assert torch.equal(gm(x), model(x))


def test_each_side_of_an_encoder_decoder_has_its_own_mask() -> None:
    model, sample = build("t5")
    batch = sample(4, 12) | {"use_cache": False}
    batch["decoder_input_ids"] = batch["input_ids"].flip(0)  # as long as the encoder's
    batch["attention_mask"] = torch.ones(4, 12).long()
    batch["attention_mask"][:, 4:] = 0
    gm = run_passes(trace(model, (), batch), analysis())
    values = bind_inputs(gm, (), batch)
    with torch.no_grad(), observed(gm, located(gm), lambda: Reading(padding_masks(values))) as seen:
        gm(**values)
    tokens = {name: accumulator.tokens for name, accumulator in seen.items()}
    assert {n for name, n in tokens.items() if name.startswith("encoder.")} == {16}
    cross = {name for name in tokens if "EncDecAttention.k" in name or "EncDecAttention.v" in name}
    assert {tokens[name] for name in cross} == {16}  # they read what the encoder made
    assert {n for name, n in tokens.items() if name.startswith("decoder.") and name not in cross} == {48}
