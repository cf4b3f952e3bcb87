"""What the CUDA kernels get from the host: tables, and files that are kept."""

from pathlib import Path

import pytest
import torch

from mpfx.nn import Layout, pack
from mpfx.nn.kernels.cuda.decode import unit_table
from mpfx.nn.kernels.cuda.kept import kept_bytes
from mpfx.nn.kernels.cuda.weights import masked, segments_of
from tests.nn.test_packing import random_weight

CPU = torch.device("cpu")
LAYOUT = Layout(500, (8, 8, 8, 5, 5, 16, 16, 4, 4, 4, 4, 0, 3, 3, 3, 1), 64)


@pytest.mark.parametrize("workers", [1, 3, 16, 40])
def test_units_share_all_segments_out(workers: int) -> None:
    table, most = unit_table(LAYOUT, 70, workers, True, True, None, CPU)
    assert table.shape == (workers, most, 4)
    expected = segments_of(LAYOUT, 70, None)
    found: list[int] = []
    for share in table.tolist():
        bits = [unit[0] & 255 for unit in share]
        assert 0 not in bits[: bits.count(0) and bits.index(0)]  # what is unused is at the end
        for first, second, word, zero in share:
            if not first & 255:
                continue
            count, segment, grid = first >> 8 & 255, second & 0xFFFF, second >> 16
            assert expected[segment] == (first & 255, word, grid, zero)
            same = {expected[s][2] for s in range(segment, segment + count)}
            assert same == {grid}  # one grid a unit
            assert (first >> 16 & 255, first >> 24) == ((0, 0) if first & 255 == 16 else (first & 255, 12))
            found += range(segment, segment + count)
    assert sorted(found) == [s for s, bits in enumerate(LAYOUT.widths) if bits]


def test_shares_are_about_as_much_work() -> None:
    table, _ = unit_table(Layout(4096, (6,) * 32 + (4,) * 64 + (3,) * 32, 64), 64, 16, True, True, None, CPU)
    assert {int((share[:, 0] != 0).sum()) for share in table} <= {3, 4, 5}


def test_starts_count_the_survivors_before() -> None:
    weight = random_weight(LAYOUT, 70, density=0.4, coded=True)
    assert weight.kept is not None
    found = masked(pack(weight))
    before: dict[int, int] = {}
    first = dict.fromkeys(LAYOUT.widths, 0)
    for segment, bits in enumerate(LAYOUT.widths):
        kept = weight.kept[:, segment * 32 : (segment + 1) * 32]
        ends = [before.get(bits, 0) + int(kept[: min(32 * tile, 70)].sum()) for tile in range(4)]
        if bits:
            assert found.starts[segment].tolist() == ends
        before[bits] = ends[-1]
    words = 0
    for bits in sorted(first):
        first[bits], words = words, words + (-(-before[bits] // 32) * bits)
    assert all(found.streams[s] == first[bits] for s, bits in enumerate(LAYOUT.widths) if bits)


def test_bits_of_a_mask_beyond_the_last_channel_are_not_counted() -> None:
    weight = pack(random_weight(LAYOUT, 70, density=0.4, coded=True))
    assert weight.mask is not None
    expected = masked(weight).starts.clone()
    weight.mask[-1] |= -1 << (500 % 32)
    assert torch.equal(masked(weight).starts, expected)


def test_what_is_kept_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPFX_CACHE", str(tmp_path / "cache"))
    made: list[int] = []

    def make() -> bytes:
        made.append(1)
        return b"code"

    assert [kept_bytes("a", make), kept_bytes("a", make)] == [b"code", b"code"]
    assert len(made) == 1
    monkeypatch.setenv("MPFX_CACHE", str(tmp_path / "cache" / "a"))  # a file: nothing can be kept there
    assert kept_bytes("b", make) == b"code"
