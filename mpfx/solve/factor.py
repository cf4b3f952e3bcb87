"""The factor that the sweep walks along."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

_LADDER = (1, 10, 100)


@dataclass(frozen=True)
class Factor:
    """Upper Cholesky factor U of the damped inverse: ``inverse(H + damping * mean(diag H) * I) = U^T U``.

    Attributes:
        upper: ``(in, in)`` float32.
        damping: the fraction of the mean diagonal that was added.
        fallback: what had to be tried beyond the asked damping in float32; None where nothing had to.
    """

    upper: Tensor
    damping: float
    fallback: str | None = None

    @property
    def inverse_diagonal(self) -> Tensor:
        """``diag(H^-1)``, ``(in,)``."""
        return self.upper.square().sum(0)


def factorise(hessian: Tensor, damping: float = 0.01) -> Factor:
    """Factor the inverse of a Hessian with a single Cholesky.

    With J the reversal of the channels, ``J H J = L L^T`` gives ``H = R R^T`` with ``R = J L J`` upper triangular,
    hence ``H^-1 = U^T U`` with ``U = R^-1``: no inverse of H is formed and nothing is factorised twice.

    A channel that never carried a value (zero row of H) is decoupled: it gets the damping alone and is simply rounded.

    Args:
        hessian: symmetric positive semi-definite, ``(in, in)``.
        damping: fraction of the mean diagonal to add; retried with 10 and 100 times as much, then all three in float64.

    Raises:
        ValueError: if the Hessian is not finite, or cannot be factorised after the last retry.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(
            "the Hessian of the inputs holds NaN or infinity: the calibration data or the model produces such "
            "activations; look at the perplexity of the dense model and at the compute precision."
        )
    mean = float(hessian.diagonal().mean())
    if mean <= 0:
        upper = torch.eye(len(hessian), device=hessian.device)
        return Factor(upper, 0.0, "no activation ever reached the input: rounded to nearest")
    tried: list[str] = []
    for dtype in (torch.float32, torch.float64):
        for fraction in (damping * step for step in _LADDER):
            upper, info = _upper_of_inverse(hessian.to(dtype), fraction * mean)
            if not info and bool(torch.isfinite(upper).all()):
                return Factor(upper.float(), fraction, f"Cholesky failed with {', '.join(tried)}" if tried else None)
            tried.append(f"damping {fraction:g} in {str(dtype).removeprefix('torch.')}")
    raise ValueError(
        f"the Hessian of the inputs cannot be factorised; tried {', '.join(tried)}. Calibrate on more tokens than "
        f"{len(hessian)} (the number of input channels) or raise `damping`."
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK's Cholesky rounds differently on other numbers of threads; nothing else that a run computes does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _upper_of_inverse(hessian: Tensor, ridge: float) -> tuple[Tensor, bool]:
    flipped = hessian.flip(0, 1)
    flipped.diagonal().add_(ridge)
    with _one_thread():
        lower, info = torch.linalg.cholesky_ex(flipped)
    if int(info):
        return lower, True
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1), False
