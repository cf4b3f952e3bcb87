from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mpfx.graph import TraceError, bind_inputs, blocks, first_samples, sites, trace

ALL = ["llama", "opt", "gpt2", "qwen2", "mistral", "gemma2", "phi3", "gptneox", "falcon", "mixtral", "bert", "t5"]


def linear_paths(model: nn.Module) -> set[str]:
    kinds = ("Linear", "Conv1D", "FalconLinear")
    return {name for name, module in model.named_modules() if type(module).__name__ in kinds}


@pytest.mark.parametrize("name", ALL)
def test_graph_and_blocks_equal_the_model_on_another_batch(name: str, family: Any, run_in_blocks: Any) -> None:
    model, sample = family(name)
    gm = trace(model, (), sample(2, 9, padded=False) | {"attention_mask": torch.ones(2, 9, dtype=torch.long)})
    assert {site.path for site in sites(gm) if site.kind != "expert"} == linear_paths(model)
    gm.graph.lint()
    for other in (sample(3, 13), sample(1, 6)):
        with torch.no_grad():
            expected = model(**other).logits
            assert torch.equal(gm(**other)["logits"], expected)
            assert torch.equal(run_in_blocks(gm, **other)["logits"], expected)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_model_without_attention_mask(name: str, family: Any, run_in_blocks: Any) -> None:
    model, sample = family(name)
    gm = trace(model, (torch.randint(3, 96, (2, 7)),))
    other = torch.randint(3, 96, (3, 11))
    with torch.no_grad():
        assert torch.equal(gm(input_ids=other)["logits"], model(other).logits)
        assert torch.equal(run_in_blocks(gm, other)["logits"], model(other).logits)
    with pytest.raises(ValueError, match="attention_mask"):
        gm(**sample(2, 7))


def test_a_traced_model_is_freed_with_its_graph(family: Any) -> None:
    model, sample = family("llama")
    gm = trace(model, (), sample(2, 5))
    assert blocks(gm)
    gone = weakref.ref(model)
    del model, gm
    gc.collect()  # graphs have cycles
    assert gone() is None


def test_no_result_is_kept_while_tracing(family: Any) -> None:
    """Under symbolic sizes that takes longer than to compute it again."""
    model, sample = family("llama")
    before = FakeTensorMode.cache_hits, FakeTensorMode.cache_misses
    trace(model, (), sample(2, 9))
    assert (FakeTensorMode.cache_hits, FakeTensorMode.cache_misses) == before


def test_output_holds_tensors_only(family: Any) -> None:
    model, sample = family("llama")
    assert set(trace(model, (), sample(2, 5) | {"use_cache": True})(**sample(2, 5))) == {"logits"}
    with_hidden = trace(model, (), sample(2, 5) | {"output_hidden_states": True, "return_dict": False})
    logits, hidden = with_hidden(**sample(2, 5))
    assert isinstance(logits, Tensor)
    assert len(hidden) == 3


def test_replacing_a_module_reaches_model_graph_and_blocks(family: Any, run_in_blocks: Any) -> None:
    model, sample = family("llama")
    gm, batch = trace(model, (), sample(2, 5)), sample(3, 8)
    before, parts = gm(**batch)["logits"], blocks(gm)
    for site in sites(gm):
        model.set_submodule(site.path, nn.Linear(site.in_features, site.out_features))
    expected = model(**batch).logits
    assert not torch.equal(before, expected)
    assert torch.equal(gm(**batch)["logits"], expected)
    assert torch.equal(run_in_blocks(gm, **batch)["logits"], expected)
    assert blocks(gm) is parts


@pytest.mark.parametrize("training", [False, True])
def test_inference_mode_and_autocast_around_the_trace(training: bool, family: Any) -> None:
    model, sample = family("llama")
    model.train(training)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        batch = sample(2, 7)
        assert batch["input_ids"].is_inference()
        gm = trace(model, (), batch)
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()
        other = sample(3, 9)
        assert torch.equal(gm(**other)["logits"], model(**other).logits)
    other = sample(3, 9)
    assert torch.equal(gm(**other)["logits"], model(**other).logits)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_model_on_the_meta_device(device: str, family: Any) -> None:
    model, sample = family("llama")
    empty = copy.deepcopy(model).to("meta")
    gm = trace(empty, (), {name: value.to(device) for name, value in sample(2, 5).items()})
    assert [site.path for site in sites(gm)] == [site.path for site in sites(trace(model, (), sample(2, 5)))]
    if device == "cpu":  # the weights may come after the trace
        empty.to_empty(device="cpu")
        for kind in ("named_parameters", "named_buffers"):
            values = dict(getattr(model, kind)())
            for name, tensor in getattr(empty, kind)():
                tensor.data.copy_(values[name])
        batch = sample(3, 8)
        assert torch.equal(gm(**batch)["logits"], model(**batch).logits)


def test_batch_of_one_stays_dynamic(chain: nn.Module) -> None:
    gm = trace(chain, (torch.randn(1, 5, 8),))
    x = torch.randn(4, 3, 8)
    assert torch.equal(gm(input=x), chain(x))


def test_lightning_module_around_a_model(family: Any, run_in_blocks: Any) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Wrapped(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.model(*args, **kwargs).logits

    model, sample = family("llama")
    module = Wrapped(model)
    gm = trace(module, (sample(2, 5)["input_ids"],), {"use_cache": False})
    ids = sample(3, 8)["input_ids"]
    assert torch.equal(gm(args_0=ids), module(ids, use_cache=False))
    assert torch.equal(run_in_blocks(gm, ids), module(ids))
    assert sites(gm)[0].path == "model.model.layers.0.self_attn.q_proj"


def test_batch_norm_in_training_keeps_its_statistics() -> None:
    module = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Flatten()).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random_state = torch.get_rng_state()
    trace(module, (torch.randn(2, 3, 9, generator=torch.Generator()),))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_hooks_of_others_take_part(chain: nn.Module) -> None:
    shapes: list[torch.Size] = []
    chain[0].gate.register_forward_hook(lambda module, args, out: shapes.append(out.shape))  # type: ignore[index]
    chain.register_forward_hook(lambda module, args, out: 2 * out)
    gm, x = trace(chain, (torch.randn(2, 8),)), torch.randn(5, 8)
    assert torch.equal(gm(input=x), chain(x))
    assert shapes[-1] == (5, 12)


def test_tracing_from_a_hook_of_the_module_says_so(chain: nn.Module) -> None:
    chain.register_forward_pre_hook(lambda module, args: trace(module, args) and None)
    with pytest.raises(TraceError, match="hook"):
        chain(torch.randn(2, 8))


def test_export_finds_the_same_linear_layers(family: Any) -> None:
    model, sample = family("llama")
    batch = sample(2, 6) | {"use_cache": False}
    exported = torch.export.export(model, (), batch, strict=False)
    stacks = [node.meta.get("nn_module_stack", {}) for node in exported.graph.nodes if node.op == "call_function"]
    visited = {path for stack in stacks for path, _ in stack.values()}
    found = {site.path for site in sites(trace(model, (), batch))}
    assert found == {path for path in visited if isinstance(model.get_submodule(path), nn.Linear)}


def test_first_samples_of_a_batch(family: Any) -> None:
    model, sample = family("llama")
    gm = trace(model, (), sample(3, 9))
    batch = bind_inputs(gm, (), sample(5, 11))
    smaller = first_samples(gm, batch)
    assert smaller["input_ids"].shape == (2, 11)
    assert torch.equal(smaller["attention_mask"], batch["attention_mask"][:2])
    assert torch.equal(gm(**smaller)["logits"], model(**smaller).logits)


def test_a_batch_that_cannot_be_cut_stays_whole() -> None:
    class Product(nn.Module):
        def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return x @ weights

    gm = trace(Product(), (torch.randn(3, 4), torch.randn(4, 2)))
    batch = bind_inputs(gm, (torch.randn(7, 5), torch.randn(5, 6)))
    assert first_samples(gm, batch)["x"].shape == (2, 5)
    batch = bind_inputs(gm, (torch.randn(5, 5), torch.randn(5, 6)))  # the weights' rows look like samples
    assert first_samples(gm, batch)["x"].shape == (5, 5)
    assert torch.equal(gm(**first_samples(gm, batch)), batch["x"] @ batch["weights"])
