"""`mpfx bench compress`: a random model is compressed. What stages take, what they have to take, and the plain loop."""

import copy
import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from mpfx.bench.device import current, device_of, dtype_of, environment, last_level_cache
from mpfx.bench.models import config_of, random_model
from mpfx.bench.plain import plain_block, solve_plain
from mpfx.bench.report import place
from mpfx.bench.stages import ALLOCATE, HESSIAN, OBSERVE, SHARE, SOLVE, Meter, Stage
from mpfx.bench.timing import Stopwatch, copy_speed, matmul_speed, stopwatch
from mpfx.callbacks import ModelCompression
from mpfx.graph import bind_inputs, blocks, last_readers, linear_weight, run_block, traced_module
from mpfx.lm import CausalLM, EachOnce, is_first_process, losses_of, make_trainer, start_processes
from mpfx.lm.module import model_inputs
from mpfx.passes import CompressionConfig, located, located_graph
from mpfx.report import reset_peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = ("stage", "seconds", "floor", "times the floor", "peak GB")
"""Of the table."""

TOTAL = "graph to packed modules"
PLAIN = "the plain loop"

_RUN, _OTHER = "run", "other"
_DENSE_BITS = 16


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """What is measured.

    Args:
        model: name of a preset, a ``config.json``, or a folder that holds one.
        layers: of the model, 2 or more; None: as many as its config says.
        samples: calibration windows of random tokens.
        length: tokens of a window.
        batch: windows that run at a time.
        bits: stored bits per weight.
        sparsity: share to prune; None: none.
        guided: whether the loss's sensitivities are gathered and used.
        correction: share of earlier blocks' error that is made up for, which takes another run of the dense model.
            None: as by default if guided, else 0.
        allocation_tokens: that bits are given by; None: all.
        streaming: whether the model stays on the host and its blocks move to the device one at a time.
        plain: whether the plain loop runs too, on one block: 4-bit codes in groups of 128, the same sparsity.
        parts: whether the parts of stages are measured too. The device is waited for at the bounds of each, which takes
            time: without them stages are as fast as they are.
        devices: how many share calibration and solving: of the kind of `device`, numbered from 0.
        device: cpu, cuda or cuda:<number>; None: a CUDA device if there is one.
        dtype: of the model; None: bfloat16 on a CUDA device, float32 on the CPU.

    Raises:
        ValueError: if a field cannot be.
    """

    model: str = "llama-2-7b"
    layers: int | None = None
    samples: int = 128
    length: int = 2048
    batch: int = 4
    bits: float = 4.0
    sparsity: float | None = None
    guided: bool = False
    correction: float | None = None
    allocation_tokens: int | None = None
    streaming: bool = False
    plain: bool = True
    parts: bool = True
    devices: int = 1
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "batch", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected `{name}` of 1 or more but got {getattr(self, name)}.")
        if self.length < 3:
            raise ValueError(f"Expected `length` of 3 or more but got {self.length}.")
        if self.devices > 1 and ":" in (self.device or ""):
            raise ValueError(f"Expected `device` without a number with {self.devices} devices but got {self.device!r}.")
        if -(-self.samples // self.batch) < self.devices:
            raise ValueError(
                f"Expected at least one batch for each of {self.devices} devices but {self.samples} samples make fewer "
                f"of {self.batch}: lower `batch` or raise `samples`."
            )
        dtype_of(self.dtype, device_of(self.device))
        self.compression  # noqa: B018  (making it refuses what cannot be)

    @property
    def compression(self) -> CompressionConfig:
        """How mpfx compresses."""
        return CompressionConfig(
            bits_per_weight=self.bits,
            sparsity=self.sparsity,
            guidance=None if self.guided else 0.0,
            correction=0.0 if self.correction is None and not self.guided else self.correction,
            allocation_tokens=self.allocation_tokens,
            offload="always" if self.streaming else "never",
        )


@dataclass(frozen=True)
class Rates:
    """What the device reaches.

    Attributes:
        half: floating-point operations per second of large matrix products in the model's dtype.
        single: likewise in float32.
        copy: bytes per second, read and written, of a large copy.
    """

    half: float
    single: float
    copy: float


@dataclass(frozen=True)
class Work:
    """What a part of a compression cannot do without.

    Attributes:
        half: floating-point operations on the model's dtype.
        single: on float32.
        nbytes: read and written.
    """

    half: float = 0.0
    single: float = 0.0
    nbytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.half + other.half, self.single + other.single, self.nbytes + other.nbytes)

    def seconds(self, rates: Rates) -> float:
        """At least; arithmetic and copies may overlap."""
        return max(self.half / rates.half + self.single / rates.single, self.nbytes / rates.copy)


@dataclass(frozen=True)
class CompressReport:
    """All that was measured.

    Attributes:
        config: what was asked for.
        weights: compressed.
        blocks: repeated ones.
        rates: of the device.
        stages: by name, in the order of the run; parts as ``solve/sweep``.
        floors: seconds that stages take at least, by name, shared out evenly over all devices.
        plain: seconds of the plain loop for one block; None: not measured.
        environment: of the run.
        notes: what has to be known of the figures.
    """

    config: CompressConfig
    weights: int
    blocks: int
    rates: Rates
    stages: Mapping[str, Stage]
    floors: Mapping[str, float]
    plain: Stage | None
    environment: dict[str, str | int]
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """From the traced graph to packed modules."""
        return sum(stage.seconds for name, stage in self.stages.items() if "/" not in name and name != "trace")

    @property
    def plain_seconds(self) -> float | None:
        """Of the plain loop, if all blocks took as long as the one that was measured."""
        return None if self.plain is None else self.plain.seconds * self.blocks

    def title(self) -> str:
        """What was measured where."""
        c, r = self.config, self.rates
        pruned = f", {c.sparsity:.0%} pruned" if c.sparsity else ""
        where = f"{c.devices} x {place(self.environment)}" if c.devices > 1 else place(self.environment)
        kind = f"{c.bits:g} bits per weight{pruned}, {'guided' if c.guided else 'unguided'}"
        kind += f", correction {c.compression.corrected:g}" if c.compression.corrected else ", no correction"
        kind += f", bits by {c.allocation_tokens} tokens" if c.allocation_tokens else ""
        kind += ", blocks streamed from the host" if c.streaming else ""
        return (
            f"{c.model}, {self.blocks} blocks, {self.weights / 1e9:.3g} billion weights, random; {c.samples} x "
            f"{c.length} tokens; {kind}; {where}; matrix products {r.half / 1e12:.3g} TFLOP/s "
            f"(float32 {r.single / 1e12:.3g}), a copy {r.copy / 1e9:.3g} GB/s."
        )

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table."""
        floor = sum(seconds for name, seconds in self.floors.items() if "/" not in name)
        peak = max(stage.peak for stage in self.stages.values())
        rows = [_row(name.replace("/", ": "), s, self.floors.get(name)) for name, s in self.stages.items()]
        rows.append(_row(TOTAL, Stage(self.seconds, peak), floor))
        if self.plain is not None and self.plain_seconds is not None:
            rows.append(_row(f"{PLAIN}, one block", self.plain, None))
            rows.append(_row(f"{PLAIN}, all {self.blocks} blocks (projected)", Stage(self.plain_seconds), None))
            rows.append([f"{PLAIN} / mpfx", f"{self.plain_seconds / self.seconds:.2f} x", "", "", ""])
        return list(HEAD), rows

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "config": asdict(self.config),
            "environment": self.environment,
            "rates": asdict(self.rates),
            "weights": self.weights,
            "blocks": self.blocks,
            "stages": {name: asdict(stage) for name, stage in self.stages.items()},
            "floors": dict(self.floors),
            "seconds": self.seconds,
            "plain": None if self.plain is None else asdict(self.plain),
            "plain_seconds": self.plain_seconds,
            "notes": list(self.notes),
        }


def _row(name: str, stage: Stage, floor: float | None) -> list[str]:
    known = floor is not None and floor > 0
    return [
        name,
        f"{stage.seconds:.3g}",
        f"{floor:.3g}" if known else "",
        f"{stage.seconds / floor:.2f}" if known and floor else "",
        f"{stage.peak / 1e9:.2f}" if stage.peak else "",
    ]


def bench(
    config: CompressConfig, *, clock: Stopwatch | None = None, on_stage: Callable[[str], None] = lambda text: None
) -> CompressReport:
    """Let the plain loop solve one block, then compress the whole model.

    Args:
        config: what to measure.
        clock: times copies and products; None: the device's.
        on_stage: called with a line about what comes next.

    Raises:
        ValueError: for a model that is not there, has too few positions, or cannot have such a size.
    """
    device = device_of(config.device)
    if config.devices > 1 and device.type == "cuda":
        device = device_of(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")  # Lightning starts this program once for each
    dtype = dtype_of(config.dtype, device)
    clock = stopwatch(device) if clock is None else clock
    sizes = _sizes(config)
    with current(device):
        rates = Rates(
            matmul_speed(device, dtype, clock),
            matmul_speed(device, torch.float32, clock),
            copy_speed(device, last_level_cache(device), clock),
        )
        on_stage(f"{config.model}: random weights")
        model = random_model(sizes, device, dtype)
        batches = _batches(config, sizes.get_text_config().vocab_size)
        gm = located_graph(model, (), _inputs(model, batches[0]), config.compression)
        groups = [(g.sites[0].in_features, sum(s.out_features for s in g.sites)) for g in located(gm)]
        repeated = sum(block.repeated for block in blocks(gm))
        plain = None
        if config.plain and is_first_process():
            on_stage(f"{PLAIN}: one block")
            plain = _plain(gm, model, batches, config, device)
        del gm
        if config.streaming:
            nn.Module.to(model, "cpu")
        gc.collect()  # graphs have cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
        on_stage("mpfx: all blocks")
        stages = _compressed(model, batches, config, device)
    floors = {name: work.seconds(rates) / config.devices for name, work in _floors(groups, config)}
    return CompressReport(
        config=config,
        weights=sum(channels * rows for channels, rows in groups),
        blocks=repeated,
        rates=rates,
        stages=_with_rests(stages),
        floors={name: seconds for name, seconds in floors.items() if name in stages},
        plain=plain,
        environment=environment(device, dtype),
        notes=tuple(_notes(config, device)),
    )


def _notes(config: CompressConfig, device: torch.device) -> Iterator[str]:
    if not reset_peak_memory(device):
        yield "peaks are those of the process so far"
    if config.devices > 1:
        yield "seconds and peaks are those of the first process, with its waits for the others"


def _sizes(config: CompressConfig) -> Any:
    sizes: Any = config_of(config.model)
    most = getattr(sizes, "max_position_embeddings", None)
    if most is not None and config.length > most:
        raise ValueError(
            f"Expected `length` of {most} at most, the positions of {config.model}, but got {config.length}."
        )
    if config.layers is not None:
        sizes = copy.deepcopy(sizes)
        sizes.num_hidden_layers = config.layers
    if sizes.num_hidden_layers < 2:
        raise ValueError(
            f"Expected `layers` of 2 or more, as blocks are what repeats, but got {sizes.num_hidden_layers}."
        )
    return sizes


def _batches(config: CompressConfig, words: int) -> list[dict[str, Tensor]]:
    """Random tokens, on the host."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(words, (config.samples, config.length), generator=generator)
    return [{"input_ids": part} for part in tokens.split(config.batch)]


def _inputs(model: "PreTrainedModel", batch: Mapping[str, Tensor]) -> dict[str, Any]:
    moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
    return model_inputs(model, moved)


@torch.no_grad()
def _plain(
    gm: fx.GraphModule,
    model: "PreTrainedModel",
    batches: Sequence[Mapping[str, Tensor]],
    config: CompressConfig,
    device: torch.device,
) -> Stage:
    """Seconds and peak of the plain loop on the first repeated block, whose weights are as before afterwards."""
    parts = blocks(gm)
    readers, first = last_readers(parts), next(block for block in parts if block.repeated and block.sites)
    streams = [bind_inputs(gm, (), _inputs(model, batch)) for batch in batches]
    for block in parts[: first.index]:
        streams = [run_block(block, values, readers) for values in streams]
    weights = {path: linear_weight(traced_module(gm).get_submodule(path)) for path in first.sites}
    before = {path: weight.cpu().clone() for path, weight in weights.items()}
    meter = Meter(device)
    with meter.stage(PLAIN):
        plain_block(
            gm,
            first,
            readers,
            streams,
            lambda weight, hessian: solve_plain(weight, hessian, 4, 128, config.sparsity or 0.0),
        )
    for path, weight in weights.items():
        weight.copy_(before[path])
    return meter.stages[PLAIN]


def _compressed(
    model: "PreTrainedModel", batches: Sequence[Mapping[str, Tensor]], config: CompressConfig, device: torch.device
) -> dict[str, Stage]:
    """Compress as any user does, with the callback; the stages, in the order of the run."""
    meter = Meter(device)
    callback = ModelCompression(config.compression, module="model", progress=False)
    kind = "gpu" if device.type == "cuda" else "cpu"
    where: Any = [device.index or 0] if device.type == "cuda" and config.devices == 1 else config.devices
    trainer = make_trainer(kind, where, callbacks=[callback], progress=False)
    start_processes(make_trainer(kind, where, progress=False))
    module, own = CausalLM(model), [batches[index] for index in EachOnce(batches)]
    with meter.watching(config.parts), meter.stage(_RUN):
        callback.take_calls(trainer, module, (_inputs(model, batch) for batch in own), losses_of(own))
    return _in_order(meter.stages, callback.seconds["observe"])


def _in_order(measured: Mapping[str, Stage], observing: float) -> dict[str, Stage]:
    """Stages of one run in the order of the run, each before its parts.

    Args:
        measured: as they lie in one another: allocation asks for what is observed.
        observing: seconds of the loop over the calibration data and of all that was observed.
    """
    order = ["trace", "sense", OBSERVE, ALLOCATE, "scale", SOLVE, "pack", "fold"]
    inner = {name.removeprefix(f"{_RUN}/"): stage for name, stage in measured.items() if "/" in name}
    nested = f"{ALLOCATE}/{OBSERVE}"
    found = {name.replace(nested, OBSERVE): stage for name, stage in inner.items() if name != SHARE}  # between stages
    if nested in inner:
        spent, observed = found[ALLOCATE], inner[nested]
        found[ALLOCATE] = Stage(spent.seconds - observed.seconds, spent.peak)
    if SHARE in found:  # before there is something to observe
        early, late = found.pop(SHARE), found.pop(f"{OBSERVE}/{SHARE}", Stage())
        found[f"{OBSERVE}/{SHARE}"] = Stage(early.seconds + late.seconds, max(early.peak, late.peak))
    found[OBSERVE] = Stage(observing, found.get(OBSERVE, measured[_RUN]).peak)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0].partition("/")[0]), "/" in item[0])))


def _with_rests(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The stages, and after the parts of each what these leave."""
    found: dict[str, Stage] = {}
    for name, stage in stages.items():
        if "/" in name:
            continue
        parts = {other: part for other, part in stages.items() if other.startswith(f"{name}/")}
        found |= {name: stage, **parts}
        if parts:
            rest = stage.seconds - sum(part.seconds for part in parts.values())
            found[f"{name}/{_rest_of(name)}"] = Stage(rest)
    return found


def _rest_of(stage: str) -> str:
    """What a stage does beside its parts: mostly, it runs the model."""
    return "forward" if stage in (OBSERVE, SOLVE) else _OTHER


def _floors(groups: Sequence[tuple[int, int]], config: CompressConfig) -> Iterator[tuple[str, Work]]:
    """What stages and their parts cannot do without; attention, the head and the like are not counted.

    Args:
        groups: channels and rows of every input group.
        config: tokens, bits.
    """
    tokens = config.samples * config.length
    weights = sum(channels * rows for channels, rows in groups)
    forward = Work(half=2.0 * tokens * weights)
    share = min(1.0, (config.allocation_tokens or tokens) / tokens)
    hessian = Work(half=sum(float(tokens) * channels**2 for channels, _ in groups))  # symmetric: one half
    cholesky = Work(single=sum(1 / 3 * channels**3 for channels, _ in groups))
    factor = cholesky + cholesky  # and a triangle's inverse, which takes as much
    sweep = Work(single=sum(float(rows) * channels**2 for channels, rows in groups))  # each channel on all later ones
    read = Work(nbytes=weights * _DENSE_BITS / 8)
    written = Work(nbytes=weights * config.bits / 8)
    yield OBSERVE, Work(half=share * (forward.half + hessian.half))
    yield f"{OBSERVE}/{HESSIAN}", Work(half=share * hessian.half)
    yield "sense", forward + forward + forward  # there, and there and back once more
    yield ALLOCATE, cholesky + read  # the diagonal of the factor is enough
    yield f"{ALLOCATE}/factor", cholesky
    runs = forward + forward  # before and after a block is solved
    if config.compression.corrected:
        runs += forward  # of the dense model
    yield SOLVE, runs + hessian + factor + sweep + read + written
    yield f"{SOLVE}/{HESSIAN}", hessian
    yield f"{SOLVE}/factor", factor
    yield f"{SOLVE}/sweep", sweep + read
    yield f"{SOLVE}/encode", read + written
