"""The factor that the sweep walks along."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mpfx.stats import exact_products

_LADDER = (1, 10, 100)

_SMALLEST = 512  # channels of a triangle that is inverted as a whole


@dataclass(frozen=True)
class Factor:
    """Upper Cholesky factor U of the damped inverse: ``inverse(H + ridge * I) = U^T U``.

    Attributes:
        upper: ``(in, in)`` float32.
        damping: the fraction of the mean diagonal that was added.
        ridge: what that is.
        fallback: what had to be tried beyond the asked damping in float32; None where nothing had to.
    """

    upper: Tensor
    damping: float
    ridge: float
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
    return _climb(hessian, damping, _inverted)


def factor_diagonal(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Diagonal of the factor U alone, ``(in,)`` float32, which takes a Cholesky and no inverse of a triangle.

    Args:
        hessian: see :func:`factorise`, likewise what is raised.
        damping: likewise.
    """
    return _climb(hessian, damping, lambda lower: lower.diagonal().reciprocal().diag_embed()).upper.diagonal()


@exact_products()
def _climb(hessian: Tensor, damping: float, invert: Callable[[Tensor], Tensor]) -> Factor:
    """Find the damping at which a Hessian can be factorised.

    Args:
        hessian: see :func:`factorise`.
        damping: likewise.
        invert: from the lower Cholesky factor of the flipped Hessian, which may be overwritten, to its inverse.
    """
    if not is_finite(hessian):
        raise ValueError(
            "the Hessian of the inputs holds NaN or infinity: the calibration data or the model produces such "
            "activations; look at the perplexity of the dense model and at the compute precision."
        )
    mean = float(hessian.diagonal().mean())
    if mean <= 0:
        return Factor(
            torch.eye(len(hessian), device=hessian.device),
            0.0,
            0.0,
            "no activation ever reached the input: rounded to nearest",
        )
    tried: list[str] = []
    for dtype in (torch.float32, torch.float64):
        for fraction in (damping * step for step in _LADDER):
            upper = _upper_of_inverse(hessian.to(dtype), fraction * mean, invert)
            if upper is not None and is_finite(upper):
                fallback = f"Cholesky failed with {', '.join(tried)}" if tried else None
                return Factor(upper.float(), fraction, fraction * mean, fallback)
            tried.append(f"damping {fraction:g} in {str(dtype).removeprefix('torch.')}")
    raise ValueError(
        f"the Hessian of the inputs cannot be factorised; tried {', '.join(tried)}. Calibrate on more tokens than "
        f"{len(hessian)} (the number of input channels) or raise `damping`."
    )


def is_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite; takes no temporary of that size."""
    return not values.numel() or bool(torch.linalg.vector_norm(values, torch.inf).isfinite())


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK's Cholesky rounds differently on other numbers of threads; nothing else that a run computes does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _upper_of_inverse(hessian: Tensor, ridge: float, invert: Callable[[Tensor], Tensor]) -> Tensor | None:
    flipped = hessian.flip(0, 1)
    flipped.diagonal().add_(ridge)
    with _one_thread():
        lower, info = torch.linalg.cholesky_ex(flipped)
    del flipped  # large
    if int(info):
        return None
    upper = invert(lower).flip(0, 1)
    del lower
    return upper.contiguous()  # columns first, as the factor is handed over, whereas sweeps read rows


def _inverted(lower: Tensor) -> Tensor:
    """The inverse of a triangle, which is overwritten on CUDA devices: products are many times as fast there."""
    return invert_by_products(lower) if lower.is_cuda else _solved(lower)


def _solved(lower: Tensor) -> Tensor:
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse


def invert_by_products(lower: Tensor, smallest: int = _SMALLEST) -> Tensor:
    """Invert a lower triangle in place: halves by themselves, and what lies between them as a product.

    Args:
        lower: ``(in, in)``, zero above the diagonal.
        smallest: channels of a triangle that is not halved any more.
    """
    if len(lower) <= smallest:
        return lower.copy_(_solved(lower))
    half = len(lower) // 2
    first, below, last = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    invert_by_products(first, smallest)
    invert_by_products(last, smallest)
    below.copy_((last @ (below @ first)).neg_())
    return lower
