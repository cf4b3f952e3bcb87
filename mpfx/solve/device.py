"""What solves weights where: kernels, or PyTorch."""

import logging
import os
from functools import cache
from importlib.util import find_spec
from shutil import which

import torch

from mpfx.solve.grid import GridConfig
from mpfx.solve.mask import Sparsity

logger = logging.getLogger("mpfx.solve")

_COMPILERS = ("gcc", "clang", "cc")  # that Triton looks for, unless CC names one


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
    """Whether there is Triton, which comes with PyTorch's CUDA builds for Linux, and a compiler, which it needs."""
    if find_spec("triton") is None:
        lacks = "Triton is not installed"
    elif not (os.environ.get("CC") or any(map(which, _COMPILERS))):
        lacks = f"Triton needs a C compiler, but there is none of {', '.join(_COMPILERS)}, nor does CC name one"
    else:
        return True
    logger.warning("%s: weights are solved channel by channel in PyTorch, many times slower.", lacks)
    return False
