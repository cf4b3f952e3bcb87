"""A quiet Trainer that only validates: no logger, no checkpoints, no folders."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from lightning.fabric.utilities import rank_zero
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from mpfx.lm.sharing import EachOnce, leave_out_of_sync

_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.distributed",
)
_EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # windows are slices of one tensor: workers would only slow it down
    "GPU available but not used.*",  # the accelerator was chosen
    "TPU available but not used.*",
    ".*LeafSpec.* is deprecated.*",  # Lightning 2.6's own call into PyTorch >= 2.13
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Drop Lightning's banners and its warnings about choices made on purpose, inside the block only."""

    def above_info(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(above_info)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(above_info)


def is_first_process() -> bool:
    """Whether this is the only process, or of several the one that prints and writes."""
    return getattr(rank_zero.rank_zero_only, "rank", 0) == 0


def make_trainer(
    accelerator: str = "auto",
    devices: int | Sequence[int] | Literal["auto"] = "auto",
    precision: Any = "32-true",
    callbacks: Iterable[Callback] = (),
    progress: bool = True,
    nodes: int = 1,
) -> Trainer:
    """Return a Trainer for validation loops that writes nothing to disk and prints only its progress bar.

    Args:
        accelerator: Lightning's name of the device kind: ``"auto"``, ``"cpu"``, ``"gpu"``, ...
        devices: How many devices, which ones, or all of them.
        precision: Lightning's name of the compute precision, e.g. ``"32-true"`` or ``"bf16-mixed"``.
        callbacks: Callbacks to attach, in order.
        progress: Whether to show a progress bar.
        nodes: How many machines, each with as many devices.
    """
    with quiet_lightning():
        return Trainer(
            accelerator=accelerator,
            devices=devices if isinstance(devices, (int, str)) else list(devices),
            num_nodes=nodes,
            precision=precision,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
            num_sanity_val_steps=0,
        )


class _Nothing(LightningModule):
    """Runs without doing anything."""

    def validation_step(self, batch: Any, index: int) -> None:
        """Do nothing."""


def start_processes(trainer: Trainer) -> None:
    """Start the processes of Trainers like this one, for what they share before, or without, a loop over data."""
    nothing: Any = range(trainer.world_size)
    with quiet_lightning():
        trainer.validate(_Nothing(), dataloaders=DataLoader(nothing, sampler=EachOnce(nothing)), verbose=False)


def evaluate(trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> dict[str, float]:
    """Run one validation loop.

    Args:
        trainer: For example :func:`make_trainer`'s.
        module: A module that logs ``perplexity`` and ``loss``, such as :class:`mpfx.lm.CausalLM`.
        loader: Its batches, such as ``TextDataModule.val_dataloader()``.

    Returns:
        ``{"perplexity": ..., "loss": ...}``, the loss in nats per token.

    Raises:
        ValueError: If nothing was scored: the loader has no batches or the module logs other names.
    """
    leave_out_of_sync(module)
    with quiet_lightning():
        results = trainer.validate(module, dataloaders=loader, verbose=False)
    metrics = results[0] if results else {}
    if not {"perplexity", "loss"} <= metrics.keys():
        raise ValueError(
            "Expected the validation loop to log `perplexity` and `loss`, but it logged "
            f"{sorted(metrics) or 'nothing'}. Check that the loader has batches and that the module logs both."
        )
    return {name: float(metrics[name]) for name in ("perplexity", "loss")}
