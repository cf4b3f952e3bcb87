"""Which of several ways to run a kernel is the fastest on a device: measured once, kept on disk."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch

from mpfx.nn.kernels.cuda.kept import cache_folder, replace

T = TypeVar("T")
_REPEATS = 5
_AHEAD = 32  # fillings of memory that keep the device busy, about a millisecond, until what is timed has been launched


def fastest(key: str, candidates: Sequence[T], run: Callable[[T], object], device: torch.device) -> T:
    """The candidate that runs shortest.

    Measured at the first call with a key on a kind of device, with caches that hold nothing of use, and kept for later
    processes in ``tuned-*.json`` of the cache folder, a file for each version of the kernels. While a CUDA graph is
    captured, or with ``MPFX_TUNE=0``, nothing is measured: then the first candidate it is.

    Args:
        key: of what is run, without the device.
        candidates: at least one, the likeliest first.
        run: runs one on the current stream.
        device: that it runs on.
    """
    name = f"{torch.cuda.get_device_name(device)}: {key}; {candidates}"
    known = _chosen().get(name)
    if isinstance(known, int) and 0 <= known < len(candidates):
        return candidates[known]
    if len(candidates) == 1 or torch.cuda.is_current_stream_capturing() or os.environ.get("MPFX_TUNE") == "0":
        return candidates[0]
    times = _times(candidates, run, device)
    _keep(name, times.index(min(times)))
    return candidates[times.index(min(times))]


def _times(candidates: Sequence[T], run: Callable[[T], object], device: torch.device) -> list[float]:
    for candidate in candidates:
        run(candidate)  # compiles it, and measures what it chooses itself
    other = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    times = []
    for candidate in candidates:
        found = []
        for _ in range(_REPEATS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(_AHEAD):
                other.zero_()
            start.record()
            run(candidate)
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
        times.append(min(found))
    return times


@cache
def _chosen() -> dict[str, Any]:
    try:
        read = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _keep(name: str, index: int) -> None:
    _chosen()[name] = index
    with suppress(OSError):  # then the next process measures again
        replace(_file(), json.dumps(_chosen(), indent=1).encode())


def _file() -> Path:
    return cache_folder() / f"tuned-{_kernels()}.json"


@cache
def _kernels() -> str:
    """What tells one version of the kernels from another: what was fast may be slow in the next one."""
    sources = [file for file in files("mpfx.nn.kernels.cuda").iterdir() if file.name.endswith((".cu", ".cuh"))]
    texts = (file.name.encode() + file.read_bytes() for file in sorted(sources, key=lambda file: file.name))
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]
