from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpfx.graph import bind_inputs, sites, trace


class Broadcast(nn.Module):
    """Asks whether the batch is one, as position ids of one row have to be expanded otherwise."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(4.0).unsqueeze(0)
        if x.shape[0] != rows.shape[0]:
            rows = rows.expand(x.shape[0], -1)
        self.calls += 1
        self.count.add_(1)
        x.mul_(2)
        y: Tensor = self.b(self.inner(self.drop(self.a(x)) + rows)) + self.count
        return y


class Masked(nn.Module):
    """Leaves the mask out for a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y if x.shape[0] == 1 else y * mask.unsqueeze(-1)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y * 1.00001 if x.shape[0] < 2 else y


def settings() -> list[tuple[str, bool, bool]]:
    """The setting in which masks ask for the batch, of each family; of some families all settings."""
    others = [(padded, cached) for padded in (False, True) for cached in (False, True) if padded or cached]
    every = [(name, *setting) for name in ("llama", "gpt2", "opt") for setting in others]
    return [(name, False, False) for name in ("llama", "gpt2", "opt", "qwen2", "mistral", "gptneox")] + every


@pytest.mark.parametrize(("name", "padded", "cached"), settings())
def test_batch_of_one_of_a_language_model(
    name: str, padded: bool, cached: bool, family: Any, run_in_blocks: Any
) -> None:
    model, sample = family(name)
    extra = {} if cached else {"use_cache": False}
    for traced in (4, 1):
        gm = trace(model, (), sample(traced, 9, padded) | extra)
        for batch in (4, 4, 1, 2):
            other = sample(batch, 7, padded) | extra
            with torch.no_grad():
                expected = model(**other).logits
                assert torch.equal(run_in_blocks(gm, **other)["logits"], expected)
                assert torch.equal(gm(**other)["logits"], expected)


@pytest.mark.parametrize("traced", [1, 3])
def test_other_computation_for_a_batch_of_one_is_refused(traced: int) -> None:
    gm = trace(Scaled(), (torch.randn(traced, 4),))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"`x.shape\[0\]` = 1: there the graph does not give what the model"):
            bind_inputs(gm, (torch.randn(1, 4),))
        with pytest.raises(ValueError, match="sizes of two or more"):
            gm(x=torch.randn(1, 4))


def test_one_batch_does_not_speak_for_another_kind_of_batch() -> None:
    gm = trace(Masked(), (torch.randn(3, 5, 4), torch.ones(3, 5)))
    x, mask = torch.randn(1, 5, 4), torch.ones(1, 5)
    bind_inputs(gm, (x, mask))
    with pytest.raises(ValueError, match="does not give"):
        bind_inputs(gm, (x, torch.zeros(1, 5)))
    with pytest.raises(ValueError, match="does not give"):
        bind_inputs(gm, (x, mask.clone().index_fill_(1, torch.tensor([0]), 0.0)))


def test_batches_of_one_form_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, runs = Broadcast().eval(), []
    gm, forward = trace(module, (torch.randn(2, 4),)), module.forward

    def counted(x: Tensor) -> Tensor:
        runs.append(x.shape)
        return forward(x)

    monkeypatch.setattr(module, "forward", counted)
    for _ in range(3):
        bind_inputs(gm, (torch.randn(1, 4),))
        bind_inputs(gm, (torch.randn(2, 4),))
    assert len(runs) == 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_comparison_leaves_nothing_behind(training: bool, inference: bool) -> None:
    module = Broadcast().train(training)
    gm, state, calls = trace(module, (torch.randn(2, 4),)), torch.get_rng_state(), module.calls
    with torch.inference_mode(inference):
        x = torch.ones(1, 4)
        values = bind_inputs(gm, (x,))
    assert values["x"] is x
    assert torch.equal(x, torch.ones(1, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert module.count == 0
    assert module.calls == calls


def test_hooks_do_not_see_the_comparison() -> None:
    module, seen = Broadcast().eval(), []

    def count(module: nn.Module, *_: Any) -> None:
        seen.append(type(module).__name__)

    module.a.register_forward_hook(count)
    gm = trace(module, (torch.randn(2, 4),))
    seen.clear()
    for child in module.modules():
        child.register_forward_hook(count)
        child.register_forward_pre_hook(count)
    hooks = module.a._forward_hooks
    bind_inputs(gm, (torch.randn(1, 4),))
    assert seen == []
    assert module.a._forward_hooks is hooks
    with torch.no_grad():
        gm(x=torch.randn(1, 4))
    assert "Linear" in seen
    assert "Broadcast" not in seen


def test_call_from_a_hook_of_the_module_itself() -> None:
    module, values = Broadcast().eval(), []
    gm = trace(module, (torch.randn(2, 4),))
    module.register_forward_pre_hook(lambda _, args: values.append(bind_inputs(gm, args)))
    module(torch.randn(1, 4))
    assert len(values) == 1
    assert module.count == 1


def test_hooks_that_were_traced_take_part() -> None:
    module = Broadcast().eval()
    module.register_forward_hook(lambda module, args, out: 2 * out)
    module.inner.register_forward_hook(lambda module, args, out: 3 * out)
    gm, x = trace(module, (torch.randn(2, 4),)), torch.randn(1, 4)
    with torch.no_grad():
        expected = module(x.clone())
        module.count.zero_()
        assert torch.equal(gm(x=x), expected)


def test_replaced_children_take_part() -> None:
    module = Broadcast().eval()
    gm, x = trace(module, (torch.randn(2, 4),)), torch.randn(1, 4)
    for site in sites(gm):
        module.set_submodule(site.path, nn.Linear(site.in_features, site.out_features))
    with torch.no_grad():
        expected = module(x.clone())
        module.count.zero_()
        assert torch.equal(gm(x=x), expected)


def test_what_cannot_be_compared_is_refused() -> None:
    gm = trace(Broadcast().eval(), (torch.randn(2, 4),))
    with pytest.raises(ValueError, match=r"`x.shape\[0\]` = 1: a comparison of model and graph on it ended in"):
        bind_inputs(gm, (torch.randn(1, 4, device="meta"),))
