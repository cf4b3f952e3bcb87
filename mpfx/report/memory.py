"""Peak memory of this process or its accelerator."""

import sys
from pathlib import Path

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory held so far, or since the last `reset_peak_memory`.

    Allocated on a CUDA device, else resident in this process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> bool:
    """Let the peak be what is held now; False where the system cannot (only Linux can, for a process)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
