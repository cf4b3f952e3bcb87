"""Allocation `optimal` in a Trainer's loop: its own backward pass, its loss, its determinism."""

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from mpfx.callbacks import ModelCalibration, ModelCompression
from mpfx.lm import CausalLM, make_trainer, quiet_lightning
from mpfx.passes import ALLOCATIONS, CompressionConfig

Batches = list[dict[str, Tensor]]
Validate = Callable[..., None]


class Regression(pl.LightningModule):
    def __init__(self, returns: str = "loss") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 4))
        self.returns = returns

    def validation_step(self, batch: Tensor, index: int) -> Any:
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        return {"loss": loss, "mapping": {"loss": loss}, "nothing": None, "detached": loss.detach()}[self.returns]


def first_output(module: Any, batch: Tensor) -> Tensor:
    loss: Tensor = module.net(batch)[:, 0].square().mean()
    return loss


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 64, generator=generator) for _ in range(3)]


def kept_bytes(callback: ModelCompression) -> list[bytes]:
    return [w.codes.numpy().tobytes() for group in callback.solved for w in group.weights.values()]


def test_the_loop_keeps_its_own_results(llama: Any, batches: Batches) -> None:
    def logged(*callbacks: Any) -> dict[str, float]:
        with quiet_lightning():
            trainer = make_trainer("cpu", 1, callbacks=callbacks, progress=False)
            loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
            return dict(trainer.validate(CausalLM(copy.deepcopy(llama)), loader, verbose=False)[0])

    with_guidance = logged(ModelCompression(CompressionConfig(bits_per_weight=4), module="model", progress=False))
    assert with_guidance == logged()


@pytest.mark.parametrize("returns", ["loss", "mapping"])
def test_any_module_is_guided_by_the_loss_that_it_returns(validate: Validate, returns: str) -> None:
    callback = ModelCalibration(CompressionConfig(bits_per_weight=4.5), module="net")
    validate(Regression(returns), inputs(), callback)
    assert callback.calibration is not None
    net, batch = Regression(returns).net, inputs()[0]
    with torch.enable_grad():
        out = net(batch)
        (gradient,) = torch.autograd.grad(out.square().mean(), out)
    found = callback.calibration.sensitivities["4"].batches[0][0]
    expected = gradient.square().mean(-1)
    assert torch.allclose(found / found.mean(), expected / expected.mean(), rtol=1e-4)


@pytest.mark.parametrize("returns", ["nothing", "detached"])
def test_a_loss_that_cannot_be_differentiated_names_the_ways_out(validate: Validate, returns: str) -> None:
    module = Regression(returns)
    before = copy.deepcopy(module.net)
    with pytest.raises(ValueError, match=r"validation_step.*loss=.*`guidance: 0`"):
        validate(module, inputs(), ModelCompression(CompressionConfig(bits_per_weight=4.5), module="net"))
    assert all(torch.equal(a, b) for a, b in zip(module.net.parameters(), before.parameters(), strict=True))


def test_a_users_function_takes_the_place_of_the_step(validate: Validate) -> None:
    module = Regression("nothing")
    callback = ModelCompression(CompressionConfig(bits_per_weight=4.5), module="net", loss=first_output)
    validate(module, inputs(), callback)
    assert callback.done
    plain = ModelCompression(CompressionConfig(bits_per_weight=4.5), module="net")
    validate(Regression(), inputs(), plain)
    assert kept_bytes(callback) != kept_bytes(plain)  # one output of four counts, instead of all


def test_the_unguided_path_needs_no_loss(validate: Validate) -> None:
    module = Regression("nothing")
    callback = ModelCompression(CompressionConfig(bits_per_weight=4.5, guidance=0), module="net")
    validate(module, inputs(), callback)
    assert callback.done


def test_sensitivity_decides_who_gets_the_bits(validate: Validate) -> None:
    """A branch that the loss feels a hundred times less gets fewer bits, though weights and inputs are alike."""

    class Branches(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right = nn.Linear(128, 64), nn.Linear(128, 64)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.left(x[..., :128]) + 0.01 * self.right(x[..., 128:])
            return out

        def validation_step(self, batch: Tensor, index: int) -> Tensor:
            loss: Tensor = self(batch).square().mean()
            return loss

    callback = ModelCompression(CompressionConfig(bits_per_weight=4.5, correction=0))
    validate(Branches(), [torch.randn(64, 256) for _ in range(2)], callback)
    bits = {group.plan.name: group.plan.code_bits for group in callback.solved}
    assert bits["left"] > bits["right"] + 2


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_threads(
    make_llama: Callable[..., Any], batches: Batches, validate: Validate
) -> None:
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2, 2):
        callback = ModelCompression(CompressionConfig(bits_per_weight=3.5), module="model")
        try:
            torch.set_num_threads(count)
            validate(CausalLM(make_llama(num_hidden_layers=2)), batches, callback)
        finally:
            torch.set_num_threads(threads)
        found.append(kept_bytes(callback))
    assert found[0] == found[1] == found[2]


def test_one_calibration_serves_many_configs(llama: Any, batches: Batches, validate: Validate) -> None:
    configs = CompressionConfig(bits_per_weight=4), CompressionConfig(bits_per_weight=4.36, allocation="budget")
    calibrate = ModelCalibration(*configs, module="model")
    validate(CausalLM(llama), batches, calibrate)
    assert calibrate.calibration is not None
    plain, guided = calibrate.calibration.moments, calibrate.calibration.guided
    assert plain is not None
    assert guided is not None
    assert plain.keys() == guided.keys()
    name = next(iter(plain))
    assert plain[name].tokens == guided[name].tokens
    assert torch.allclose(plain[name].mean_abs, guided[name].mean_abs, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(plain[name].hessian, guided[name].hessian, rtol=1e-2)


def test_a_site_that_the_loss_does_not_need_is_named(validate: Validate) -> None:
    class Auxiliary(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.aux = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.main(x), self.aux(torch.tanh(x))

        def validation_step(self, batch: Tensor, index: int) -> Any:
            return self(batch)[0].square().mean()

    with pytest.raises(ValueError, match=r"does not depend on what sites \['aux'\].*`scope.exclude`"):
        validate(Auxiliary(), inputs(), ModelCompression(CompressionConfig(bits_per_weight=4.5)))


def test_layers_that_write_in_place_can_be_guided(validate: Validate) -> None:
    module = Regression()
    module.net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(inplace=True), nn.Linear(96, 4))
    callback = ModelCompression(CompressionConfig(bits_per_weight=4.5), module="net")
    validate(module, inputs(), callback)
    assert callback.done


def test_two_calls_a_batch_are_refused(validate: Validate) -> None:
    class Twice(Regression):
        def validation_step(self, batch: Tensor, index: int) -> Any:
            return (self.net(batch) - self.net(-batch)).square().mean()

    with pytest.raises(ValueError, match=r"one call of module 'net' a batch.*made 2: set `guidance: 0`"):
        validate(Twice(), inputs(), ModelCompression(CompressionConfig(bits_per_weight=4.5), module="net"))


def test_parameters_outside_of_the_module_gather_no_gradient(validate: Validate) -> None:
    class Headed(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def validation_step(self, batch: Tensor, index: int) -> Any:
            return self.head(self.net(batch)).square().mean()

    module = Headed()
    validate(module, inputs(), ModelCompression(CompressionConfig(bits_per_weight=4.5), module="net"))
    assert module.head.weight.grad is None
    assert module.head.weight.requires_grad


def test_random_steps_draw_the_same_numbers_again(validate: Validate) -> None:
    class Noisy(Regression):
        seen: list[Tensor]

        def validation_step(self, batch: Tensor, index: int) -> Any:
            noisy = batch + torch.randn_like(batch)
            self.seen.append(noisy)
            return self.net(noisy).square().mean()

    module = Noisy()
    module.seen = []
    validate(module, inputs(), ModelCompression(CompressionConfig(bits_per_weight=4.5), module="net"))
    assert len(module.seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(module.seen[::2], module.seen[1::2], strict=True))
    assert not torch.equal(module.seen[0], module.seen[2])


@pytest.mark.parametrize("guidance", [None, 0.0])
def test_signals_can_stand_in_for_measured_distortions(
    llama: Any, batches: Batches, validate: Validate, caplog: pytest.LogCaptureFixture, guidance: float | None
) -> None:
    def compressed(distortion: Any) -> Any:
        config = CompressionConfig(bits_per_weight=4.5, guidance=guidance, distortion=distortion)
        callback = ModelCompression(config, module="model")
        validate(CausalLM(copy.deepcopy(llama)), batches, callback)
        assert callback.graph_module is not None
        return callback.graph_module.meta[ALLOCATIONS][0]

    with caplog.at_level("INFO", "mpfx.allocate"):
        (seen, _), (predicted, chosen) = compressed("measured"), compressed("signals")
    assert "the five signals explain" in caplog.text
    assert chosen.stored_bytes <= 4.5 / 8 * sum(group.numel for group in predicted.groups)
    ratios = [
        p.curves[0].distortion / m.curves[0].distortion for p, m in zip(predicted.groups, seen.groups, strict=True)
    ]
    ratio = torch.cat(ratios)[:, 1:]
    assert not torch.allclose(ratio, torch.ones_like(ratio), rtol=1e-6)
    assert bool(((ratio > 0.2) & (ratio < 5)).all())


def test_batches_of_several_loaders_are_told_apart(validate: Validate) -> None:
    calls: list[tuple[int, int]] = []

    class Two(Regression):
        def validation_step(self, batch: Tensor, index: int, dataloader_idx: int = 0) -> Any:
            calls.append((index, dataloader_idx))
            return self.net(batch).square().mean() * (1 + dataloader_idx)

    callback = ModelCalibration(CompressionConfig(bits_per_weight=4.5), module="net")
    loaders: Any = [torch.utils.data.DataLoader(inputs(), batch_size=None) for _ in range(2)]  # type: ignore[arg-type]
    with quiet_lightning():
        make_trainer("cpu", 1, callbacks=[callback], progress=False).validate(Two(), loaders, verbose=False)
    assert callback.calibration is not None
    assert calls == [(index, loader) for loader in range(2) for index in range(3) for _ in range(2)]
    first, second = (
        torch.cat(
            [call for batch in callback.calibration.sensitivities["0"].batches[3 * i : 3 * i + 3] for call in batch]
        )
        for i in range(2)
    )
    assert torch.allclose(second, 4 * first)


def test_limits_and_budgets_of_blocks_go_together(llama: Any, batches: Batches, validate: Validate) -> None:
    from mpfx.allocate import OptimalConfig, WidthLimit

    config = CompressionConfig(
        bits_per_weight=4,
        block_bits={"model.layers.0": 6},
        optimal=OptimalConfig(limits=(WidthLimit(pattern="model.layers.2.*", most=3),)),
    )
    callback = ModelCompression(config, module="model")
    validate(CausalLM(llama), batches, callback)
    bits = {group.plan.name: group.plan for group in callback.solved}
    assert all(int(plan.bits.max()) <= 3 for name, plan in bits.items() if name.startswith("model.layers.2"))
    first = [plan for name, plan in bits.items() if name.startswith("model.layers.0")]
    size = 8 * sum(plan.stored_bytes() for plan in first) / sum(plan.numel for plan in first)
    assert 5 < size <= 6
