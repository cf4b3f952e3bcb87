"""The precision of products of float32 matrices."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CPU: Any = torch.backends.mkldnn  # whose attributes nobody has declared
_BACKENDS: tuple[Any, ...] = (torch.backends.cuda.matmul, _CPU.matmul)


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside, float32 matrices are multiplied in float32, whatever `torch.set_float32_matmul_precision` asks for.

    Hessians, their factors and the errors that a sweep pushes on need the digits that TF32 and bfloat16 leave away; the
    model itself runs as its user wants.
    """
    before, of_all = [backend.fp32_precision for backend in _BACKENDS], _precision_of_all()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(of_all)
        for backend, precision in zip(_BACKENDS, before, strict=True):
            backend.fp32_precision = precision


def _precision_of_all() -> str:
    """What is set for all backends, as PyTorch remembers it; it does not tell where one was then set on its own."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"
