"""Seconds of calls, so that neither a cache nor the order of the measurements helps one of them.

What is compared is called on many copies of its weights in turn, together several times larger than the last-level
cache: as in a model, where no weight is still cached when its layer is called again. On a CUDA device all the calls of
a round are one CUDA graph; on the CPU each is timed by itself. Rounds of what is compared take turns, and the median
counts.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch

Call = Callable[[], Any]
"""One call of what is measured."""

Stopwatch = Callable[[Mapping[str, Sequence[Call]]], dict[str, float]]
"""Takes calls by the name of what is compared, one per copy of its weights; returns seconds per call by name."""

_MARGIN = {"cuda": 6, "cpu": 4}  # times the last-level cache
_MOST_COPIES = 1 << 14
_WARM_UP = 3  # calls: kernels are compiled and tuned at the first ones
_ROUNDS, _LEAST_ROUNDS, _SECONDS = 15, 3, 20.0
_CPU_CALLS = 8  # of a round


def copies(nbytes: int, device: torch.device, cache: int) -> int:
    """How many copies of a weight no cache can hold.

    Args:
        nbytes: of one copy.
        device: that runs it.
        cache: bytes of its last-level cache.

    Returns:
        So many that they are together more than 6 (CUDA) or 4 (CPU) times as large as the cache, and at least 2.

    Raises:
        ValueError: if the weight is too small for that.
    """
    count = max(2, _MARGIN[device.type] * cache // nbytes + 1)
    if count > _MOST_COPIES:
        raise ValueError(
            f"Expected weights that take more than {_MARGIN[device.type] * cache // _MOST_COPIES:,} bytes each, as "
            f"{_MOST_COPIES} copies must not fit into the cache ({cache:,} bytes), but one takes {nbytes:,}: "
            "choose larger `shapes`."
        )
    return count


def stopwatch(device: torch.device) -> Stopwatch:
    """The clock of a device."""
    prepare = _graph_round if device.type == "cuda" else _cpu_round

    def measure(calls: Mapping[str, Sequence[Call]]) -> dict[str, float]:
        rounds = {name: prepare(of_name) for name, of_name in calls.items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        started = time.perf_counter()
        for done in range(_ROUNDS):
            if done >= _LEAST_ROUNDS and time.perf_counter() - started > _SECONDS:
                break
            for name, run in rounds.items():
                seconds[name] += run()
        return {name: median(found) for name, found in seconds.items()}

    return measure


def _cpu_round(calls: Sequence[Call]) -> Callable[[], list[float]]:
    for call in calls[:_WARM_UP]:
        call()
    endless, count = cycle(calls), min(_CPU_CALLS, len(calls))  # the next round goes on where this one ends
    return lambda: [_seconds(call) for call in islice(endless, count)]


def _seconds(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _graph_round(calls: Sequence[Call]) -> Callable[[], list[float]]:
    graph = captured(calls)

    def run() -> list[float]:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # keeps the device busy until all that is timed has been launched
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        return [float(first.elapsed_time(last)) / 1e3 / len(calls)]

    return run


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """Record calls as one CUDA graph, after each was made as it is: first calls compile, and make tables."""
    for _ in range(_WARM_UP):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


@contextmanager
def never_waiting(device: torch.device) -> Iterator[None]:
    """Raise RuntimeError where the block waits for a CUDA device: no graph can hold that, and capturing it is fatal."""
    if device.type != "cuda":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyTorch does not find all of it
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def copy_speed(device: torch.device, cache: int, clock: Stopwatch) -> float:
    """Bytes per second, read and written, of a copy that is much larger than the cache."""
    source = torch.zeros(_MARGIN[device.type] * cache, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    seconds = clock({"copy": [lambda: target.copy_(source)] * 2})["copy"]
    return 2 * source.nbytes / seconds


_SIDE = {"cuda": 8192, "cpu": 2048}  # of the matrices


def matmul_speed(device: torch.device, dtype: torch.dtype, clock: Stopwatch) -> float:
    """Floating-point operations per second of a product of large square matrices."""
    side = _SIDE[device.type]
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)
    seconds = clock({"product": [lambda: torch.mm(left, right, out=out)] * 2})["product"]
    return 2 * side**3 / seconds
