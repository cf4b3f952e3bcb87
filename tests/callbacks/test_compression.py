"""The callback under real Trainers."""

import copy
import sys
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

import mpfx.callbacks
from mpfx.callbacks import ModelCompression
from mpfx.lm import CausalLM, losses_of, make_trainer, quiet_lightning
from mpfx.nn import MixedPrecisionLinear
from mpfx.passes import CompressionConfig, PassError
from mpfx.stats import MomentAccumulator, Moments

Batches = list[dict[str, Tensor]]
Validate = Callable[..., None]


def packed(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, MixedPrecisionLinear)]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


class Scored(pl.LightningModule):
    """A user's own module: its forward is what validation calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.seen.append(self(batch).detach())


def test_the_package_is_known_by_one_name() -> None:
    assert mpfx.callbacks.ModelCompression.__module__ == "mpfx.callbacks.compression"
    assert "callbacks" not in sys.modules


@pytest.mark.parametrize("allocation", ["fixed", "quantile"])
def test_one_validation_loop_compresses(llama: Any, batches: Batches, validate: Validate, allocation: Any) -> None:
    dense = copy.deepcopy(llama)
    module = CausalLM(llama)
    callback = ModelCompression(CompressionConfig(code_bits=4, allocation=allocation), module="model")
    validate(module, batches, callback)
    assert callback.done
    assert len(packed(llama)) == 21
    assert "lm_head" not in packed(llama)
    assert set(callback.seconds) == {"trace", "observe", "allocate", "scale", "solve", "pack", "fold"}
    assert all(seconds >= 0 for seconds in callback.seconds.values())
    assert hooks(llama) == 0
    assert module.model is llama
    before, after = dense(**batches[0]).logits, llama(**batches[0]).logits
    assert 0 < float((before - after).norm().detach() / before.norm().detach()) < 0.8
    state = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    validate(module, batches, callback)  # a second loop evaluates and changes nothing
    assert all(torch.equal(tensor, state[name]) for name, tensor in llama.state_dict().items())


def test_equals_the_passes_called_by_hand(llama: Any, batches: Batches, validate: Validate) -> None:
    from mpfx.graph import bind_inputs, trace
    from mpfx.passes import Allocate, FoldPermutations, Pack, PruneAndQuantize, Scope, SolveConfig, analysis, run_passes

    config, twin = CompressionConfig(code_bits=3, sparsity=0.25, allocation="fixed"), copy.deepcopy(llama)
    validate(CausalLM(llama), batches, ModelCompression(config, module="model"))
    gm = trace(twin, (), {**batches[0], "use_cache": False})
    values = [bind_inputs(gm, (), {**batch, "use_cache": False}) for batch in batches]
    solve = PruneAndQuantize(values, SolveConfig(refine=config.refine))
    passes = [*analysis(Scope()), Allocate(config), solve, Pack(), FoldPermutations()]
    run_passes(gm, passes)
    for (name, ours), theirs in zip(llama.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_lightning_module_itself(validate: Validate) -> None:
    torch.manual_seed(0)
    module, x = Scored(), torch.randn(32, 40)
    before = module(x).detach()
    validate(module, [x, torch.randn(20, 40)], ModelCompression(CompressionConfig(code_bits=8, allocation="fixed")))
    assert packed(module) == ["net.0", "net.2", "net.4"]
    assert float((module(x) - before).norm().detach() / before.norm()) < 0.05


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision_plugins(llama: Any, batches: Batches, validate: Validate, precision: str) -> None:
    module = CausalLM(llama)
    callback = ModelCompression(CompressionConfig(code_bits=4, allocation="fixed"), module="model")
    validate(module, batches[:2], callback, precision=precision)
    assert len(packed(llama)) == 21
    validate(module, batches[:2], precision=precision)
    site = llama.model.layers[0].mlp.up_proj
    assert site.row_scales.dtype == torch.float16
    errors = [entry.relative_error for group in callback.solved for entry in group.reports()]
    assert max(errors) < 0.05


def test_known_calls_take_the_place_of_the_loop(llama: Any, batches: Batches, validate: Validate) -> None:
    """The same bytes, and the dense model does not run."""
    config = CompressionConfig(code_bits=4, allocation="fixed", fold_scales=False)
    twin, runs = copy.deepcopy(llama), []
    validate(CausalLM(llama), batches, ModelCompression(config, module="model"))
    callback = ModelCompression(config, module="model", progress=False)
    assert not callback.guided
    twin.register_forward_hook(lambda *_: runs.append(1))
    calls = ({**batch, "use_cache": False} for batch in batches)
    with quiet_lightning():
        callback.take_calls(make_trainer("cpu", progress=False), CausalLM(twin), calls)
    assert callback.done
    assert hooks(twin) == 1  # the test's own
    assert len(runs) <= 1  # tracing may run the module once
    for (name, ours), theirs in zip(llama.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_calls_that_need_a_loss_are_not_taken(llama: Any, batches: Batches) -> None:
    callback = ModelCompression(CompressionConfig(code_bits=4), module="model", progress=False)
    assert callback.guided
    with quiet_lightning(), pytest.raises(ValueError, match=r"a `loss` with guidance.*`trainer\.validate`"):
        callback.take_calls(make_trainer("cpu", progress=False), CausalLM(llama), batches)
    assert hooks(llama) == 0


def test_a_loss_of_known_calls_guides_as_that_of_the_loop(llama: Any, batches: Batches, validate: Validate) -> None:
    config, twin = CompressionConfig(bits_per_weight=5), copy.deepcopy(llama)
    looped = ModelCompression(config, module="model")
    validate(CausalLM(llama), batches, looped)
    callback = ModelCompression(config, module="model", progress=False)
    assert callback.guided
    calls = ({**batch, "use_cache": False} for batch in batches)
    with quiet_lightning():
        callback.take_calls(make_trainer("cpu", progress=False), CausalLM(twin), calls, losses_of(batches))
    assert hooks(twin) == 0
    assert callback.seconds["sense"] > 0
    for ours, theirs in zip(callback.solved, looped.solved, strict=True):
        assert torch.equal(ours.plan.bits, theirs.plan.bits), ours.plan.name
        for path in ours.weights:
            assert torch.allclose(
                ours.dense(path), theirs.dense(path), atol=1e-3 * float(theirs.dense(path).abs().max())
            )


def test_known_calls_leave_no_hook_behind_when_they_fail(llama: Any, batches: Batches) -> None:
    config = CompressionConfig(code_bits=4, allocation="fixed", fold_scales=False)
    callback = ModelCompression(config, module="model", progress=False)
    calls = [batches[0], {"input_ids": torch.full((1, 8), 10**6)}]
    with quiet_lightning(), pytest.raises(PassError, match="out of range"):
        callback.take_calls(make_trainer("cpu", progress=False), CausalLM(llama), calls)
    assert hooks(llama) == 0
    assert not callback.done


def test_results_are_the_same_every_time(llama: Any, batches: Batches, validate: Validate) -> None:
    twin = copy.deepcopy(llama)
    for model in (llama, twin):
        torch.manual_seed(len(packed(model)))  # whatever the global generator holds
        config = CompressionConfig(code_bits=4, sparsity=0.5, allocation="quantile")
        validate(CausalLM(model), batches, ModelCompression(config, module="model"))
    for (name, one), two in zip(llama.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_weights_can_be_trained_on_afterwards(llama: Any, batches: Batches, validate: Validate) -> None:
    """Nothing that is left in the model is an inference tensor."""
    config = CompressionConfig(code_bits=4, allocation="fixed")
    validate(CausalLM(llama), batches, ModelCompression(config, module="model"))
    assert not any(t.is_inference() for t in (*llama.parameters(), *llama.buffers()))
    llama(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    assert llama.model.embed_tokens.weight.grad is not None


class Fails(pl.Callback):
    """Raises at a batch."""

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        raise KeyError("user's own mistake")


def test_no_hook_is_left_after_an_exception(llama: Any, batches: Batches, validate: Validate) -> None:
    state = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    callback = ModelCompression(CompressionConfig(code_bits=4, allocation="budget"), module="model")
    with pytest.raises(KeyError, match="own mistake"):
        validate(CausalLM(llama), batches, callback, Fails())
    assert hooks(llama) == 0
    assert not callback.done
    assert all(torch.equal(tensor, state[name]) for name, tensor in llama.state_dict().items())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", r"`module` to be the path of a submodule of CausalLM but got 'nothing'; .*'model'"),
        ("", "was not called during validation"),
        ("model.lm_head", "is itself one Linear: name the module that holds it"),
    ],
)
def test_a_wrong_target_is_named(llama: Any, batches: Batches, validate: Validate, target: str, message: str) -> None:
    callback = ModelCompression(CompressionConfig(code_bits=4, allocation="fixed"), module=target)
    with pytest.raises((ValueError, RuntimeError, PassError), match=message):
        validate(CausalLM(llama), batches, callback)
    assert hooks(llama) == 0


def test_an_infeasible_budget_stops_at_the_first_batch(llama: Any, batches: Batches, validate: Validate) -> None:
    steps: list[int] = []

    class Counts(CausalLM):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            steps.append(batch_idx)

    callback = ModelCompression(CompressionConfig(bits_per_weight=1.3, allocation="fixed"), module="model")
    with pytest.raises(ValueError, match="`bits_per_weight` of at least"):
        validate(Counts(llama), batches, callback)
    assert steps == []


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader`")  # Lightning's own word on it
def test_an_empty_loader_is_an_error(llama: Any, validate: Validate) -> None:
    with pytest.raises(RuntimeError, match="ran no batch"):
        validate(CausalLM(llama), [], ModelCompression(CompressionConfig(code_bits=4), module="model"))


def test_no_hessian_outlives_the_allocation(llama: Any, batches: Batches, validate: Validate) -> None:
    from mpfx.passes import solve as room

    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    finalise, solve_group = MomentAccumulator.finalise, room.solve_group

    def finalised(accumulator: MomentAccumulator) -> Moments:
        moments = finalise(accumulator)
        made.append(weakref.ref(moments.hessian))
        return moments

    def spy(*args: Any) -> Any:
        alive.append(sum(hessian() is not None for hessian in made))
        return solve_group(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MomentAccumulator, "finalise", finalised)
        patch.setattr(room, "solve_group", spy)
        config = CompressionConfig(code_bits=4, allocation="quantile")
        validate(CausalLM(llama), batches, ModelCompression(config, module="model"))
    assert len(made) == 24  # of the dense model, then of the compressed one
    assert alive == [1] * 12


def test_validation_inside_of_fit_is_left_alone() -> None:
    class Trained(Scored):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss: Tensor = self(batch).square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback, module = ModelCompression(CompressionConfig(code_bits=4, allocation="fixed")), Trained()
    data: Any = torch.utils.data.DataLoader([torch.randn(8, 40)] * 2, batch_size=None)  # type: ignore[arg-type]
    with quiet_lightning():
        trainer = make_trainer("cpu", 1, callbacks=[callback], progress=False)
        trainer.fit_loop.max_epochs = 1
        trainer.fit(module, data, data)
    assert packed(module) == []
    assert not callback.done


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_on_a_gpu(llama: Any, batches: Batches, validate: Validate, precision: str, sparsity: float | None) -> None:
    twin, dense = copy.deepcopy(llama), copy.deepcopy(llama)
    config = CompressionConfig(code_bits=4, allocation="quantile", sparsity=sparsity)
    on_gpu, on_cpu = (ModelCompression(config, module="model") for _ in range(2))
    validate(CausalLM(llama), batches, on_gpu, accelerator="gpu", precision=precision)
    validate(CausalLM(twin), batches, on_cpu)
    before = dense(**batches[0]).logits.detach()
    ours, theirs = (float((m(**batches[0]).logits.detach() - before).norm()) for m in (llama.cpu(), twin))
    assert ours == pytest.approx(theirs, rel=0.15)
    for one, two in zip(on_gpu.solved, on_cpu.solved, strict=True):
        assert one.plan.layout.widths == two.plan.layout.widths  # quantile: the same number of segments a tier
        for path, error in one.relative_error.items():
            assert error == pytest.approx(two.relative_error[path], rel=0.3)


def test_an_interrupt_while_solving_leaves_the_model_as_it_was(
    llama: Any, batches: Batches, validate: Validate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpfx.passes import solve as room

    state = {name: value.clone() for name, value in llama.state_dict().items()}
    original, calls = room.solve_group, iter(range(100))

    def stops(*args: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(room, "solve_group", stops)
    callback = ModelCompression(CompressionConfig(code_bits=4), module="model")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        validate(CausalLM(llama), batches, callback)
    assert not callback.done
    assert packed(llama) == []
    assert all(torch.equal(value, state[name]) for name, value in llama.state_dict().items())


class Policy(pl.LightningModule):
    """Two heads on one trunk, of which validation runs one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Linear(40, 64), nn.LayerNorm(64))
        self.actor, self.critic = nn.Sequential(trunk, nn.Linear(64, 8)), nn.Sequential(trunk, nn.Linear(64, 3))

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.actor(batch * torch.linspace(0.1, 3, 40))


def test_what_others_read_keeps_its_channels(validate: Validate) -> None:
    module = Policy().eval()
    with torch.no_grad():
        module.get_parameter("actor.0.1.weight").mul_(torch.linspace(0.1, 8, 64))  # scales would help
    x = torch.randn(64, 40)
    before = module.critic(x).detach()
    validate(
        module, [x, x.flip(0)], ModelCompression(CompressionConfig(code_bits=8, allocation="fixed"), module="actor")
    )
    after = module.critic(x).detach()
    assert float((after - before).norm() / before.norm()) < 0.02
