"""Passes of the user's own: in a list, in a config, and when they fail."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mpfx import Pass, PassResult, run_passes, trace
from mpfx.callbacks import ModelCompression
from mpfx.cli import parser
from mpfx.graph import bind_inputs, sites, traced_module
from mpfx.lm import CausalLM
from mpfx.passes import CompressionConfig, PassError


@dataclass(frozen=True)
class Rescales(Pass):
    """Multiplies all weights, in place."""

    factor: float = 1.0

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        self._multiply(gm, self.factor)
        return PassResult(gm, modified=True, undo=lambda: self._multiply(gm, 1 / self.factor))

    def _multiply(self, gm: fx.GraphModule, factor: float) -> None:
        with torch.no_grad():
            for site in sites(gm):
                site.weight(traced_module(gm)).mul_(factor)


class PromisesMore(Rescales):
    """Says that it changes nothing."""

    preserves_function = True


@dataclass(frozen=True)
class Fails(Pass):
    """Raises where it is told to."""

    where: str = "call"

    def requires(self, gm: fx.GraphModule) -> None:
        self._step("requires")

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        self._step("call")
        return PassResult(gm, modified=False)

    def ensures(self, gm: fx.GraphModule) -> None:
        self._step("ensures")

    def _step(self, name: str) -> None:
        if name == self.where:
            raise ValueError(f"no {name} today")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


def traced(model: nn.Module) -> tuple[fx.GraphModule, list[dict[str, Any]]]:
    x = torch.randn(6, 8)
    gm = trace(model, (x,))
    return gm, [bind_inputs(gm, (x,))]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_promise_to_preserve_the_function_is_checked(model: nn.Module) -> None:
    gm, inputs = traced(model)
    before = state(model)
    run_passes(gm, [PromisesMore(1.0)], inputs)
    with pytest.raises(PassError, match=r"PromisesMore failed: output 0 of the model changed by 1\.\d+ of its largest"):
        run_passes(gm, [PromisesMore(2.0)], inputs)
    assert same(model, before)
    run_passes(gm, [PromisesMore(2.0)])  # without inputs there is nothing to compare
    assert not same(model, before)


@pytest.mark.parametrize("where", ["requires", "call", "ensures"])
def test_a_failure_puts_back_what_passes_before_have_changed(model: nn.Module, where: str) -> None:
    gm, inputs = traced(model)
    before = state(model)
    with pytest.raises(PassError, match=rf"Fails \(after Rescales, Rescales\) failed: no {where} today"):
        run_passes(gm, [Rescales(2.0), Rescales(4.0), Fails(where)], inputs)
    assert same(model, before)


def test_the_way_back_is_kept_only_where_asked(model: nn.Module) -> None:
    gm, inputs = traced(model)
    before, way_back = state(model), ExitStack()
    run_passes(gm, [Rescales(2.0), Rescales(8.0)], inputs, way_back=way_back)
    assert not same(model, before)
    way_back.close()
    assert same(model, before)
    run_passes(gm, [Rescales(2.0)], inputs)
    doubled = state(model)
    with pytest.raises(PassError):  # an earlier call is none of a later one's business
        run_passes(gm, [Fails()], inputs)
    assert same(model, doubled)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interrupts_and_failing_iterators_put_everything_back(model: nn.Module, error: type[BaseException]) -> None:
    gm, inputs = traced(model)
    before = state(model)

    def steps() -> Iterator[Pass]:
        yield Rescales(2.0)
        raise error

    with pytest.raises(PassError if error is ValueError else error):
        run_passes(gm, steps(), inputs)
    assert same(model, before)


def test_an_undo_that_fails_hides_neither_cause_nor_the_others(model: nn.Module) -> None:
    class Stuck(Rescales):
        def __call__(self, gm: fx.GraphModule) -> PassResult:
            def undo() -> None:
                raise RuntimeError("stuck")

            return PassResult(gm, modified=False, undo=undo)

    gm, inputs = traced(model)
    before = state(model)
    with pytest.raises(PassError, match="no call today") as caught:
        run_passes(gm, [Rescales(2.0), Stuck(), Fails()], inputs)
    assert same(model, before)
    assert "stuck" in str(getattr(caught.value.__cause__, "__notes__", None))


def test_a_pass_has_to_return_a_result(model: nn.Module) -> None:
    class Silent(Fails):
        def __call__(self, gm: fx.GraphModule) -> PassResult:
            return None  # type: ignore[return-value]

    with pytest.raises(PassError, match="Silent failed: expected it to return a PassResult but got NoneType"):
        run_passes(traced(model)[0], [Silent("never")])


def test_models_that_write_to_their_inputs_or_draw_numbers_can_be_compared() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x.mul_(2)) + torch.randn_like(x)  # type: ignore[no-any-return]

    x = torch.randn(4, 8)
    gm = trace(Odd(), (x.clone(),))
    inputs = [bind_inputs(gm, (x,))]
    run_passes(gm, [PromisesMore(1.0)], inputs)
    assert torch.equal(inputs[0]["x"], x)


def test_in_the_callback(llama: Any, batches: Any, validate: Any) -> None:
    before = state(llama)
    config = CompressionConfig(code_bits=4, allocation="fixed", passes=(Rescales(2.0), Fails()))
    with pytest.raises(PassError, match="no call today"):
        validate(CausalLM(llama), batches, ModelCompression(config, module="model"))
    assert same(llama, before)

    class BreakError(Exception):
        pass

    class Stops(CausalLM):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            raise BreakError

    config = CompressionConfig(code_bits=4, allocation="fixed", passes=(Rescales(2.0),))
    with pytest.raises(BreakError):
        validate(Stops(llama), batches, ModelCompression(config, module="model"))
    assert same(llama, before)
    callback = ModelCompression(config, module="model")
    validate(CausalLM(llama), batches, callback)
    assert callback.done
    assert "Rescales" in callback.seconds


def test_from_a_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "house_passes.py").write_text(
        "from dataclasses import dataclass\n"
        "from mpfx import Pass, PassResult\n\n"
        "@dataclass(frozen=True)\n"
        "class Polishes(Pass):\n"
        "    strength: float = 1.0\n\n"
        "    def __call__(self, gm):\n"
        "        return PassResult(gm, modified=False)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = {"code_bits": 4, "passes": [{"class_path": "house_passes.Polishes", "init_args": {"strength": 3}}]}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    top = parser()
    found = top.instantiate(top.parse_args(["compress", "--config", str(tmp_path / "run.yaml")])).compress
    assert [(type(step).__name__, step.strength) for step in found.passes] == [("Polishes", 3.0)]
    from mpfx.run import _plain

    assert _plain(found.passes) == [{"class_path": "house_passes.Polishes", "init_args": {"strength": 3.0}}]
    config["passes"] = [{"class_path": "house_passes.Nothing"}]
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        top.parse_args(["compress", "--config", str(tmp_path / "run.yaml")])
    assert "house_passes" in capsys.readouterr().err
