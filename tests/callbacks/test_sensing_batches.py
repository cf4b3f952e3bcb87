"""What batches, losses and modules may be like for the backward run of a calibration."""

import re
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from mpfx.callbacks import ModelCalibration, ModelCompression
from mpfx.graph import bind_inputs
from mpfx.lm import CausalLM
from mpfx.passes import CompressionConfig, Sensing, analysis, dense_moments, located, run_passes

Validate = Callable[..., None]
CONFIG = CompressionConfig(bits_per_weight=5)


class Step(pl.LightningModule):
    """A small network with a step of one's own."""

    def __init__(self, step: Callable[[nn.Module, Any], Any], net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)) if net is None else net
        self.step = step

    def validation_step(self, batch: Any, index: int) -> Any:
        return self.step(self.net, batch)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibrated(validate: Validate, module: pl.LightningModule, batches: list[Any], name: str = "net") -> Any:
    callback = ModelCalibration(CONFIG, module=name)
    validate(module, batches, callback)
    return callback.calibration


def test_short_texts_count_by_their_tokens(llama: Any, validate: Validate) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 160, (1, n), generator=generator) for n in (96, 96, 12)]
    found = calibrated(validate, CausalLM(llama), [{"input_ids": i} for i in ids], "model")
    means = torch.tensor(
        [[float(torch.cat(batch).mean()) for batch in s.batches] for s in found.sensitivities.values()]
    ).mean(0)
    assert 0.4 < float(means[2] / means[0]) < 2.5
    assert 0.4 < float(means[1] / means[0]) < 2.5


def test_what_is_averaged_over_is_told_by_what_the_model_reads(validate: Validate) -> None:
    weights = torch.ones(1000)  # first in the batch, but no sample

    def step(net: nn.Module, batch: Any) -> Any:
        return net(batch["x"]).square().mean()

    batches = [{"weights": weights, "x": noise(n, 64, seed=n)} for n in (32, 32, 4)]
    for found in calibrated(validate, Step(step), batches).sensitivities.values():
        first, _, last = (float(torch.cat(batch).mean()) for batch in found.batches)
        assert 0.5 < last / first < 2


def test_a_step_may_take_its_batch_apart(validate: Validate) -> None:
    def step(net: nn.Module, batch: Any) -> Any:
        labels = batch.pop("labels")
        return (net(batch["x"]) - labels).square().mean()

    module = Step(step)
    callback = ModelCompression(CONFIG, module="net")
    validate(module, [{"x": noise(16, 64), "labels": noise(16, 64, seed=1)}], callback)
    assert callback.done


def test_inputs_that_are_written_to_later_count_as_they_were_read() -> None:
    class Residual(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.in_place = nn.Linear(32, 32), nn.Linear(32, 32), in_place

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            y = 10 * torch.relu(self.second(h))
            if self.in_place:
                h += y
            else:
                h = h + y
            result: Tensor = h
            return result

    moments = []
    for in_place in (False, True):
        model = Residual(in_place)
        gm = run_passes(torch_trace(model, noise(4, 32)), analysis())
        sensing = Sensing(gm, located(gm))
        for seed in (0, 1):
            sensing.batch(lambda model=model, seed=seed: model(noise(8, 32, seed=seed)).square().mean())  # type: ignore[misc]
        values = [bind_inputs(gm, (noise(8, 32, seed=seed),)) for seed in (0, 1)]
        with torch.no_grad():
            moments.append(dict(dense_moments(gm, values, sensed=sensing.finalise())))
    assert moments[0].keys() == moments[1].keys()
    for name, plain in moments[0].items():
        assert torch.allclose(moments[1][name].mean_abs, plain.mean_abs)
        assert torch.allclose(moments[1][name].hessian, plain.hessian, rtol=1e-4)


def torch_trace(model: nn.Module, x: Tensor) -> Any:
    import mpfx

    return mpfx.trace(model, (x,))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda net, batch: net(batch["x"]).square().mean() * batch["scale"], r"the loss is nan"),
        (lambda net, batch: (net(batch["x"]) * 1e30).square().mean(), r"the loss is inf|not finite"),
        (lambda net, batch: 1 / 0 if torch.is_grad_enabled() else net(batch["x"]).mean(), "ZeroDivisionError"),
    ],
)
def test_what_goes_wrong_in_the_second_run_names_batch_and_way_out(
    validate: Validate, step: Callable[[nn.Module, Any], Any], message: str
) -> None:
    batches = [{"x": noise(8, 64), "scale": torch.tensor(1.0 if i < 1 else float("nan"))} for i in range(2)]
    with pytest.raises(ValueError, match=r"batch [01] could not be run once more") as caught:
        validate(Step(step), batches, ModelCompression(CONFIG, module="net"))
    assert re.search(message, str(caught.value))
    assert "`guidance: 0`" in str(caught.value)


class Experts(nn.Module):
    """Experts in a ModuleList: every token to the two that a router likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, rank = (chosen == index).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(x[token]) * weight[token, rank, None])
        return x + out


@pytest.mark.parametrize("guidance", [None, 0.0])
def test_experts_whose_tokens_change_with_compression_are_told_of(validate: Validate, guidance: float | None) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(Experts() for _ in range(3)))
    module = Step(lambda net, batch: net(batch).square().mean(), net)
    callback = ModelCompression(CompressionConfig(bits_per_weight=3.5, guidance=guidance), module="net")
    validate(module, [noise(128, 32, seed=i) for i in range(2)], callback)
    notes = {path: group.fallback for group in callback.solved for path in group.weights}
    assert any("depend on the values" in (note or "") for path, note in notes.items() if ".experts." in path)
    assert not any("depend on the values" in (note or "") for path, note in notes.items() if "router" in path)


def test_configs_of_one_calibration_have_to_be_alike() -> None:
    from mpfx.passes import Scope

    with pytest.raises(ValueError, match="alike in `scope`"):
        ModelCalibration(CONFIG, CompressionConfig(bits_per_weight=4, scope=Scope(head=True)), module="net")
