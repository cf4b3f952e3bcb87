"""Compress a model at the end of a validation loop over calibration data."""

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import fx
from typing_extensions import override

from mpfx.callbacks.calibration import Loss, ModelCalibration
from mpfx.lm import leave_out_of_sync
from mpfx.passes import Calibration, CompressionConfig, SolvedGroup, compress_calibrated


class ModelCompression(ModelCalibration):
    """Turn one ``trainer.validate(module, calibration_data)`` into a compressed model.

    While the loop runs, the callback records the real calls of the target module and traces it at the first one (see
    :class:`ModelCalibration`). When the loop ends it observes what the Linears read, allocates bits, solves block by
    block and installs the packed modules in the user's own model; the next ``validate`` evaluates the
    compressed one. Loops after that are left alone.

    Args:
        config: what to do.
        module: path of the submodule to compress; "" for the LightningModule itself.
        loss: what is differentiated with guidance; None: what `validation_step` returns.
        progress: show a bar while solving.

    Example:
        >>> from mpfx.callbacks import ModelCompression
        >>> from mpfx.passes import CompressionConfig
        >>> compress = ModelCompression(CompressionConfig(code_bits=4, sparsity=0.5), module="model")
        >>> compress.done
        False
    """

    def __init__(
        self, config: CompressionConfig, *, module: str = "", loss: Loss | None = None, progress: bool = True
    ) -> None:
        super().__init__(config, module=module, loss=loss)
        self.config, self.progress = config, progress
        self.solved: tuple[SolvedGroup, ...] = ()
        self.graph_module: fx.GraphModule | None = None

    @property
    @override
    def done(self) -> bool:
        """Whether the model is compressed."""
        return bool(self.solved)

    @override
    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, calibration: Calibration) -> None:
        with torch.inference_mode(False), self._bar(trainer) as bar:
            task = bar.add_task("solve", total=1.0, name="")
            compressed = compress_calibrated(
                calibration,
                self.config,
                runner=self._runner,
                on_block=lambda name, share: bar.update(task, completed=share, name=name),
            )
        self.seconds["observe"] += compressed.seconds.pop("observe", 0.0)
        self.seconds.update(compressed.seconds)
        self.graph_module, self.solved = compressed.graph_module, compressed.solved
        leave_out_of_sync(pl_module)

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
