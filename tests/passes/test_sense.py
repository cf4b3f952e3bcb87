"""Sensitivities of the loss against gradients that autograd gives for the weights themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mpfx
from mpfx.graph import bind_inputs
from mpfx.passes import Sensing, analysis, dense_moments, located, run_passes


class Net(nn.Module):
    """Two linear layers that read one value, one that reads theirs; optionally checkpointed."""

    def __init__(self, wrap: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 3)
        self.wrap = wrap

    def inner(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.first(x)) * self.gate(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x) if self.wrap is None else self.wrap(self.inner, x)
        out: Tensor = self.down(h)
        return out


def sensed(net: nn.Module, batches: list[Tensor]) -> tuple[Any, Any]:
    plain = Net()
    plain.load_state_dict(net.state_dict())
    gm = run_passes(mpfx.trace(net if getattr(net, "wrap", None) is None else plain, (batches[0],)), analysis())
    sensing = Sensing(gm, located(gm))
    for x in batches:
        sensing.batch(lambda x=x: gm_module(gm)(x).square().sum())  # type: ignore[misc]
    found = sensing.finalise()
    with torch.no_grad():
        return dict(dense_moments(gm, [bind_inputs(gm, (x,)) for x in batches], sensed=found)), found.sensitivities


def gm_module(gm: Any) -> nn.Module:
    from mpfx.graph import traced_module

    return traced_module(gm)


def output_gradients(net: Net, x: Tensor) -> dict[str, Tensor]:
    """Gradients at the outputs, by hand: dL/dy of every token, from the products of the chain rule."""
    with torch.enable_grad():
        a, g = net.first(x).detach().requires_grad_(), net.gate(x).detach().requires_grad_()
        out = net.down(torch.tanh(a) * g)
        loss = out.square().sum()
        da, dg = torch.autograd.grad(loss, (a, g))
    return {"first": da, "gate": dg, "down": (2 * out).detach()}


def test_sensitivities_are_squared_output_gradients() -> None:
    net = Net()
    batches = [torch.randn(5, 4, 8), torch.randn(3, 4, 8)]
    moments, found = sensed(net, batches)
    assert set(found) == {"first", "down"}
    for index, x in enumerate(batches):
        expected = output_gradients(net, x)
        both = (expected["first"].square().sum(-1) + expected["gate"].square().sum(-1)) / 24
        assert torch.allclose(found["first"].batches[index][0], both.flatten(), rtol=1e-5)
        down = expected["down"].square().mean(-1)
        assert torch.allclose(found["down"].batches[index][0], down.flatten(), rtol=1e-5)
    x = torch.cat([b.flatten(0, 1) for b in batches]).double()
    c = torch.cat([call for batch in found["first"].batches for call in batch]).double()
    hessian = 2 / len(x) * torch.einsum("t,ti,tj->ij", c, x, x)
    assert torch.allclose(moments["first"].hessian.double(), hessian, rtol=1e-4, atol=1e-7)


def test_the_model_is_left_as_it_was() -> None:
    net = Net()
    net.gate.weight.requires_grad_(False)
    net.first.bias.grad = torch.ones(12)
    before = {name: p.requires_grad for name, p in net.named_parameters()}
    sensed(net, [torch.randn(2, 8)])
    assert {name: p.requires_grad for name, p in net.named_parameters()} == before
    assert torch.equal(net.first.bias.grad, torch.ones(12))
    assert net.first.weight.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpoints_change_nothing(reentrant: bool) -> None:
    def wrap(inner: Callable[..., Tensor], x: Tensor) -> Tensor:
        result: Tensor = checkpoint(inner, x, use_reentrant=reentrant)
        return result

    plain, wrapped = Net(), Net(wrap)
    x = torch.randn(6, 8)
    gm = run_passes(mpfx.trace(plain, (x,)), analysis())
    expected = Sensing(gm, located(gm))
    expected.batch(lambda: plain(x).square().sum())
    right = expected.finalise().sensitivities
    plain.wrap = wrapped.wrap
    again = Sensing(gm, located(gm))
    again.batch(lambda: plain(x.clone().requires_grad_(reentrant)).square().sum())
    found = again.finalise().sensitivities
    for name in right:
        assert len(found[name].batches[0]) == 1
        assert torch.allclose(found[name].batches[0][0], right[name].batches[0][0], rtol=1e-5)


def test_padding_weighs_nothing_in_guided_moments(make_llama: Callable[..., Any]) -> None:
    llama = make_llama(num_hidden_layers=1)
    ids, mask = torch.randint(0, 160, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    gm = run_passes(mpfx.trace(llama, (), {"input_ids": ids, "attention_mask": mask, "use_cache": False}), analysis())
    sensing = Sensing(gm, located(gm))
    values = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    sensing.batch(lambda: llama(**values).logits.square().mean())
    with torch.no_grad():
        moments = dict(dense_moments(gm, [bind_inputs(gm, (), values)], sensed=sensing.finalise()))
    assert {m.tokens for m in moments.values()} == {15}


@pytest.mark.parametrize("value", [None, torch.ones(()), torch.ones(3)])
def test_a_loss_without_gradient_names_the_way_out(value: Any) -> None:
    net = Net()
    gm = run_passes(mpfx.trace(net, (torch.randn(2, 8),)), analysis())
    with pytest.raises(ValueError, match=r"differentiable scalar loss.*`guidance: 0`"):
        Sensing(gm, located(gm)).batch(lambda: value)


def test_experts_are_judged_by_the_gradient_of_their_weights() -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 60, (4, 32))
    gm = run_passes(mpfx.trace(model, (), {"input_ids": ids, "use_cache": False}), analysis())
    sensing = Sensing(gm, located(gm))
    sensing.batch(lambda: model(input_ids=ids, use_cache=False).logits.square().mean())
    values = bind_inputs(gm, (), {"input_ids": ids, "use_cache": False})
    with torch.no_grad():
        moments = dict(dense_moments(gm, [values], sensed=sensing.finalise()))
    parameter = next(p for name, p in model.named_parameters() if name.endswith("experts.down_proj"))
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(model(input_ids=ids, use_cache=False).logits.square().mean(), [parameter])
    for expert in range(4):
        name = next(n for n in moments if n.endswith(f"down_proj.{expert}"))
        # trace(H) n / 2 is sum c |x|^2, and c |x|^2 summed is |dL/dW|^2 over the rows
        total = float(moments[name].hessian.diagonal().double().sum()) * moments[name].tokens / 2
        assert total == pytest.approx(float(gradient[expert].double().square().sum()) / gradient.shape[1], rel=1e-3)
