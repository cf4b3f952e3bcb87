"""What solves weights where: kernels, or PyTorch."""

import logging
from functools import cache
from importlib.util import find_spec

import torch

logger = logging.getLogger("mpfx.solve")


def has_kernels(device: torch.device) -> bool:
    """Whether a device has kernels: CUDA devices do, with Triton."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    """Whether Triton is there, which comes with PyTorch's CUDA builds for Linux."""
    found = find_spec("triton") is not None
    if not found:
        logger.warning("Triton is not installed: weights are solved channel by channel in PyTorch, many times slower.")
    return found
