"""Layouts: groups, panels and bytes against counting by hand."""

import pytest

from mpfx.nn import LAYOUT_WIDTHS, Layout, Span, permutation_bytes, stored_bytes


def test_groups_never_mix_widths() -> None:
    layout = Layout(200, (8, 4, 4, 4, 2, 2, 2), group_size=64)
    assert layout.groups == (Span(0, 32, 8), Span(32, 96, 4), Span(96, 128, 4), Span(128, 192, 2), Span(192, 200, 2))
    assert layout.panels == (Span(0, 32, 8), Span(32, 128, 4), Span(128, 200, 2))
    assert layout.code_bits == (32 * 8 + 96 * 4 + 72 * 2) / 200


@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256, None])
def test_groups_and_panels_cover_all_channels_once(group_size: int | None) -> None:
    layout = Layout(1000, (4,) * 20 + (3,) * 12, group_size)
    for spans in (layout.groups, layout.panels, layout.runs):
        assert [c for s in spans for c in range(s.start, s.stop)] == list(range(1000))
    assert all(panel.channels <= 128 for panel in layout.panels)
    if group_size is not None and group_size <= 128:  # no group is cut by a panel
        starts = {panel.start for panel in layout.panels}
        assert not any(g.start < s < g.stop for g in layout.groups for s in starts)


def test_bytes_counted_by_hand() -> None:
    layout = Layout(128, (4,) * 4, group_size=64)
    size = stored_bytes(layout, 10, symmetric=False, scale_bits=16)
    assert size.codes == 10 * 128 * 4 // 8
    assert size.scales == 10 * 2 * 2
    assert size.zeros == 2 * 32 * 4 // 8  # two groups, ten rows padded to a block of 32 codes
    assert (size.mask, size.widths) == (0, 4)
    sparse = stored_bytes(layout, 10, symmetric=True, kept=(641,))
    assert sparse.codes == 21 * 4 * 4  # 641 codes are 21 blocks of 32, four words each
    assert (sparse.mask, sparse.zeros) == (10 * 128 // 8, 0)
    coded = stored_bytes(layout, 40, symmetric=False)
    assert coded.scales == 2 * (64 * 4 // 8) + 2 * 40 + 2 * 2  # forty rows are two blocks of 32; bases
    assert coded.total - coded.scales == stored_bytes(layout, 40, symmetric=False, scale_bits=16).total - 40 * 2 * 2
    assert permutation_bytes(65536) == 2 * 65536
    assert permutation_bytes(65537) == 4 * 65537


def test_segments_that_are_left_out_cost_their_width_and_mask() -> None:
    layout = Layout(224, (4, 4, 0, 0, 0, 16, 2), group_size=64)
    assert layout.runs == (Span(0, 64, 4), Span(64, 160, 0), Span(160, 192, 16), Span(192, 224, 2))
    assert layout.grids == (Span(0, 64, 4), Span(192, 224, 2))
    assert not Span(64, 160, 0).quantized
    assert layout.code_bits == (64 * 4 + 32 * 16 + 32 * 2) / 224
    shorter = Layout(128, (4, 4, 16, 2), group_size=64)
    for symmetric in (True, False):
        for scale_bits in (4, 16):
            size = stored_bytes(layout, 10, symmetric=symmetric, scale_bits=scale_bits)
            assert size.total == stored_bytes(shorter, 10, symmetric=symmetric, scale_bits=scale_bits).total + 3
    sparse, less = (
        stored_bytes(laid_out, 10, symmetric=False, kept=kept)
        for laid_out, kept in ((layout, (70, 0, 30, 31)), (shorter, (70, 30, 31)))
    )
    assert sparse.total == less.total + 3 + 3 * 10 * 4
    nothing = stored_bytes(Layout(70, (0, 0, 0)), 10, symmetric=False, scale_bits=16)
    assert nothing.total == nothing.widths == 3


def test_all_widths_of_a_layout() -> None:
    assert Layout(32 * 10, LAYOUT_WIDTHS).widths == (0, 1, 2, 3, 4, 5, 6, 7, 8, 16)


@pytest.mark.parametrize(
    ("channels", "widths", "group", "message"),
    [
        (64, (4,), 64, "Expected 2 widths"),
        (64, (4, 9), 64, "Expected widths in 0..8 or 16"),
        (64, (4, 4), 48, "multiple of 32"),
        (0, (), 64, "channels"),
    ],
)
def test_impossible_layouts_are_refused(channels: int, widths: tuple[int, ...], group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(channels, widths, group)
