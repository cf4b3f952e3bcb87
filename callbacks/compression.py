"""Compress a model at the end of a validation loop over calibration data."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from mpfx.callbacks.calibration import CallRecorder
from mpfx.graph import InputGroup, bind_inputs, first_samples
from mpfx.passes import (
    Allocate,
    CompressionConfig,
    FoldPermutations,
    FoldScales,
    Pack,
    Pass,
    PruneAndQuantize,
    SolvedGroup,
    located,
    located_graph,
    run_passes,
    solved_groups,
)

_STAGES = {
    "FoldScales": "scale",
    "Allocate": "allocate",
    "PruneAndQuantize": "solve",
    "Pack": "pack",
    "FoldPermutations": "fold",
}
"""Names of the passes' times in reports."""


class ModelCompression(Callback):
    """Turn one ``trainer.validate(module, calibration_data)`` into a compressed model.

    While the loop runs, the callback records the real calls of the target module, traces it at the first one, and
    gathers the statistics of every input group. When the loop ends it allocates bits, solves block by block and
    installs the packed modules in the user's own model; the next ``validate`` evaluates the compressed one. Loops
    after that are left alone.

    Args:
        config: what to do.
        module: path of the submodule to compress; "" for the LightningModule itself.
        progress: show a bar while solving.

    Example:
        >>> from mpfx.callbacks import ModelCompression
        >>> from mpfx.passes import CompressionConfig
        >>> compress = ModelCompression(CompressionConfig(code_bits=4, sparsity=0.5), module="model")
        >>> compress.done
        False
    """

    def __init__(self, config: CompressionConfig, *, module: str = "", progress: bool = True) -> None:
        self.config, self.module, self.progress = config, module, progress
        self.seconds: dict[str, float] = {}
        self.solved: tuple[SolvedGroup, ...] = ()
        self.graph_module: fx.GraphModule | None = None
        self._recorder: CallRecorder | None = None
        self._way_back = ExitStack()  # of the user's own passes
        self._started = 0.0

    @property
    def done(self) -> bool:
        """Whether the model is compressed."""
        return bool(self.solved)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.done or trainer.state.fn != TrainerFn.VALIDATING:
            return
        if trainer.world_size > 1:
            raise ValueError(
                f"Expected one process to calibrate in but the Trainer runs {trainer.world_size}: use `devices=1`."
            )
        self._recorder = CallRecorder(self._target(pl_module), partial(self._prepare, pl_module))
        self._recorder.open()
        self._started = time.perf_counter()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._recorder is None:
            return
        recorder = self._recorder
        recorder.close()
        self.seconds["observe"] = time.perf_counter() - self._started - self.seconds.get("trace", 0.0)
        if recorder.graph_module is None:
            raise RuntimeError(
                f"module {self.module or type(pl_module).__name__!r} was not called during validation, so there is "
                "nothing to trace: name the submodule that `validation_step` calls, as in "
                "ModelCompression(config, module='model')."
            )
        try:
            with torch.inference_mode(False), torch.no_grad(), self._bar(trainer) as bar:
                self._compress(recorder, trainer, pl_module.device, bar)
        except BaseException:
            self._drop()
            raise
        self._way_back.pop_all()  # from here on the changes stay, and the dense weights may go
        self._recorder = None

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._drop()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._drop()
        if not self.done and trainer.state.fn == TrainerFn.VALIDATING:
            raise RuntimeError("the validation loop ran no batch, so nothing was compressed: give it calibration data.")

    def _drop(self) -> None:
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

    def _prepare(
        self, whole: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[fx.GraphModule, list[InputGroup]]:
        assert self._recorder is not None
        started = time.perf_counter()
        gm = located_graph(self._recorder.module, args, kwargs, self.config, whole)
        self.seconds["trace"] = time.perf_counter() - started
        if self.config.passes:
            sample = first_samples(gm, bind_inputs(gm, args, kwargs))
            gm = run_passes(gm, self.config.passes, [sample], seconds=self.seconds, way_back=self._way_back)
        return gm, located(gm) if self.config.measured else []

    def _compress(self, recorder: CallRecorder, trainer: pl.Trainer, device: torch.device, bar: Progress) -> None:
        assert recorder.graph_module is not None
        task = bar.add_task("solve", total=1.0, name="")
        solve = PruneAndQuantize(
            recorder.calls,
            damping=self.config.damping,
            strict=self.config.strict,
            device=device,
            context=trainer.precision_plugin.forward_context,
            on_block=lambda name, share: bar.update(task, completed=share, name=name),
        )
        sample = first_samples(recorder.graph_module, recorder.calls[0])
        sample = pytree.tree_map_only(Tensor, lambda t: t.to(device), sample)
        seconds: dict[str, float] = {}
        gm = run_passes(
            recorder.graph_module, self._steps(recorder, solve), [sample], seconds=seconds, context=solve.context
        )
        self.seconds.update({_STAGES.get(name, name): value for name, value in seconds.items()})
        self.graph_module, self.solved = gm, solved_groups(gm)

    def _steps(self, recorder: CallRecorder, solve: PruneAndQuantize) -> Iterator[Pass]:
        moments = recorder.take_moments()
        yield Allocate(self.config, moments)
        if self.config.scaled:
            yield FoldScales(moments)
        moments.clear()  # the dense model's Hessians are large, and solving makes its own, block by block
        yield solve
        yield Pack()
        yield FoldPermutations()

    def _bar(self, trainer: pl.Trainer) -> Progress:
        shown = self.progress and trainer.progress_bar_callback is not None and trainer.is_global_zero
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        return Progress(
            *columns,
            TimeElapsedColumn(),
            TextColumn("{task.fields[name]}"),
            console=Console(stderr=True),
            disable=not shown,
        )
