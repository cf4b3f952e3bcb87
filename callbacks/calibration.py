"""Watch a module during a validation loop: its real calls, and what the outputs of its Linears mean to the loss."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.data.distributed import DistributedSampler
from torchmetrics import Metric
from typing_extensions import override

from mpfx.graph import bind_inputs, first_samples
from mpfx.passes import (
    Calibration,
    CompressionConfig,
    Ranks,
    Runner,
    Sensed,
    Sensing,
    check_feasible,
    located,
    located_graph,
    most_bytes,
    run_passes,
    sense_by_blocks,
    tokens_of,
)

Loss = Callable[[pl.LightningModule, Any], Tensor]
"""From a module and a batch to a scalar loss that can be differentiated: the mean over the batch's samples, or over its
tokens where the compressed module reads token ids."""

_LOSS_SCALE = 2.0**10  # keeps the gradients of a mean loss within float16's range


class CallRecorder:
    """Record the calls of a module.

    Needs no Trainer: open it, run the module on calibration data, close it. No hook is left behind.

    Args:
        module: whose calls are recorded.
        prepare: called once, with the arguments of the first call, before that call runs. Returns the traced module.
    """

    def __init__(
        self,
        module: nn.Module,
        prepare: Callable[[tuple[Any, ...], dict[str, Any]], fx.GraphModule],
    ) -> None:
        self.module = module
        self.graph_module: fx.GraphModule | None = None
        self.calls: list[dict[str, Any]] = []
        self._prepare, self._paused = prepare, False
        self._hooks = ExitStack()

    def open(self) -> None:
        """Start to listen."""
        handle = self.module.register_forward_pre_hook(self._listen, with_kwargs=True)
        self._hooks.callback(handle.remove)

    def close(self) -> None:
        """Stop to listen; what was recorded stays."""
        self._hooks.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, calls are not recorded."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _listen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._paused:
            self.record(args, kwargs)

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call with these arguments, whether it is made or not."""
        # A validation loop runs in inference mode; what is recorded has to live on outside of it.
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
            if self.graph_module is None:
                self.close()  # tracing calls the module: it must not record itself
                self.graph_module = self._prepare(args, kwargs)
                self.open()
            values = bind_inputs(self.graph_module, args, kwargs)
            self.calls.append(pytree.tree_map_only(Tensor, lambda t: t.to("cpu"), values))


class ModelCalibration(Callback):
    """Gather in one ``trainer.validate(module, calibration_data)`` all that a compression needs.

    While the loop runs, the callback records the real calls of the target module and traces it at the first one. With
    guidance, it runs every batch once more, forward and backward, for the sensitivity of the loss; the loop's own
    results are undisturbed. What the Linears read is observed after the loop, block by block.

    Under a Trainer with several devices (strategy ddp) every process gathers from its own batches, and the sums of all
    count every sample once: samples that a sampler repeats, to give all processes as many, are refused.

    Args:
        configs: what will be done: one or more, alike in scope, passes, strictness, `offload` and `allocation_tokens`.
        module: path of the submodule to compress; "" for the LightningModule itself.
        loss: what is differentiated: mean loss of a batch, a scalar; None: what the module's `validation_step` returns
            (itself, or under "loss"). A step that does more than that, such as collecting results, needs it: the step
            runs twice.

    Attributes:
        calibration: what was gathered, once the loop has ended.
        seconds: by stage.
    """

    def __init__(self, *configs: CompressionConfig, module: str = "", loss: Loss | None = None) -> None:
        for name in ("scope", "passes", "strict", "offload", "allocation_tokens"):
            if any(getattr(config, name) != getattr(configs[0], name) for config in configs):
                raise ValueError(f"Expected configs of one calibration to be alike in `{name}` but they differ.")
        self.configs, self.module, self.loss = configs, module, loss
        self.seconds: dict[str, float] = {}
        self.calibration: Calibration | None = None
        self._ranks = Ranks()
        self._recorder: CallRecorder | None = None
        self._sensing: Sensing | None = None
        self._first_tokens = 1
        self._random: list[Tensor] = []
        self._batch: Any = None
        self._sensed = 0
        self._runner = Runner()
        self._way_back = ExitStack()  # of the user's own passes
        self._started = 0.0

    @property
    def done(self) -> bool:
        """Whether everything is gathered."""
        return self.calibration is not None

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.done or trainer.state.fn != TrainerFn.VALIDATING:
            return
        self._begin(trainer, pl_module)

    def take_calls(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        calls: Iterable[dict[str, Any]],
        loss: Callable[[Any, int], Tensor] | None = None,
    ) -> None:
        """Take the place of a validation loop: the module runs block by block, never as a whole.

        Args:
            trainer: whose precision and device are computed in; it does not run.
            pl_module: on the device to compute on; or on the host, then its blocks move to the device one at a time.
            calls: keyword arguments of every call of the target module, where the module is; of several processes,
                which have to be started already, each has its own.
            loss: from what the target module returned (as its graph returns it) and the number of the call to a scalar
                that can be differentiated, as :data:`Loss`; needed with guidance.

        Raises:
            ValueError: if a loss is needed and not given, or cannot be differentiated.
        """
        if self.guided and loss is None:
            raise ValueError(
                "Expected a `loss` with guidance, or a config with `guidance: 0`, or run `trainer.validate` with this "
                "callback."
            )
        recorder = self._begin(trainer, pl_module)
        try:
            with self._ranks.together():
                with torch.inference_mode(), trainer.precision_plugin.forward_context():
                    for call in calls:
                        recorder.record((), call)
                gm = self._graph_module(pl_module, recorder)
                if self.guided and loss is not None:
                    self._sense(gm, recorder.calls, loss)
        except BaseException:
            self._drop()
            raise
        self._end(trainer, pl_module, recorder)

    def _sense(self, gm: fx.GraphModule, calls: list[dict[str, Any]], loss: Callable[[Any, int], Tensor]) -> None:
        assert self._sensing is not None
        started = time.perf_counter()

        def scaled(output: Any, index: int) -> Tensor:
            value = loss(output, index)
            return value * (tokens_of(calls[index]) / self._first_tokens * _LOSS_SCALE)

        with torch.inference_mode(False):
            sense_by_blocks(self._sensing, gm, calls, scaled, self._runner, self._ranks)
        self.seconds["sense"] = time.perf_counter() - started

    @property
    def guided(self) -> bool:
        """Whether a loss has to be differentiated on the calibration data."""
        return any(config.power for config in self.configs)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> CallRecorder:
        check_shares(trainer)
        self._ranks = Ranks.of(trainer.world_size, trainer.strategy.root_device)
        self._runner = runner_of(trainer, self.configs[0])
        self._recorder = CallRecorder(self._target(pl_module), partial(self._prepare, pl_module))
        self._recorder.open()
        self._started = time.perf_counter()
        return self._recorder

    @override
    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._recorder is not None:
            # The step may take its batch apart; the second run needs all of it.
            self._batch = apply_to_collection(batch, Tensor, lambda t: t)
            self._random = [torch.get_rng_state()]
            self._random += torch.cuda.get_rng_state_all() if pl_module.device.type == "cuda" else []

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._recorder is None or self._sensing is None:
            return
        with torch.inference_mode(False):
            batch = apply_to_collection(self._batch, Tensor, torch.clone)
        several = len(trainer.num_val_batches) > 1
        indices = (batch_idx, dataloader_idx) if several else (batch_idx,)
        calls = len(self._recorder.calls) - self._sensed
        if calls != 1:
            raise ValueError(
                f"Expected one call of module {self.module!r} a batch, whose tokens the loss can be traced back to, "
                f"but `validation_step` made {calls}: set `guidance: 0`."
            )
        self._sensed += 1
        started, recorded = time.perf_counter(), self._recorder.calls
        # A mean over fewer would count each of them more.
        share = tokens_of(recorded[-1]) / self._first_tokens

        def loss() -> Tensor:
            with trainer.precision_plugin.forward_context():
                value = self._loss(pl_module, batch, *indices)
            return value * (share * _LOSS_SCALE) if isinstance(value, Tensor) else value

        with self._recorder.paused(), undisturbed(pl_module), naming_batch(batch_idx):
            self._sensing.batch(loss, pl_module, lambda: replayed(self._random))
        self.seconds["sense"] = self.seconds.get("sense", 0.0) + time.perf_counter() - started

    def _loss(self, pl_module: pl.LightningModule, batch: Any, *indices: int) -> Any:
        if self.loss is not None:
            return self.loss(pl_module, batch)
        step = pl_module.validation_step(batch, *indices)
        return step.get("loss") if isinstance(step, Mapping) else step

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._recorder is not None:
            self._end(trainer, pl_module, self._recorder)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, recorder: CallRecorder) -> None:
        recorder.close()
        try:
            with self._ranks.together():
                calibration = self._gathered(pl_module, recorder)
            other = self.seconds.get("trace", 0.0) + self.seconds.get("sense", 0.0)
            self.seconds["observe"] = time.perf_counter() - self._started - other
            self._finish(trainer, pl_module, calibration)
        except BaseException:
            self._drop()
            raise
        self._way_back.pop_all()  # from here on the changes stay, and the dense weights may go
        self._recorder = None

    def _gathered(self, pl_module: pl.LightningModule, recorder: CallRecorder) -> Calibration:
        """What was recorded in this process, with what the loss feels in all."""
        gm = self._graph_module(pl_module, recorder)
        sensed = Sensed() if self._sensing is None else self._sensing.finalise(self._ranks)
        self._sensing = None
        return Calibration(gm, recorder.calls, sensed, ranks=self._ranks)

    def _graph_module(self, pl_module: pl.LightningModule, recorder: CallRecorder) -> fx.GraphModule:
        if recorder.graph_module is None:
            raise RuntimeError(
                f"module {self.module or type(pl_module).__name__!r} was not called during validation, so there is "
                "nothing to trace: name the submodule that `validation_step` calls, as in "
                "ModelCompression(config, module='model')."
            )
        return recorder.graph_module

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, calibration: Calibration) -> None:
        started = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            self.calibration = calibration.keeping(self.configs, self._runner)
        self.seconds["observe"] += time.perf_counter() - started

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._drop()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._drop()
        if not self.done and trainer.state.fn == TrainerFn.VALIDATING:
            raise RuntimeError("the validation loop ran no batch, so nothing was compressed: give it calibration data.")

    def _drop(self) -> None:
        self._sensing = self._batch = None
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
        self._way_back.close()

    def _target(self, pl_module: pl.LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError:
            names = [name for name, _ in pl_module.named_children()]
            raise ValueError(
                f"Expected `module` to be the path of a submodule of {type(pl_module).__name__} but got "
                f"{self.module!r}; its children are {names}."
            ) from None

    def _prepare(self, whole: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
        with self._ranks.together() as exchange:
            gm = self._traced(whole, args, kwargs)
            firsts = exchange(FirstCall.of(gm, bind_inputs(gm, args, kwargs)))
        check_alike(firsts)
        self._first_tokens = firsts[0].tokens
        return gm

    def _traced(self, whole: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
        assert self._recorder is not None
        started = time.perf_counter()
        config = self.configs[0]
        gm = located_graph(self._recorder.module, args, kwargs, config, whole)
        for other in self.configs[1:]:
            check_feasible(gm, other)
        self.seconds["trace"] = time.perf_counter() - started
        if config.passes:
            sample = first_samples(gm, bind_inputs(gm, args, kwargs))
            gm = run_passes(
                gm, config.passes, [sample], seconds=self.seconds, run=self._runner.whole, way_back=self._way_back
            )
        if any(c.power for c in self.configs):
            self._sensing = Sensing(gm, located(gm))
        return gm


def runner_of(trainer: pl.Trainer, config: CompressionConfig) -> Runner:
    """How the blocks of a calibrated graph run: on the Trainer's device, in its precision."""
    device = trainer.strategy.root_device
    return Runner(device, trainer.precision_plugin.forward_context, most_bytes(device, config.offload))


@dataclass(frozen=True)
class FirstCall:
    """What processes tell each other of their first calls.

    Attributes:
        digest: of the tensors in it.
        tokens: see :func:`mpfx.passes.tokens_of`.
        groups: names of the input groups.
    """

    digest: str
    tokens: int
    groups: list[str]

    @classmethod
    def of(cls, gm: fx.GraphModule, values: Mapping[str, Any]) -> "FirstCall":
        """Sum up a call."""
        hashed = hashlib.sha256()
        for tensor in (leaf for leaf in pytree.tree_leaves(dict(values)) if isinstance(leaf, Tensor)):
            hashed.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        names = [group.name for group in located(gm)]
        return cls(hashed.hexdigest(), tokens_of(values), names)


def check_alike(firsts: Sequence[FirstCall]) -> None:
    """Refuse processes that calibrate on the same batches, or on different models.

    Raises:
        ValueError: naming the processes.
    """
    for rank, call in enumerate(firsts[1:], 1):
        if call.groups != firsts[0].groups:
            raise ValueError(
                f"Expected the same model in all processes but process {rank} found the input groups {call.groups[:3]} "
                f"... and process 0 {firsts[0].groups[:3]} ..."
            )
        if call.digest == firsts[0].digest:
            raise ValueError(
                f"Expected batches of its own in every process but {rank} got the same first one as 0, so that samples "
                "would count twice: leave `use_distributed_sampler` of the Trainer on, or share out the data set."
            )


def check_shares(trainer: pl.Trainer) -> None:
    """Refuse processes whose model nobody sees or that hold parts of it only, and samplers that give samples twice.

    Raises:
        ValueError: with what to do.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            "Expected a strategy whose processes go on after the loop but got one that spawns or forks them, and the "
            "compressed model would go with them: use `strategy='ddp'`, in a script, or `devices=1` with strategy auto."
        )
    if trainer.world_size == 1:
        return
    if not isinstance(trainer.strategy, DDPStrategy):
        raise ValueError(
            f"Expected strategy ddp, where every process has the whole model, but got {type(trainer.strategy).__name__}"
            f" with {trainer.world_size} processes: use `strategy='ddp'` or `devices=1`."
        )
    loaders = pytree.tree_leaves(trainer.val_dataloaders)
    for holder in (*loaders, *(getattr(loader, "batch_sampler", None) for loader in loaders)):
        sampler = getattr(holder, "sampler", None)
        if isinstance(sampler, DistributedSampler) and not sampler.drop_last:
            samples = len(sampler.dataset)  # type: ignore[arg-type]
            if repeated := sampler.total_size - samples:
                raise ValueError(
                    f"Expected a number of samples that {trainer.world_size} processes can share evenly but got "
                    f"{samples}, of which the sampler repeats {repeated}, which would count twice: leave out "
                    f"{samples % trainer.world_size}, or give the loader `sampler=mpfx.lm.EachOnce(data, batch_size)`."
                )


@contextmanager
def naming_batch(index: int) -> Iterator[None]:
    """Say which batch failed where a validation step is run once more, and what to do about it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"batch {index} could not be run once more for the sensitivity of the loss: {found}\nHand over a function "
            "that can be, `ModelCompression(..., loss=...)`, or set `guidance: 0` to compress without the loss."
        ) from error


@contextmanager
def replayed(states: list[Tensor]) -> Iterator[None]:
    """Inside, random numbers are those that came after some state of the generators; these go on as if nothing was."""
    with torch.random.fork_rng(devices=range(len(states) - 1)):
        torch.set_rng_state(states[0])
        for device, state in enumerate(states[1:]):
            torch.cuda.set_rng_state(state, device)
        yield


@contextmanager
def undisturbed(pl_module: pl.LightningModule) -> Iterator[None]:
    """Inside, a validation step may run once more: nothing is logged, and metrics are as before afterwards."""
    metrics = [module for module in pl_module.modules() if isinstance(module, Metric)]
    attributes = [(metric, dict(metric.__dict__)) for metric in metrics]
    silent = dict.fromkeys(("log", "log_dict"), lambda *args, **kwargs: None)
    shadowed = {name: pl_module.__dict__[name] for name in silent if name in pl_module.__dict__}
    pl_module.__dict__.update(silent)
    with torch.inference_mode(False):  # states made by the loop belong to its inference mode
        for metric in metrics:
            for name in metric._defaults:
                setattr(metric, name, pytree.tree_map_only(Tensor, torch.clone, getattr(metric, name)))
    try:
        yield
    finally:
        for name in silent:
            del pl_module.__dict__[name]
        pl_module.__dict__.update(shadowed)
        for metric, before in attributes:
            metric.__dict__.clear()
            metric.__dict__.update(before)
