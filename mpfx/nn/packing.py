"""The packed form of one weight, and its way there and back."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from mpfx.nn.layout import LEFT_OUT, SCALE_BITS, SEGMENT, Layout, Span, scale_shapes, stored_bytes, words
from mpfx.nn.planes import last_word, pack_codes, pack_mask, unpack_codes, unpack_mask
from mpfx.nn.scales import CodedScales, Scales, decoded, scale_rows

FLOAT_PARTS = ("scales", "row_scales", "group_scales")
"""Those of the parts that are float16 and stay so, whatever dtype a module computes in."""

PARTS = ("codes", "scales", "scale_codes", "row_scales", "group_scales", "zeros", "mask", "widths")
"""Names of the tensors of a packed weight."""


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight as the sweep leaves it, channels in sweep order.

    Attributes:
        codes: int32 ``(out, in)``; in raw channels the bit pattern of a float16 value; zero where pruned or left out.
        scales: float16 ``(out, grids)``, one column per quantized group of the layout; or coded.
        zeros: uint8 ``(out, grids)``, or None if symmetric.
        kept: bool ``(out, in)``, False where pruned; None: nothing is pruned.
        layout: of the channels.
    """

    codes: Tensor
    scales: Scales
    zeros: Tensor | None
    kept: Tensor | None
    layout: Layout

    def rows(self, index: slice | Tensor) -> "QuantizedWeight":
        """Some of the rows, or all of them in another order."""
        zeros = None if self.zeros is None else self.zeros[index]
        kept = None if self.kept is None else self.kept[index]
        return QuantizedWeight(self.codes[index], scale_rows(self.scales, index), zeros, kept, self.layout)

    def dequantize(self) -> Tensor:
        """Return the weight ``(out, in)`` in float32, exactly 0 where it is pruned or left out."""
        weight = torch.zeros(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        scales, grid = decoded(self.scales, self.layout), 0
        # Adjacent groups of one kind in one go.
        for (bits, channels), alike in groupby(self.layout.groups, key=lambda group: (group.bits, group.channels)):
            groups = list(alike)
            inside, grids = slice(groups[0].start, groups[-1].stop), slice(grid, grid + len(groups))
            codes = self.codes[:, inside]
            if groups[0].quantized:
                zero = float(1 << bits - 1) if self.zeros is None else self.zeros[:, grids, None].float()
                values = (codes.unflatten(1, (-1, channels)) - zero).mul_(scales[:, grids, None])
                weight[:, inside] = values.flatten(1)
                grid += len(groups)
            elif bits != LEFT_OUT:
                weight[:, inside] = codes.to(torch.int16).view(torch.float16).float()
        return weight if self.kept is None else weight.masked_fill_(~self.kept, 0.0)


@dataclass(frozen=True)
class PackedWeight:
    """One weight as it is stored and run; every tensor is counted in its bytes.

    Attributes:
        codes: int32 words. Without a mask ``(words, out)``: segment after segment, every word of a segment for all
            rows side by side, as a kernel whose lanes are rows reads them. With a mask ``(words,)``: per width
            (ascending) one stream of the surviving codes, segment after segment, in these row after row. Segments that
            are left out have none.
        scales: float16 ``(out, grids)``, one column per quantized group; or coded.
        zeros: int32 ``(words,)``: per quantized group the packed zero points of all rows; None if symmetric.
        mask: int32 ``(segments, out)``, bit k for channel k of the segment, 1 = kept, all 0 where the segment is left
            out; None: nothing is pruned within the others.
        widths: uint8 ``(segments,)``.
        layout: of the channels.
    """

    codes: Tensor
    scales: Scales
    zeros: Tensor | None
    mask: Tensor | None
    widths: Tensor
    layout: Layout

    @classmethod
    def of(cls, parts: Mapping[str, Tensor | None], layout: Layout) -> "PackedWeight":
        """Put the tensors of :attr:`parts` together.

        Raises:
            ValueError: if one is missing, or the scales are neither float16 nor coded, but both.
        """
        codes, widths = parts.get("codes"), parts.get("widths")
        if codes is None or widths is None:
            raise ValueError("Expected `codes` and `widths` but one of them is missing.")
        return cls(codes, _scales_of(parts), parts.get("zeros"), parts.get("mask"), widths, layout)

    @property
    def parts(self) -> dict[str, Tensor | None]:
        """The tensors by name, as modules and checkpoints hold them; None for those that this weight lacks.

        Coded scales are ``scale_codes``, ``row_scales`` and ``group_scales``.
        """
        scales = self.scales
        coded = scales if isinstance(scales, CodedScales) else None
        return {
            "codes": self.codes,
            "scales": None if isinstance(scales, CodedScales) else scales,
            "scale_codes": None if coded is None else coded.codes,
            "row_scales": None if coded is None else coded.row,
            "group_scales": None if coded is None else coded.group,
            "zeros": self.zeros,
            "mask": self.mask,
            "widths": self.widths,
        }

    def to(self, device: torch.device) -> "PackedWeight":
        """The same weight on another device."""
        moved = {name: None if part is None else part.to(device) for name, part in self.parts.items()}
        return PackedWeight.of(moved, self.layout)

    @property
    def out_features(self) -> int:
        """Number of rows."""
        return len(self.scales if isinstance(self.scales, Tensor) else self.scales.row)

    @property
    def nbytes(self) -> int:
        """Stored bytes, without the permutation that the input group shares."""
        return sum(part.nbytes for part in self.parts.values() if part is not None)

    @property
    def sparsity(self) -> float:
        """Share of the weights that are pruned or left out."""
        if self.mask is None:
            left_out = sum(run.channels for run in self.layout.runs if run.bits == LEFT_OUT)
            return left_out / self.layout.in_features
        return 1 - float(unpack_mask(self.mask, self.layout.in_features).double().mean())


def _scales_of(parts: Mapping[str, Tensor | None]) -> Scales:
    scales, codes, row, group = (parts.get(name) for name in ("scales", "scale_codes", "row_scales", "group_scales"))
    if scales is not None and codes is None and row is None and group is None:
        return scales
    if scales is not None or codes is None or row is None or group is None:
        raise ValueError(
            "Expected either `scales`, or `scale_codes`, `row_scales` and `group_scales`, but some of them are missing "
            "or there are both."
        )
    return CodedScales(codes, row, group)


def pack(weight: QuantizedWeight) -> PackedWeight:
    """Pack a solved weight; :func:`unpack` gives it back exactly."""
    layout = weight.layout
    return PackedWeight(
        codes=_pack_rows(weight) if weight.kept is None else _pack_streams(weight),
        scales=weight.scales.contiguous() if isinstance(weight.scales, Tensor) else weight.scales,
        zeros=_pack_zeros(weight),
        mask=None if weight.kept is None else pack_mask(weight.kept),
        widths=torch.tensor(layout.widths, dtype=torch.uint8, device=weight.codes.device),
        layout=layout,
    )


def unpack(packed: PackedWeight) -> QuantizedWeight:
    """Undo :func:`pack`."""
    kept = None if packed.mask is None else unpack_mask(packed.mask, packed.layout.in_features)
    return QuantizedWeight(
        codes=_unpack_rows(packed) if kept is None else _unpack_streams(packed, kept),
        scales=packed.scales,
        zeros=_unpack_zeros(packed),
        kept=kept,
        layout=packed.layout,
    )


def filled(weight: PackedWeight) -> PackedWeight:
    """The same weight without its mask: every pruned weight of a grid has the zero point as code, a raw one is 0.0.

    Both stand for 0, so it dequantizes to the same bits; which weights were pruned is forgotten, and ``sparsity`` is
    that of what is left out. One without a mask is returned as it is.

    Returns:
        A weight with codes of its own; its other tensors are those of the weight given.
    """
    if weight.mask is None:
        return weight
    loose = unpack(weight)
    codes, kept, zeros = loose.codes, loose.kept, loose.zeros
    assert kept is not None
    for grid, group in enumerate(weight.layout.grids):  # raw channels have zeros where nothing was stored
        inside = slice(group.start, group.stop)
        zero = 1 << group.bits - 1 if zeros is None else zeros[:, grid, None].int()
        codes[:, inside] = torch.where(kept[:, inside], codes[:, inside], zero)
    return replace(weight, codes=_pack_rows(loose), mask=None)


def own_order(weight: Tensor, permutation: Tensor | None) -> Tensor:
    """Columns of a weight ``(out, in)`` in the input's own order, where column k stands for ``permutation[k]``."""
    if permutation is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, permutation.long(), weight)


def reordered_rows(packed: PackedWeight, order: Tensor) -> PackedWeight:
    """A packed weight whose row i is row ``order[i]`` of the given one, ``(out,)``."""
    return pack(unpack(packed).rows(order.to(packed.codes.device)))


def _pack_rows(weight: QuantizedWeight) -> Tensor:
    parts = [pack_codes(weight.codes[:, r.start : r.stop], r.bits) for r in _stored(weight.layout)]
    return torch.cat([weight.codes[:, :0], *parts], 1).t().contiguous()


def _unpack_rows(packed: PackedWeight) -> Tensor:
    shape = (packed.out_features, packed.layout.in_features)
    codes, start = torch.zeros(shape, dtype=torch.int32, device=packed.codes.device), 0
    for run in _stored(packed.layout):
        stop = start + words(run.channels, run.bits)
        codes[:, run.start : run.stop] = unpack_codes(packed.codes[start:stop].t(), run.bits, run.channels)
        start = stop
    return codes


def _stored(layout: Layout) -> list[Span]:
    """Runs that have codes."""
    return [run for run in layout.runs if run.bits != LEFT_OUT]


def _segments_by_width(layout: Layout, device: torch.device) -> list[tuple[int, Tensor]]:
    """Indices of the segments of every width that has codes, widths ascending."""
    of = torch.tensor(layout.widths, device=device)
    return [(bits, (of == bits).nonzero()[:, 0]) for bits in sorted({run.bits for run in _stored(layout)})]


def _by_segment(values: Tensor, segment: int) -> Tensor:
    """``(rows, in)`` as ``(segments, rows, segment)``, the last segment filled up with zeros."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % segment))
    by_segment: Tensor = padded.unflatten(1, (-1, segment)).transpose(0, 1)
    return by_segment


def _pack_streams(weight: QuantizedWeight) -> Tensor:
    assert weight.kept is not None
    codes, kept = (_by_segment(part, weight.layout.segment) for part in (weight.codes, weight.kept))
    streams = [torch.empty(0, dtype=torch.int32, device=weight.codes.device)]
    for bits, segments in _segments_by_width(weight.layout, weight.codes.device):
        streams.append(pack_codes(codes[segments][kept[segments]], bits))
    return torch.cat(streams)


def _unpack_streams(packed: PackedWeight, kept: Tensor) -> Tensor:
    layout, by_segment, start = packed.layout, _by_segment(kept, packed.layout.segment), 0
    codes = torch.zeros(by_segment.shape, dtype=torch.int32, device=kept.device)
    for bits, segments in _segments_by_width(layout, kept.device):
        of_width = by_segment[segments]
        count = int(of_width.sum())
        stop = start + words(count, bits)
        part = torch.zeros(of_width.shape, dtype=torch.int32, device=kept.device)
        part[of_width] = unpack_codes(packed.codes[start:stop], bits, count)
        codes[segments] = part
        start = stop
    return codes.transpose(0, 1).flatten(1)[:, : layout.in_features].contiguous()


def _pack_zeros(weight: QuantizedWeight) -> Tensor | None:
    if weight.zeros is None:
        return None
    parts, start = [weight.codes.new_empty(0, dtype=torch.int32)], 0
    for bits, count in _grids_alike(weight.layout):
        parts.append(pack_codes(weight.zeros[:, start : start + count].t(), bits).flatten())
        start += count
    return torch.cat(parts)


def _unpack_zeros(packed: PackedWeight) -> Tensor | None:
    if packed.zeros is None:
        return None
    parts, start = [torch.empty(0, packed.out_features, dtype=torch.uint8, device=packed.codes.device)], 0
    for bits, count in _grids_alike(packed.layout):
        stop = start + count * words(packed.out_features, bits)
        of_width = unpack_codes(packed.zeros[start:stop].view(count, -1), bits, packed.out_features)
        parts.append(of_width.to(torch.uint8))
        start = stop
    return torch.cat(parts).t().contiguous()


def _grids_alike(layout: Layout) -> list[tuple[int, int]]:
    """Width and number of adjacent grids of one width."""
    return [(bits, len(list(alike))) for bits, alike in groupby(layout.grids, key=lambda group: group.bits)]


def validate(packed: PackedWeight) -> None:
    """Check that the tensors of a packed weight fit its layout; for data from outside.

    Scales, codes and zero points may be on the meta device: then their sizes are checked.

    Raises:
        ValueError: naming the tensor, what it is, and what the layout asks for.
    """
    layout = packed.layout
    if layout.segment != SEGMENT:
        raise ValueError(f"Expected segments of {SEGMENT} channels but got {layout.segment}.")
    _validate_widths(packed.widths, layout)
    rows, scale_bits = _validate_scales(packed, layout)
    kept = None if packed.mask is None else count_kept(packed.mask, rows, layout)
    size = stored_bytes(layout, rows, symmetric=packed.zeros is None, scale_bits=scale_bits, kept=kept)
    columns = size.codes // 4
    _expect("codes", packed.codes, (columns // rows, rows) if kept is None else (columns,), torch.int32)
    if packed.zeros is not None:
        _expect("zeros", packed.zeros, (size.zeros // 4,), torch.int32)


def _validate_widths(widths: Tensor, layout: Layout) -> None:
    _expect("widths", widths, (len(layout.widths),), torch.uint8)
    if tuple(widths.tolist()) != layout.widths:
        raise ValueError(f"Expected `widths` to be those of the layout, {layout.widths}, but got {widths.tolist()}.")


def _validate_scales(packed: PackedWeight, layout: Layout) -> tuple[int, int]:
    """Check the scales; return the number of rows, which they tell, and their width."""
    coded = isinstance(packed.scales, CodedScales)
    parts = {name: part for name, part in packed.parts.items() if part is not None}
    name, sizes = ("row_scales", "(rows,)") if coded else ("scales", f"(rows, {len(layout.grids)})")
    telling, scale_bits = parts[name], SCALE_BITS if coded else 16
    if telling.dim() != (1 if coded else 2) or len(telling) < 1:
        raise ValueError(
            f"Expected `{name}` to be of shape {sizes} with at least 1 row but got shape {tuple(telling.shape)}."
        )
    for part, shape in scale_shapes(layout, len(telling), scale_bits).items():
        _expect(part, parts[part], shape, torch.float16 if part in FLOAT_PARTS else torch.int32)
        if part in FLOAT_PARTS:
            _validate_values(part, parts[part])
    return len(telling), scale_bits


def _validate_values(name: str, scales: Tensor) -> None:
    if scales.is_meta or not scales.numel():
        return  # has no values, or none yet
    least, most = scales.aminmax()  # NaN where there is one; no temporary as large as the scales
    if not (least >= 0 and most < torch.inf):
        wrong = int((~(scales.isfinite() & (scales >= 0))).sum())
        raise ValueError(
            f"Expected `{name}` to be finite and not negative but {wrong} of {scales.numel()} are negative, "
            "infinite or NaN."
        )


def count_kept(mask: Tensor, rows: int, layout: Layout) -> tuple[int, ...]:
    """Check a mask; return the surviving weights of every run.

    Raises:
        ValueError: if it is not int32 ``(segments, rows)``, or keeps weights of segments that are left out.
    """
    _expect("mask", mask, (len(layout.widths), rows), torch.int32)
    counts = _segment_counts(mask, layout)
    kept = tuple(sum(counts[run.start // SEGMENT : -(-run.stop // SEGMENT)]) for run in layout.runs)
    if any(count for count, run in zip(kept, layout.runs, strict=True) if run.bits == LEFT_OUT):
        raise ValueError("Expected `mask` to keep nothing of the segments that are left out but it does.")
    return kept


def _segment_counts(mask: Tensor, layout: Layout) -> list[int]:
    """Bits that are set, by segment.

    In Python's integers, one segment at a time: unpacking would take 32 times as much memory, and blocks as large as a
    mask would leave holes in the heap, so that checking a whole model took the memory of all masks once more.
    """
    segments = list(mask.cpu().numpy().view("uint32"))
    segments[-1] = segments[-1] & last_word(layout.in_features)
    return [int.from_bytes(segment.tobytes(), "little").bit_count() for segment in segments]


def survivors(mask: Tensor, layout: Layout) -> Tensor:
    """Count the bits of a mask by segment and row, on its own device.

    Args:
        mask: int32 ``(segments, rows)``.
        layout: of its channels; bits that stand for none are not counted.

    Returns:
        int32 ``(segments, rows)``.
    """
    bits = mask.clone()
    if layout.in_features % SEGMENT:
        bits[-1] &= last_word(layout.in_features)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return (bits * 0x01010101 >> 24) & 0xFF


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"Expected `{name}` to be {dtype} of shape {shape} but got {tensor.dtype} of shape {tuple(tensor.shape)}."
        )
