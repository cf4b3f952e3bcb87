"""Statistics of experts that saw few tokens, topped up with those of all experts together."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from mpfx.stats.moments import MomentAccumulator, Moments


def pooled(accumulators: Sequence[MomentAccumulator]) -> MomentAccumulator:
    """Merge accumulators of inputs with the same channels into a new one; they are left as they are.

    Args:
        accumulators: at least one; the result lies on the device of the first.

    Raises:
        ValueError: if there is none.
    """
    if not accumulators:
        raise ValueError("Expected at least one accumulator to pool but got none.")
    total = copy.deepcopy(accumulators[0])
    for accumulator in accumulators[1:]:
        total.merge(accumulator)
    return total


def topped_up(moments: Moments | None, pool: Moments, needed: int) -> tuple[Moments, str | None]:
    """Fill up the statistics of an expert that saw too few tokens, as if the missing ones were of the pool's kind.

    Args:
        moments: of the expert; None if it saw no token at all.
        pool: of all experts of the stack together.
        needed: tokens that suffice, for example the number of input channels.

    Returns:
        The statistics of ``max(needed, n)`` tokens, and a sentence for the report if some are the pool's.

    Raises:
        ValueError: if ``needed`` is negative, or the two differ in their channels.
    """
    if needed < 0:
        raise ValueError(f"Expected `needed` to be at least 0 tokens but got {needed}.")
    if moments is None or moments.tokens == 0:
        return pool, f"saw no token; it takes the statistics of all experts ({pool.tokens} tokens)"
    if moments.hessian.shape != pool.hessian.shape:
        raise ValueError(
            f"Expected the statistics of the pool to have {moments.hessian.shape[0]} channels but they have "
            f"{pool.hessian.shape[0]}."
        )
    if moments.tokens >= needed:
        return moments, None
    share = 1 - moments.tokens / needed
    note = f"saw {moments.tokens} of {needed} tokens that its statistics need; {share:.0%} pooled from all experts"
    return _mixed(moments, pool, needed, share), note


def _mixed(own: Moments, pool: Moments, tokens: int, share: float) -> Moments:
    """Statistics of own tokens and, in place of ``share`` of all, tokens like the pool's."""

    def mix(name: str) -> Tensor:
        mine: Tensor = getattr(own, name)
        return torch.lerp(mine, getattr(pool, name).to(mine.device), share)

    # The spread between the two means is part of the variance of both sets together.
    between = (own.mean - pool.mean.to(own.mean.device)).square() * (share * (1 - share))
    return Moments(
        hessian=mix("hessian"),
        mean_abs=mix("mean_abs"),
        mean=mix("mean"),
        variance=mix("variance") + between,
        tokens=tokens,
    )
