"""Sensitivities block by block against one backward pass through the whole model."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mpfx.graph import bind_inputs, trace
from mpfx.lm import losses_of
from mpfx.passes import (
    Runner,
    Sensed,
    Sensing,
    analysis,
    backward,
    located,
    run_passes,
    running,
    sense,
    sense_by_blocks,
)

Batches = list[dict[str, Tensor]]
CPU = torch.device("cpu")


def traced(model: nn.Module, batch: dict[str, Tensor]) -> fx.GraphModule:
    return run_passes(trace(model, (), {**batch, "use_cache": False}), analysis())


def whole(model: Any, batches: Batches) -> Sensed:
    gm, loss = traced(model, batches[0]), losses_of(batches)
    sensing = Sensing(gm, located(gm))
    for index, batch in enumerate(batches):
        sensing.batch(lambda index=index, batch=batch: loss(model(**batch, use_cache=False), index))  # type: ignore[misc]
    return sensing.finalise()


def by_blocks(model: nn.Module, batches: Batches, most_bytes: int | None = None) -> Sensed:
    gm = traced(model, batches[0])
    sensing = Sensing(gm, located(gm))
    values = [bind_inputs(gm, (), {**batch, "use_cache": False}) for batch in batches]
    sense_by_blocks(sensing, gm, values, losses_of(batches), Runner(CPU, most_bytes=most_bytes))
    return sensing.finalise()


def check_alike(found: Sensed, expected: Sensed) -> None:
    assert found.sensitivities.keys() == expected.sensitivities.keys()
    for name, known in expected.sensitivities.items():
        assert found.sensitivities[name].mean == pytest.approx(known.mean, rel=1e-4)
        for ours, theirs in zip(found.sensitivities[name].batches, known.batches, strict=True):
            assert len(ours) == len(theirs)
            for one, other in zip(ours, theirs, strict=True):
                assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(other.max()))
    assert found.gradients == pytest.approx(expected.gradients, rel=1e-3)


def test_blocks_alone_feel_what_the_whole_model_feels(language_model: Any, batches: Batches) -> None:
    expected = whole(language_model, batches)
    frozen = {name: p.requires_grad for name, p in language_model.named_parameters()}
    check_alike(by_blocks(language_model, batches), expected)
    assert {name: p.requires_grad for name, p in language_model.named_parameters()} == frozen
    assert all(p.grad is None for p in language_model.parameters())
    assert not any(module._forward_hooks for module in language_model.modules())


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_moved_blocks_too(llama: Any, batches: Batches, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    expected = whole(llama, batches)
    fetched: list[Tensor] = []
    original = running._Fetcher._copy

    def copied(fetcher: Any, tensor: Tensor) -> Tensor:
        fetched.append(tensor)
        return original(fetcher, tensor)

    monkeypatch.setattr(running, "is_away", lambda tensor, device: True)
    monkeypatch.setattr(running._Fetcher, "_copy", copied)
    monkeypatch.setattr(backward, "_free_bytes", lambda: free)
    check_alike(by_blocks(llama, batches), expected)
    times = sum(tensor.data_ptr() == llama.model.layers[1].mlp.up_proj.weight.data_ptr() for tensor in fetched)
    assert times == 2 * (1 if free else len(batches))  # there and back


def test_gradients_wait_on_the_host_too(llama: Any, batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that holds nothing may hold nothing; on the CPU what was moved is known by its address."""
    expected, moved, waiting = whole(llama, batches), set[int](), list[bool]()
    to_host, back = running._to_host, backward._Way._back

    def noted(tensor: Tensor) -> Tensor:
        found = to_host(tensor)
        moved.add(found.data_ptr())
        return found

    def then(way: Any, block: Any, groups: Any, stream: Any, sensing: Any) -> None:
        back(way, block, groups, stream, sensing)
        waiting.extend(gradient.data_ptr() in moved for gradient in stream.gradients.values())

    monkeypatch.setattr(running, "_SMALL", 0)
    monkeypatch.setattr(running, "_to_host", noted)
    monkeypatch.setattr(backward._Way, "_back", then)
    check_alike(by_blocks(llama, batches, most_bytes=0), expected)
    assert len(waiting) >= len(batches)
    assert all(waiting)


@pytest.mark.parametrize("together", [1, 64])
def test_a_gradient_that_is_not_finite_names_its_batch(
    llama: Any, batches: Batches, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """However late it is looked at."""
    gm = traced(llama, batches[0])
    values = [bind_inputs(gm, (), {**batch, "use_cache": False}) for batch in batches]

    def loss(result: Any, index: int) -> Tensor:
        mean: Tensor = result["logits"].mean()
        return mean if index < 1 else (mean - mean.detach()).sqrt()  # 0, whose root has no finite slope

    monkeypatch.setattr(sense, "_TOGETHER", together)
    sensing = Sensing(gm, located(gm))
    with pytest.raises(ValueError, match=r"not finite in batch 1, counted from 0: look at the data of this batch"):
        sense_by_blocks(sensing, gm, values, loss, Runner(CPU))


def test_experts_too() -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    batches = [{"input_ids": torch.randint(0, 60, (2, 16))} for _ in range(2)]
    expected = whole(model, batches)
    assert expected.gradients
    check_alike(by_blocks(model, batches), expected)
