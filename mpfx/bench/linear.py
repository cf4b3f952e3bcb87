"""`mpfx bench linear`: one packed layer against ``F.linear`` and torch's kernel for 4 bits."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mpfx.bench.contenders import DENSE, INT4, Contender, Stage, dense, packed, torch_int4
from mpfx.bench.device import current, device_of, dtype_of, environment, last_level_cache
from mpfx.bench.report import place
from mpfx.bench.timing import Stopwatch, copies, copy_speed, stopwatch
from mpfx.bench.weights import mixed_layout, uniform_layout

SHAPES = ("4096x4096", "11008x4096", "4096x11008", "1024x4096", "14336x4096", "4096x14336")
"""Sites of Llama-2-7B (the first three) and Llama-3-8B, as OUTxIN."""

HEAD = (
    *("weight", "rows", "packed", "stored bits", "µs", f"{DENSE} µs", "times as fast", f"{INT4} µs"),
    *("GB/s", "of copy", "error"),
)
"""Of the table."""

ROWS = {"cuda": (1, 8, 512, 4096), "cpu": (1, 8, 512)}
"""Rows of activations by kind of device."""


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """What is measured.

    Args:
        device: cpu, cuda or cuda:<number>; None: a CUDA device if there is one.
        dtype: of activations and dense weights; None: bfloat16 on a CUDA device, float32 on the CPU.
        rows: of activations; None: 1, 8, 512 and, on a CUDA device, 4096.
        bits: stored bits per weight of packed layers that mix 3, 4, 5 and 6 bits.
        sparsity: also measures 4-bit codes with a bitmask that prunes this share, the same weight with the bitmask
            filled, and 4-bit codes without one.
        shapes: of the weights, as OUTxIN.

    Raises:
        ValueError: if a field cannot be.
    """

    device: str | None = None
    dtype: str | None = None
    rows: Sequence[int] | None = None
    bits: Sequence[float] = (4.25,)
    sparsity: float | None = None
    shapes: Sequence[str] = SHAPES

    def __post_init__(self) -> None:
        if any(rows < 1 for rows in self.rows or ()):
            raise ValueError(f"Expected `rows` of 1 or more but got {min(self.rows or ())}.")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"Expected `sparsity` between 0 and 1 but got {self.sparsity}.")
        for out_features, in_features in self.sizes:
            for bits in self.bits:
                mixed_layout(out_features, in_features, bits)
        dtype_of(self.dtype, device_of(self.device))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(out, in) of every weight, each once."""
        return [_size(shape) for shape in dict.fromkeys(self.shapes)]


def _size(shape: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", shape)
    if found is None or not int(found[1]) or not int(found[2]):
        raise ValueError(f"Expected `shapes` as OUTxIN, such as 11008x4096, but got {shape!r}.")
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Timing:
    """One measured layer.

    Attributes:
        shape: OUTxIN.
        rows: of activations.
        name: of the contender.
        bits: stored per weight.
        nbytes: moved by one call at least: the weight, the activations, the result.
        seconds: of one call.
        error: relative to the result in float32.
    """

    shape: str
    rows: int
    name: str
    bits: float
    nbytes: int
    seconds: float
    error: float

    @property
    def bytes_per_second(self) -> float:
        """Achieved."""
        return self.nbytes / self.seconds


@dataclass(frozen=True)
class LinearReport:
    """All that was measured.

    Attributes:
        copy_bytes_per_second: read and written by a large copy.
        timings: of every contender.
        notes: why some are missing.
        environment: of the run.
    """

    copy_bytes_per_second: float
    timings: tuple[Timing, ...]
    notes: tuple[str, ...]
    environment: dict[str, str | int]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        copy = self.copy_bytes_per_second
        rows = [
            {**asdict(t), "bytes_per_second": t.bytes_per_second, "share_of_copy": t.bytes_per_second / copy}
            for t in self.timings
        ]
        return {
            "environment": self.environment,
            "copy_bytes_per_second": copy,
            "timings": rows,
            "notes": list(self.notes),
        }

    def title(self) -> str:
        """Where it was measured, with the speed of a copy."""
        return f"{place(self.environment)}; a copy moves {self.copy_bytes_per_second / 1e9:.0f} GB/s."

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table: one row per packed weight, what it is compared with beside it."""
        known = {(t.shape, t.rows, t.name): t.seconds for t in self.timings}
        packed = [t for t in self.timings if t.name not in (DENSE, INT4)]
        return list(HEAD), [self._row(t, known) for t in packed]

    def _row(self, t: Timing, known: dict[tuple[str, int, str], float]) -> list[str]:
        dense, other = (known.get((t.shape, t.rows, name)) for name in (DENSE, INT4))
        return [
            t.shape,
            f"{t.rows}",
            t.name,
            f"{t.bits:.2f}",
            _micro(t.seconds),
            _micro(dense),
            "" if dense is None else f"{dense / t.seconds:.2f}",
            _micro(other),
            f"{t.bytes_per_second / 1e9:.1f}",
            f"{t.bytes_per_second / self.copy_bytes_per_second:.0%}",
            f"{t.error:.1e}",
        ]


def _micro(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.1f}"


def bench(
    config: LinearConfig,
    *,
    clock: Stopwatch | None = None,
    cache: int | None = None,
    on_shape: Callable[[str], None] = lambda text: None,
) -> LinearReport:
    """Measure packed layers and what they are compared with.

    Args:
        config: what to measure.
        clock: times calls; None: the device's.
        cache: bytes of the last-level cache; None: the device's.
        on_shape: called with a line about every weight before it is measured.

    Raises:
        ValueError: if a weight is so small that the cache would hold thousands.
        ArithmeticError: if a kernel's result is wrong.
    """
    device = device_of(config.device)
    dtype = dtype_of(config.dtype, device)
    clock = stopwatch(device) if clock is None else clock
    cache = last_level_cache(device) if cache is None else cache
    timings: list[Timing] = []
    notes: list[str] = []
    for out_features, in_features in config.sizes:  # refused before anything is measured
        copies(int(min(config.bits) * out_features * in_features / 8), device, cache)
    with torch.no_grad(), current(device):
        speed = copy_speed(device, cache, clock)
        for out_features, in_features in config.sizes:
            on_shape(f"{out_features}x{in_features}")
            timings += _of_weight(config, Stage(out_features, in_features, device, dtype, cache), clock, notes)
    return LinearReport(speed, tuple(timings), tuple(notes), environment(device, dtype))


def _of_weight(config: LinearConfig, stage: Stage, clock: Stopwatch, notes: list[str]) -> list[Timing]:
    """All timings of one weight, whose copies are gone afterwards."""
    contenders = list(_contenders(config, stage, notes))
    counts = config.rows or ROWS[stage.device.type]
    return [timing for rows in counts for timing in _measure(stage, contenders, rows, clock, notes)]


def _contenders(config: LinearConfig, stage: Stage, notes: list[str]) -> Iterator[Contender]:
    yield dense(stage)
    try:
        yield torch_int4(stage)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        notes.append(_note(INT4, stage.shape, error))
    for bits in config.bits:
        yield packed(f"mixed {bits:g}", mixed_layout(stage.out_features, stage.in_features, bits), stage)
    if config.sparsity is not None:
        layout = uniform_layout(stage.in_features, 4)
        yield packed("4-bit codes", layout, stage)
        pruned = f"4-bit codes, {config.sparsity:.0%} pruned"
        yield packed(pruned, layout, stage, config.sparsity)
        yield packed(f"{pruned}, filled", layout, stage, config.sparsity, fill=True)


def _measure(
    stage: Stage, contenders: Sequence[Contender], rows: int, clock: Stopwatch, notes: list[str]
) -> Iterator[Timing]:
    """Check all results, then time all that can run."""
    x = stage.random(rows, stage.in_features, seed=1)
    errors: dict[str, float] = {}
    for contender in contenders:
        try:
            errors[contender.name] = contender.error(x)
        except (RuntimeError, ArithmeticError) as error:
            if not contender.optional or isinstance(error, torch.OutOfMemoryError):
                raise
            notes.append(_note(contender.name, stage.shape, error, rows))
    able = [contender for contender in contenders if contender.name in errors]
    seconds = clock({contender.name: contender.calls(x) for contender in able})
    around = x.nbytes + rows * stage.out_features * x.element_size()
    for c in able:
        yield Timing(stage.shape, rows, c.name, c.bits, c.nbytes + around, seconds[c.name], errors[c.name])


def _note(name: str, shape: str, error: Exception, rows: int | None = None) -> str:
    where = shape if rows is None else f"{shape}, {rows} rows"
    return f"no {name} for {where}: {str(error).splitlines()[0]}"
