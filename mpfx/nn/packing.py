"""Bits in, bits out: planar codes, bitmasks, and the packed form of one weight.

A block of 32 codes of b bits is stored as exactly b 32-bit words, in planes of 8, 4, 2 and 1 bits (3 = 2 + 1, 5 = 4
+ 1, 6 = 4 + 2, 7 = 4 + 2 + 1, 16 = 8 + 8), the largest plane first and holding the lowest bits of every code. Inside
a plane of p bits, code k lies at bit ``k * p`` of the plane's p words, least significant bit first. Nothing
straddles a word.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mpfx.nn.layout import RAW_BITS, SEGMENT, WIDTHS, Layout, Span, stored_bytes, words

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


def _shifts(size: int, device: torch.device) -> Tensor:
    return torch.arange(0, 32, size, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight as the sweep leaves it, channels in sweep order.

    Attributes:
        codes: int32 ``(out, in)``; in raw channels the bit pattern of a float16 value; zero where pruned.
        scales: float16 ``(out, grids)``, one column per quantized group of the layout.
        zeros: uint8 ``(out, grids)``, or None if symmetric.
        kept: bool ``(out, in)``, False where pruned; None: nothing is pruned.
        layout: of the channels.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    kept: Tensor | None
    layout: Layout

    def rows(self, index: slice | Tensor) -> "QuantizedWeight":
        """Some of the rows, or all of them in another order."""
        zeros = None if self.zeros is None else self.zeros[index]
        kept = None if self.kept is None else self.kept[index]
        return QuantizedWeight(self.codes[index], self.scales[index], zeros, kept, self.layout)

    def dequantize(self) -> Tensor:
        """Return the weight ``(out, in)`` in float32, exactly 0 where it is pruned."""
        weight = torch.empty(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        grid = 0
        for group in self.layout.groups:
            codes = self.codes[:, group.start : group.stop]
            if group.quantized:
                zero = float(1 << group.bits - 1) if self.zeros is None else self.zeros[:, grid, None].float()
                value = (codes - zero) * self.scales[:, grid, None].float()
                grid += 1
            else:
                value = codes.to(torch.int16).view(torch.float16).float()
            weight[:, group.start : group.stop] = value
        return weight if self.kept is None else weight.masked_fill_(~self.kept, 0.0)


@dataclass(frozen=True)
class PackedWeight:
    """One weight as it is stored and run; every tensor is counted in its bytes.

    Attributes:
        codes: int32 words. Without a mask ``(out, words)``: row after row, segment after segment. With a mask
            ``(words,)``: per width (ascending) one stream of the surviving codes, row after row.
        scales: float16 ``(out, grids)``.
        zeros: int32 ``(words,)``: per quantized group the packed zero points of all rows; None if symmetric.
        mask: int32 ``(out, segments)``, bit k of a word is channel k of the segment, 1 = kept; None: nothing is pruned.
        widths: uint8 ``(segments,)``.
        layout: of the channels.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    mask: Tensor | None
    widths: Tensor
    layout: Layout

    @property
    def out_features(self) -> int:
        """Number of rows."""
        return self.scales.shape[0]

    @property
    def nbytes(self) -> int:
        """Stored bytes, without the permutation that the input group shares."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros, self.mask, self.widths) if t is not None)

    @property
    def sparsity(self) -> float:
        """Share of the weights that are pruned."""
        if self.mask is None:
            return 0.0
        return 1 - float(unpack_codes(self.mask, 1, self.layout.in_features).double().mean())


def pack(weight: QuantizedWeight) -> PackedWeight:
    """Pack a solved weight; :func:`unpack` gives it back exactly."""
    layout = weight.layout
    return PackedWeight(
        codes=_pack_rows(weight) if weight.kept is None else _pack_streams(weight),
        scales=weight.scales.contiguous(),
        zeros=_pack_zeros(weight),
        mask=None if weight.kept is None else pack_codes(weight.kept, 1),
        widths=torch.tensor(layout.widths, dtype=torch.uint8, device=weight.codes.device),
        layout=layout,
    )


def unpack(packed: PackedWeight) -> QuantizedWeight:
    """Undo :func:`pack`."""
    kept = None if packed.mask is None else unpack_codes(packed.mask, 1, packed.layout.in_features).bool()
    return QuantizedWeight(
        codes=_unpack_rows(packed) if kept is None else _unpack_streams(packed, kept),
        scales=packed.scales,
        zeros=_unpack_zeros(packed),
        kept=kept,
        layout=packed.layout,
    )


def reordered_rows(packed: PackedWeight, order: Tensor) -> PackedWeight:
    """A packed weight whose row i is row ``order[i]`` of the given one, ``(out,)``."""
    return pack(unpack(packed).rows(order.to(packed.codes.device)))


def _pack_rows(weight: QuantizedWeight) -> Tensor:
    return torch.cat([pack_codes(weight.codes[:, r.start : r.stop], r.bits) for r in weight.layout.runs], 1)


def _unpack_rows(packed: PackedWeight) -> Tensor:
    parts, start = [], 0
    for run in packed.layout.runs:
        stop = start + words(run.channels, run.bits)
        parts.append(unpack_codes(packed.codes[:, start:stop], run.bits, run.channels))
        start = stop
    return torch.cat(parts, 1)


def _channels_by_width(layout: Layout, device: torch.device) -> list[tuple[int, Tensor]]:
    """Channel indices of every width, widths ascending."""
    of = torch.tensor(layout.widths, device=device).repeat_interleave(layout.segment)[: layout.in_features]
    return [(bits, (of == bits).nonzero()[:, 0]) for bits in sorted(set(layout.widths))]


def _pack_streams(weight: QuantizedWeight) -> Tensor:
    assert weight.kept is not None
    streams = []
    for bits, channels in _channels_by_width(weight.layout, weight.codes.device):
        streams.append(pack_codes(weight.codes[:, channels][weight.kept[:, channels]], bits))
    return torch.cat(streams)


def _unpack_streams(packed: PackedWeight, kept: Tensor) -> Tensor:
    codes, start = torch.zeros(kept.shape, dtype=torch.int32, device=kept.device), 0
    for bits, channels in _channels_by_width(packed.layout, kept.device):
        of_width = kept[:, channels]
        count = int(of_width.sum())
        stop = start + words(count, bits)
        part = torch.zeros(of_width.shape, dtype=torch.int32, device=kept.device)
        part[of_width] = unpack_codes(packed.codes[start:stop], bits, count)
        codes[:, channels] = part
        start = stop
    return codes


def _grids(layout: Layout) -> list[Span]:
    return [group for group in layout.groups if group.quantized]


def _pack_zeros(weight: QuantizedWeight) -> Tensor | None:
    if weight.zeros is None:
        return None
    parts = [pack_codes(weight.zeros[:, g], group.bits) for g, group in enumerate(_grids(weight.layout))]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32, device=weight.codes.device)


def _unpack_zeros(packed: PackedWeight) -> Tensor | None:
    if packed.zeros is None:
        return None
    columns, start = [], 0
    for group in _grids(packed.layout):
        stop = start + words(packed.out_features, group.bits)
        columns.append(unpack_codes(packed.zeros[start:stop], group.bits, packed.out_features))
        start = stop
    if not columns:
        return torch.empty(packed.out_features, 0, dtype=torch.uint8, device=packed.codes.device)
    return torch.stack(columns, 1).to(torch.uint8)


def validate(packed: PackedWeight) -> None:
    """Check that the tensors of a packed weight fit its layout; for data from outside.

    Raises:
        ValueError: naming the tensor, what it is, and what the layout asks for.
    """
    layout = packed.layout
    if layout.segment != SEGMENT:
        raise ValueError(f"Expected segments of {SEGMENT} channels but got {layout.segment}.")
    _validate_widths(packed.widths, layout)
    rows = _validate_scales(packed.scales, layout)
    kept = None if packed.mask is None else _count_kept(packed.mask, rows, layout)
    size = stored_bytes(layout, rows, symmetric=packed.zeros is None, kept=kept)
    columns = size.codes // 4
    _expect("codes", packed.codes, (rows, columns // rows) if kept is None else (columns,), torch.int32)
    if packed.zeros is not None:
        _expect("zeros", packed.zeros, (size.zeros // 4,), torch.int32)


def _validate_widths(widths: Tensor, layout: Layout) -> None:
    _expect("widths", widths, (len(layout.widths),), torch.uint8)
    if tuple(widths.tolist()) != layout.widths:
        raise ValueError(f"Expected `widths` to be those of the layout, {layout.widths}, but got {widths.tolist()}.")


def _validate_scales(scales: Tensor, layout: Layout) -> int:
    """Check the scales; return the number of rows, which they tell."""
    grids = len(_grids(layout))
    if scales.dim() != 2 or scales.shape[0] < 1:
        raise ValueError(
            f"Expected `scales` to be of shape (rows, {grids}) with at least 1 row but got shape {tuple(scales.shape)}."
        )
    rows = scales.shape[0]
    _expect("scales", scales, (rows, grids), torch.float16)
    if wrong := int((~(scales.isfinite() & (scales >= 0))).sum()):
        raise ValueError(
            f"Expected `scales` to be finite and not negative but {wrong} of {scales.numel()} are negative, "
            "infinite or NaN."
        )
    return rows


def _count_kept(mask: Tensor, rows: int, layout: Layout) -> tuple[int, ...]:
    """Check the mask; return the surviving weights of every run."""
    _expect("mask", mask, (rows, len(layout.widths)), torch.int32)
    alive = unpack_codes(mask, 1, layout.in_features)
    return tuple(int(alive[:, run.start : run.stop].sum()) for run in layout.runs)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"Expected `{name}` to be {dtype} of shape {shape} but got {tensor.dtype} of shape {tuple(tensor.shape)}."
        )
