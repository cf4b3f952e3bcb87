"""CUDA kernels against float64 products of the dense weight, on poisoned buffers."""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpfx.nn import Layout, PackedWeight, filled, pack
from mpfx.nn.kernels import cuda, packed_linear, packed_linears, reference
from mpfx.nn.kernels.cuda import nvrtc, tune
from mpfx.nn.kernels.cuda.decode import Cut, decode
from mpfx.nn.kernels.cuda.expand import Chunks
from mpfx.nn.kernels.cuda.kept import cache_folder
from mpfx.nn.kernels.cuda.tile import Part, Tile, unpacks_in_registers
from mpfx.nn.kernels.cuda.weights import address
from tests.nn.test_packing import random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Of the sum of the absolute products: what rounding the result, and for many rows the weight, may cost.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
MIXED = Layout(256, (16, 7, 4, 4, 3, 2, 2, 0), None)
LAYOUTS = [Layout(96, (bits,) * 3, 32) for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16)] + [
    Layout(200, (8, 6, 5, 5, 3, 1, 0), 64),
    MIXED,
    Layout(333, (5,) * 6 + (0,) + (3,) * 4, 64),
    Layout(4096, (6,) * 20 + (5,) * 30 + (4,) * 40 + (3,) * 38, 64),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote to holds NaN."""
    empty = torch.empty

    def poison(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        made.view(torch.uint8).fill_(255) if made.numel() and made.dim() else None
        return made

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture(autouse=True)
def few_rows_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is faster on this device."""
    monkeypatch.setattr(cuda, "SURE_ROWS", cuda.DECODE_ROWS)


@pytest.fixture
def hopper() -> None:
    """Skip on other GPUs."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def on_device(weight: PackedWeight) -> PackedWeight:
    parts = {name: None if part is None else part.cuda() for name, part in weight.parts.items()}
    return PackedWeight.of(parts, weight.layout)


CASES = [
    (layout, torch.bfloat16, 144, plain, density)
    for layout in LAYOUTS
    for plain in (False, True)
    for density in (1.0, 0.4)
]
CASES += [(MIXED, dtype, 37, False, density) for dtype in TOLERANCE for density in (1.0, 0.5)]
CASES += [(LAYOUTS[-1], torch.float16, 515, True, 1.0), (Layout(333, (5,) * 11, 32), torch.bfloat16, 33, False, 0.7)]


@pytest.mark.parametrize(("layout", "dtype", "out", "plain", "density"), CASES, ids=str)
def test_products_are_those_of_the_dense_weight(
    layout: Layout, dtype: torch.dtype, out: int, plain: bool, density: float
) -> None:
    weight = random_weight(layout, out, symmetric=plain, coded=not plain, density=density)
    dense, packed = weight.dequantize().double().cuda(), on_device(pack(weight))
    order = None if plain else torch.randperm(layout.in_features).to(torch.uint16).cuda()
    bias = None if plain else torch.randn(out, dtype=dtype, device="cuda")
    for rows in (1, 8, 20) if out == 144 else (1, 2, 3, 5, 8, 9):
        x = torch.randn(rows, layout.in_features, dtype=dtype, device="cuda")
        agrees(x, dense, packed, order, bias)


def agrees(
    x: Tensor,
    dense: Tensor,
    packed: PackedWeight,
    order: Tensor | None,
    bias: Tensor | None,
    summed: Tensor | None = None,
) -> None:
    """The result is that of the dense weight, but for rounding in sums over ``summed``, if not over that weight."""
    moved = x.double() if order is None else x.double()[:, order.long()]
    size = moved.abs() @ (dense if summed is None else summed).abs().t() + 1e-6
    expected = moved @ dense.t() + (0 if bias is None else bias.double())
    found = packed_linear(x, packed, order, bias)
    assert found.dtype == x.dtype
    assert float(((found.double() - expected).abs() / (size + expected.abs())).max()) <= TOLERANCE[x.dtype]
    assert torch.equal(found, packed_linear(x, packed, order, bias))


FILLED = [(layout, torch.bfloat16, 144, plain, 0.4) for layout in LAYOUTS for plain in (False, True)]
FILLED += [(MIXED, dtype, 37, False, 0.5) for dtype in TOLERANCE]
FILLED += [(Layout(333, (5,) * 11, 32), torch.bfloat16, 33, False, density) for density in (0.0, 0.05, 0.7)]


@pytest.mark.parametrize(("layout", "dtype", "out", "plain", "density"), FILLED, ids=str)
def test_filled_weights_give_the_products_of_those_under_a_mask(
    layout: Layout, dtype: torch.dtype, out: int, plain: bool, density: float
) -> None:
    weight = random_weight(layout, out, symmetric=plain, coded=not plain, density=density)
    packed = on_device(pack(weight))
    dense, whole = weight.dequantize().double().cuda(), filled(packed)
    unpruned = replace(weight, kept=None).dequantize().double().cuda()  # zero points are taken off sums over all codes
    for name, part in filled(pack(weight)).parts.items():
        found = whole.parts[name]
        assert (part is None) == (found is None)
        assert part is None or found is None or torch.equal(found.cpu(), part)
    order = None if plain else torch.randperm(layout.in_features).to(torch.uint16).cuda()
    for rows in (1, 8, 20):
        x = torch.randn(rows, layout.in_features, dtype=dtype, device="cuda")
        agrees(x, dense, packed, order, None)
        agrees(x, dense, whole, order, None, unpruned)
        assert torch.equal(reference(x, whole, order, None), reference(x, packed, order, None))


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_rows_without_survivors_give_zero(bits: int) -> None:
    """Exactly: what is pruned is not just close to nothing."""
    weight = random_weight(Layout(192, (bits,) * 6, 64), 70, coded=True, density=0.5)
    assert weight.kept is not None
    kept = weight.kept.clone()
    kept[::3] = False
    packed = on_device(pack(replace(weight, codes=weight.codes.masked_fill(~kept, 0), kept=kept)))
    found = packed_linear(torch.randn(2, 192, device="cuda"), packed, None, None)
    assert not found[:, ::3].any()
    assert found[:, 1::3].all()


@pytest.mark.parametrize(
    "cut",
    [Cut(1, 1, 4, 1), Cut(2, 1, 4, 2), Cut(4, 2, 3, 2), Cut(1, 3, 8, 2), Cut(1, 5, 4, 3), Cut(2, 11, 2, 2)],
    ids=str,
)
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_every_cut_gives_the_same(cut: Cut, density: float) -> None:
    if cut.cluster > 1 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs clusters of thread blocks")
    layout = Layout(512, (6,) * 4 + (5,) * 4 + (4,) * 4 + (3,) * 3 + (1,), 64)
    packed = on_device(pack(random_weight(layout, 300, coded=True, density=density)))
    order = torch.randperm(512).to(torch.uint16).cuda()
    x = torch.randn(3, 512, dtype=torch.float32, device="cuda")
    expected = decode(x, [packed], order, [None], Cut(1, 1, 1, 1))[0]
    found = decode(x, [packed], order, [None], cut)[0]
    assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("cut", [Cut(2, 1, 16, 2), Cut(4, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_blocks_of_a_cluster_find_their_own_survivors(bits: int, cut: Cut) -> None:
    """An address in shared memory says which block of the cluster it is of."""
    weight = random_weight(Layout(384, (bits,) * 12, 32), 144, coded=True, density=0.4)
    x = torch.randn(1, 384, dtype=torch.float32, device="cuda")
    expected = x.double() @ weight.dequantize().double().cuda().t()
    found = decode(x, [on_device(pack(weight))], None, [None], cut)[0]
    assert float((found.double() - expected).norm()) <= 1e-5 * float(expected.norm())


DIRTY = """
struct Args { int words; };
extern "C" __global__ void dirty(const __grid_constant__ Args a) {
    extern __shared__ int shared[];
    for (int i = threadIdx.x; i < a.words; i += blockDim.x) ((volatile int*)shared)[i] = -1;
}
"""


def leave_shared_memory_dirty() -> None:
    """All ones, wherever the next kernel runs."""
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    size, count = properties.shared_memory_per_block_optin, 4 * properties.multi_processor_count
    words = type("Words", (ctypes.Structure,), {"_fields_": [("words", ctypes.c_int)]})(size // 4)
    nvrtc._load(DIRTY, "dirty", (), torch.cuda.current_device())(nvrtc.Launch((count, 1), 1024, size), words)


@pytest.mark.parametrize("bits", [3, 4, 7, 8, 16])
def test_what_is_pruned_behind_the_last_survivor_is_zero(bits: int) -> None:
    """Of the second 32 rows, a segment's end with their 32nd block, before the last channels; another has none."""
    weight = random_weight(Layout(64, (bits,) * 2, 32), 64, coded=True, density=0.5)
    kept = torch.ones(64, 2, 32, dtype=torch.bool)
    kept[0, :, :24] = kept[63, :, 24:] = False  # 1000 and 1016 of a segment
    kept[32:, 1] = False  # nothing, after 1000
    codes = torch.randint(0, 2 ** min(bits, 14), (64, 64), dtype=torch.int32)
    weight = replace(weight, codes=codes * kept.flatten(1), kept=kept.flatten(1))
    dense, packed = weight.dequantize().double().cuda(), on_device(pack(weight))
    x = torch.randn(64, 64, device="cuda")
    expected, many = x.double() @ dense.t(), torch.empty(64, 64, device="cuda")
    decode(x[:1], [packed], None, [None], Cut(1, 1, 2, 1))  # nothing has to be counted any more
    leave_shared_memory_dirty()
    few = decode(x[:1], [packed], None, [None], Cut(1, 1, 2, 1))[0]
    leave_shared_memory_dirty()
    Chunks(64).multiply(x, packed, None, None, many)
    for found, wanted in ((few, expected[:1]), (many, expected)):
        assert float((found.double() - wanted).norm()) <= 1e-3 * float(wanted.norm())


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (8, torch.float32), (9, torch.float16)])
def test_several_weights_at_once_give_what_each_gives_alone(rows: int, dtype: torch.dtype, density: float) -> None:
    layouts = [Layout(512, widths, 64) for widths in ((6,) * 5 + (3,) * 11, (4,) * 16, (8, 16) + (2,) * 13 + (0,))]
    weights = [
        on_device(pack(random_weight(layout, out, coded=True, density=density)))
        for layout, out in zip(layouts, (300, 20, 76), strict=True)
    ]
    order = torch.randperm(512).to(torch.uint16).cuda()
    biases = [torch.randn(300, device="cuda"), None, torch.randn(76, device="cuda", dtype=dtype)]
    x = torch.randn(2, rows, 512, device="cuda").mul(0.05).to(dtype)[1]
    expected = [packed_linear(x, weight, order, bias) for weight, bias in zip(weights, biases, strict=True)]
    for found, wanted in zip(packed_linears(x, weights, order, biases), expected, strict=True):
        assert float((found.double() - wanted.double()).norm()) <= TOLERANCE[dtype] * float(wanted.double().norm())


def test_kernels_that_follow_each_other_in_a_graph_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One starts while the one before it runs, and reads its result all the same."""
    monkeypatch.undo()  # memory that is poisoned would come between them
    early, config = [], nvrtc.Kernel._config

    def seen(kernel: nvrtc.Kernel, launch: nvrtc.Launch) -> Any:
        early.append(launch.early)
        return config(kernel, launch)

    monkeypatch.setattr(nvrtc.Kernel, "_config", seen)
    layout = Layout(1024, (4,) * 32, 64)
    layers = [on_device(pack(random_weight(layout, 1024, coded=True))) for _ in range(6)]
    order = torch.randperm(1024).to(torch.uint16).cuda()
    x = torch.randn(1, 1024, device="cuda")

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = packed_linear(x / x.norm() if layer is layers[3] else x, layer, order, None)
        return x

    check_replays(run, x, run(x))
    assert sum(early) == 4  # all that were captured, but for the first one, and the one behind another kernel


def check_replays(run: Callable[[Tensor], Tensor], x: Tensor, expected: Tensor) -> None:
    """Capture a run; every replay, into poisoned memory, gives what is expected."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(x)
    for _ in range(20):
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, expected)


TILES = [
    (132, 9, Tile(16, (Part(2, 1),))),
    (516, 70, Tile(64, (Part(5, 2),))),
    (256, 300, Tile(256, (Part(2, 1),))),
    (384, 176, Tile(176, (Part(3, 4),))),
    (516, 300, Tile(256, (Part(2, 1), Part(3, 3)))),
    (388, 70, Tile(32, (Part(1, 2), Part(3, 8)))),
    (772, 300, Tile(128, (Part(4, 1), Part(1, 5), Part(2, 7)))),
    (132, 9, Tile(16, (Part(2, 2),))),
    (256, 300, Tile(256, (Part(2, 2),))),
    (384, 176, Tile(176, (Part(3, 2),))),
    (772, 300, Tile(128, (Part(4, 1), Part(3, 2)))),
]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("out", "rows", "tile"), TILES, ids=str)
def test_tiles_unpack_the_weight_in_registers(
    layout: Layout, out: int, rows: int, tile: Tile, dtype: torch.dtype
) -> None:
    weight = random_weight(layout, out, symmetric=rows == 70, coded=True)
    dense, packed = weight.dequantize().double().cuda(), on_device(pack(weight))
    # Float16 values of the weight are any: what they add up to has to be within float16's range.
    x = (torch.randn(rows, layout.in_features, device="cuda") / 32).to(dtype)
    bias = torch.randn(out, device="cuda").to(dtype)
    assert unpacks_in_registers(x, packed)
    order = (
        None if rows == 9 else torch.randperm(layout.in_features).to(torch.uint16 if rows == 70 else torch.int32).cuda()
    )
    moved = x.double() if order is None else x.double()[:, order.long()]
    found = torch.empty(rows, out, dtype=dtype, device="cuda")
    tile.multiply(x, packed, order, bias, found)
    expected, size = moved @ dense.t() + bias.double(), moved.abs() @ dense.abs().t() + bias.double().abs()
    assert float(((found.double() - expected).abs() / (size + expected.abs())).max()) <= TOLERANCE[dtype]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [256, 176, 64])
@pytest.mark.parametrize("parts", [(Part(3, 1), Part(2, 3), Part(3, 8)), (Part(4, 1), Part(4, 2))], ids=str)
def test_processors_take_one_share_after_the_other(
    parts: tuple[Part, ...], tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tiles with all the channels, and of such whose shares go to any processors, or two; with the same result."""
    layout = Layout(1056, (16, *(6, 5, 4, 3) * 8), 32)
    packed = on_device(pack(random_weight(layout, 1000, coded=True)))
    x = (torch.randn(600, 1056, device="cuda") / 32).to(dtype)
    order, bias = torch.randperm(1056).to(torch.uint16).cuda(), torch.randn(1000, device="cuda").to(dtype)
    expected, results = reference(x.float(), packed, order, bias.float()), []
    for processors in (1, 7, 4, 10, 132, 132):
        monkeypatch.setattr("mpfx.nn.kernels.cuda.tile._processors", lambda _, processors=processors: processors)
        results.append(torch.full((600, 1000), float("nan"), dtype=dtype, device="cuda"))
        Tile(tokens, parts).multiply(x, packed, order, bias, results[-1])
        assert float((results[-1].float() - expected).norm() / expected.norm()) < 0.01
        assert torch.equal(results[-1], results[0])


def check_with_threads_asleep(
    cut: Tile,
    x: Tensor,
    packed: PackedWeight,
    monkeypatch: pytest.MonkeyPatch,
    *,
    where: str,
    who: str,
    nanoseconds: int,
) -> None:
    """The product stays the same, bit for bit, if some threads fall asleep before one place of the source."""
    load = nvrtc._load

    def product() -> Tensor:
        out = torch.empty(len(x), packed.out_features, dtype=x.dtype, device=x.device)
        cut.multiply(x, packed, None, None, out)
        return out

    def slow(source: str, *options: Any) -> nvrtc.Kernel:
        assert source.count(where) == 1
        return load(source.replace(where, f"if ({who}) __nanosleep({nanoseconds});\n{where}"), *options)

    expected = product()
    monkeypatch.setattr(nvrtc, "_load", slow)
    monkeypatch.setattr("mpfx.nn.kernels.cuda.tile.kernel", nvrtc.kernel.__wrapped__)
    assert torch.equal(product(), expected)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("late", [0, 1])
def test_tiles_wait_for_a_warp_that_prepares_late(late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the ends of shares too, which it may not even have seen when others are far ahead."""
    packed = on_device(pack(random_weight(LAYOUTS[-1], 512, coded=True)))
    x = torch.randn(256, 4096, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr("mpfx.nn.kernels.cuda.tile._processors", lambda _: 1)
    waits, who = "wait(room.full + turn.stage * 8, turn.parity);", f"k == share.steps - 1 && first == {late}"
    check_with_threads_asleep(
        Tile(256, (Part(4, 8),)), x, packed, monkeypatch, where=waits, who=who, nanoseconds=50_000
    )


LATE_BLOCKS = {  # where a block of a cluster, or one of its warps, falls asleep
    "starts": ("    const int4 unit = __ldg(a.units + min(", "true"),
    "multiplies": ("        const Share share(a, i);\n            const bool paired", "true"),
    "reads": (
        "        wait(ready + turn.stage * 8, turn.parity);",
        "threadIdx.x / 128 == 1 && k == max(share.steps - STAGES, 0)",
    ),
    "offers room": ("    const int other = cluster_rank() ^ 1;\n    if (threadIdx.x == 0)", "threadIdx.x / 32 == 5"),
    "goes on": ("        paired = false, stop = share.steps;", "true"),
    "sends": ("    const int theirs = *room.offered", "threadIdx.x / 32 == 2"),
    "receives": ("    const u32 from[2]", "threadIdx.x / 32 == 7"),
}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("tokens", [256, 16])
@pytest.mark.parametrize("steps", [64, 63, 5])
@pytest.mark.parametrize("late", LATE_BLOCKS)
@pytest.mark.parametrize("rank", [0, 1])
def test_two_blocks_that_have_a_tile_wait_for_each_other(
    rank: int, late: str, steps: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(64 * steps, LAYOUTS[-1].widths[: 2 * steps], 64)
    packed = on_device(pack(random_weight(layout, 512, coded=True)))
    x = torch.randn(tokens, layout.in_features, dtype=torch.bfloat16, device="cuda")
    where, who = LATE_BLOCKS[late]
    who = f"cluster_rank() == {rank} && {who}"
    check_with_threads_asleep(
        Tile(tokens, (Part(4, 2),)), x, packed, monkeypatch, where=where, who=who, nanoseconds=100_000
    )


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("parts", [(Part(4, 1), Part(4, 2)), (Part(2, 1), Part(2, 3), Part(4, 8))], ids=str)
def test_tiles_that_follow_each_other_in_a_graph_wait_for_each_other(
    parts: tuple[Part, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are read while activations are put in order, where those of the layer before were."""
    monkeypatch.undo()  # memory that is poisoned would come between them
    layers = [on_device(pack(random_weight(Layout(1024, (4,) * 32, 64), 1024, coded=True))) for _ in range(4)]
    order = torch.randperm(1024).to(torch.uint16).cuda()
    x = torch.randn(600, 1024, dtype=torch.bfloat16, device="cuda")

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            out = torch.empty_like(x)
            Tile(128, parts).multiply(x, layer, order, None, out)
            x = out / out.norm(dim=1, keepdim=True) if layer is layers[1] else out
        return x

    expected = run(x)
    dense = x.double()
    for layer in layers:
        dense = reference(dense.float(), layer, order, None).double()
        dense /= dense.norm(dim=1, keepdim=True)
    assert float((expected.double() / expected.double().norm(dim=1, keepdim=True) - dense).norm()) < 0.05 * 600**0.5
    check_replays(run, x, expected)


LATE = """
struct Args { const int* from; int* to; int words; };
extern "C" __global__ void late(const __grid_constant__ Args a) {
    asm volatile("griddepcontrol.launch_dependents;");
    const long long start = clock64();
    while (clock64() - start < 100000) {}
    for (int i = threadIdx.x; i < a.words; i += blockDim.x) a.to[i] = a.from[i];
}
"""


@pytest.mark.usefixtures("hopper")
def test_tiles_wait_for_whoever_writes_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel before lets them start, and only then writes weights, activations, or their order."""
    monkeypatch.undo()  # memory that is poisoned would come between them
    weight = random_weight(LAYOUTS[-1], 1024, coded=True)
    held, wanted = (on_device(pack(weight.rows(rows))) for rows in (slice(512), slice(512, 1024)))
    orders = [torch.arange(4096).to(torch.uint16).cuda(), torch.randperm(4096).to(torch.uint16).cuda()]
    xs = torch.randn(2, 300, 4096, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(300, 512, dtype=torch.bfloat16, device="cuda")
    cut, device = Tile(256, (Part(4, 2),)), torch.cuda.current_device()
    cut.multiply(xs[1], wanted, orders[1], None, out)
    expected = out.clone()
    fields = [("start", ctypes.c_void_p), ("to", ctypes.c_void_p), ("words", ctypes.c_int)]
    arguments, write = type("Copy", (ctypes.Structure,), {"_fields_": fields}), nvrtc._load(LATE, "late", (), device)
    pairs = [(held.codes, wanted.codes), (orders[0], orders[1]), (xs[0], xs[1])]
    for old, new in pairs:  # the one that is written last, all others being there
        for part, other in zip(held.parts.values(), wanted.parts.values(), strict=True):
            if part is not None and other is not None:
                part.copy_(other)
        orders[0].copy_(orders[1]), xs[0].copy_(xs[1])
        kept = new.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            old.view(torch.uint8).zero_()
            write(nvrtc.Launch((1, 1), 1024, 0), arguments(address(kept), address(old), kept.nbytes // 4))
            cut.multiply(xs[0], held, orders[0], None, out)
        for _ in range(5):
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, expected)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("tokens", [256, 176])
def test_tiles_wait_for_a_step_that_comes_late(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings of five stages and of six; all that is copied ahead, but for the first step, is there before that."""
    packed = on_device(pack(random_weight(LAYOUTS[-1], 256, coded=True)))
    x = torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda")
    cut, copied = Tile(tokens, (Part(2, 1),)), "arrive_when_copied(full);"
    check_with_threads_asleep(cut, x, packed, monkeypatch, where=copied, who="count == 0", nanoseconds=200_000)


@pytest.mark.parametrize("size", [1e-30, 1e4, 1e30])
def test_activations_of_any_size_keep_their_precision(size: float) -> None:
    weight = random_weight(Layout(256, (4,) * 8, 64), 96, coded=True)
    dense, packed = weight.dequantize().double().cuda(), on_device(pack(weight))
    x = torch.randn(2, 256, device="cuda") * size
    expected = x.double() @ dense.t()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        found = packed_linear(x.to(dtype), packed, None, None).double()
        assert float((found - expected).norm()) <= tolerance * float(expected.norm())


def test_more_vectors_than_fit_are_multiplied_one_part_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(MIXED, 40, coded=True)
    x = torch.randn(7, 256, device="cuda")
    monkeypatch.setattr(cuda, "room_for", lambda *arguments: 3)
    agrees(x, weight.dequantize().double().cuda(), on_device(pack(weight)), None, None)


@pytest.mark.parametrize("way", ["few", "many"])
@pytest.mark.parametrize("together", ["together", "apart"])
@pytest.mark.usefixtures("hopper")
def test_five_to_eight_rows_are_multiplied_either_way(way: str, together: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "SURE_ROWS", 4)
    fastest, chosen = tune.fastest, []

    def choose(key: str, candidates: tuple[Any, ...], run: Callable[[Any], object], device: torch.device) -> Any:
        found = next((c for c in candidates if c in (way, together)), None)
        if found is None:
            return fastest(key, candidates, run, device)
        for candidate in candidates:  # as what measures does
            run(candidate)
        chosen.append(found)
        return found

    monkeypatch.setattr(cuda, "fastest", choose)
    weights = [random_weight(LAYOUTS[-1], out, coded=True) for out in (512, 256)]
    packed, dense = [on_device(pack(w)) for w in weights], [w.dequantize().double().cuda() for w in weights]
    order = torch.randperm(4096).to(torch.uint16).cuda()
    bias = torch.randn(512, dtype=torch.bfloat16, device="cuda")
    for rows in (4, 5, 7, 8, 9):
        chosen.clear()
        x = torch.randn(rows, 4096, dtype=torch.bfloat16, device="cuda")
        agrees(x, dense[0], packed[0], order, bias)
        assert chosen == [way] * (2 if 4 < rows < 9 else 0)
        alone = [packed_linear(x, w, order, b) for w, b in zip(packed, (bias, None), strict=True)]
        for one, other in zip(packed_linears(x, packed, order, [bias, None]), alone, strict=True):
            difference = (one.double() - other.double()).norm() / other.double().norm()
            assert float(difference) <= TOLERANCE[torch.bfloat16]
        assert (together in chosen) == (4 < rows < 9)


def test_a_mask_that_is_loaded_anew_is_counted_anew() -> None:
    first, second = (random_weight(MIXED, 40, density=d, coded=True) for d in (0.3, 0.6))
    packed = on_device(pack(first))
    x = torch.randn(1, 256, device="cuda")
    agrees(x, first.dequantize().double().cuda(), packed, None, None)
    other = on_device(pack(second))
    assert packed.mask is not None
    assert other.mask is not None
    packed.mask.copy_(other.mask)
    parts = {**other.parts, "mask": packed.mask}
    agrees(x, second.dequantize().double().cuda(), PackedWeight.of(parts, packed.layout), None, None)


def test_a_mask_that_nobody_counted_is_refused_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = on_device(pack(random_weight(MIXED, 40, density=0.5, coded=True)))
    x = torch.randn(1, 256, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="Run the layer once before"):
        packed_linear(x, packed, None, None)


def test_the_fastest_cut_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPFX_CACHE", str(tmp_path))
    monkeypatch.delenv("MPFX_TUNE", raising=False)
    tune._chosen.cache_clear()
    ran: list[int] = []

    def run(cycles: int) -> None:
        ran.append(cycles)
        torch.cuda._sleep(cycles)

    device = torch.device("cuda", torch.cuda.current_device())
    assert tune.fastest("a", (3_000_000, 1_000, 2_000_000), run, device) == 1_000
    count = len(ran)
    tune._chosen.cache_clear()
    assert tune.fastest("a", (3_000_000, 1_000, 2_000_000), run, device) == 1_000
    assert len(ran) == count
    assert tune._file().parent == cache_folder()
    assert tune._file().exists()
    tune._chosen.cache_clear()


def test_what_is_not_finite_stays_so() -> None:
    packed = on_device(pack(random_weight(Layout(128, (4,) * 4, 64), 64, coded=True)))
    for value in (float("nan"), float("inf")):
        x = torch.randn(1, 128, device="cuda")
        x[0, 70] = value
        assert not bool(torch.isfinite(packed_linear(x, packed, None, None)).any())


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # the compiler imports it
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_graphs_and_compilers_take_it(density: float) -> None:
    layout = Layout(256, (5, 5, 4, 4, 3, 3, 3, 3), 64)
    packed = on_device(pack(random_weight(layout, 320, coded=True, density=density)))
    x = torch.randn(1, 256, dtype=torch.bfloat16, device="cuda")
    expected = packed_linear(x, packed, None, None)
    with torch.no_grad():
        compiled = torch.compile(lambda t: packed_linear(t, packed, None, None), fullgraph=True)
        assert torch.equal(compiled(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = packed_linear(x, packed, None, None)
    for _ in range(3):
        graph.replay()
    assert torch.equal(found, expected)
