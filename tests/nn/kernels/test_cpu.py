"""The CPU kernels against the eager reference in float64, by relative error; and that they are deterministic."""

import copy
import dataclasses
import gc
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpfx.nn import CodedScales, Layout, MixedPrecisionLinear, PackedWeight, QuantizedWeight, pack, unpack
from mpfx.nn.kernels import cpu
from mpfx.nn.kernels.cpu import cpu_linear
from mpfx.nn.packing import PARTS

ROUNDED, EXACT = 1e-4, 2e-6  # of the result's norm: activations of 16 bits up to eight rows, float32 beyond
MIXED = (8, 7, 6, 5, 4, 3, 2, 1, 0, 16)
needs_numba = pytest.mark.skipif(not cpu._has_numba(), reason="needs numba")


def random_weight(
    layout: Layout, rows: int, *, symmetric: bool = False, coded: bool = True, density: float = 1.0
) -> PackedWeight:
    generator = torch.Generator().manual_seed(rows)
    grids = len(layout.grids)
    codes = [
        torch.randn(rows, run.channels, generator=generator).half().view(torch.int16).int() & 0xFFFF
        if run.bits == 16
        else torch.randint(0, 1 << run.bits, (rows, run.channels), generator=generator)
        for run in layout.runs
    ]
    kept = torch.rand(rows, layout.in_features, generator=generator) < density
    kept &= torch.tensor([bits > 0 for bits in layout.widths]).repeat_interleave(32)[: layout.in_features]
    zeros = [torch.randint(0, 1 << grid.bits, (rows,), generator=generator).byte() for grid in layout.grids]
    scales = torch.rand(rows, grids, generator=generator).half()
    if coded:
        indices = torch.randint(0, 16, (rows, grids), generator=generator)
        bases = [torch.rand(n, generator=generator) + 0.5 for n in (rows, grids)]
    return pack(
        QuantizedWeight(
            codes=torch.cat(codes, 1).int() * (kept if density < 1 else 1),
            scales=CodedScales.of(indices, *bases) if coded else scales,
            zeros=None if symmetric else torch.stack([torch.empty(rows).byte(), *zeros], 1)[:, 1:],
            kept=kept if density < 1 else None,
            layout=layout,
        )
    )


def activations(rows: int, channels: int) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(channels + rows))


def error(y: Tensor, x: Tensor, weight: PackedWeight, permutation: Tensor | None = None) -> float:
    ordered = x if permutation is None else x[:, permutation.long()]
    expected = ordered.double() @ unpack(weight).dequantize().double().t()
    return float((y.double() - expected).norm() / expected.norm())


@pytest.fixture(params=["compiled", "eager"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "eager":
        monkeypatch.setattr(cpu, "_has_numba", lambda: False)
    elif not cpu._has_numba():
        pytest.skip("needs numba")
    return str(request.param)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("widths", [*((bits,) for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16)), MIXED, (4, 4, 3)], ids=str)
@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.usefixtures("path")
def test_every_width(widths: tuple[int, ...], density: float, count: int) -> None:
    channels = 200 if len(widths) < len(MIXED) else 300
    layout = Layout(channels, tuple(widths[k % len(widths)] for k in range(-(-channels // 32))), 64)
    weight, x = random_weight(layout, 37, density=density), activations(count, channels)
    assert error(cpu_linear(x, weight, None), x, weight) < (ROUNDED if count == 1 else EXACT)


@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.usefixtures("path")
def test_every_grid(group_size: int | None, symmetric: bool, coded: bool, density: float) -> None:
    layout = Layout(352, (4, 4, 4, 4, 4, 16, 3, 3, 0, 5, 5), group_size)
    weight = random_weight(layout, 70, symmetric=symmetric, coded=coded, density=density)
    for count in (2, 9):
        x = activations(count, 352)
        assert error(cpu_linear(x, weight, None), x, weight) < (ROUNDED if count <= 8 else EXACT)


@pytest.mark.parametrize("rows", [1, 7, 9, 65, 577])
@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.usefixtures("path")
def test_odd_sizes(rows: int, density: float) -> None:
    for channels, widths in ((33, (5, 3)), (200, (3, 4, 4, 16, 6, 1, 2)), (5, (4,))):
        weight = random_weight(Layout(channels, widths, 64), rows, density=density)
        for count in (1, 8, 9, 70):
            x = activations(count, channels)
            y = cpu_linear(x, weight, None)
            assert y.shape == (count, rows)
            if unpack(weight).dequantize().any():
                assert error(y, x, weight) < ROUNDED


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("path")
def test_dtypes_and_permutations(dtype: torch.dtype) -> None:
    weight = random_weight(Layout(200, (3, 4, 4, 16, 6, 1, 2), 64), 50)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    for count in (0, 1, 8, 9):
        x = activations(count, 200).to(dtype)
        for permutation in (order, order.to(torch.uint16), order.int()):
            y = cpu_linear(x, weight, permutation)
            assert y.dtype == dtype
            assert y.shape == (count, 50)
            assert not count or error(y, x, weight, permutation) < max(ROUNDED, torch.finfo(dtype).eps)


@needs_numba
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_same_bits_on_any_number_of_threads(density: float) -> None:
    weight = random_weight(Layout(1024, (4, 3, 5, 16) * 8, 64), 1500, density=density)
    for count in (1, 3):
        x, results = activations(count, 1024), []
        for threads in (1, 2, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(cpu_linear(x, weight, None))
        assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_nothing_uninitialised_is_read(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    weight = random_weight(Layout(330, (*MIXED, 4), 64), 100, density=density)
    inputs = [activations(count, 330) for count in (1, 8, 40)]
    clean = [cpu_linear(x, weight, None) for x in inputs]
    empty, array = torch.empty, np.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(113)

    def poisoned_array(*arguments: Any) -> Any:
        made = array(*arguments)
        made.fill(113)
        return made

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(np, "empty", poisoned_array)
    garbage = [torch.full((1 << 18,), float("nan")) for _ in range(20)]  # for the kernels' own buffers to lie in
    del garbage
    for x, expected in zip(inputs, clean, strict=True):
        assert torch.equal(cpu_linear(x, weight, None), expected)


@pytest.mark.usefixtures("path")
def test_no_more_than_a_chunk_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)  # the least that is possible: 64 rows, or 32 channels
    for density in (1.0, 0.5):
        weight = random_weight(Layout(200, (3, 4, 4, 16, 6, 1, 2), None), 200, density=density)
        x = activations(20, 200)
        assert error(cpu_linear(x, weight, None), x, weight) < EXACT


@needs_numba
def test_another_mask_in_the_same_tensor() -> None:
    layout = Layout(128, (4, 4, 3, 3), 64)
    weight, other, x = (
        random_weight(layout, 80, density=0.5),
        random_weight(layout, 80, density=0.2),
        activations(1, 128),
    )
    cpu_linear(x, weight, None)
    assert weight.mask is not None
    assert other.mask is not None
    weight.mask.copy_(other.mask)
    loaded = dataclasses.replace(other, mask=weight.mask)
    assert error(cpu_linear(x, loaded, None), x, other) < ROUNDED


@needs_numba
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_get_lost(value: float) -> None:
    weight = random_weight(Layout(64, (4, 4), 64), 40)
    x = activations(1, 64)
    x[0, 5] = value
    assert not cpu_linear(x, weight, None).isfinite().any()
    assert torch.equal(cpu_linear(torch.zeros(1, 64), weight, None), torch.zeros(1, 40))


@needs_numba
@pytest.mark.parametrize("features", ["", "+avx,+avx2,+bmi,+bmi2"], ids=["none", "avx2"])
def test_other_processors(features: str) -> None:
    """Numba compiles for a processor that lacks what this one may have; a process of its own, as numba asks once."""
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    command = [sys.executable, "-c", "import test_cpu; test_cpu.check_other_processor()"]
    subprocess.run(command, env=environment, cwd=Path(__file__).parent, check=True)


def check_other_processor() -> None:
    from mpfx.nn.kernels import cpu_lanes

    assert not cpu_lanes.BYTES
    assert not cpu_lanes.MOVES
    layout = Layout(330, (*MIXED, 4), 64)
    for density in (1.0, 0.5):
        weight = random_weight(layout, 75, density=density)
        for count in (1, 3, 20):
            x = activations(count, 330)
            assert error(cpu_linear(x, weight, None), x, weight) < (ROUNDED if count <= 8 else EXACT)


@needs_numba
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_addresses_follow_the_tensors(density: float) -> None:
    layout, x = Layout(128, (4, 4, 3, 3), 64), activations(1, 128)
    weight, other = (random_weight(layout, 80, density=d) for d in (density, density / 2 if density < 1 else 1.0))
    module = MixedPrecisionLinear(weight)
    before = module(x)
    assert error(before, x, weight) < ROUNDED
    copied, loaded = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for name in PARTS:  # the original's memory is someone else's then
        if (part := getattr(module, name)) is not None:
            part.zero_()
    assert torch.equal(copied(x), before)
    assert torch.equal(loaded(x), before)
    copied.share_memory()  # the same tensors, elsewhere
    assert torch.equal(copied(x), before)
    for name, part in other.parts.items():
        setattr(module, name, None if part is None else part.clone())
    assert error(module(x), x, other) < ROUNDED


@needs_numba
def test_nothing_keeps_a_weight() -> None:
    module = MixedPrecisionLinear(random_weight(Layout(64, (4, 4), 64), 40, density=0.5))
    module(activations(1, 64))
    codes = weakref.ref(module.codes)
    del module
    gc.collect()
    assert codes() is None


@needs_numba
def test_calls_from_several_threads() -> None:
    weight, x = random_weight(Layout(2048, (4, 3) * 32, 64), 3000), activations(1, 2048)
    torch.set_num_threads(2)
    expected = cpu_linear(x, weight, None)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: cpu_linear(x, weight, None), range(40)))
    assert all(torch.equal(expected, result) for result in results)


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_has_threads_of_its_own() -> None:
    weight, x = random_weight(Layout(2048, (4, 3) * 32, 64), 3000), activations(1, 2048)
    torch.set_num_threads(2)
    expected = cpu_linear(x, weight, None)
    if not (child := os.fork()):
        os._exit(0 if torch.equal(cpu_linear(x, weight, None), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@needs_numba
def test_arguments_that_do_not_fit() -> None:
    weight = random_weight(Layout(64, (4, 4), 64), 40)
    x, order = activations(1, 64), torch.arange(63)
    for arguments, message in (
        ((x[:, :63], weight, None), "`x` of 64 channels but got 63"),
        ((x, weight, order), "`permutation` of 64 channels but got 63"),
        ((x, weight, None, torch.zeros(41)), "`bias` of 40 rows but got 41"),
        ((x, dataclasses.replace(weight, codes=weight.codes.long()), None), "`codes` of torch.int32"),
        ((x, dataclasses.replace(weight, codes=weight.codes.to("meta")), None), "`codes` on the CPU"),
        ((x, weight, torch.arange(64, device="meta")), "`permutation` on the CPU"),
        ((x, weight, None, torch.zeros(40, device="meta")), "`bias` on the CPU"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu_linear(*arguments)
