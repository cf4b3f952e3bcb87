"""One whole run: load, measure, compress, measure again, save."""

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import fx

from mpfx.allocate import PLAN_FILE, remove_frontier, save_frontier, save_plan
from mpfx.callbacks import ModelCompression
from mpfx.config import REPORT, RunConfig, TrainerConfig
from mpfx.graph import opaque_parts
from mpfx.hub.card import model_card, write_card
from mpfx.hub.checkpoint import is_checkpoint, load, save, tensor_bytes
from mpfx.hub.source import Source, load_model
from mpfx.lm import CausalLM, EvaluationData, TextDataModule
from mpfx.lm import evaluate as validate
from mpfx.nn import fill_masks as fill_all_masks
from mpfx.passes import LocateSites, Pass, SolvedGroup
from mpfx.report import AllocationReport, Report, peak_memory_bytes
from mpfx.session import (
    Session,
    allocation_report,
    check_length,
    check_output,
    check_shares,
    measured,
    measured_domains,
    sizes,
    status,
    trainer_of,
)

_NO_TOKENIZER = "no usable tokenizer; save one along with mpfx.save(model, path, tokenizer=...)."


def compress(config: RunConfig) -> Report:
    """Compress a language model; write checkpoint, plan, frontier and report to ``config.output``.

    On several devices this program runs once for each; the first process writes, and all return the report.

    Raises:
        ValueError: for a model, text or size that cannot be had, before anything is written.
        FileNotFoundError: likewise.
        RankError: if another process failed.
    """
    check_output(Path(config.output), is_checkpoint)
    if is_checkpoint(config.model):
        raise ValueError(f"Expected `model` to be a dense model but {config.model!r} is compressed already.")
    started = time.perf_counter()
    session = Session(config)
    session.check(config)
    model, dense_bytes = session.source.model, tensor_bytes(session.source.model)
    (dense,) = session.measure().values()
    callback = ModelCompression(config, module="model", progress=config.progress)
    session.loop(callback)
    (compressed,) = session.measure().values()
    gm = callback.graph_module
    assert gm is not None
    with measured(session.seconds, "save"), status(f"saving to {config.output}", config.progress):
        stored = session.ranks.once(lambda: _save(session, gm, callback.solved, config))
    allocation = allocation_report(gm, config)
    report = Report(
        model=config.model,
        perplexity={"dense": dense, "compressed": compressed},
        **sizes(callback.solved),
        bytes={"dense": dense_bytes, "compressed": stored},
        seconds={**session.seconds, **callback.seconds, "total": time.perf_counter() - started},
        peak_memory_bytes=peak_memory_bytes(session.trainer.strategy.root_device),
        allocation=allocation,
        left_dense=LocateSites(config.scope).reasons(gm),
        notes=[*_notes(config, callback.solved, allocation), *map(str, opaque_parts(gm))],
        config=_plain(config),
    )
    session.ranks.once(lambda: _save_report(report, model_card(config.output, model, report), config))
    return report


def _save(session: Session, gm: fx.GraphModule, solved: tuple[SolvedGroup, ...], config: RunConfig) -> int:
    """Write the checkpoint, and what its widths follow from; nothing of an earlier run stays.

    Returns:
        Bytes of the weight tensors.
    """
    stored = save(session.source.model, config.output, tokenizer=session.source.tokenizer)
    save_plan([group.plan for group in solved], Path(config.output) / PLAN_FILE)
    if measured := measured_domains(gm, config):
        save_frontier(measured, config.output)
    else:
        remove_frontier(config.output)
    return stored


def _save_report(report: Report, card: str, config: RunConfig) -> None:
    report.save(Path(config.output) / REPORT)
    write_card(Path(config.output), Path(config.output), card)


def evaluate(
    model: str,
    evaluation: EvaluationData,
    trainer: TrainerConfig,
    *,
    progress: bool = True,
    trust_remote_code: bool = False,
    fill_masks: bool = False,
) -> dict[str, Any]:
    """Measure the perplexity of an mpfx checkpoint, or of any model that :func:`compress` takes.

    Args:
        model: the folder or the name.
        evaluation: the text.
        trainer: that runs the model.
        progress: whether to show a progress bar.
        trust_remote_code: whether to run code that comes with the model.
        fill_masks: whether bitmasks are filled after loading (:func:`mpfx.fill_masks`).

    Returns:
        ``model``, ``perplexity``, ``loss`` (nats per token), ``tokens`` scored, ``bytes`` of the weight tensors as they
        ran.

    Raises:
        ValueError: if bitmasks are to be filled, but there is none.
    """
    with status(f"loading {model} and text", progress):
        source = _open(model, trust_remote_code)
        check_length(source, evaluation=evaluation.length)
        data = TextDataModule(source.tokenizer, evaluation=evaluation)
        data.setup("validate")
        check_shares(trainer, evaluation=data.val_dataloader())
        if fill_masks and not fill_all_masks(source.model):
            raise ValueError(
                f"Expected weights under a bitmask in {model}, to fill, but there is none: leave out `fill_masks`."
            )
    result = validate(trainer_of(trainer, progress), CausalLM(source.model), data.val_dataloader())
    windows, length = data.evaluation_windows.shape
    return {"model": model, **result, "tokens": windows * (length - 1), "bytes": tensor_bytes(source.model)}


def _open(model: str, trust_remote_code: bool) -> Source:
    if not is_checkpoint(model):
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


def _notes(config: RunConfig, solved: tuple[SolvedGroup, ...], allocation: AllocationReport | None) -> list[str]:
    unit = "bits_per_weight" if config.code_bits is None else "code_bits"
    found = sizes(solved)[unit]
    notes = [] if allocation is None or not allocation.sparsity else [_sparsity_note(solved)]
    if config.allocation in ("threshold", "quantile"):
        notes.append(
            f"the tiers of allocation {config.allocation} set the size: {unit} is {found:.3f}, {config.target:g} was "
            "asked for; allocation budget meets a target."
        )
    elif config.allocation in ("budget", "optimal") and not config.block_bits and found < 0.999 * config.target:
        notes.append(f"{unit} is {found:.3f}, {config.target:g} was asked for: {_reason(config, allocation)}.")
    return notes


def _reason(config: RunConfig, allocation: AllocationReport | None) -> str:
    """Why a size is not met from below."""
    widths = list(config.widths)
    if allocation is None:
        return f"whole segments of 32 channels of {widths} bits come no closer from below"
    budget = allocation.budget_bytes
    if budget is not None and config.code_bits is None and allocation.stored_bytes >= 0.999 * budget:
        return "masked codes are counted at most beforehand, and took less"
    return f"no choice of {widths} bits within the limits spends the rest and lowers the estimated loss"


def _sparsity_note(solved: tuple[SolvedGroup, ...]) -> str:
    pruned = sum(bool(group.plan.sparsity) for group in solved)
    if not pruned:
        return f"at this budget sparsity paid on none of the {len(solved)} input groups."
    return f"sparsity paid on {pruned} of {len(solved)} input groups."


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
