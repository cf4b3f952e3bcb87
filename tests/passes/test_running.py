"""Blocks that lie elsewhere than where they run: copies stand in for moves to an accelerator."""

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mpfx.graph import bind_inputs, blocks, dead_ends, last_readers, run_block, run_on, trace
from mpfx.graph.live import TraceRecord
from mpfx.passes import (
    Allocate,
    CompressionConfig,
    FoldPermutations,
    Pack,
    PruneAndQuantize,
    Runner,
    Scope,
    SolveConfig,
    analysis,
    dense_moments,
    located,
    observed,
    run_passes,
    running,
)
from mpfx.passes.observe import outputs_left_away

Batches = list[dict[str, Tensor]]
CPU = torch.device("cpu")
CONFIG = CompressionConfig(bits_per_weight=5, guidance=0, fold_scales=False)


def compressed(model: nn.Module, batches: Batches, runner: Runner) -> fx.GraphModule:
    gm = run_passes(trace(model, (), {**batches[0], "use_cache": False}), analysis(Scope()))
    values = [bind_inputs(gm, (), {**batch, "use_cache": False}) for batch in batches]
    solve = PruneAndQuantize(values, SolveConfig(correction=0.5), runner=runner)
    steps = [Allocate(CONFIG, dense_moments(gm, values, runner)), solve, Pack(), FoldPermutations()]
    return run_passes(gm, steps, values[:1], run=runner.whole)


class Copies:
    """Remembers what was copied to the device, and what of it there still is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0
        original = running._Fetcher._copy

        def copied(fetcher: Any, tensor: Tensor) -> Tensor:
            result = original(fetcher, tensor)
            self.made.append(weakref.ref(result))
            self.most = max(self.most, self.alive)
            return result

        monkeypatch.setattr(running, "is_away", lambda tensor, device: True)
        monkeypatch.setattr(running._Fetcher, "_copy", copied)

    @property
    def alive(self) -> int:
        return sum(tensor.nbytes for ref in self.made if (tensor := ref()) is not None)


def test_moved_blocks_give_the_same_bytes(
    language_model: Any, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = copy.deepcopy(language_model)
    compressed(language_model, batches, Runner(CPU))
    copies = Copies(monkeypatch)
    compressed(twin, batches, Runner(CPU))
    assert copies.made
    for (name, ours), theirs in zip(language_model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_two_blocks_are_on_the_device_at_most(make_llama: Any, batches: Batches, monkeypatch: Any) -> None:
    llama = make_llama(num_hidden_layers=4, hidden_size=128, intermediate_size=256)
    gm = run_passes(trace(llama, (), {**batches[0], "use_cache": False}), analysis(Scope()))
    values = [bind_inputs(gm, (), {**batch, "use_cache": False}) for batch in batches]
    copies = Copies(monkeypatch)
    of_block = sum(p.nbytes for p in llama.model.layers[0].parameters())
    with torch.no_grad():
        for _ in dense_moments(gm, values, Runner(CPU)):
            pass
    assert of_block < copies.most <= 2 * of_block + llama.model.embed_tokens.weight.nbytes
    assert copies.alive == 0


def test_everything_is_home_again_when_a_block_fails(llama: Any, batches: Batches, monkeypatch: Any) -> None:
    gm = run_passes(trace(llama, (), {**batches[0], "use_cache": False}), analysis(Scope()))
    homes = {name: p.data_ptr() for name, p in llama.named_parameters()}
    Copies(monkeypatch)
    weight, away = llama.model.layers[0].mlp.up_proj.weight, []

    def fail() -> None:
        with Runner(CPU).placed(blocks(gm)) as placed:
            for block in placed:
                away.append(weight.data_ptr() != homes["model.layers.0.mlp.up_proj.weight"])
                if block.index == 1:
                    raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert away == [False, True]
    assert {name: p.data_ptr() for name, p in llama.named_parameters()} == homes


class Gather(nn.Module):
    """Without children, so graphs call it as a whole."""

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.get_buffer("order"))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        order = torch.randperm(8)
        self.one, self.two, self.first, self.second = Gather(order), Gather(order), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.first(self.one(x)) * self.second(self.two(x))
        return out


def test_a_buffer_that_modules_share_is_moved_in_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [Layer(), Layer()]
    gm = trace(nn.Sequential(*layers), (torch.randn(3, 8),))
    homes, seen = [layer.one.order for layer in layers], []
    Copies(monkeypatch)
    with Runner(CPU).placed(blocks(gm)) as placed:
        for _ in placed:
            assert all(layer.one.order is layer.two.order for layer in layers)
            seen.append([layer.one.order is home for layer, home in zip(layers, homes, strict=True)])
    assert seen == [[False, True], [True, False]]
    assert all(layer.one.order is layer.two.order is home for layer, home in zip(layers, homes, strict=True))


def test_values_wait_on_the_host_where_the_device_is_crowded(
    llama: Any, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[Tensor] = []
    monkeypatch.setattr(running, "_SMALL", 0)
    monkeypatch.setattr(running, "allocated_bytes", lambda device: 10)
    original = running._to_host

    def to_host(tensor: Tensor) -> Tensor:
        moved.append(tensor)
        return original(tensor)

    monkeypatch.setattr(running, "_to_host", to_host)
    gm = run_passes(trace(llama, (), {**batches[0], "use_cache": False}), analysis(Scope()))
    values = bind_inputs(gm, (), {**batches[0], "use_cache": False})
    with torch.no_grad():
        plain = dict(dense_moments(gm, [values], Runner(CPU, most_bytes=11)))
        assert not moved
        waiting = dict(dense_moments(gm, [values], Runner(CPU, most_bytes=10)))
    assert moved
    assert all(torch.equal(plain[name].hessian, found.hessian) for name, found in waiting.items())


@pytest.mark.parametrize("odd", [0, 1])
def test_batches_share_one_mask_where_it_is_the_same(
    odd: int, llama: Any, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_SMALL", 0)
    batches = batches[:1] * 4
    masks = [torch.ones_like(batch["input_ids"]) for batch in batches]
    masks[odd][0, -3:] = 0
    calls = [{**b, "attention_mask": mask, "use_cache": False} for b, mask in zip(batches, masks, strict=True)]
    gm = run_passes(trace(llama, (), calls[0]), analysis(Scope()))
    first, runner = blocks(gm)[0], Runner(CPU)
    readers, values = last_readers(blocks(gm)), [bind_inputs(gm, (), call) for call in calls]
    with torch.no_grad():
        found = [runner.run(first, one, readers) for one in values]
        expected = [run_block(first, one, readers) for one in values]
    (name,) = [name for name, value in found[0].items() if getattr(value, "dtype", None) == torch.bool]
    assert found[3][name] is found[2][name]
    assert found[2][name] is not found[odd][name]
    assert all(torch.equal(one[name], other[name]) for one, other in zip(found, expected, strict=True))
    assert runner == Runner(CPU)
    assert hash(runner) == hash(pickle.loads(pickle.dumps(runner)))
    found.clear()
    assert not runner._alike  # nothing is kept that no batch has any more


def test_masks_without_data_are_shared_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones(4, 4, dtype=torch.bool, device="meta")
    monkeypatch.setattr(running, "_SMALL", 0)
    assert Runner(torch.device("meta"))._shared("mask", mask) is mask


def test_layers_whose_outputs_nobody_needs_do_not_run(llama: Any, batches: Batches) -> None:
    gm = run_passes(trace(llama, (), {**batches[0], "use_cache": False}), analysis(Scope()))
    values, down = bind_inputs(gm, (), {**batches[0], "use_cache": False}), llama.model.layers[0].mlp.down_proj
    parts = blocks(gm)
    with torch.no_grad():
        values = run_block(parts[0], values, last_readers(parts))
        with observed(gm, located(gm)) as expected:
            run_block(parts[1], values, {})
        with observed(gm, located(gm)) as found, outputs_left_away(gm, dead_ends(parts[1])):
            assert not down(torch.ones(2, 160)).any()
            run_block(parts[1], values, {})
    assert found.keys() == expected.keys()
    down_name = "model.layers.0.mlp.down_proj"
    others = found.keys() - {down_name}  # the call by hand was observed too
    assert all(torch.equal(found[n].finalise().hessian, expected[n].finalise().hessian) for n in others)
    assert down(torch.ones(2, 160)).any()


def test_a_graph_makes_its_tensors_where_it_runs(llama: Any, batches: Batches) -> None:
    """The meta device stands for an accelerator: results there have sizes only."""
    gm = trace(llama, (), {**batches[0], "use_cache": False})
    values = bind_inputs(gm, (), {**batches[0], "use_cache": False})
    meta = torch.device("meta")
    llama.to(meta)
    for block in blocks(gm):
        run_on(block, meta, {CPU})
    assert Runner(meta).whole(gm, values)["logits"].is_meta


@pytest.mark.parametrize("offload", ["auto", "never", "always"])
def test_nothing_is_offloaded_from_the_host(llama: Any, offload: Any) -> None:
    assert running.most_bytes(CPU, offload) is None
    assert not running.stays_on_host(llama, CPU, offload)
    with pytest.raises(ValueError, match="`offload` to be auto, always or never"):
        CompressionConfig(code_bits=4, offload="sometimes")  # type: ignore[arg-type]


def test_the_graph_is_not_walked_for_every_block(make_llama: Any, batches: Batches, monkeypatch: Any) -> None:
    """What every analysis begins with, a look at all nodes, is done as often for many layers as for few."""
    looks: list[int] = []
    original = TraceRecord.cached

    def cached(record: TraceRecord, *args: Any) -> Any:
        looks[-1] += 1
        return original(record, *args)

    for layers in (2, 5):
        gm = run_passes(
            trace(make_llama(num_hidden_layers=layers), (), {**batches[0], "use_cache": False}), analysis(Scope())
        )
        values = [bind_inputs(gm, (), {**batches[0], "use_cache": False})]
        looks.append(0)
        with monkeypatch.context() as patch:
            patch.setattr(TraceRecord, "cached", cached)
            allocate = Allocate(CONFIG, dense_moments(gm, values, Runner(CPU)))
            run_passes(gm, [allocate, PruneAndQuantize(values, SolveConfig(correction=0.5))])
    assert looks[0] == looks[1] < 40
