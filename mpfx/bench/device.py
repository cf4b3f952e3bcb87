"""Where a measurement runs: device and dtype by name, the size of its caches, and what a report says of it."""

import platform
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

DTYPES = ("float32", "float16", "bfloat16")
"""What a layer can be measured in."""

_CACHES = "/sys/devices/system/cpu"
_UNKNOWN_CACHE = 256 << 20  # where the system does not tell: no smaller than most


def device_of(name: str | None) -> torch.device:
    """Find a device; without a name a CUDA device if there is one, else the CPU.

    Raises:
        ValueError: if it is neither a CPU nor a CUDA device, or is not there.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"Expected `device` to be cpu, cuda or cuda:<number> but got {name!r}.")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise ValueError(
            f"Expected `device` {name!r} to be there but PyTorch {torch.__version__} finds {count} CUDA devices: "
            "choose another, or `cpu`."
        )
    return torch.device("cuda", int(number or 0))


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one: events and graphs belong to that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """Find a dtype; without a name bfloat16 on CUDA devices and float32 on the CPU.

    Raises:
        ValueError: if it is none that layers are measured in.
    """
    if name is None:
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name not in DTYPES:
        raise ValueError(f"Expected `dtype` to be one of {', '.join(DTYPES)} but got {name!r}.")
    found: torch.dtype = getattr(torch, name)
    return found


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache: L2 of a CUDA device; of a CPU all its last-level caches together."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return _cpu_cache(Path(_CACHES)) or _UNKNOWN_CACHE


def _cpu_cache(folder: Path) -> int:
    """Sum of the last-level caches that Linux lists with their sizes; 0 where it lists none."""
    found: dict[tuple[int, str], int] = {}  # by level and the cores that share it: each once
    for cache in folder.glob("cpu[0-9]*/cache/index[0-9]*"):
        files = [cache / name for name in ("level", "shared_cpu_list", "size")]
        if all(file.is_file() for file in files):  # not every processor tells the size
            level, shared, size = (file.read_text(encoding="ascii").strip() for file in files)
            found[int(level), shared] = int(size.removesuffix("K")) << 10
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last)


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """What a figure depends on besides its command: device, dtype, cache and versions."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "cache_bytes": last_level_cache(device),
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("mpfx", "numba", "transformers")},
    }


def _cpu_name() -> str:
    """What Linux calls the processor; the architecture elsewhere."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
