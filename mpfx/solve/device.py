"""What solves weights where: kernels, or PyTorch."""

import logging
from functools import cache
from importlib.util import find_spec

import torch

from mpfx.solve.grid import GridConfig
from mpfx.solve.mask import Sparsity

logger = logging.getLogger("mpfx.solve")


def has_kernels(device: torch.device) -> bool:
    """Whether a device has kernels: CUDA devices do, with Triton."""
    return device.type == "cuda" and _has_triton()


def prepare(config: GridConfig, sparsity: Sparsity, refined: bool, device: torch.device) -> None:
    """Compile what solving will need, where there is something to compile; see :func:`mpfx.solve.cuda.compile_kernels`.

    If that fails, so does solving, which raises the error.
    """
    if has_kernels(device):
        from mpfx.solve.cuda import compile_kernels

        try:
            compile_kernels(config, sparsity, refined, device)
        except Exception:
            logger.debug("kernels could not be compiled ahead", exc_info=True)


@cache
def _has_triton() -> bool:
    """Whether Triton is there, which comes with PyTorch's CUDA builds for Linux."""
    found = find_spec("triton") is not None
    if not found:
        logger.warning("Triton is not installed: weights are solved channel by channel in PyTorch, many times slower.")
    return found
