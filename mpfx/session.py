"""A model and its texts, loaded once: measured, calibrated once, and compressed in as many ways as wanted."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from mpfx.allocate import Domain, relative_gap
from mpfx.callbacks import ModelCalibration
from mpfx.callbacks.calibration import runner_of
from mpfx.config import RunConfig, TrainerConfig
from mpfx.graph import bind_inputs, trace
from mpfx.hub.source import Source, load_model
from mpfx.lm import (
    CausalLM,
    EvaluationData,
    Perplexity,
    TextDataModule,
    is_first_process,
    losses_of,
    make_trainer,
    scored,
    start_processes,
)
from mpfx.lm import evaluate as validate
from mpfx.lm.module import model_inputs
from mpfx.lm.text import parse_source
from mpfx.passes import (
    ALLOCATIONS,
    Calibration,
    CompressionConfig,
    Ranks,
    SolvedGroup,
    analysis,
    check_feasible,
    compress_calibrated,
    run_passes,
    stays_on_host,
)
from mpfx.passes.allocate import domains
from mpfx.report import AllocationReport, SiteReport

SHARED = (
    "model",
    "calibration",
    "evaluation",
    "trainer",
    "trust_remote_code",
    "scope",
    "passes",
    "strict",
    "offload",
    "allocation_tokens",
)
"""Fields in which the configs of one session have to be alike: they make the calibration what it is."""


@dataclass(frozen=True)
class Result:
    """One way to compress, measured.

    Attributes:
        perplexity: by name of the text.
        bits_per_weight: stored, everything counted.
        code_bits: average nominal width.
        sparsity: share pruned.
        allocation: with allocation `optimal`, else None.
        seconds: by stage.
    """

    perplexity: Mapping[str, float]
    bits_per_weight: float
    code_bits: float
    sparsity: float
    allocation: AllocationReport | None
    seconds: Mapping[str, float]


class Session:
    """A dense model with its texts.

    Args:
        config: model, texts, device, scope; what else it says is up to :meth:`run`.
        also: further texts to measure on.

    Attributes:
        seconds: by stage.
        dense: perplexity of the dense model by name of the text, once measured.

    Raises:
        ValueError: for a model or text that cannot be had.
        FileNotFoundError: likewise.
    """

    def __init__(self, config: RunConfig, *, also: Sequence[EvaluationData] = ()) -> None:
        self.config = config
        self.seconds: dict[str, float] = {}
        self.dense: dict[str, float] = {}
        self.trainer = trainer_of(config.trainer, config.progress)
        with measured(self.seconds, "load"), status(f"loading {config.model} and text", config.progress):
            self.source = load_model(config.model, trust_remote_code=config.trust_remote_code)
            self.source.model.eval()
            self.data = TextDataModule(self.source.tokenizer, config.calibration, config.evaluation)
            lengths = {"calibration": config.calibration.length, "evaluation": config.evaluation.length}
            check_length(self.source, **lengths)
            self.data.setup("validate")
            check_shares(config.trainer, calibration=self.data.calibration_dataloader())
            self._texts = {config.evaluation.data: self.data, **dict(self._further(also))}
        for text in self._texts.values():
            check_shares(config.trainer, evaluation=text.val_dataloader())
        self.module = CausalLM(self.source.model)
        self._calibration: Calibration | None = None

    def _further(self, also: Sequence[EvaluationData]) -> Iterator[tuple[str, TextDataModule]]:
        calibration, seen = parse_source(self.config.calibration.data), [self.config.evaluation.data]
        for text in also:
            if text.data in seen:
                raise ValueError(f"Expected each text to measure on once but {text.data!r} is named twice.")
            seen.append(text.data)
            if calibration.kind != "pydocs" and calibration.same_text(parse_source(text.data)):
                raise ValueError(f"Expected another text to measure on than {text.data!r}, which is calibrated on.")
            check_length(self.source, also=text.length)
            data = TextDataModule(self.source.tokenizer, evaluation=text)
            data.setup("validate")
            yield text.data, data

    @property
    def ranks(self) -> Ranks:
        """The processes, once something was measured."""
        return Ranks.of(self.trainer.world_size, self.trainer.strategy.root_device)

    def problems(self, configs: Sequence[CompressionConfig]) -> list[str | None]:
        """Tell, before any work, why each of these configs cannot be done; None where nothing speaks against it.

        Raises:
            TraceError: if the model cannot be traced, as `strict` asks for.
            PassError: if nothing is left to compress, or a pattern of the scope matches nothing.
        """
        with measured(self.seconds, "load"):
            # The callback traces again, on the device and in the precision of the Trainer.
            inputs = model_inputs(self.source.model, next(iter(self.data.calibration_dataloader())))
            gm = trace(self.source.model, (), inputs, whole=self.config.strict)
            gm = run_passes(gm, analysis(self.config.scope))
            return [self._problem(gm, config) for config in configs]

    def _problem(self, gm: fx.GraphModule, config: CompressionConfig) -> str | None:
        for name in SHARED:
            ours = getattr(self.config, name)
            if (theirs := getattr(config, name, ours)) != ours:
                return f"Expected `{name}` to be {ours} in all runs of one session but got {theirs}."
        try:
            check_feasible(gm, config)
        except ValueError as error:
            return str(error)
        return None

    def check(self, *configs: CompressionConfig) -> None:
        """Refuse what :meth:`problems` speaks against.

        Raises:
            ValueError: if a budget is infeasible, or a config differs where all of a session have to be alike.
        """
        for problem in filter(None, self.problems(configs)):
            raise ValueError(problem)

    def measure(self) -> dict[str, float]:
        """Perplexity of the model as it is, by name of the text."""
        with measured(self.seconds, "evaluate"):
            start_processes(trainer_of(self.config.trainer, progress=False))
            large = any(self.ranks.gathered(self._has_no_room))
            return {name: (self._by_blocks if large else self._validated)(data) for name, data in self._texts.items()}

    def _has_no_room(self) -> bool:
        device = self.trainer.strategy.root_device
        return self.config.offload != "never" and stays_on_host(self.module, device, "auto")

    def _validated(self, data: TextDataModule) -> float:
        return validate(self.trainer, self.module, data.val_dataloader())["perplexity"]

    @torch.no_grad()
    def _by_blocks(self, data: TextDataModule) -> float:
        """Perplexity of a model that has no room on the device, whose blocks move there one at a time."""
        model, runner = self.source.model, runner_of(self.trainer, self.config)
        self.trainer.precision_plugin.convert_module(self.module).to("cpu")
        batches = list(data.val_dataloader())
        gm = trace(model, (), model_inputs(model, batches[0]))
        values = (bind_inputs(gm, (), model_inputs(model, batch)) for batch in batches)
        perplexity = Perplexity().to(self.ranks.device)
        with self.ranks.together():
            for batch, output in zip(batches, runner.outputs(gm, values), strict=True):
                perplexity.update(*scored(output, batch))
        return float(perplexity.compute())

    def loop(self, callback: ModelCalibration) -> None:
        """Hand the calibration data to a callback; the model runs block by block."""
        trainer = trainer_of(self.config.trainer, self.config.progress, callback)
        batches = self.data.calibration_dataloader()
        device = trainer.strategy.root_device
        trainer.precision_plugin.convert_module(self.module)
        home = torch.device("cpu") if stays_on_host(self.module, device, self.config.offload) else device
        self.module.to(home)
        inputs = (model_inputs(self.source.model, batch) for batch in batches)
        moved = (pytree.tree_map_only(Tensor, lambda t: t.to(home), values) for values in inputs)
        callback.take_calls(trainer, self.module, moved, losses_of(list(batches)))

    def calibrate(self, configs: Sequence[CompressionConfig]) -> None:
        """Measure the dense model and gather, in one loop, all that these configs need; :meth:`check` them before."""
        self.dense = self.measure()
        callback = ModelCalibration(*configs, module="model")
        with measured(self.seconds, "calibrate"):
            self.loop(callback)
        self._calibration = callback.calibration

    def run(self, config: CompressionConfig) -> Result:
        """Compress, measure, and make the model dense again, bit for bit.

        Args:
            config: one of those that were calibrated for, or one that needs no more than they.

        Raises:
            RuntimeError: if nothing was calibrated.
            PassError: naming the pass that failed; the model is dense then.
        """
        if self._calibration is None:
            raise RuntimeError("Expected a calibrated session: call `calibrate` first.")
        device = self.trainer.strategy.root_device
        if not stays_on_host(self.module, device, config.offload):
            self.module.to(device)  # a Trainer takes it back to the host
        before = self.seconds.get("evaluate", 0.0)
        with ExitStack() as way_back:
            with torch.inference_mode(False), status("compressing", self.config.progress) as shown:
                compressed = compress_calibrated(
                    self._calibration,
                    config,
                    runner=runner_of(self.trainer, config),
                    on_block=lambda name, share: None if shown is None else shown.update(f"{share:.0%} {name}"),
                    way_back=way_back,
                )
            perplexity = self.measure()
            return Result(
                perplexity=perplexity,
                **{name: value for name, value in sizes(compressed.solved).items() if name != "sites"},
                allocation=allocation_report(compressed.graph_module, config),
                seconds={**compressed.seconds, "evaluate": self.seconds["evaluate"] - before},
            )


def trainer_of(config: TrainerConfig, progress: bool, *callbacks: Callback) -> Trainer:
    """A Trainer for validation loops."""
    return make_trainer(config.accelerator, config.devices, config.precision, callbacks, progress, config.nodes)


def check_shares(config: TrainerConfig, **loaders: DataLoader[Any]) -> None:
    """Refuse fewer batches than processes, before any process is started: each needs one at least."""
    for name, loader in loaders.items():
        if len(loader) < config.processes:
            raise ValueError(
                f"Expected at least one batch for each of {config.processes} devices but {name} has {len(loader)}: "
                f"lower `{name}.batch_size` or raise `{name}.samples`, or use fewer `trainer.devices`."
            )


def check_output(folder: Path, earlier: Callable[[Path], bool]) -> None:
    """Refuse to write where something else lies, before anything runs.

    Args:
        folder: to write to; made by who writes.
        earlier: whether a folder is one of an earlier run, whose files may be replaced.

    Raises:
        ValueError: naming the folder, and what is wrong with it.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"Expected `output` to be a folder but {str(there)!r} is a file.")
    if not os.access(there, os.W_OK):
        raise ValueError(f"Expected `output` to be a folder that can be written but {str(there)!r} cannot.")
    if folder.is_dir() and any(folder.iterdir()) and not earlier(folder):
        raise ValueError(
            f"Expected `output` to be a new or empty folder, or one of an earlier run, but {str(folder)!r} holds "
            "other files: name another one with --output."
        )


def check_length(source: Source, **lengths: int) -> None:
    """Refuse windows that are longer than the model's positions: they would fail, or mean nothing."""
    most = getattr(source.model.config, "max_position_embeddings", None)
    for name, length in lengths.items():
        if most is not None and length > most:
            raise ValueError(
                f"Expected `{name}.length` of at most {most}, the positions of {source.name}, but got {length}."
            )


@contextmanager
def measured(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time that the block takes."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def status(text: str, shown: bool) -> AbstractContextManager[Any]:
    """Show a spinner, in the first process, while something runs that has no progress of its own."""
    return Console(stderr=True).status(text) if shown and is_first_process() else nullcontext()


def sizes(solved: Sequence[SolvedGroup]) -> dict[str, Any]:
    """Stored bits, code bits, sparsity, and the entry of every site."""
    entries: list[SiteReport] = [entry for group in solved for entry in group.reports()]
    numel = [group.plan.rows[path] * len(group.plan.bits) for group in solved for path in group.plan.rows]
    total = sum(numel)
    return {
        "bits_per_weight": 8 * sum(group.stored_bytes for group in solved) / total,
        "code_bits": sum(entry.code_bits * n for entry, n in zip(entries, numel, strict=True)) / total,
        "sparsity": sum(entry.sparsity * n for entry, n in zip(entries, numel, strict=True)) / total,
        "sites": entries,
    }


def measured_domains(gm: fx.GraphModule, config: CompressionConfig) -> list[Domain]:
    """What allocation `optimal` measured, with the budgets; empty with any other."""
    found = gm.meta.get(ALLOCATIONS, [])
    budgets = domains(gm, config) if found else []
    codes = config.code_bits is not None
    return [
        Domain(f, target, codes, own, config.optimal) for (f, _), (target, _, own) in zip(found, budgets, strict=True)
    ]


def allocation_report(gm: fx.GraphModule, config: CompressionConfig) -> AllocationReport | None:
    """What allocation `optimal` found; None with any other."""
    budgets, chosen = measured_domains(gm, config), [allocation for _, allocation in gm.meta.get(ALLOCATIONS, [])]
    if not budgets:
        return None
    distortion, bound = sum(a.distortion for a in chosen), sum(a.bound for a in chosen)
    plans = [plan for allocation in chosen for plan in allocation.plans]
    patterns = {path: str(plan.sparsity) for plan in plans for path in plan.rows}
    weights = [sum(group.numel for group in domain.frontier.groups) for domain in budgets]
    allowed = sum(int(domain.target * numel / 8) for domain, numel in zip(budgets, weights, strict=True))
    return AllocationReport(
        distortion=distortion,
        bound=bound,
        gap=relative_gap(distortion, bound),
        budget_bytes=allowed if config.code_bits is None else None,
        stored_bytes=sum(allocation.stored_bytes for allocation in chosen),
        left_out=sum(int((plan.bits == 0).sum()) for plan in plans),
        channels=sum(len(plan.bits) for plan in plans),
        sparsity=patterns if len(config.patterns) > 1 else {},
    )
