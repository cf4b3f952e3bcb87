"""The kernels of the sweep and of the refinement against PyTorch, on poisoned buffers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mpfx.nn import Layout, pack, unpack
from mpfx.nn.scales import decoded
from mpfx.solve import GridConfig, Sparsity, layer_error, measured_refine, measured_sweep, prune_lowest, refine, sweep
from mpfx.solve.refine import ChannelDescent
from mpfx.solve.sweep import ChannelSweep
from tests.solve.test_sweep import problem, upper_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote to holds NaN."""
    empty = torch.empty

    def poison(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        made.view(torch.uint8).fill_(255) if made.numel() else None
        return made

    monkeypatch.setattr(torch, "empty", poison)


WIDTHS = [(4,) * 10, (8, 8, 5, 5, 5, 4, 3, 2, 1, 1), (5, 0, 0, 16, 4, 4, 16, 3, 0, 2), (0,) * 10]
CONFIGS = [
    GridConfig(),
    GridConfig(symmetric=True, clip_search=False),
    GridConfig(group_size=32),
    GridConfig(group_size=96, symmetric=True),
    GridConfig(group_size=128, scale_bits=16),
    GridConfig(group_size=160),
    GridConfig(group_size=None, scale_bits=16),
    GridConfig(group_size=None, scale_bits=16, symmetric=True, clip_search=False),
]
PATTERNS = [None, 0.5, "1:2", "2:4", "16:32"]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("rows", "channels"), [(77, 320), (5, 293)])
def test_agrees_with_pytorch(
    widths: tuple[int, ...], config: GridConfig, pattern: float | str | None, rows: int, channels: int
) -> None:
    weight, h = problem(rows, channels)
    upper, layout, sparsity = upper_of(h), Layout(channels, widths, config.group_size), Sparsity.parse(pattern)
    expected = ChannelSweep(weight, upper, layout, config, sparsity).solve()
    found, damped = measured_sweep(weight.cuda(), upper.cuda(), layout, config, sparsity)
    off = weight.cuda() - found.dequantize()
    pushed = torch.linalg.solve_triangular(upper.cuda().double(), off.double(), upper=True, left=False)  # off = E U
    torch.testing.assert_close(damped, pushed.square().sum(1), rtol=1e-3, atol=0)
    dense = found.dequantize().cpu()
    errors = [layer_error(weight, part, h) for part in (dense, expected.dequantize())]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    # Where a value lies within rounding of the middle between two codes, all that follows may differ.
    alike = (dense - expected.dequantize()).abs() <= 1e-4
    assert float(alike[:, : channels // 2].double().mean()) > 0.9
    assert torch.equal(unpack(pack(found)).dequantize().cpu(), dense)
    assert (found.kept is None) == (expected.kept is None)
    if found.kept is not None and expected.kept is not None:
        assert torch.equal(found.kept.sum(), expected.kept.cuda().sum())
    again = sweep(weight.cuda(), upper.cuda(), layout, config, sparsity)
    assert torch.equal(again.codes, found.codes)


def test_the_first_group_is_the_same_to_the_bit() -> None:
    """Nothing was compensated yet, so that only the clip search's sums may round otherwise."""
    weight, h = problem(64, 64)
    for config in (GridConfig(), GridConfig(scale_bits=16), GridConfig(symmetric=True)):
        layout = Layout(64, (4, 4), config.group_size)
        expected = ChannelSweep(weight, upper_of(h), layout, config, Sparsity()).solve()
        found = sweep(weight.cuda(), upper_of(h).cuda(), layout, config)
        alike = decoded(found.scales, layout).cpu() == decoded(expected.scales, layout)
        assert float(alike.double().mean()) > 0.95
        if found.zeros is not None and expected.zeros is not None:
            assert torch.equal(found.zeros.cpu(), expected.zeros)


@pytest.mark.parametrize(("value", "message"), [(1e7, "float16"), (float("inf"), "infinity"), (float("nan"), "NaN")])
@pytest.mark.parametrize("scale_bits", [4, 16])
def test_weights_that_no_grid_can_hold_are_refused(value: float, message: str, scale_bits: int) -> None:
    weight, h = problem(8, 64)
    weight[5, 40] = value
    with pytest.raises(ValueError, match=message):
        sweep(weight.cuda(), upper_of(h).cuda(), Layout(64, (4, 4)), GridConfig(scale_bits=scale_bits))


def test_the_lowest_are_pruned_in_storage_order() -> None:
    scores = torch.randint(0, 9, (40, 50)).float()
    for count in (0, 1, 777, 2000):
        assert torch.equal(prune_lowest(scores.cuda(), count).cpu(), prune_lowest(scores, count))


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("pattern", [None, 0.5, "2:4"])
@pytest.mark.parametrize(("rows", "channels", "passes"), [(77, 320, 1), (77, 320, 3), (37, 293, 2)])
def test_refinement_agrees_with_pytorch(
    widths: tuple[int, ...],
    config: GridConfig,
    pattern: float | str | None,
    rows: int,
    channels: int,
    passes: int,
) -> None:
    weight, h = problem(rows, channels)
    layout = Layout(channels, widths, config.group_size)
    solved = sweep(weight.cuda(), upper_of(h).cuda(), layout, config, Sparsity.parse(pattern))
    silent = [3, channels // 2, channels - 1]  # channels that get neither input nor damping
    h[silent], h[:, silent] = 0.0, 0.0
    for damping in (0.0, 0.01):
        slow = ChannelDescent(weight.cuda(), solved, h.cuda(), damping)
        for _ in range(passes):
            if not slow.cycle():
                break
        expected, (found, lowered) = slow.result(), measured_refine(weight.cuda(), solved, h.cuda(), damping, passes)
        assert float(lowered.sum()) == pytest.approx(float(slow.lowered.sum()), rel=1e-2)
        assert float((found.codes != expected).double().mean()) < 0.02  # ties, and what follows from them
        errors = [layer_error(weight, replace(solved, codes=c).dequantize().cpu(), h) for c in (found.codes, expected)]
        off = 1e-3 if torch.equal(found.codes, expected) else 1e-2  # after a tie there are several ways down
        assert errors[0] == pytest.approx(errors[1], rel=off)
        if not damping:
            assert torch.equal(found.codes[:, silent], solved.codes[:, silent])
        if solved.kept is not None:
            assert not bool(found.codes[~solved.kept].any())
        assert torch.equal(refine(weight.cuda(), solved, h.cuda(), damping, passes).codes, found.codes)


def test_refinement_tells_whether_a_code_has_changed() -> None:
    from mpfx.solve.cuda import KernelDescent

    weight, h = problem(40, 100)
    solved = sweep(weight.cuda(), upper_of(h).cuda(), Layout(100, (4, 3, 2, 2)), GridConfig(), Sparsity(0.5))
    state = KernelDescent(weight.cuda(), solved, h.cuda(), 0.01)
    before, cycles = state.result(), 0
    while state.cycle():
        assert not torch.equal(state.result(), before)
        before, cycles = state.result(), cycles + 1
        assert cycles < 100
    assert cycles > 1
    assert torch.equal(state.result(), before)


@pytest.mark.parametrize("pattern", [None, 0.5, "2:4"])
@pytest.mark.parametrize("config", [GridConfig(), GridConfig(scale_bits=16)])
def test_kernels_that_were_compiled_ahead_serve(pattern: float | str | None, config: GridConfig) -> None:
    from mpfx.solve.cuda import compile_kernels
    from mpfx.solve.descent import descent_kernel
    from mpfx.solve.panels import panel_kernel

    def compiled() -> int:
        kernels = (panel_kernel, descent_kernel)
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    sparsity = Sparsity.parse(pattern)
    compile_kernels(config, sparsity, bool(sparsity), torch.device("cuda"))
    before = compiled()
    assert before
    weight, h = problem(77, 320)
    solved = sweep(weight.cuda(), upper_of(h).cuda(), Layout(320, (4, 4, 3, 3, 5, 5, 2, 2, 8, 8)), config, sparsity)
    if sparsity:
        refine(weight.cuda(), solved, h.cuda())
    assert compiled() == before
