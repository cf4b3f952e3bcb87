"""One whole run: load, measure, compress, measure again, save."""

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console

from mpfx.callbacks import ModelCompression
from mpfx.config import REPORT, RunConfig, TrainerConfig
from mpfx.graph import opaque_parts
from mpfx.hub.checkpoint import MANIFEST, load, save, tensor_bytes
from mpfx.hub.source import Source, load_model
from mpfx.lm import CausalLM, EvaluationData, TextDataModule, make_trainer
from mpfx.lm import evaluate as validate
from mpfx.lm.module import model_inputs
from mpfx.passes import LocateSites, Pass, SolvedGroup, located_graph
from mpfx.report import Report, SiteReport, peak_memory_bytes

_NO_TOKENIZER = "no usable tokenizer; save one along with mpfx.save(model, path, tokenizer=...)."


def compress(config: RunConfig) -> Report:
    """Compress a language model; write checkpoint and report to ``config.output``.

    Raises:
        ValueError: for a model, text or size that cannot be had, before anything is written.
        FileNotFoundError: likewise.
    """
    _check_output(Path(config.output))
    if (Path(config.model) / MANIFEST).is_file():
        raise ValueError(f"Expected `model` to be a dense model but {config.model!r} is compressed already.")
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    trainer = _trainer(config.trainer, config.progress)
    with _measured(seconds, "load"), _status(f"loading {config.model} and text", config.progress):
        source = load_model(config.model, trust_remote_code=config.trust_remote_code)
        data = TextDataModule(source.tokenizer, config.calibration, config.evaluation)
        _check_length(source, calibration=config.calibration.length, evaluation=config.evaluation.length)
        data.setup("validate")
        # The callback traces again, on the device and in the precision of the Trainer.
        located_graph(source.model, (), model_inputs(source.model, next(iter(data.calibration_dataloader()))), config)
    module, dense_bytes = CausalLM(source.model), tensor_bytes(source.model)
    with _measured(seconds, "evaluate"):
        dense = validate(trainer, module, data.val_dataloader())
    callback = ModelCompression(config, module="model", progress=config.progress)
    validate(_trainer(config.trainer, config.progress, callback), module, data.calibration_dataloader())
    with _measured(seconds, "evaluate"):
        compressed = validate(trainer, module, data.val_dataloader())
    with _measured(seconds, "save"), _status(f"saving to {config.output}", config.progress):
        stored = save(source.model, config.output, tokenizer=source.tokenizer)
    assert callback.graph_module is not None
    report = Report(
        model=config.model,
        perplexity={"dense": dense["perplexity"], "compressed": compressed["perplexity"]},
        **_sizes(callback.solved),
        bytes={"dense": dense_bytes, "compressed": stored},
        seconds={**seconds, **callback.seconds, "total": time.perf_counter() - started},
        peak_memory_bytes=peak_memory_bytes(trainer.strategy.root_device),
        left_dense=LocateSites(config.scope).reasons(callback.graph_module),
        notes=[*_notes(config, callback.solved), *map(str, opaque_parts(callback.graph_module))],
        config=_plain(config),
    )
    report.save(Path(config.output) / REPORT)
    return report


def evaluate(
    model: str,
    evaluation: EvaluationData,
    trainer: TrainerConfig,
    *,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure the perplexity of an mpfx checkpoint, or of any model that :func:`compress` takes.

    Returns:
        ``model``, ``perplexity``, ``loss`` (nats per token), ``tokens`` scored, ``bytes`` of the weight tensors.
    """
    with _status(f"loading {model} and text", progress):
        source = _open(model, trust_remote_code)
        _check_length(source, evaluation=evaluation.length)
        data = TextDataModule(source.tokenizer, evaluation=evaluation)
        data.setup("validate")
    result = validate(_trainer(trainer, progress), CausalLM(source.model), data.val_dataloader())
    windows, length = data.evaluation_windows.shape
    return {"model": model, **result, "tokens": windows * (length - 1), "bytes": tensor_bytes(source.model)}


def _open(model: str, trust_remote_code: bool) -> Source:
    if not (Path(model) / MANIFEST).is_file():
        return load_model(model, trust_remote_code=trust_remote_code)
    from transformers import AutoTokenizer

    loaded: Any = load(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        usable = tokenizer.vocab_size > 0  # without its files, some classes of tokenizer come up empty
    except (OSError, ValueError) as error:
        raise ValueError(f"{model}: {_NO_TOKENIZER}") from error
    if not usable:
        raise ValueError(f"{model}: {_NO_TOKENIZER}")
    return Source(model=loaded, tokenizer=tokenizer, name=model)


def _check_output(folder: Path) -> None:
    """Refuse to write where something else lies."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"Expected `output` to be a folder but {str(there)!r} is a file.")
    if not os.access(there, os.W_OK):
        raise ValueError(f"Expected `output` to be a folder that can be written but {str(there)!r} cannot.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise ValueError(
            f"Expected `output` to be a new or empty folder, or one of an earlier run, but {str(folder)!r} holds "
            "other files."
        )


@contextmanager
def _measured(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _status(text: str, shown: bool) -> AbstractContextManager[Any]:
    """Show a spinner while something runs that has no progress of its own."""
    return Console(stderr=True).status(text) if shown else nullcontext()


def _trainer(config: TrainerConfig, progress: bool, *callbacks: Callback) -> Trainer:
    return make_trainer(config.accelerator, config.devices, config.precision, callbacks, progress)


def _check_length(source: Source, **lengths: int) -> None:
    """Refuse windows that are longer than the model's positions: they would fail, or mean nothing."""
    most = getattr(source.model.config, "max_position_embeddings", None)
    for name, length in lengths.items():
        if most is not None and length > most:
            raise ValueError(
                f"Expected `{name}.length` of at most {most}, the positions of {source.name}, but got {length}."
            )


def _sizes(solved: tuple[SolvedGroup, ...]) -> dict[str, Any]:
    entries: list[SiteReport] = [entry for group in solved for entry in group.reports()]
    numel = [group.plan.rows[path] * len(group.plan.bits) for group in solved for path in group.plan.rows]
    total = sum(numel)
    return {
        "bits_per_weight": 8 * sum(group.stored_bytes for group in solved) / total,
        "code_bits": sum(entry.code_bits * n for entry, n in zip(entries, numel, strict=True)) / total,
        "sparsity": sum(entry.sparsity * n for entry, n in zip(entries, numel, strict=True)) / total,
        "sites": entries,
    }


def _notes(config: RunConfig, solved: tuple[SolvedGroup, ...]) -> list[str]:
    sizes = _sizes(solved)
    unit = "bits_per_weight" if config.code_bits is None else "code_bits"
    if config.allocation == "budget" and not config.block_bits and sizes[unit] < 0.999 * config.target:
        return [
            f"{unit} is {sizes[unit]:.3f}, {config.target:g} was asked for: whole segments of 32 channels of "
            f"{list(config.tiers.widths)} bits come no closer from below."
        ]
    if config.allocation not in ("threshold", "quantile"):
        return []
    return [
        f"the tiers of allocation {config.allocation} set the size: {unit} is {sizes[unit]:.3f}, "
        f"{config.target:g} was asked for; allocation budget meets a target."
    ]


def _plain(value: Any) -> Any:
    """Turn a config into data that JSON can hold."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        path = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"class_path": path, "init_args": fields} if isinstance(value, Pass) else fields
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
