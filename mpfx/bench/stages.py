"""Seconds and peak memory of the stages of a compression: clocks around functions, for the time of a measurement."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from mpfx.callbacks import calibration
from mpfx.passes import (
    Allocate,
    FoldPermutations,
    FoldScales,
    Pack,
    PruneAndQuantize,
    Ranks,
    frontier,
    pipeline,
    solve,
)
from mpfx.report import peak_memory_bytes, reset_peak_memory
from mpfx.stats import MomentAccumulator

OBSERVE, ALLOCATE, SOLVE = "observe", "allocate", "solve"
HESSIAN = "Hessian"
SHARE = "share"

_STAGES: tuple[tuple[Any, str, str], ...] = (
    (calibration, "located_graph", "trace"),
    (calibration, "sense_by_blocks", "sense"),
    (pipeline, "dense_moments", OBSERVE),
    (Allocate, "__call__", ALLOCATE),
    (FoldScales, "__call__", "scale"),
    (PruneAndQuantize, "__call__", SOLVE),
    (Pack, "__call__", "pack"),
    (FoldPermutations, "__call__", "fold"),
)
"""What holds a function, its name there, and that of the stage."""

_PARTS: tuple[tuple[Any, str, str], ...] = (
    (MomentAccumulator, "update", HESSIAN),
    (frontier, "factor_diagonal", "factor"),
    (frontier, "with_curves", "curves"),
    (solve, "factorise", "factor"),
    (solve, "measured_sweep", "sweep"),
    (solve, "measured_refine", "refine"),
    (solve, "pack", "encode"),
    (solve, "layer_error", "error"),
    (Ranks, "_exchanged", SHARE),
    (Ranks, "_reduced", SHARE),
)
"""Likewise of parts of stages."""


@dataclass
class Stage:
    """What a stage, or a part of one, took.

    Attributes:
        seconds: in all its calls.
        peak: most bytes of memory in use: allocated on a CUDA device, of this process on the CPU.
    """

    seconds: float = 0.0
    peak: int = 0


class Meter:
    """Measures stages that lie in one another.

    Args:
        device: that works; it is waited for at the bounds of every stage.

    Attributes:
        stages: by name, ``solve/sweep`` for a part.
    """

    def __init__(self, device: torch.device) -> None:
        self.stages: dict[str, Stage] = defaultdict(Stage)
        self._device = device
        self._open: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add what the block takes to a stage, inside of the one that is open."""
        self._note_peak()
        self._open.append(f"{self._open[-1]}/{name}" if self._open else name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.stages[self._open[-1]].seconds += time.perf_counter() - started
            self._note_peak()
            self._open.pop()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _note_peak(self) -> None:
        """Give the peak since the last call to all open stages."""
        self._wait()
        peak = peak_memory_bytes(self._device)
        for name in self._open:
            self.stages[name].peak = max(self.stages[name].peak, peak)
        reset_peak_memory(self._device)

    @contextmanager
    def watching(self, parts: bool) -> Iterator[None]:
        """Measure a compression that runs in the block.

        Args:
            parts: whether also the parts of stages: waiting for the device at their bounds takes time.
        """
        with ExitStack() as stack:
            for holder, name, stage in (*_STAGES, *(_PARTS if parts else ())):
                original = vars(holder)[name]
                setattr(holder, name, self._measured(original, stage))
                stack.callback(setattr, holder, name, original)
            yield

    def _measured(self, original: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.stage(stage):
                result = original(*args, **kwargs)
            return self._each(result, stage) if isinstance(result, Iterator) else result

        return run

    def _each(self, items: Iterator[Any], stage: str) -> Iterator[Any]:
        """Measure what makes items when they are asked for."""
        end = object()
        while True:
            with self.stage(stage):
                item = next(items, end)
            if item is end:
                return
            yield item
