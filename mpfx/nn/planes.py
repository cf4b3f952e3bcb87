"""Bits in, bits out: planar codes, and masks.

A block of 32 codes of b bits is stored as exactly b 32-bit words, in planes of 8, 4, 2 and 1 bits (3 = 2 + 1, 5 = 4
+ 1, 6 = 4 + 2, 7 = 4 + 2 + 1, 16 = 8 + 8), the largest plane first and holding the lowest bits of every code. Each of
the p words of a plane of p bits holds 32 / p codes, and code k of a word lies at bit ``8 * (k % 4) + p * (k // 4)``: so
codes 4i .. 4i+3 are the four bytes of ``word >> (p * i)``, masked, whatever p is. Nothing straddles a byte.

A mask has one word per segment of 32 channels and row: bit k stands for channel k of the segment, 1 if it is kept.
"""

import torch
from torch import Tensor

from mpfx.nn.layout import RAW_BITS, WIDTHS

PLANES: dict[int, tuple[int, ...]] = {
    bits: (8,) * (bits // 8) + tuple(p for p in (4, 2, 1) if bits % 8 & p) for bits in (*WIDTHS, RAW_BITS)
}
"""Plane sizes of every width, in the order they are stored."""


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into planar 32-bit words.

    Args:
        codes: integers in ``0 .. 2**bits - 1``, shape ``(..., count)``; padded with zeros to whole blocks of 32.
        bits: width, 1..8 or 16.

    Returns:
        int32 words, shape ``(..., ceil(count / 32) * bits)``.
    """
    padding = -codes.shape[-1] % 32
    blocks = torch.nn.functional.pad(codes.to(torch.int32), (0, padding)).unflatten(-1, (-1, 32))  # (..., B, 32)
    planes, low = [], 0
    for size in PLANES[bits]:
        plane = (blocks >> low) & ((1 << size) - 1)
        fields = plane.unflatten(-1, (size, 32 // size)) << _shifts(size, codes.device)  # (..., B, words, fields)
        planes.append(fields.sum(-1, dtype=torch.int32))  # disjoint bits: the sum is the bitwise or
        low += size
    return torch.cat(planes, -1).flatten(-2)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo :func:`pack_codes`.

    Args:
        packed: int32 words, shape ``(..., words)``.
        bits: width, 1..8 or 16.
        count: codes to return per row.

    Returns:
        int32 codes, shape ``(..., count)``.
    """
    blocks = packed.unflatten(-1, (-1, bits))  # (..., B, bits)
    codes, low, word = None, 0, 0
    for size in PLANES[bits]:
        fields = blocks[..., word : word + size, None] >> _shifts(size, packed.device)
        plane = (fields & ((1 << size) - 1)).flatten(-2) << low  # (..., B, 32)
        codes = plane if codes is None else codes | plane
        low, word = low + size, word + size
    assert codes is not None
    flat: Tensor = codes.flatten(-2)
    return flat[..., :count]


def pack_mask(kept: Tensor) -> Tensor:
    """Pack a mask.

    Args:
        kept: bool ``(rows, in)``.

    Returns:
        int32 words ``(segments, rows)``; bits behind the last channel are 0.
    """
    bits = torch.nn.functional.pad(kept.to(torch.int32), (0, -kept.shape[1] % 32)).unflatten(1, (-1, 32))
    words: Tensor = (bits << torch.arange(32, dtype=torch.int32, device=kept.device)).sum(-1, dtype=torch.int32)
    return words.t().contiguous()


def unpack_mask(words: Tensor, channels: int) -> Tensor:
    """Undo :func:`pack_mask`.

    Args:
        words: int32 ``(segments, rows)``.
        channels: to return per row.

    Returns:
        bool ``(rows, channels)``.
    """
    bits = words.t().unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    kept: Tensor = bits.flatten(1)[:, :channels].bool()
    return kept


def last_word(channels: int) -> int:
    """Which bits of the last segment's words of a mask stand for channels, as an unsigned number of 32 bits."""
    return (1 << (channels % 32 or 32)) - 1


def _shifts(size: int, device: torch.device) -> Tensor:
    """Where the codes of a word lie in it, ``(32 / size,)``."""
    code = torch.arange(32 // size, dtype=torch.int32, device=device)
    return code % 4 * 8 + code // 4 * size
