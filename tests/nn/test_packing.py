"""Packing: exact round trips, and the bits where the format says they are."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mpfx.nn import (
    CodedScales,
    Layout,
    PackedWeight,
    QuantizedWeight,
    filled,
    pack,
    reordered_rows,
    stored_bytes,
    unpack,
    validate,
)
from mpfx.nn.planes import last_word, pack_codes, pack_mask, unpack_codes, unpack_mask

ALL_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


def random_weight(
    layout: Layout, rows: int, *, symmetric: bool = False, density: float = 1.0, coded: bool = False
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(rows)
    columns = [
        torch.randint(0, 2**run.bits if run.bits < 16 else 0x7000, (rows, run.channels), generator=generator)
        for run in layout.runs
    ]
    grids = [group.bits for group in layout.grids]
    zeros = [torch.randint(0, 2**bits, (rows,), generator=generator) for bits in grids]
    kept = torch.rand(rows, layout.in_features, generator=generator) < density
    for run in layout.runs:
        if run.bits == 0:
            kept[:, run.start : run.stop] = False
    codes = torch.cat(columns, 1).int()
    scales = torch.rand(rows, len(grids), generator=generator).half()
    return QuantizedWeight(
        codes=codes if density == 1 else codes * kept,
        scales=coded_scales(rows, len(grids)) if coded else scales,
        zeros=None if symmetric else torch.stack(zeros, 1).to(torch.uint8) if zeros else torch.empty(rows, 0).byte(),
        kept=None if density == 1 else kept,
        layout=layout,
    )


def coded_scales(rows: int, grids: int) -> CodedScales:
    generator = torch.Generator().manual_seed(rows + grids)
    codes = torch.randint(0, 16, (rows, grids), generator=generator)
    return CodedScales.of(
        codes, torch.rand(rows, generator=generator) + 0.5, torch.rand(grids, generator=generator) + 0.1
    )


@pytest.mark.parametrize("bits", ALL_WIDTHS)
@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 100])
def test_codes_round_trip(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(bits))
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, -(-count // 32) * bits)
    assert torch.equal(unpack_codes(packed, bits, count), codes.int())


def bit(packed: Tensor, index: int) -> int:
    return int(packed[index // 32]) >> (index % 32) & 1


@pytest.mark.parametrize(("bits", "planes"), [(3, (2, 1)), (4, (4,)), (7, (4, 2, 1)), (16, (8, 8))])
def test_bits_lie_where_the_format_says(bits: int, planes: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2**bits, (32,), generator=torch.Generator().manual_seed(1))
    packed = pack_codes(codes, bits)
    for k, code in enumerate(codes.tolist()):
        low, start = 0, 0
        for size in planes:
            word, within = divmod(k, 32 // size)
            for i in range(size):
                at = start + 32 * word + 8 * (within % 4) + size * (within // 4) + i
                assert bit(packed, at) == code >> (low + i) & 1
            low, start = low + size, start + 32 * size


@pytest.mark.parametrize(
    "widths",
    [(b,) * 4 for b in (0, *ALL_WIDTHS)]
    + [(8, 7, 6, 5), (4, 3, 2, 1), (16, 4, 16, 4), (0, 4, 0, 3), (5, 0, 0, 16), (16, 2, 0, 0)],
    ids=str,
)
@pytest.mark.parametrize("channels", [128, 101])
@pytest.mark.parametrize("rows", [1, 32, 45])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("coded", [False, True])
def test_weights_round_trip_exactly(
    widths: tuple[int, ...], channels: int, rows: int, density: float, coded: bool
) -> None:
    weight = random_weight(Layout(channels, widths, 64), rows, density=density, coded=coded)
    packed = pack(weight)
    validate(packed)
    back = unpack(packed)
    assert torch.equal(back.codes, weight.codes)
    for name, part in pack(back).parts.items():
        original = packed.parts[name]
        assert (part is None) == (original is None)
        assert part is None or original is None or torch.equal(part, original)
    assert packed.out_features == rows
    assert weight.zeros is not None
    assert back.zeros is not None
    assert torch.equal(back.zeros, weight.zeros)
    assert (back.kept is None) == (weight.kept is None)
    assert torch.equal(back.dequantize(), weight.dequantize())
    if weight.kept is not None:
        assert back.kept is not None
        assert torch.equal(back.kept, weight.kept)
        assert bool((back.dequantize()[~weight.kept] == 0).all())
        assert packed.sparsity == pytest.approx(1 - float(weight.kept.float().mean()))
    else:
        left_out = [run.channels for run in weight.layout.runs if run.bits == 0]
        assert packed.sparsity == sum(left_out) / channels
    for run in weight.layout.runs:
        if run.bits == 0:
            assert bool((back.dequantize()[:, run.start : run.stop] == 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("scale_bits", [4, 16])
@pytest.mark.parametrize("widths", [(16, 5, 5, 4, 3, 3, 1), (16, 5, 0, 0, 3, 3, 1), (0,) * 7, (16,) * 7])
def test_bytes_are_those_predicted(symmetric: bool, density: float, scale_bits: int, widths: tuple[int, ...]) -> None:
    layout = Layout(203, widths, 64)
    weight = random_weight(layout, 50, symmetric=symmetric, density=density, coded=scale_bits == 4)
    kept = weight.kept
    counts = None if kept is None else tuple(int(kept[:, run.start : run.stop].sum()) for run in layout.runs)
    size = stored_bytes(layout, 50, symmetric=symmetric, scale_bits=scale_bits, kept=counts)
    assert pack(weight).nbytes == size.total
    assert weight.scales.nbytes == size.scales


def test_a_left_out_weight_stores_its_widths_only() -> None:
    packed = pack(random_weight(Layout(70, (0, 0, 0), 64), 5))
    assert packed.nbytes == 3
    assert torch.equal(unpack(packed).dequantize(), torch.zeros(5, 70))


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_rows_in_another_order(coded: bool, density: float) -> None:
    weight = random_weight(Layout(128, (4, 0, 3, 3), 64), 45, coded=coded, density=density)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(0))
    moved = reordered_rows(pack(weight), order)
    validate(moved)
    assert torch.equal(unpack(moved).dequantize(), weight.dequantize()[order])
    part = pack(weight.rows(slice(7, 20)))
    validate(part)
    assert torch.equal(unpack(part).dequantize(), weight.dequantize()[7:20])


def masked_weight(layout: Layout, rows: int, density: float, **kinds: bool) -> QuantizedWeight:
    """A random weight that has a mask even if that keeps everything."""
    weight = random_weight(layout, rows, **kinds)
    kept = torch.rand(weight.codes.shape, generator=torch.Generator().manual_seed(1)) < density
    for run in layout.runs:
        if run.bits == 0:
            kept[:, run.start : run.stop] = False
    return dataclasses.replace(weight, codes=weight.codes * kept, kept=kept)


def zero_codes(weight: QuantizedWeight) -> Tensor:
    """The code of every weight that stands for 0, int32 ``(out, in)``: one channel after the other."""
    codes, grid = torch.zeros_like(weight.codes), -1
    for group in weight.layout.groups:
        grid += group.quantized
        for channel in range(group.start, group.stop):
            if group.quantized:
                codes[:, channel] = 2 ** (group.bits - 1) if weight.zeros is None else weight.zeros[:, grid]
    return codes


@pytest.mark.parametrize(
    "widths",
    [(b,) * 4 for b in (0, *ALL_WIDTHS)] + [(8, 7, 6, 5), (4, 3, 2, 1), (16, 4, 16, 4), (0, 4, 0, 3), (16, 2, 0, 0)],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(128, 32, 64), (101, 45, 32), (97, 1, None)], ids=str)
@pytest.mark.parametrize("density", [0, 0.05, 0.5, 1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("coded", [False, True])
def test_a_filled_mask_changes_no_value(
    widths: tuple[int, ...], sizes: tuple[int, int, int | None], density: float, symmetric: bool, coded: bool
) -> None:
    channels, rows, group = sizes
    weight = masked_weight(Layout(channels, widths, group), rows, density, symmetric=symmetric, coded=coded)
    assert weight.kept is not None
    packed = pack(weight)
    before = {name: None if part is None else part.clone() for name, part in packed.parts.items()}
    whole = filled(packed)
    validate(whole)
    assert whole.mask is None
    dense = unpack(whole).dequantize()
    assert torch.equal(dense.view(torch.int32), weight.dequantize().view(torch.int32))  # no -0.0 either
    stored = torch.tensor([bits > 0 for bits in widths]).repeat_interleave(32)[:channels]
    expected = torch.where(weight.kept, weight.codes, zero_codes(weight)) * stored
    assert torch.equal(unpack(whole).codes, expected)
    again = pack(unpack(whole))
    assert all(torch.equal(part, again.parts[name]) for name, part in whole.parts.items() if part is not None)  # type: ignore[arg-type]
    size = stored_bytes(whole.layout, rows, symmetric=symmetric, scale_bits=4 if coded else 16)
    assert whole.nbytes == size.total
    assert whole.sparsity == 1 - float(stored.double().mean())
    for name, part in packed.parts.items():  # what was given stays, and shares all but the codes
        original = before[name]
        assert part is None or original is None or torch.equal(part, original)
        assert name in ("codes", "mask") or whole.parts[name] is part


def test_a_weight_without_a_mask_is_filled_already() -> None:
    packed = pack(random_weight(Layout(128, (4, 0, 3, 3), 64), 8))
    assert filled(packed) is packed


def test_filled_codes_by_hand() -> None:
    weight = QuantizedWeight(
        codes=torch.tensor([[0, 3, 0]], dtype=torch.int32),
        scales=torch.tensor([[0.5]]).half(),
        zeros=torch.tensor([[1]], dtype=torch.uint8),
        kept=torch.tensor([[True, True, False]]),
        layout=Layout(3, (2,), 64),
    )
    assert unpack(filled(pack(weight))).codes.tolist() == [[0, 3, 1]]
    assert unpack(filled(pack(dataclasses.replace(weight, zeros=None)))).codes.tolist() == [[0, 3, 2]]


def test_dequantized_values_by_hand() -> None:
    layout = Layout(3, (2,), 64)
    weight = QuantizedWeight(
        codes=torch.tensor([[0, 3, 1]], dtype=torch.int32),
        scales=torch.tensor([[0.5]]).half(),
        zeros=torch.tensor([[1]], dtype=torch.uint8),
        kept=torch.tensor([[True, True, False]]),
        layout=layout,
    )
    assert weight.dequantize().tolist() == [[-0.5, 1.0, 0.0]]
    symmetric = dataclasses.replace(weight, zeros=None, kept=None)
    assert symmetric.dequantize().tolist() == [[-1.0, 0.5, -0.5]]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("codes", lambda t: t[:, :-1]),
        ("codes", lambda t: t.long()),
        ("scales", lambda t: t.float()),
        ("scales", lambda t: t[:, :-1]),
        ("scales", lambda t: t[0, 0]),
        ("scales", lambda t: t[0]),
        ("scales", lambda t: t[:0]),
        ("scales", torch.neg),
        ("scales", lambda t: torch.full_like(t, float("nan"))),
        ("scales", lambda t: torch.full_like(t, float("inf"))),
        ("zeros", lambda t: t[:-1]),
        ("zeros", lambda t: t[None]),
        ("widths", lambda t: t[:-1]),
        ("widths", lambda t: t[None]),
        ("widths", lambda t: t[0]),
        ("widths", lambda t: t.int()),
        ("widths", lambda t: t + 1),
    ],
)
def test_tensors_that_do_not_fit_are_named(field: str, change) -> None:  # type: ignore[no-untyped-def]
    packed = pack(random_weight(Layout(128, (4, 4, 3, 3), 64), 8))
    with pytest.raises(ValueError, match=f"Expected `{field}`"):
        validate(dataclasses.replace(packed, **{field: change(getattr(packed, field))}))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("codes", lambda t: t[:-1]),
        ("codes", lambda t: t.view(-1, 4)),
        ("codes", lambda t: t.long()),
        ("row", lambda t: t.float()),
        ("row", lambda t: t[:-8]),
        ("row", lambda t: t[:0]),
        ("row", lambda t: t[None]),
        ("row", lambda t: t[0]),
        ("row", torch.neg),
        ("row", lambda t: t * float("inf")),
        ("group", lambda t: t.float()),
        ("group", lambda t: t[:-1]),
        ("group", lambda t: t[:, None]),
        ("group", torch.neg),
        ("group", lambda t: t * float("nan")),
    ],
)
def test_coded_scales_that_do_not_fit_are_named(field: str, change) -> None:  # type: ignore[no-untyped-def]
    packed = pack(random_weight(Layout(128, (4, 4, 3, 3), 64), 40, coded=True))
    validate(packed)
    assert isinstance(packed.scales, CodedScales)
    scales = dataclasses.replace(packed.scales, **{field: change(getattr(packed.scales, field))})
    named = {"codes": "scale_codes", "row": "(row_scales|scale_codes|codes)", "group": "group_scales"}[field]
    with pytest.raises(ValueError, match=f"Expected `{named}`"):
        validate(dataclasses.replace(packed, scales=scales))


def test_a_mask_that_keeps_what_is_left_out_is_refused() -> None:
    packed = pack(random_weight(Layout(128, (4, 0, 3, 3), 64), 8, density=0.5))
    assert packed.mask is not None
    mask = packed.mask.clone()
    mask[1, 3] = 1
    with pytest.raises(ValueError, match="`mask` to keep nothing of the segments that are left out"):
        validate(dataclasses.replace(packed, mask=mask))


def test_parts_that_do_not_go_together_are_refused() -> None:
    plain, coded = (pack(random_weight(Layout(64, (4, 4), 64), 8, coded=coded)) for coded in (False, True))
    for parts in (coded.parts | {"group_scales": None}, plain.parts | {"scales": None}):
        with pytest.raises(ValueError, match="Expected either `scales`, or"):
            PackedWeight.of(parts, plain.layout)
    both = coded.parts | {"scales": plain.parts["scales"]}
    with pytest.raises(ValueError, match="there are both"):
        PackedWeight.of(both, plain.layout)
    with pytest.raises(ValueError, match="`codes` and `widths`"):
        PackedWeight.of(plain.parts | {"widths": None}, plain.layout)


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("rows", [0, 7, 9])
def test_other_rows_are_refused(density: float, rows: int) -> None:
    packed = pack(random_weight(Layout(128, (4, 4, 3, 3), 64), 8, density=density))
    scales = torch.ones(rows, len(packed.layout.grids)).half()
    with pytest.raises(ValueError, match=r"Expected `(scales|mask|codes)`"):
        validate(dataclasses.replace(packed, scales=scales))


@pytest.mark.parametrize("change", [lambda t: t[:, :-1], lambda t: t.bool(), lambda t: t[0], torch.zeros_like])
def test_a_mask_that_does_not_fit_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    packed = pack(random_weight(Layout(128, (4, 4, 3, 3), 64), 8, density=0.5))
    assert packed.mask is not None
    with pytest.raises(ValueError, match=r"Expected `(mask|codes)`"):
        validate(dataclasses.replace(packed, mask=change(packed.mask)))


@pytest.mark.parametrize("channels", [1, 32, 75])
def test_bits_of_a_mask_lie_where_the_format_says(channels: int) -> None:
    kept = torch.rand(5, channels, generator=torch.Generator().manual_seed(channels)) < 0.5
    words = pack_mask(kept)
    assert words.shape == (-(-channels // 32), 5)
    assert words.dtype == torch.int32
    for row in range(5):
        for channel in range(channels):
            assert int(words[channel // 32, row]) >> (channel % 32) & 1 == int(kept[row, channel])
    assert all(int(word) & 0xFFFFFFFF <= last_word(channels) for word in words[-1])
    assert torch.equal(unpack_mask(words, channels), kept)
