"""What the CUDA kernels get from the host: tables, and files that are kept."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from mpfx.nn import Layout, PackedWeight, pack
from mpfx.nn.kernels import cuda
from mpfx.nn.kernels.cuda import _order, tile, tune
from mpfx.nn.kernels.cuda.decode import unit_table
from mpfx.nn.kernels.cuda.kept import kept_bytes
from mpfx.nn.kernels.cuda.nvrtc import Launch
from mpfx.nn.kernels.cuda.weights import masked, segments_of, weight_macros
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
        used = [b for b in bits if b]
        assert bits[: len(used)] == used  # what is unused is at the end
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


@pytest.mark.parametrize("channels", [4096, 28672, 29568, 53248, 58_000])
def test_blocks_have_the_shared_memory_that_they_ask_for(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """227 KiB less what the kernel declares itself, rounded up; two stages have room in the widest layout."""
    launches: list[Launch] = []
    monkeypatch.setattr(tile, "kernel", lambda *_: lambda launch, arguments: launches.append(launch))
    monkeypatch.setattr(tile, "_processors", lambda _: 132)
    monkeypatch.setattr(tile, "last_captured", lambda: None)
    segments = -(-channels // 32)
    layout = Layout(channels, ((6, 5, 4, 3) * segments)[:segments], 32)
    weight, x = pack(random_weight(layout, 4, coded=True)), torch.empty(512, channels, dtype=torch.bfloat16)
    every = [tile.Tile(tokens, (tile.Part(1, 1),)) for tokens in tile._TOKENS]
    for cut in every:
        cut.multiply(x, weight, None, None, torch.empty(512, 4, dtype=torch.bfloat16))
    assert len(launches) == 2 * len(every)
    assert min(tile._stages(tokens, 32, 58_000 // 64)[1] for tokens in tile._TOKENS) >= 2
    assert max(launch.shared for launch in launches) <= (227 << 10) - 256
    assert not tile._tiles_for.__wrapped__(512, 64, 1 << 16, 1 << 10, 132)  # two rows of activations are 256 KiB


@pytest.mark.parametrize("count", [1 << 12, 1 << 17, 1 << 20])
def test_what_shares_leave_in_memory_is_bounded(count: int) -> None:
    cuts = tile._tiles_for.__wrapped__(count, 112, 4096, 64, 132)
    assert cuts
    assert all(cut.found_bytes(-(-count // cut.tokens)) <= 64 << 20 for cut in cuts)


@pytest.mark.parametrize("row_tiles", [1, 3, 32, 86, 112, 500])
@pytest.mark.parametrize("count", [16, 64, 512, 4096, 1 << 15])
def test_parts_of_a_cut_have_all_rows_once(row_tiles: int, count: int) -> None:
    cuts = tile._tiles_for.__wrapped__(count, row_tiles, 4096, 64, 132)
    assert any(len(cut.parts) == 1 for cut in cuts)
    for cut in cuts:
        assert sum(part.tiles for part in cut.parts) == row_tiles
        assert min(part.tiles for part in cut.parts) > 0


def test_what_would_leave_processors_idle_is_split() -> None:
    """Of 172 tiles, each of 132 processors takes one; the 40 that are left go three ways: 120 are busy again."""
    cuts = tile._tiles_for.__wrapped__(512, 86, 4096, 64, 132)
    assert cuts[0] == tile.Tile(256, (tile.Part(66, 1), tile.Part(20, 3)))
    assert tile.Tile(176, (tile.Part(86, 1),)) in cuts  # two rounds of 132, of which six tiles are missing


@pytest.mark.parametrize(
    ("shape", "fastest"),
    [
        ((16, 86, 4096), tile.Tile(16, (tile.Part(66, 2), tile.Part(20, 6)))),
        ((64, 86, 4096), tile.Tile(64, (tile.Part(86, 3),))),
        ((128, 86, 4096), tile.Tile(128, (tile.Part(86, 1),))),
        ((256, 86, 4096), tile.Tile(256, (tile.Part(86, 1),))),
        ((1024, 86, 4096), tile.Tile(256, (tile.Part(86, 1),))),
        ((4096, 86, 4096), tile.Tile(256, (tile.Part(82, 1), tile.Part(4, 2)))),
        ((512, 32, 11008), tile.Tile(256, (tile.Part(32, 2),))),
        ((512, 112, 4096), tile.Tile(256, (tile.Part(112, 1),))),
    ],
    ids=str,
)
def test_what_was_measured_to_be_the_fastest_is_tried(shape: tuple[int, int, int], fastest: tile.Tile) -> None:
    count, row_tiles, channels = shape
    cuts = tile._tiles_for.__wrapped__(count, row_tiles, channels, channels // 64, 132)
    assert fastest in cuts
    assert len(cuts) <= 4


@pytest.mark.parametrize("channels", [32, 96, 200])
def test_no_share_is_empty(channels: int) -> None:
    steps = -(-channels // 64)
    cuts = tile._tiles_for.__wrapped__(64, 20, channels, steps, 132)
    assert all(part.splits <= steps for cut in cuts for part in cut.parts)


def test_processors_take_shares_in_turn() -> None:
    """Three of them; a tile takes a hundred steps, to write results takes next to nothing."""

    def rounds(*parts: tile.Part) -> float:
        return tile.Tile(16, parts).time(1, 100, 3) / tile.Tile(16, (tile.Part(1, 1),)).time(1, 100, 3)

    assert rounds(tile.Part(3, 1)) == 1
    assert rounds(tile.Part(4, 1)) == 2
    assert 4 / 3 < rounds(tile.Part(3, 1), tile.Part(1, 3)) < 1.4
    assert rounds(tile.Part(2, 1), tile.Part(1, 1)) == 1  # the second part starts where the first one leaves room


Called = list[tuple[str, dict[str, int], Launch, tile.Arguments]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Called:
    """What would have been launched: kernels, what they are compiled with, and what they are given."""
    calls: Called = []

    def kernel(_: str, name: str, macros: tuple[tuple[str, int], ...], __: int) -> Callable[..., None]:
        return lambda launch, arguments: calls.append((name, dict(macros), launch, arguments))

    monkeypatch.setattr(tile, "kernel", kernel)
    monkeypatch.setattr(tile, "_processors", lambda _: 20)
    monkeypatch.setattr(tile, "last_captured", lambda: None)
    return calls


def multiply(cut: tile.Tile, layout: Layout, rows: int) -> None:
    weight, x = pack(random_weight(layout, 516, coded=True)), torch.empty(rows, layout.in_features)
    cut.multiply(x.bfloat16(), weight, None, None, torch.empty(rows, 516, dtype=torch.bfloat16))


@pytest.mark.parametrize("before", [None, 1])
def test_a_launch_knows_where_its_parts_start(
    before: int | None, calls: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile, "last_captured", lambda: before)
    cut = tile.Tile(256, (tile.Part(2, 1), tile.Part(3, 3)))
    multiply(cut, LAYOUT, 300)
    (arrange, _, first, same), (name, macros, launch, given) = calls
    assert (arrange, name, macros["PAIRS"]) == ("arrange_1", "tile", 0)
    assert same is given
    assert [(of.grid, of.cluster, of.early) for of in (first, launch)] == [
        ((256, 1), 1, before is not None),
        ((20, 1), 1, True),
    ]
    assert [given.steps, given.columns, given.shares, given.slots, given.most_splits] == [8, 2, 4 + 18, 6, 3]
    parts = [(part.tile, part.share, part.slot, part.tiles, part.splits) for part in given.parts]
    assert parts[:2] == [(0, 0, 0, 2, 1), (2, 4, 0, 3, 3)]
    assert parts[2][1] == given.shares
    assert [part.steps for part in given.parts[:2]] == [8, 3]  # of eight: the last one of three shares has two
    assert cut.found_bytes(2) == 6 * 3 * 128 * 256 * 4


@pytest.mark.parametrize(
    ("parts", "rows", "processors", "pairs"),
    [
        (((5, 2),), 256, 20, True),  # ten shares
        (((3, 1), (2, 2)), 256, 20, False),  # the first one of a tile's shares would be its cluster's second block
        (((3, 1), (2, 2)), 512, 20, True),
        (((5, 2),), 1024, 19, False),  # one processor would be left alone
        (((5, 1),), 512, 20, False),
        (((5, 4),), 256, 20, False),
    ],
)
def test_two_blocks_of_a_cluster_have_a_tile_in_two_shares(
    parts: tuple[tuple[int, int], ...], rows: int, processors: int, pairs: bool, calls: Called,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tile, "_processors", lambda _: processors)
    multiply(tile.Tile(256, tuple(tile.Part(*part) for part in parts)), LAYOUT, rows)
    _, (_, macros, launch, _) = calls
    assert (macros["PAIRS"], launch.cluster) == ((1, 2) if pairs else (0, 1))
    assert launch.grid[0] % launch.cluster == 0


def test_long_rows_are_put_in_order_by_threads_that_have_more_of_them(calls: Called) -> None:
    for channels in (4096, 4128):
        multiply(tile.Tile(256, (tile.Part(5, 1),)), Layout(channels, (3,) * (channels // 32), None), 256)
    assert [name for name, *_ in calls] == ["arrange_1", "tile", "arrange_3", "tile"]


def test_all_of_the_last_piece_of_a_row_is_in_shared_memory(calls: Called) -> None:
    """Channel 35 of 37 changes places with what is 16 bytes further on, as ``place_of`` of tile.cu says."""
    multiply(tile.Tile(16, (tile.Part(5, 1),)), Layout(37, (3, 3), None), 16)
    places = [channel * 4 ^ channel // 32 % 2 << 4 for channel in range(37)]
    assert max(places) + 4 <= calls[0][2].shared


def test_what_kernels_divide_by() -> None:
    """As ``divided`` of tile.cu does, by a product's upper half."""
    for tiles in (1, 2, 3, 5, 7, 1000):
        for splits in range(1, 9):
            (part, *_), _ = tile.Tile(16, (tile.Part(tiles, splits),))._shared_out(16, 64)
            for divisor, by in ((part.tiles, part.by_tiles), (part.splits, part.by_splits)):
                for dividend in (*range(40), *range(divisor * 1000 - 3, divisor * 1000 + 3), 128_000):
                    quotient = dividend if divisor == 1 else dividend * by >> 32
                    assert quotient == dividend // divisor


def test_more_tiles_than_kernels_can_number_are_not_tried() -> None:
    """Of 150,000 rows of a weight times a million rows of activations."""
    assert tile._tiles_for(1 << 16, 1200, 4096, 64, 132)
    assert not tile._tiles_for(1 << 20, 1200, 4096, 64, 132)


def test_orders_start_where_words_do() -> None:
    orders = torch.stack([torch.randperm(33).to(torch.uint16) for _ in range(3)])
    for order in orders:
        found = _order(order)
        assert found is not None
        assert found.data_ptr() % 4 == 0
        assert torch.equal(found.int(), order.int())
    assert _order(orders[0]).data_ptr() == orders.data_ptr()  # type: ignore[union-attr]
    assert _order(None) is None


@pytest.mark.parametrize("moved", ["codes", "mask"])
def test_what_is_not_aligned_is_said_to_be_so(moved: str) -> None:
    weight = pack(random_weight(LAYOUT, 72, density=0.5, coded=True))
    part = weight.parts[moved]
    assert part is not None
    room = torch.empty(part.numel() + 1, dtype=torch.int32)[1:].view(part.shape)
    other = PackedWeight.of({**weight.parts, moved: room.copy_(part)}, LAYOUT)
    assert [dict(weight_macros(torch.empty(1, 500), w))["ALIGNED"] for w in (weight, other)] == [1, 0]


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


def test_choices_of_other_kernels_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPFX_CACHE", str(tmp_path))
    monkeypatch.delenv("MPFX_TUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    measured: list[list[float]] = []

    def chosen(times: list[float]) -> str:
        def measure(*_: object) -> list[float]:
            measured.append(times)
            return times

        monkeypatch.setattr(tune, "_times", measure)
        tune._chosen.cache_clear()
        return tune.fastest("a layer", ("one", "other"), lambda _: None, torch.device("cuda"))

    assert chosen([2.0, 1.0]) == "other"
    assert chosen([1.0, 2.0]) == "other"  # what was kept counts
    assert measured == [[2.0, 1.0]]
    monkeypatch.setattr(tune, "_kernels", lambda: "others")
    assert chosen([1.0, 2.0]) == "one"
    tune._chosen.cache_clear()


@dataclass
class Choices:
    """Stands in for the kernels and for what measures them: keeps what ran and what was asked."""

    room: int
    tiles: bool
    fastest: tuple[str, str]
    ran: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def decode(self, x: torch.Tensor, weights: list[PackedWeight], *_: object) -> list[torch.Tensor]:
        self.ran.append("few " + ", ".join([str(len(x))] * len(weights)))
        return [x] * len(weights)

    def many(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        self.ran.append(f"many {len(x)}")
        return x

    def choose(self, key: str, candidates: tuple[str, ...], *_: object) -> str:
        assert candidates in (("few", "many"), ("together", "apart"))  # unmeasured, the first one runs
        self.keys.append(key)
        return next(c for c in candidates if c in self.fastest)

    def put(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fakes = {
            "decode": self.decode,
            "_multiply_many": self.many,
            "room_for": lambda *_: self.room,
            "tiles_for": lambda *_: [None] * self.tiles,
            "fastest": self.choose,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(cuda, name, fake)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())


def activations(rows: int) -> torch.Tensor:
    return torch.randn(rows, LAYOUT.in_features, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("rows", "choices", "alone", "several"),
    [
        (4, Choices(8, True, ("many", "apart")), ["few 4"], ["few 4, 4"]),
        (5, Choices(8, True, ("many", "apart")), ["many 5"], ["many 5", "many 5"]),
        (8, Choices(8, True, ("few", "apart")), ["few 8"], ["few 8", "few 8"]),
        (8, Choices(8, True, ("many", "together")), ["many 8"], ["few 8, 8"]),
        (8, Choices(8, False, ("many", "apart")), ["few 8"], ["few 8, 8"]),
        (9, Choices(8, True, ("few", "together")), ["many 9"], ["many 9", "many 9"]),
        (8, Choices(3, True, ("few", "together")), ["few 3", "few 3", "few 2"], ["few 3", "few 3", "few 2"] * 2),
        (4, Choices(3, True, ("many", "together")), ["many 4"], ["many 4", "many 4"]),
        (4, Choices(3, False, ("many", "together")), ["few 2", "few 2"], ["few 2", "few 2"] * 2),
        (1, Choices(0, False, ("few", "together")), ["many 1"], ["many 1", "many 1"]),
    ],
)
def test_few_rows_are_multiplied_by_what_was_faster(
    rows: int, choices: Choices, alone: list[str], several: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    choices.put(monkeypatch)
    weight, x = pack(random_weight(LAYOUT, 64, coded=True)), activations(rows)
    assert torch.equal(cuda.cuda_linear(x, weight, None, None), x)  # the parts in their order
    assert choices.ran == alone
    choices.ran.clear()
    assert len(cuda.cuda_linears(x, [weight, weight], None, [None, None])) == 2
    assert choices.ran == several


def test_choices_are_kept_for_what_makes_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = Choices(8, True, ("few", "together"))
    choices.put(monkeypatch)
    layouts = (LAYOUT, Layout(500, (4,) * 16, 64), Layout(480, (4,) * 15, 64))
    first, fewer_bits, fewer_channels = (pack(random_weight(layout, 64, coded=True)) for layout in layouts)
    more_rows = pack(random_weight(LAYOUT, 96, coded=True))
    x = activations(8)
    for activated, weight in (
        (x, first), (x[:7], first), (x.half(), first), (x, fewer_bits), (x[:, :480], fewer_channels), (x, more_rows),
    ):  # fmt: skip
        cuda.cuda_linear(activated, weight, None, None)
    cuda.cuda_linears(x, [first, more_rows], None, [None, None])
    assert len(set(choices.keys)) == len(choices.keys) == 7
    cuda.cuda_linear(activations(8), first, None, None)
    assert choices.keys[-1] == choices.keys[0]
