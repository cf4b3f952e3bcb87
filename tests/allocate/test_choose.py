"""From frontiers to plans: budgets, limits, ties, and distortions that mean what they say."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from mpfx.allocate import Frontier, GroupFrontier, OptimalConfig, WidthLimit, choose, with_curves
from mpfx.allocate.choose import feasible_bits
from mpfx.allocate.frontier import count_bytes, measure_curve
from mpfx.nn import Layout, stored_bytes
from mpfx.solve import GridConfig, Sparsity, factorise, layer_error, sweep

WIDTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8)


def frontier(
    sizes: dict[str, tuple[int, int]], sparsities: tuple[Sparsity, ...] = (Sparsity(),), **grid: Any
) -> Frontier:
    generator = torch.Generator().manual_seed(0)
    config = GridConfig(**grid)
    empty = Frontier(WIDTHS, config, ())
    groups = []
    for index, (name, (rows, channels)) in enumerate(sizes.items()):
        weight = torch.randn(rows, channels, generator=generator) * 3**index
        diagonal = torch.rand(channels, generator=generator) + 0.1
        draft = GroupFrontier(name, {name: rows}, torch.randperm(channels, generator=generator), 64, True, None, ())
        groups.append(with_curves(draft, empty, sparsities, (weight, diagonal.sort().values)))
    return replace(empty, groups=tuple(groups))


SIZES = {"a.q_proj": (96, 256), "a.down_proj": (64, 352), "b.q_proj": (96, 256), "b.down_proj": (64, 352)}


@pytest.mark.parametrize("target", [1.5, 2.8, 3.34, 4.35, 7.0])
def test_a_stored_budget_is_met_from_below(target: float) -> None:
    found = choose(frontier(SIZES), target, OptimalConfig())
    numel = sum(rows * channels for rows, channels in SIZES.values())
    stored = sum(plan.stored_bytes() for plan in found.plans)
    assert stored == found.stored_bytes
    assert stored <= target * numel / 8
    step = max(rows * 64 / 8 + 100 for rows, _ in SIZES.values())  # one unit, one bit
    assert stored > target * numel / 8 - step
    assert found.distortion <= found.bound * 1.005


@pytest.mark.parametrize("pattern", ["0.5", "0.25", "2:4"])
def test_feasible_budgets_of_masked_codes_are_met(pattern: str) -> None:
    sizes = {f"{i}.{name}": size for i in range(4) for name, size in (("q", (96, 64)), ("d", (64, 160)))}
    measured, numel = frontier(sizes, (Sparsity.parse(pattern),)), 4 * (96 * 64 + 64 * 160)
    least, most = feasible_bits(measured, OptimalConfig())
    for step in range(1, 40):
        target = least * 1.02 + (most - least) * step / 40
        found = choose(measured, target, OptimalConfig())
        assert 0.985 * target * numel / 8 < found.stored_bytes <= target * numel / 8
        assert found.bound <= found.distortion


def test_more_bytes_never_harm() -> None:
    measured = frontier(SIZES)
    distortions = [choose(measured, target, OptimalConfig()).distortion for target in (1.0, 2.0, 3.0, 4.0, 6.0)]
    assert distortions == sorted(distortions, reverse=True)
    assert distortions[0] > 100 * distortions[-1]


def test_code_bits_are_met_exactly_where_the_units_allow() -> None:
    sizes = {"q": (64, 256), "k": (64, 256)}
    found = choose(frontier(sizes), 3.0, OptimalConfig(), code_bits=True)
    assert sum(plan.code_bits for plan in found.plans) / 2 == pytest.approx(3.0)


def test_the_choice_is_the_best_of_all() -> None:
    measured = frontier({"q": (32, 128), "d": (32, 128)}, scale_bits=16)
    measured = replace(
        measured,
        widths=(2, 4),
        groups=tuple(
            replace(
                g,
                curves=tuple(
                    replace(c, stored=c.stored[:, [2, 4]], distortion=c.distortion[:, [2, 4]]) for c in g.curves
                ),
            )
            for g in measured.groups
        ),
    )
    target = 4.0
    budget = target * 2 * 32 * 128 / 8
    curves = [group.curves[0] for group in measured.groups]
    best = min(
        sum(
            float(c.distortion[u, w])
            for c, ws in zip(curves, (pick[:2], pick[2:]), strict=True)
            for u, w in enumerate(ws)
        )
        for pick in product(range(2), repeat=4)
        if sum(
            c.base + sum(int(c.stored[u, w]) for u, w in enumerate(ws))
            for c, ws in zip(curves, (pick[:2], pick[2:]), strict=True)
        )
        <= budget
    )
    found = choose(measured, target, OptimalConfig(widths=(2, 4)))
    assert found.distortion == pytest.approx(best)


def test_limits_bind_the_sites_that_they_name() -> None:
    limits = (WidthLimit(pattern="a.*", least=5), WidthLimit(pattern="b.down_proj", most=3))
    found = {plan.name: plan for plan in choose(frontier(SIZES), 4.35, OptimalConfig(limits=limits)).plans}
    assert int(found["a.q_proj"].bits.min()) >= 5
    assert int(found["a.down_proj"].bits.min()) >= 5
    assert int(found["b.down_proj"].bits.max()) <= 3


def test_tied_groups_get_the_same_widths() -> None:
    found = {p.name: p for p in choose(frontier(SIZES), 3.5, OptimalConfig(ties=(("*.q_proj",),))).plans}
    assert found["a.q_proj"].layout.widths == found["b.q_proj"].layout.widths
    assert found["a.down_proj"].layout.widths != found["b.down_proj"].layout.widths


def test_uniform_gives_one_width_to_each_group() -> None:
    found = choose(frontier(SIZES), 4.35, OptimalConfig(uniform=True))
    assert all(len(set(plan.bits.tolist())) == 1 for plan in found.plans)
    assert len({int(plan.bits[0]) for plan in found.plans}) > 1


def test_one_width_in_natural_order_stores_no_permutation() -> None:
    measured, config = frontier(SIZES), OptimalConfig(uniform=True)
    natural = choose(replace(measured, activation_order=False), 4.35, config)
    assert not any(plan.permuted for plan in natural.plans)
    ordered = choose(measured, 8 * natural.stored_bytes / sum(r * c for r, c in SIZES.values()), config)
    assert natural.distortion < ordered.distortion  # what the permutations took buys something
    widths = [int(plan.bits[0]) for plan in natural.plans]
    stored = sum(
        stored_bytes(Layout(channels, (bits,) * (channels // 32), 64), rows, symmetric=False, scale_bits=4).total
        for bits, (rows, channels) in zip(widths, SIZES.values(), strict=True)
    )
    assert natural.stored_bytes == stored


@pytest.mark.parametrize(
    ("config", "target", "message"),
    [
        (OptimalConfig(limits=(WidthLimit(pattern="nothing"),)), 4.0, "`optimal.limits` to match sites but 'nothing'"),
        (OptimalConfig(ties=(("nothing",),)), 4.0, "`optimal.ties` to match sites but 'nothing'"),
        (OptimalConfig(ties=(("a.*",),)), 4.0, "equally many input channels"),
        (OptimalConfig(limits=(WidthLimit(pattern="*", least=9, most=15),)), 4.0, "to leave a width for a.q_proj"),
        (
            OptimalConfig(limits=(WidthLimit(pattern="*", least=4),)),
            3.0,
            r"`bits_per_weight` of at least 4\.\d+ .up to",
        ),
    ],
)
def test_what_cannot_be_is_refused(config: OptimalConfig, target: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(frontier(SIZES), target, config)


@pytest.mark.parametrize("kwargs", [{"widths": ()}, {"widths": (4, 2)}, {"widths": (9,)}, {"widths": (0,)}])
def test_odd_menus_are_refused(kwargs: Any) -> None:
    with pytest.raises(ValueError, match=r"optimal\.widths"):
        OptimalConfig(**kwargs)


def test_sparsity_is_chosen_where_it_pays() -> None:
    measured = frontier({"q": (96, 256), "d": (64, 320)}, (Sparsity(), Sparsity(0.5)))
    free = replace(measured.groups[0].curves[1], distortion=measured.groups[0].curves[0].distortion / 100)
    costly = replace(measured.groups[1].curves[1], distortion=measured.groups[1].curves[0].distortion * 100)
    groups = (
        replace(measured.groups[0], curves=(measured.groups[0].curves[0], free)),
        replace(measured.groups[1], curves=(measured.groups[1].curves[0], costly)),
    )
    found = choose(replace(measured, groups=groups), 4.0, OptimalConfig())
    assert [plan.sparsity.fraction for plan in found.plans] == [0.5, 0.0]
    assert found.stored_bytes <= 4.0 * (96 * 256 + 64 * 320) / 8


@pytest.mark.parametrize(
    ("channels", "scale_bits", "group"), [(256, 4, 64), (352, 16, 64), (200, 4, 64), (320, 4, 128)]
)
def test_units_add_up_to_the_bytes_of_the_whole(channels: int, scale_bits: int, group: int) -> None:
    grid = GridConfig(group_size=group, scale_bits=scale_bits)
    sizes = [len(part) for part in torch.arange(channels).split(group)]
    stored, base = count_bytes([48, 30], sizes, WIDTHS, grid, Sparsity())
    for bits in WIDTHS:
        layout = Layout(channels, (bits,) * -(-channels // 32), group)
        whole = sum(stored_bytes(layout, r, symmetric=False, scale_bits=scale_bits).total for r in (48, 30))
        assert base + int(stored[:, WIDTHS.index(bits)].sum()) == whole


def test_the_distortion_estimates_the_error_of_a_sweep() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(128) + 0.05 * torch.randn(128, 128, generator=generator)
    x = torch.randn(2000, 128, generator=generator) @ mixing
    hessian = 2 / 2000 * x.t() @ x
    weight = torch.randn(200, 128, generator=generator)
    order = hessian.diagonal().argsort(descending=True)
    hessian, weight = hessian[order][:, order], weight[:, order]
    upper, grid = factorise(hessian, 0.001).upper, GridConfig()
    curve = measure_curve(weight, upper.diagonal(), 64, WIDTHS, grid, Sparsity())
    size = float(((weight @ hessian) * weight).sum())
    for bits in (2, 4, 6):
        solved = sweep(weight, upper, Layout(128, (bits,) * 4, 64), grid).dequantize()
        error = layer_error(weight, solved, hessian) * size
        assert float(curve[:, bits].sum()) * 2 == pytest.approx(error, rel=0.3)


def test_a_sample_of_rows_stands_for_all() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3000, 64, generator=generator)
    all_rows = sum(
        measure_curve(part, torch.ones(64), 64, (3,), GridConfig(scale_bits=16), Sparsity())
        for part in weight.split(1000)
    )
    sampled = measure_curve(weight, torch.ones(64), 64, (3,), GridConfig(scale_bits=16), Sparsity())
    assert float(sampled) == pytest.approx(float(all_rows), rel=0.02)
