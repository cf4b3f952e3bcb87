"""Compressions that one process and two are to do alike; ``python -m tests.callbacks.processes FOLDER`` runs them."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from mpfx.callbacks import ModelCalibration, ModelCompression, calibration
from mpfx.lm import CausalLM, EachOnce, evaluate, losses_of, make_trainer, quiet_lightning
from mpfx.passes import Calibration, CompressionConfig, Runner, SolvedGroup, allocate, compress_calibrated, solve
from mpfx.solve import Sparsity
from tests.conftest import build_llama, token_batches
from tests.zoo import build


class Regression(pl.LightningModule):
    """A user's own module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 4))

    def validation_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        self.log("loss", loss, sync_dist=True)
        return loss


def samples(count: int = 96) -> TensorDataset:
    return TensorDataset(torch.randn(count, 64, generator=torch.Generator().manual_seed(0)))


def windows(batches: list[dict[str, Tensor]]) -> DataLoader[Any]:
    """Whole batches, dealt out."""
    data: Any = batches
    return DataLoader(data, batch_size=None, sampler=EachOnce(data))


def trainer_for(devices: int, *callbacks: pl.Callback) -> pl.Trainer:
    return make_trainer("cpu", devices, callbacks=callbacks, progress=False)


def compressed(devices: int, module: pl.LightningModule, loader: DataLoader[Any], name: str, **fields: Any) -> Any:
    callback = ModelCompression(CompressionConfig(**fields), module=name, progress=False)
    with quiet_lightning():
        trainer_for(devices, callback).validate(module, loader, verbose=False)
        after = trainer_for(devices).validate(module, loader, verbose=False)
    return {**described(callback.solved), "after": after[0]}


def described(solved: tuple[SolvedGroup, ...]) -> dict[str, Any]:
    """Plans and weights as plain data."""
    return {
        "bits": {group.plan.name: group.plan.bits for group in solved},
        "pruned": {group.plan.name: group.plan.sparsity != Sparsity() for group in solved},
        "weights": {path: group.dense(path) for group in solved for path in group.weights},
        "errors": {path: error for group in solved for path, error in group.relative_error.items()},
        "fallbacks": {group.plan.name: group.fallback or "" for group in solved},
    }


def language_model(devices: int, **fields: Any) -> Any:
    llama = build_llama(num_hidden_layers=2)
    return compressed(devices, CausalLM(llama), windows(token_batches(5)), "model", **fields)


def own_module(devices: int) -> Any:
    loader: DataLoader[Any] = DataLoader(samples(), batch_size=16)
    return compressed(devices, Regression(), loader, "net", bits_per_weight=4.5)


def experts(devices: int) -> Any:
    model, sample = build("mixtral")
    loader = windows([sample(2, 48) for _ in range(4)])
    return compressed(devices, CausalLM(model), loader, "model", bits_per_weight=5)


def known_calls(devices: int, **fields: Any) -> Any:
    """No loop runs; the processes are there from an earlier one."""
    callback = ModelCompression(CompressionConfig(**fields), module="model", progress=False)
    own = list(windows(token_batches(5)))
    calls, module = ({**batch, "use_cache": False} for batch in own), CausalLM(build_llama(num_hidden_layers=2))
    with quiet_lightning():
        callback.take_calls(trainer_for(devices), module, calls, losses_of(own))
    return {**described(callback.solved), "after": {}}


SEVERAL = CompressionConfig(bits_per_weight=4.5), CompressionConfig(bits_per_weight=5, guidance=0, correction=0)


def calibrated(devices: int) -> Calibration:
    """One calibration for several configs."""
    callback, loader = ModelCalibration(*SEVERAL, module="net"), DataLoader(samples(), batch_size=16)
    with quiet_lightning():
        trainer_for(devices, callback).validate(Regression(), loader, verbose=False)
    assert callback.calibration is not None
    return callback.calibration


def several(devices: int) -> Any:
    found: dict[str, Any] = {"after": {}}
    made = calibrated(devices)
    for index, config in enumerate(SEVERAL):
        with ExitStack() as way_back:
            result = compress_calibrated(made, config, runner=Runner(torch.device("cpu")), way_back=way_back)
        for key, part in described(result.solved).items():
            found.setdefault(key, {}).update({f"{index} {name}": value for name, value in part.items()})
    return found


def kept(devices: int) -> list[list[str]]:
    """Names of the groups whose moments, plain and guided, one process keeps."""
    made = calibrated(devices)
    return [sorted(moments or ()) for moments in (made.moments, made.guided)]


def perplexity(devices: int) -> Any:
    with quiet_lightning():
        found = evaluate(trainer_for(devices), CausalLM(build_llama(num_hidden_layers=2)), windows(token_batches(5)))
    return {"perplexity": found["perplexity"]}


CASES: dict[str, Callable[[int], Any]] = {
    "guided": lambda devices: language_model(devices, bits_per_weight=4),
    # One batch says enough, so that of several processes only one has any to observe.
    "scaled": lambda devices: known_calls(devices, bits_per_weight=4, guidance=0, correction=0, allocation_tokens=1),
    "tiers": lambda devices: known_calls(
        devices, bits_per_weight=4, allocation="budget", sparsity=0.5, allocation_tokens=384
    ),
    "own": own_module,
    "experts": experts,
    "known calls": lambda devices: known_calls(devices, code_bits=4, allocation="fixed", fold_scales=False),
    "several": several,
    "perplexity": perplexity,
}
"""What any number of processes does alike."""


def failing(devices: int) -> Iterator[tuple[str, Any]]:
    """Errors as told in this process, and whether the model is as before."""

    def attempt(module: Any, loader: DataLoader[Any], name: str, **fields: Any) -> tuple[str, bool]:
        before = copy.deepcopy(module.state_dict())
        error: BaseException | None = None
        try:
            compressed(devices, module, loader, name, **fields)
        except Exception as caught:
            error = caught
        now = module.state_dict()
        alike = now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in before)
        return f"{type(error).__name__}: {error}", alike

    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.ones(8, 64).split(4))

    class Own(Regression):
        def validation_step(self, batch: Any, index: int) -> Tensor:
            return super().validation_step(batch if isinstance(batch, list) else [batch], index)

    fields: dict[str, Any] = {"bits_per_weight": 4.5}
    yield "repeated", attempt(Regression(), DataLoader(samples(95), batch_size=16), "net", **fields)
    yield "same", attempt(Own(), DataLoader(Stream(), batch_size=None), "net", **fields)
    infeasible = {"bits_per_weight": 1.3, "allocation": "fixed"}
    yield "infeasible", attempt(Regression(), DataLoader(samples(), batch_size=16), "net", **infeasible)
    places: list[tuple[Any, str]] = [(calibration, "located_graph"), (allocate, "measure_group")]
    for room, place in (*places, (solve, "padding_masks"), (solve, "solve_group")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(room, place, failing_in_one(getattr(room, place)))
            loader = windows(token_batches(2))
            yield place, attempt(CausalLM(build_llama(num_hidden_layers=2)), loader, "model", **fields)


def failing_in_one(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that fails in process 1."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            raise ZeroDivisionError("something of its own")
        return original(*args, **kwargs)

    return broken


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {name: case(2) for name, case in CASES.items()}
    found["kept"] = kept(2)
    found["failing"] = dict(failing(2))
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
