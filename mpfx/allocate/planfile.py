"""Plans as a file that people can read and compare: ``plan.json``."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import torch

from mpfx.allocate.fields import Fields, read_json, replaced
from mpfx.allocate.plan import GroupPlan
from mpfx.allocate.storage import read_grid, read_rows, read_sparsity, spelled
from mpfx.nn.layout import LAYOUT_WIDTHS, SEGMENT
from mpfx.solve import GridConfig, Sparsity

PLAN_FILE = "plan.json"
"""Its name in a folder of `mpfx compress`."""

_FORMAT, _VERSION = "mpfx plan", 1
_MOST = 1 << 40


@dataclass(frozen=True)
class PlanEntry:
    """The decision for one input group.

    Attributes:
        name: of the input group.
        sites: output channels by module path.
        sparsity: pattern of all sites.
        grid: how scales are stored.
        widths: of every segment of 32 channels, in sweep order.
        order: channels in sweep order; None: the input's own order.
        by_activation: inside a width the sweep takes the largest activations first, which only a solved model tells;
            `order` is then right as to widths.
        gathered: whether the order is stored and the input gathered at run time.
    """

    name: str
    sites: Mapping[str, int]
    sparsity: Sparsity
    grid: GridConfig
    widths: tuple[int, ...]
    order: tuple[int, ...] | None
    by_activation: bool
    gathered: bool

    @classmethod
    def of(cls, plan: GroupPlan) -> "PlanEntry":
        """Tell what a plan decides."""
        order = plan.order(torch.zeros(len(plan.bits)))
        return cls(
            name=plan.name,
            sites=dict(plan.rows),
            sparsity=plan.sparsity,
            grid=plan.grid,
            widths=plan.layout.widths,
            order=None if order is None else tuple(order.tolist()),
            by_activation=plan.permuted and plan.arrangement is None and plan.activation_order,
            gathered=plan.permuted and plan.fold is None,
        )


def save_plan(plans: Iterable[GroupPlan], path: str | PathLike[str]) -> None:
    """Write plans to a JSON file; lists of numbers go on one line, so that two files compare line by line."""
    entries = ",\n".join(_entry_text(PlanEntry.of(plan)) for plan in plans)
    with replaced(Path(path)) as temporary:
        head = f'{{\n "format": {json.dumps(_FORMAT)},\n "version": {_VERSION},\n "groups": [\n'
        temporary.write_text(f"{head}{entries}\n ]\n}}\n", encoding="utf-8")


def _entry_text(entry: PlanEntry) -> str:
    fields = {
        "name": entry.name,
        "sites": dict(entry.sites),
        "sparsity": spelled(entry.sparsity),
        "grid": asdict(entry.grid),
        "gathered": entry.gathered,
        "by_activation": entry.by_activation,
        "widths": list(entry.widths),
        "order": None if entry.order is None else list(entry.order),
    }
    lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    return f"  {{\n{lines}\n  }}"


def load_plan(path: str | PathLike[str]) -> list[PlanEntry]:
    """Read what :func:`save_plan` wrote.

    Raises:
        ValueError: for anything that is not as it should be, naming file and field.
        OSError: if there is no such file.
    """
    top = read_json(Path(path), _FORMAT, _VERSION)
    entries = [_read_entry(entry) for entry in top.items("groups")]
    top.done()
    _check_apart(entries, top)
    return entries


def _read_entry(entry: Fields) -> PlanEntry:
    sparsity = read_sparsity(entry, "sparsity", entry.text("sparsity"))
    widths = entry.integers("widths", 0, 16)
    if not widths or not {*widths} <= {*LAYOUT_WIDTHS}:
        raise entry.wrong("widths", f"widths out of {list(LAYOUT_WIDTHS)}", list(widths))
    order = None if entry.take("order") is None else entry.integers("order", 0, _MOST)
    if order is not None and (sorted(order) != list(range(len(order))) or -(-len(order) // SEGMENT) != len(widths)):
        raise entry.wrong("order", f"a permutation of the channels of {len(widths)} segments", list(order[:8]))
    read = PlanEntry(
        name=entry.text("name"),
        sites=read_rows(entry, "sites"),
        sparsity=sparsity,
        grid=read_grid(entry),
        widths=widths,
        order=order,
        by_activation=entry.boolean("by_activation"),
        gathered=entry.boolean("gathered"),
    )
    entry.done()
    return read


def _check_apart(entries: Sequence[PlanEntry], top: Fields) -> None:
    names = [entry.name for entry in entries]
    paths = [path for entry in entries for path in entry.sites]
    if len({*names}) < len(names) or len({*paths}) < len(paths):
        raise top.wrong("groups", "groups and sites that occur once", "some twice")
