"""The recorder without a Trainer; which Trainers' processes can share a calibration."""

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from mpfx.callbacks import CallRecorder
from mpfx.callbacks.calibration import FirstCall, check_alike, check_shares
from mpfx.graph import trace
from mpfx.lm import quiet_lightning
from mpfx.passes import Scope, analysis, dense_moments, run_passes


def prepare(module: nn.Module) -> Any:
    def at_first_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
        return run_passes(trace(module, args, kwargs), analysis(Scope()))

    return at_first_call


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 6), nn.Linear(8, 5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], -1) * scale


def test_what_recorded_calls_read_is_observed_later() -> None:
    module, inputs = Net(), [torch.randn(n, 8) for n in (4, 7, 3)]
    recorder = CallRecorder(module, prepare(module))
    recorder.open()
    with torch.inference_mode():
        for x in inputs:
            module(x, scale=2.0)
    recorder.close()
    module(torch.randn(2, 8))  # not recorded any more
    x = torch.cat(inputs)
    assert recorder.graph_module is not None
    with torch.no_grad():
        (moments,) = dict(dense_moments(recorder.graph_module, recorder.calls)).values()
    assert moments.tokens == 14
    torch.testing.assert_close(moments.hessian, 2 / 14 * x.t() @ x)
    assert [call["x"].shape[0] for call in recorder.calls] == [4, 7, 3]
    assert all(torch.equal(call["x"], given) for call, given in zip(recorder.calls, inputs, strict=True))
    assert not any(call["x"].is_inference() for call in recorder.calls)
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_what_the_model_does_to_its_inputs_later_does_not_reach_the_record() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.one(x.mul_(2))
            return out

    module, x = InPlace(), torch.ones(3, 8)
    recorder = CallRecorder(module, prepare(module))
    recorder.open()
    with torch.no_grad():
        module(x)
    recorder.close()
    assert torch.equal(recorder.calls[0]["x"], torch.ones(3, 8))


def test_calls_are_recorded_without_being_made() -> None:
    module, inputs, runs = Net(), [torch.randn(n, 8) for n in (4, 7, 3)], []
    recorder = CallRecorder(module, prepare(module))
    recorder.open()
    module.register_forward_hook(lambda *_: runs.append(1))
    module(inputs[0])
    before = len(runs)
    recorder.record((inputs[1],), {})
    assert len(runs) == before
    module(inputs[2])
    recorder.close()
    assert [len(call["x"]) for call in recorder.calls] == [4, 7, 3]


def test_a_record_alone_leaves_no_hook() -> None:
    module, x = Net(), torch.randn(3, 8)
    recorder = CallRecorder(module, prepare(module))
    recorder.record((x,), {"scale": 3.0})
    recorder.close()
    assert torch.equal(recorder.calls[0]["x"], x)
    assert recorder.graph_module is not None
    assert not any(m._forward_pre_hooks for m in module.modules())


def trainer(**options: Any) -> pl.Trainer:
    with quiet_lightning():
        return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)


@pytest.mark.parametrize("devices", [1, 2])
def test_processes_that_end_with_the_loop_are_refused(devices: int) -> None:
    with pytest.raises(ValueError, match=r"spawns or forks them.*`strategy='ddp'`"):
        check_shares(trainer(strategy="ddp_spawn", devices=devices))
    check_shares(trainer(strategy="ddp", devices=devices))


def test_processes_that_hold_parts_of_the_model_are_refused() -> None:
    strategy = SimpleNamespace(launcher=None)
    with pytest.raises(ValueError, match=r"strategy ddp.*got SimpleNamespace with 2 processes"):
        check_shares(SimpleNamespace(strategy=strategy, world_size=2))  # type: ignore[arg-type]


@pytest.mark.parametrize("by_batches", [False, True])
def test_samples_that_come_twice_are_refused_wherever_the_sampler_is(by_batches: bool) -> None:
    data: Any = list(range(7))
    sampler: Any = DistributedSampler(data, num_replicas=2, rank=0)
    loader = (
        DataLoader(data, batch_sampler=BatchSampler(sampler, 2, drop_last=False))
        if by_batches
        else DataLoader(data, sampler=sampler)
    )
    strategy = trainer(strategy="ddp", devices=2).strategy
    with pytest.raises(ValueError, match=r"2 processes can share evenly but got 7, of which the sampler repeats 1"):
        check_shares(SimpleNamespace(strategy=strategy, world_size=2, val_dataloaders=[loader]))  # type: ignore[arg-type]


def first(digest: str, groups: list[str]) -> FirstCall:
    return FirstCall(digest, 4, groups)


def test_processes_have_to_run_one_model_on_batches_of_their_own() -> None:
    check_alike([first("a", ["g"]), first("b", ["g"])])
    with pytest.raises(ValueError, match="but 1 got the same first one as 0"):
        check_alike([first("a", ["g"]), first("a", ["g"])])
    with pytest.raises(ValueError, match="process 1 found the input groups"):
        check_alike([first("a", ["g"]), first("b", ["h"])])
