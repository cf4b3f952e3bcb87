"""Packed weights of random bits: any size, any mean of stored bits, no dense weight needed to make them."""

from bisect import bisect_left
from math import comb

import torch
from torch import Tensor

from mpfx.nn import SEGMENT, CodedScales, Layout, PackedWeight, pack_permutation, permutation_bytes, stored_bytes
from mpfx.nn.layout import SCALE_BITS, scale_shapes
from mpfx.nn.packing import count_kept
from mpfx.nn.planes import pack_mask

GROUP = 64
"""Channels that share a scale."""

MIXED = (3, 4, 5, 6)
"""Widths that a weight mixes, about as plans for some 4 bits do."""


def stored_bits(nbytes: int, out_features: int, in_features: int) -> float:
    """Stored bits per weight."""
    return 8 * nbytes / (out_features * in_features)


def uniform_layout(in_features: int, bits: int) -> Layout:
    """All channels of one width."""
    return Layout(in_features, (bits,) * -(-in_features // SEGMENT), GROUP)


def mixed_layout(out_features: int, in_features: int, bits: float) -> Layout:
    """Mix widths of 3 to 6 bits, so many of each as in a binomial distribution.

    Args:
        out_features: rows of the weight.
        in_features: its channels.
        bits: wanted stored bits per weight: codes, scales, zero points, widths and a permutation of its own.

    Returns:
        The layout that comes closest: a group of 64 channels, one bit wider, is a step.

    Raises:
        ValueError: if these widths make no such size.
    """
    groups = -(-in_features // GROUP)

    def size(steps: int) -> float:
        counted = stored_bytes(_stepped(in_features, groups, steps), out_features, symmetric=False).total
        return stored_bits(counted + permutation_bytes(in_features), out_features, in_features)

    most = groups * (MIXED[-1] - MIXED[0])
    if not size(0) <= bits <= size(most):
        raise ValueError(
            f"Expected `bits` from {size(0):.3f} to {size(most):.3f} for a weight of {out_features}x{in_features}, "
            f"whose codes have {MIXED[0]} to {MIXED[-1]} bits, but got {bits}."
        )
    above = bisect_left(range(most + 1), bits, key=size)
    return _stepped(in_features, groups, min((max(above - 1, 0), above), key=lambda steps: abs(size(steps) - bits)))


def _stepped(in_features: int, groups: int, steps: int) -> Layout:
    """A layout whose groups are together so many bits wider than if each had the least width; wide ones first."""
    top = MIXED[-1] - MIXED[0]
    share = steps / (groups * top)
    chances = [comb(top, k) * share**k * (1 - share) ** (top - k) for k in range(top + 1)]
    reaching, wanted, given = [], 0.0, 0  # how many groups are k bits wider, or more, for k from 1
    for k in range(1, top + 1):
        wanted += groups * sum(chances[k:])
        reaching.append(round(wanted) - given)  # what is rounded off here, the next one gets
        given += reaching[-1]
    widths = [MIXED[0] + sum(group < count for count in reaching) for group in range(groups)]
    per_group = GROUP // SEGMENT
    segments = [bits for bits in widths for _ in range(per_group)]
    return Layout(in_features, tuple(segments[: -(-in_features // SEGMENT)]), GROUP)


def random_weight(
    layout: Layout, out_features: int, generator: torch.Generator, *, sparsity: float | None = None
) -> PackedWeight:
    """A weight of random codes, zero points and coded scales, on the device of the generator.

    Args:
        layout: of its channels.
        out_features: rows.
        generator: of the random numbers.
        sparsity: share of the weights that a random bitmask prunes; None: no bitmask.

    Returns:
        Its values are about as large as those of a freshly initialised layer: outputs are of the size of the inputs.
    """
    device = generator.device
    mask = None if sparsity is None else _random_mask(layout, out_features, sparsity, generator)
    kept = None if mask is None else count_kept(mask, out_features, layout)
    size = stored_bytes(layout, out_features, symmetric=False, kept=kept)
    shapes = scale_shapes(layout, out_features, SCALE_BITS)

    def bases(name: str) -> Tensor:
        return torch.rand(shapes[name], generator=generator, device=device) + 0.5

    codes = _random_words(size.codes // 4, generator)
    return PackedWeight(
        codes=codes.view(-1, out_features) if mask is None else codes,
        scales=CodedScales(
            codes=_random_words(shapes["scale_codes"][0], generator),
            row=(4 * bases("row_scales") / layout.in_features**0.5).half(),
            group=bases("group_scales").half(),
        ),
        zeros=_random_words(size.zeros // 4, generator),
        mask=mask,
        widths=torch.tensor(layout.widths, dtype=torch.uint8, device=device),
        layout=layout,
    )


def _random_words(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, (count,), dtype=torch.int32, generator=generator, device=generator.device)


def _random_mask(layout: Layout, rows: int, sparsity: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(rows, layout.in_features, generator=generator, device=generator.device) >= sparsity
    return pack_mask(kept)


def random_order(in_features: int, generator: torch.Generator) -> Tensor:
    """A permutation of the channels, as modules hold it."""
    return pack_permutation(torch.randperm(in_features, generator=generator, device=generator.device))
