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
from torch import fx

from mpfx.callbacks import ModelCompression
from mpfx.config import REPORT, RunConfig, TrainerConfig
from mpfx.graph import sites
from mpfx.hub.checkpoint import MANIFEST, load, save, tensor_bytes
from mpfx.hub.source import Source, load_model, output_head
from mpfx.lm import CausalLM, EvaluationData, TextDataModule, make_trainer
from mpfx.lm import evaluate as validate
from mpfx.passes import CompressionConfig, SolvedGroup
from mpfx.report import Report, SiteReport, peak_memory_bytes


def compress(config: RunConfig) -> Report:
    """Compress a language model; write checkpoint and report to ``config.output``.

    Raises:
        ValueError: for a model, text or size that cannot be had, before anything is written.
        FileNotFoundError: likewise.
    """
    _check_output(Path(config.output))
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    with _measured(seconds, "load"), _status(f"loading {config.model} and text", config.progress):
        source = load_model(config.model, trust_remote_code=config.trust_remote_code)
        data = TextDataModule(source.tokenizer, config.calibration, config.evaluation)
        data.setup("validate")
    module, dense_bytes = CausalLM(source.model), tensor_bytes(source.model)
    trainer = _trainer(config.trainer, config.progress)
    with _measured(seconds, "evaluate"):
        dense = validate(trainer, module, data.val_dataloader())
    callback = ModelCompression(config, module="model", heads=_heads(config, source), progress=config.progress)
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
        left_dense=_left_dense(callback.graph_module, callback.solved),
        notes=_notes(config, callback.solved),
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
    return Source(model=loaded, tokenizer=AutoTokenizer.from_pretrained(model, local_files_only=True), name=model)


def _check_output(folder: Path) -> None:
    """Refuse to write where something else lies."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected `output` to be a folder but {str(folder)!r} is a file.")
    earlier = any((folder / name).exists() for name in (MANIFEST, REPORT))
    if folder.is_dir() and any(folder.iterdir()) and not earlier:
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


def _heads(config: CompressionConfig, source: Source) -> tuple[str, ...]:
    head = output_head(source.model)
    return () if head is None or config.compress_head else (head,)


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


def _left_dense(gm: fx.GraphModule, solved: tuple[SolvedGroup, ...]) -> dict[str, str]:
    packed = {path for group in solved for path in group.plan.rows}
    return {s.path: s.dense_reason or "named to stay dense" for s in sites(gm) if s.path not in packed}


def _notes(config: RunConfig, solved: tuple[SolvedGroup, ...]) -> list[str]:
    if config.allocation not in ("threshold", "quantile"):
        return []
    sizes = _sizes(solved)
    unit = "bits_per_weight" if config.code_bits is None else "code_bits"
    return [
        f"the tiers of allocation {config.allocation} set the size: {unit} is {sizes[unit]:.3f}, "
        f"{config.target:g} was asked for; allocation budget meets a target."
    ]


def _plain(value: Any) -> Any:
    """Turn a config into data that JSON can hold."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
