"""Frontiers and plans on disk: what is read is what was written, and nothing odd is read."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpfx.allocate import (
    Domain,
    Frontier,
    GroupFrontier,
    OptimalConfig,
    WidthLimit,
    answer,
    choose,
    load_frontier,
    load_plan,
    save_frontier,
    save_plan,
    with_curves,
)
from mpfx.graph import PermutationFold
from mpfx.solve import GridConfig, Sparsity

WIDTHS, PATTERNS = (0, 2, 3, 4, 8), (Sparsity(), Sparsity(1 / 3))


def fold(channels: int, *paths: str) -> PermutationFold:
    units = channels // 2  # two heads share their values
    unit, image = torch.arange(channels) % units, torch.arange(channels) // units
    rows = torch.arange(units) + 3
    return PermutationFold(paths, unit, image, torch.arange(units) // 32, (("v_proj", rows),), (units + 3,))


def group(name: str, channels: int, seed: int, folded: bool = False) -> GroupFrontier:
    generator, paths = torch.Generator().manual_seed(seed), (f"layers.0.{name}_proj", f"layers.1.{name}_proj")
    draft = GroupFrontier(
        name=name,
        rows={path: 24 + 8 * i for i, path in enumerate(paths)},
        order=torch.arange(channels) if folded else torch.randperm(channels, generator=generator),
        unit=64,
        free=not folded,
        fold=fold(channels, *paths) if folded else None,
        curves=(),
    )
    weight = torch.randn(56, channels, generator=generator)
    empty = Frontier(WIDTHS, GridConfig(), ())
    return with_curves(draft, empty, PATTERNS, (weight, torch.rand(channels, generator=generator) + 0.5))


@pytest.fixture(scope="module")
def domains() -> list[Domain]:
    one = Frontier(WIDTHS, GridConfig(), (group("q", 128, 0), group("o", 128, 1, folded=True)))
    two = Frontier(WIDTHS, GridConfig(), (group("down", 200, 2),))
    return [Domain(one, 3.5), Domain(two, 5.0, own=True)]


@pytest.fixture
def saved(domains: list[Domain], tmp_path: Path) -> Path:
    save_frontier(domains, tmp_path)
    return tmp_path


def test_what_is_read_is_what_was_written(domains: list[Domain], saved: Path) -> None:
    read = load_frontier(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["frontier.json", "frontier.safetensors"]
    for (frontier, *rest), (other, *others) in zip(domains, read, strict=True):
        assert rest == others
        assert (frontier.widths, frontier.grid, frontier.activation_order) == (other.widths, other.grid, True)
        for a, b in zip(frontier.groups, other.groups, strict=True):
            assert (a.name, a.rows, a.unit, a.free) == (b.name, b.rows, b.unit, b.free)
            assert torch.equal(a.order, b.order)
            for x, y in zip(a.curves, b.curves, strict=True):
                assert (x.sparsity, x.base) == (y.sparsity, y.base)
                assert torch.equal(x.stored, y.stored)
                assert torch.equal(x.distortion, y.distortion)
        assert choose(other, 3.5, OptimalConfig()).distortion == choose(frontier, 3.5, OptimalConfig()).distortion
    assert read[0].frontier.groups[1].fold is not None
    assert torch.equal(read[0].frontier.groups[1].fold.producers[0][1], torch.arange(64) + 3)


def first_group(data: Any) -> Any:
    return data["domains"][0]["groups"][0]


_WRONG: list[tuple[str, Callable[[Any], Any]]] = [
    ("Expected `version` to be 1", lambda d: d.update(version=2)),
    ("Expected `format` to be 'mpfx frontier'", lambda d: d.update(format="zip")),
    ("at least one budget", lambda d: d.update(domains=[])),
    ("no fields besides", lambda d: d.update(more=1)),
    ("Expected `target` to be a finite number", lambda d: d["domains"][0].update(target=float("nan"))),
    ("Expected `widths` to be ascending", lambda d: d["domains"][0].update(widths=[4, 3, 2, 8, 0])),
    ("Expected `sparsity` to be a fraction", lambda d: d["domains"][0].update(sparsities=["0", "lots"])),
    ("grid.scale_bits", lambda d: d["domains"][0]["grid"].update(scale_bits=5)),
    ("a field `rows` but it is missing", lambda d: first_group(d).pop("rows")),
    ("a multiple of 32", lambda d: first_group(d).update(unit=48)),
    ("Expected `channels` to be a whole number", lambda d: first_group(d).update(channels=10**20)),
    ("Expected `channels` to be a whole number", lambda d: first_group(d).update(channels=True)),
    ("I64 [96]", lambda d: first_group(d).update(channels=96)),
    ("one per pattern", lambda d: first_group(d).update(base=[1])),
    ("groups that occur once", lambda d: first_group(d).update(name="o")),
    ("Expected `free` to be True", lambda d: first_group(d).update(free=False)),
    ("or lack", lambda d: d["domains"][0]["groups"].pop()),
]


@pytest.mark.parametrize(("message", "change"), _WRONG, ids=[message for message, _ in _WRONG])
def test_odd_manifests_are_refused(saved: Path, message: str, change: Callable[[Any], Any]) -> None:
    data = json.loads((saved / "frontier.json").read_text())
    change(data)
    (saved / "frontier.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="Expected") as error:
        load_frontier(saved)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("0.0.order", torch.zeros(128, dtype=torch.int64), "a permutation of 128 channels"),
        ("0.0.order", torch.arange(128, dtype=torch.int32), "I64"),
        ("0.0.stored.0", torch.full((2, 5), -1), "numbers from 0"),
        ("0.0.stored.1", torch.zeros(5, 2, dtype=torch.int64), "I64 [2, 5]"),
        ("0.0.distortion.0", torch.full((2, 5), float("inf"), dtype=torch.float64), "finite numbers"),
        ("0.1.fold.unit", torch.full((128,), 64), "numbers from 0 to 63"),
        ("0.1.fold.image", torch.zeros(128, dtype=torch.int64), "no unit twice"),
        ("0.1.fold.rows.0", torch.zeros(64, dtype=torch.int64), "no row twice"),
        ("extra", torch.zeros(1), "or lack"),
    ],
)
def test_odd_tensors_are_refused(saved: Path, name: str, value: torch.Tensor, message: str) -> None:
    tensors = load_file(saved / "frontier.safetensors")
    save_file({**tensors, name: value}, saved / "frontier.safetensors")
    with pytest.raises(ValueError, match="Expected") as error:
        load_frontier(saved)
    assert message in str(error.value)


def test_files_that_are_missing_or_something_else_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="allocation optimal writes it"):
        load_frontier(tmp_path / "nowhere")
    (saved / "frontier.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="a safetensors file"):
        load_frontier(saved)
    (saved / "frontier.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"frontier\.safetensors"):
        load_frontier(saved)
    (saved / "frontier.json").write_text("[" * 10_000)
    with pytest.raises(ValueError, match="Expected JSON"):
        load_frontier(saved)


def test_a_failed_save_leaves_no_manifest_that_lies(
    domains: list[Domain], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (saved / "frontier.safetensors").read_bytes()
    monkeypatch.setattr("mpfx.allocate.storage.save_file", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save_frontier(domains[:1], saved)
    assert (saved / "frontier.safetensors").read_bytes() == before
    assert len(load_frontier(saved)) == 2


def test_budgets_are_answered_and_blocks_keep_their_own(domains: list[Domain]) -> None:
    found = answer(domains, 4.5)
    assert [plan.name for plan in found.plans] == ["q", "o", "down"]
    shared, own = choose(domains[0].frontier, 4.5, OptimalConfig()), choose(domains[1].frontier, 5.0, OptimalConfig())
    assert found.distortion == shared.distortion + own.distortion
    assert found.stored_bytes == shared.stored_bytes + own.stored_bytes
    assert found.gap >= 0
    low, high = found.feasible
    assert low < 4.5 < high
    for kind in found.kinds:
        assert kind.sites == 2
        assert sum(kind.sparsity.values()) == 2
    bits = {kind.name: kind.bits_per_weight for kind in found.kinds}
    numel = {plan.name: plan.numel for plan in found.plans}
    total = sum(bits[f"{name}_proj"] * n for name, n in numel.items()) / sum(numel.values())
    assert total == pytest.approx(found.bits_per_weight)
    with pytest.raises(ValueError, match="`bits_per_weight` of at least"):
        answer(domains, low / 2)


def test_constraints_of_the_run_hold_where_no_others_are_named(domains: list[Domain], tmp_path: Path) -> None:
    config = OptimalConfig(limits=(WidthLimit(pattern="*.q_proj", least=4),), ties=(("*.o_proj", "*.q_proj"),))
    save_frontier([domain._replace(constraints=config) for domain in domains], tmp_path)
    loaded = load_frontier(tmp_path)
    assert loaded[0].constraints == config
    plans = {plan.name: plan for plan in answer(loaded, 4.6).plans}
    assert int(plans["q"].bits.min()) >= 4
    assert plans["q"].layout.widths == plans["o"].layout.widths
    free = replace(OptimalConfig(), widths=WIDTHS)
    assert int(answer(loaded, 3.5, free).plans[0].bits.min()) < 4
    with pytest.raises(ValueError, match="share one budget"):
        answer(loaded, 4.6, replace(free, ties=(("*.q_proj", "*.down_proj"),)))


def test_constraints_hold_and_have_to_match(domains: list[Domain]) -> None:
    limited = OptimalConfig(widths=WIDTHS, uniform=True, limits=(WidthLimit(pattern="*.down_proj", most=3),))
    found = answer(domains, 4.5, limited)
    assert max(found.plans[2].bits.tolist()) <= 3
    assert all(len(plan.bits.unique()) == 1 for plan in found.plans)
    narrow = answer(domains, 4.5, OptimalConfig(widths=(2, 4)))
    assert {bits for plan in narrow.plans for bits in plan.bits.tolist()} <= {2, 4}
    with pytest.raises(ValueError, match="matches none"):
        answer(domains, 4.5, OptimalConfig(widths=WIDTHS, limits=(WidthLimit(pattern="nope"),)))
    with pytest.raises(ValueError, match="which were measured"):
        answer(domains, 4.5, OptimalConfig(widths=(2, 5)))


def test_plans_are_readable_and_come_back(domains: list[Domain], tmp_path: Path) -> None:
    plans, path = answer(domains, 4.5).plans, tmp_path / "plan.json"
    save_plan(plans, path)
    read = load_plan(path)
    for plan, entry in zip(plans, read, strict=True):
        assert (plan.name, dict(plan.rows), plan.sparsity, plan.grid) == (
            *(entry.name, entry.sites, entry.sparsity, entry.grid),
        )
        assert entry.order is not None
        bits = plan.bits[torch.tensor(entry.order)]
        assert tuple(bits[::32].tolist()) == entry.widths
        assert entry.gathered == (plan.fold is None)
        assert not entry.by_activation
    save_plan(answer(domains, 4.4).plans, tmp_path / "other.json")
    lines = path.read_text().splitlines()
    assert len(lines) == len((tmp_path / "other.json").read_text().splitlines())  # they compare line by line
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"order": [0] * 128}, "a permutation"),
        ({"widths": [9, 9, 9, 9]}, "widths out of"),
        ({"sites": {}}, "at least one site"),
        ({"name": "o"}, "occur once"),
    ]
    for change, message in wrong:
        data: Any = json.loads("\n".join(lines))
        data["groups"][0].update(change)
        path.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=message):
            load_plan(path)
