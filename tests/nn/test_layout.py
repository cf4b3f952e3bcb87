"""Layouts: groups, panels and bytes against counting by hand."""

import pytest

from mpfx.nn import Layout, Span, permutation_bytes, stored_bytes


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
    size = stored_bytes(layout, 10, symmetric=False)
    assert size.codes == 10 * 128 * 4 // 8
    assert size.scales == 10 * 2 * 2
    assert size.zeros == 2 * 32 * 4 // 8  # two groups, ten rows padded to a block of 32 codes
    assert (size.mask, size.widths) == (0, 4)
    sparse = stored_bytes(layout, 10, symmetric=True, kept=(641,))
    assert sparse.codes == 21 * 4 * 4  # 641 codes are 21 blocks of 32, four words each
    assert (sparse.mask, sparse.zeros) == (10 * 128 // 8, 0)
    assert permutation_bytes(65536) == 2 * 65536
    assert permutation_bytes(65537) == 4 * 65537


@pytest.mark.parametrize(
    ("channels", "widths", "group", "message"),
    [
        (64, (4,), 64, "Expected 2 widths"),
        (64, (4, 9), 64, "Expected widths in 1..8 or 16"),
        (64, (4, 4), 48, "multiple of 32"),
        (0, (), 64, "channels"),
    ],
)
def test_impossible_layouts_are_refused(channels: int, widths: tuple[int, ...], group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(channels, widths, group)
