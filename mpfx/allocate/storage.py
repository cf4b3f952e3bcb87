"""A frontier on disk: measured once, solved for any budget later, without the model.

``frontier.safetensors`` holds the tensors, for group g of domain d: ``<d>.<g>.order`` int64, per pattern p
``<d>.<g>.stored.<p>`` int64 and ``<d>.<g>.distortion.<p>`` float64, and with a fold ``<d>.<g>.fold.unit``, ``.image``,
``.cell`` and, per producer k, ``.rows.<k>``, all int64. ``frontier.json`` says the rest and is put in place last, so a
folder that has one is whole. Both may come from anywhere: whatever is odd in them raises :class:`ValueError`, the
tensors' dtypes and shapes before any is read.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mpfx.allocate.choose import OptimalConfig, WidthLimit
from mpfx.allocate.fields import Fields, read_json, replaced
from mpfx.allocate.frontier import Curve, Frontier, GroupFrontier
from mpfx.allocate.plan import is_free
from mpfx.graph import PermutationFold
from mpfx.nn.layout import LAYOUT_WIDTHS, SEGMENT
from mpfx.solve import GridConfig, Sparsity

FRONTIER, TENSORS = "frontier.json", "frontier.safetensors"
"""Names of the two files."""

_FORMAT, _VERSION = "mpfx frontier", 1
_MOST = 1 << 40  # of rows, channels, bytes of a unit: sums of them stay far below int64
_DTYPES = {"I64": torch.int64, "F64": torch.float64}


class Domain(NamedTuple):
    """Input groups that share one budget.

    Attributes:
        frontier: of these groups.
        target: the budget that they had, in bits.
        code_bits: whether that counts the codes alone; else stored bits, everything counted.
        own: whether it is a budget of some blocks (``block_bits``) beside that of the whole model.
        constraints: that the plans of the run had to keep.
    """

    frontier: Frontier
    target: float
    code_bits: bool = False
    own: bool = False
    constraints: OptimalConfig = OptimalConfig()


def save_frontier(domains: Sequence[Domain], folder: str | PathLike[str]) -> None:
    """Write the frontiers of a model, one per budget, to a folder; earlier ones in it are replaced."""
    at = Path(folder)
    at.mkdir(parents=True, exist_ok=True)
    tensors = dict(_tensors(domains))
    entries = [_domain_entry(domain) for domain in domains]
    text = json.dumps({"format": _FORMAT, "version": _VERSION, "domains": entries}, indent=1)
    with replaced(at / TENSORS) as temporary:
        save_file(tensors, str(temporary))
        (at / FRONTIER).unlink(missing_ok=True)  # until the new one is there, nothing says that the folder is whole
    with replaced(at / FRONTIER) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_frontier(folder: str | PathLike[str]) -> None:
    """Remove an earlier run's frontier from a folder, if there is one."""
    for name in (FRONTIER, TENSORS):
        (Path(folder) / name).unlink(missing_ok=True)


def load_frontier(folder: str | PathLike[str]) -> list[Domain]:
    """Read what :func:`save_frontier` wrote.

    Raises:
        FileNotFoundError: if the folder holds no frontier.
        ValueError: for anything that is not as it should be, naming file and field.
    """
    at = Path(folder)
    if not (at / FRONTIER).is_file():
        raise FileNotFoundError(
            f"Expected {str(at)!r} to hold a frontier but there is no {FRONTIER}: `mpfx compress` with allocation "
            "optimal writes it to its output folder."
        )
    top = read_json(at / FRONTIER, _FORMAT, _VERSION)
    drafts = [_Draft(index, entry) for index, entry in enumerate(top.items("domains"))]
    top.done()
    if not drafts:
        raise top.wrong("domains", "at least one budget", [])
    _check_apart(drafts, top)
    tensors = _read_tensors(at / TENSORS, {name: spec for draft in drafts for name, spec in draft.expected()})
    return [draft.domain(tensors) for draft in drafts]


# Writing


def _tensors(domains: Sequence[Domain]) -> Iterator[tuple[str, Tensor]]:
    for d, domain in enumerate(domains):
        for g, group in enumerate(domain.frontier.groups):
            yield f"{d}.{g}.order", group.order.clone()
            for p, curve in enumerate(group.curves):
                yield f"{d}.{g}.stored.{p}", curve.stored.clone()
                yield f"{d}.{g}.distortion.{p}", curve.distortion.clone()
            if group.fold is not None:
                for name in ("unit", "image", "cell"):
                    yield f"{d}.{g}.fold.{name}", getattr(group.fold, name).clone()
                for k, (_, rows) in enumerate(group.fold.producers):
                    yield f"{d}.{g}.fold.rows.{k}", rows.clone()


def _domain_entry(domain: Domain) -> dict[str, Any]:
    frontier = domain.frontier
    return {
        "target": domain.target,
        "code_bits": domain.code_bits,
        "own": domain.own,
        "uniform": domain.constraints.uniform,
        "limits": [asdict(limit) for limit in domain.constraints.limits],
        "ties": [{"patterns": list(tie)} for tie in domain.constraints.ties],
        "widths": list(frontier.widths),
        "grid": asdict(frontier.grid),
        "activation_order": frontier.activation_order,
        "sparsities": [spelled(curve.sparsity) for curve in frontier.groups[0].curves],
        "groups": [_group_entry(group) for group in frontier.groups],
    }


def _group_entry(group: GroupFrontier) -> dict[str, Any]:
    fold = group.fold
    return {
        "name": group.name,
        "rows": dict(group.rows),
        "channels": group.channels,
        "unit": group.unit,
        "free": group.free,
        "base": [curve.base for curve in group.curves],
        "fold": None
        if fold is None
        else {
            "sites": list(fold.sites),
            "units": len(fold.cell),
            "producers": [path for path, _ in fold.producers],
            "out_features": list(fold.out_features),
        },
    }


def spelled(sparsity: Sparsity) -> str:
    """A pattern as a text that :meth:`mpfx.solve.Sparsity.parse` reads back exactly."""
    return str(sparsity) if sparsity.group_m else repr(float(sparsity.fraction))


# Reading


class _Draft:
    """A domain as the JSON file tells it."""

    def __init__(self, index: int, entry: Fields) -> None:
        self.index = index
        self.target = entry.number("target")
        self.code_bits, self.own = entry.boolean("code_bits"), entry.boolean("own")
        self.constraints = _read_constraints(entry)
        self.widths = entry.integers("widths", 0, 16)
        if not self.widths or list(self.widths) != sorted({*self.widths}) or not {*self.widths} <= {*LAYOUT_WIDTHS}:
            raise entry.wrong("widths", f"ascending widths out of {list(LAYOUT_WIDTHS)}", list(self.widths))
        self.grid = read_grid(entry)
        self.activation_order = entry.boolean("activation_order")
        self.sparsities = tuple(read_sparsity(entry, "sparsities", text) for text in entry.texts("sparsities"))
        if not self.sparsities:
            raise entry.wrong("sparsities", "at least one pattern", [])
        self.groups = [_GroupDraft(f"{index}.{g}", e, self) for g, e in enumerate(entry.items("groups"))]
        if not self.groups:
            raise entry.wrong("groups", "at least one input group", [])
        entry.done()

    def expected(self) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        """Names of the tensors with dtype and shape."""
        for group in self.groups:
            yield from group.expected()

    def domain(self, tensors: dict[str, Tensor]) -> Domain:
        groups = tuple(group.frontier(tensors) for group in self.groups)
        frontier = Frontier(self.widths, self.grid, groups, self.activation_order)
        return Domain(frontier, self.target, self.code_bits, self.own, self.constraints)


def _read_constraints(entry: Fields) -> OptimalConfig:
    limits, ties = [], []
    for limit in entry.items("limits"):
        least, most = limit.integer("least", 0, 16), limit.integer("most", 0, 16)
        if least > most:
            raise limit.wrong("least", f"at most {most}", least)
        limits.append(WidthLimit(pattern=limit.text("pattern"), least=least, most=most))
        limit.done()
    for tie in entry.items("ties"):
        ties.append(tie.texts("patterns"))
        tie.done()
    return OptimalConfig(uniform=entry.boolean("uniform"), limits=tuple(limits), ties=tuple(ties))


class _GroupDraft:
    """An input group as the JSON file tells it."""

    def __init__(self, prefix: str, entry: Fields, of: _Draft) -> None:
        self.prefix, self.of, self.entry = prefix, of, entry
        self.name, self.rows = entry.text("name"), read_rows(entry, "rows")
        self.channels = entry.integer("channels", 1, _MOST)
        self.unit = entry.integer("unit", SEGMENT, _MOST)
        if self.unit % SEGMENT:
            raise entry.wrong("unit", f"a multiple of {SEGMENT}", self.unit)
        self.free = entry.boolean("free")
        self.base = entry.integers("base", 0, _MOST)
        if len(self.base) != len(of.sparsities):
            raise entry.wrong("base", f"{len(of.sparsities)} numbers, one per pattern", list(self.base))
        self.fold = entry.optional("fold")
        if self.fold is not None:
            self.sites, self.producers = self.fold.texts("sites"), self.fold.texts("producers")
            self.units = self.fold.integer("units", 1, self.channels)
            self.out_features = self.fold.integers("out_features", self.units, _MOST)
            if sorted(self.sites) != sorted(self.rows):
                raise self.fold.wrong("sites", f"{sorted(self.rows)}, the sites of the group", list(self.sites))
            if len(self.out_features) != len(self.producers):
                raise self.fold.wrong("out_features", "as many numbers as producers", list(self.out_features))
            self.fold.done()
        entry.done()

    def expected(self) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        table = (-(-self.channels // self.unit), len(self.of.widths))
        yield f"{self.prefix}.order", ("I64", (self.channels,))
        for p in range(len(self.base)):
            yield f"{self.prefix}.stored.{p}", ("I64", table)
            yield f"{self.prefix}.distortion.{p}", ("F64", table)
        if self.fold is not None:
            for name, size in (("unit", self.channels), ("image", self.channels), ("cell", self.units)):
                yield f"{self.prefix}.fold.{name}", ("I64", (size,))
            for k in range(len(self.producers)):
                yield f"{self.prefix}.fold.rows.{k}", ("I64", (self.units,))

    def frontier(self, tensors: dict[str, Tensor]) -> GroupFrontier:
        order = tensors[f"{self.prefix}.order"]
        if not torch.equal(order.sort().values, torch.arange(self.channels)):
            raise self._wrong("order", f"a permutation of {self.channels} channels")
        curves = []
        for p, (sparsity, base) in enumerate(zip(self.of.sparsities, self.base, strict=True)):
            stored = self._within(tensors, f"stored.{p}", _MOST)
            distortion = tensors[f"{self.prefix}.distortion.{p}"]
            if not bool((distortion.isfinite() & (distortion >= 0)).all()):
                raise self._wrong(f"distortion.{p}", "finite numbers of at least 0")
            curves.append(Curve(sparsity, stored, distortion, base))
        fold = None if self.fold is None else self._fold(tensors)
        if self.free != (fold is None or is_free(fold)):
            raise self.entry.wrong("free", f"{not self.free}, as the fold says", self.free)
        return GroupFrontier(self.name, self.rows, order, self.unit, self.free, fold, tuple(curves))

    def _fold(self, tensors: dict[str, Tensor]) -> PermutationFold:
        unit = self._within(tensors, "fold.unit", self.units - 1)
        image = self._within(tensors, "fold.image", self.channels - 1)
        cell = self._within(tensors, "fold.cell", self.units - 1)
        if len((image * self.units + unit).unique()) != self.channels:
            raise self._wrong("fold.unit", "no unit twice in one image")
        rows = []
        for k, out_features in enumerate(self.out_features):
            made = self._within(tensors, f"fold.rows.{k}", out_features - 1)
            if len(made.unique()) != self.units:
                raise self._wrong(f"fold.rows.{k}", "no row twice")
            rows.append(made)
        producers = tuple(zip(self.producers, rows, strict=True))
        return PermutationFold(self.sites, unit, image, cell, producers, self.out_features)

    def _within(self, tensors: dict[str, Tensor], name: str, most: int) -> Tensor:
        tensor = tensors[f"{self.prefix}.{name}"]
        if not bool(((tensor >= 0) & (tensor <= most)).all()):
            raise self._wrong(name, f"numbers from 0 to {most}")
        return tensor

    def _wrong(self, tensor: str, expected: str) -> ValueError:
        return ValueError(
            f"{self.entry.where}: Expected the tensor {self.prefix}.{tensor} of {TENSORS} to hold {expected} but it "
            "does not."
        )


def read_grid(entry: Fields) -> GridConfig:
    """How scales are stored."""
    grid = entry.object("grid")
    symmetric, clip_search = grid.boolean("symmetric"), grid.boolean("clip_search")
    group_size = grid.integer("group_size", SEGMENT, _MOST) if grid.data.get("group_size") is not None else None
    scale_bits = grid.integer("scale_bits", 1, 16)
    grid.done([f.name for f in fields(GridConfig)])
    try:
        return GridConfig(group_size=group_size, symmetric=symmetric, clip_search=clip_search, scale_bits=scale_bits)
    except ValueError as error:
        raise ValueError(f"{grid.where}: {error}") from error


def read_sparsity(entry: Fields, name: str, text: str) -> Sparsity:
    """A pattern."""
    try:
        return Sparsity.parse(text)
    except ValueError as error:
        raise ValueError(f"{entry.where}, `{name}`: {error}") from error


def read_rows(entry: Fields, name: str) -> dict[str, int]:
    """Output channels of every site, by module path."""
    rows = entry.object(name)
    if not rows.data:
        raise entry.wrong(name, "at least one site", {})
    return {path: rows.integer(path, 1, _MOST) for path in rows.data}


def _check_apart(drafts: Sequence[_Draft], top: Fields) -> None:
    """No group and no site may be there twice."""
    groups = [group for draft in drafts for group in draft.groups]
    for kind, names in (("groups", [g.name for g in groups]), ("sites", [path for g in groups for path in g.rows])):
        if twice := sorted({name for name in names if names.count(name) > 1}) if len({*names}) < len(names) else []:
            raise top.wrong("domains", f"{kind} that occur once", twice[:5])
    if sum(math.prod((sum(g.rows.values()), g.channels)) for g in groups) > _MOST:
        raise top.wrong("domains", f"at most {_MOST} weights", "more")


def _read_tensors(path: Path, expected: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"Expected {path} beside {FRONTIER} but it is missing.")
    try:
        with safe_open(str(path), framework="pt") as file:
            names = {*file.keys()}
            if names != {*expected}:
                odd = sorted(names ^ {*expected})[:5]
                raise ValueError(f"{path}: Expected the tensors that {FRONTIER} tells of but got or lack {odd}.")
            for name, (dtype, shape) in expected.items():
                part = file.get_slice(name)
                found = (str(part.get_dtype()), tuple(part.get_shape()))
                if found != (dtype, shape):
                    raise ValueError(f"{path}: Expected {name} to be {dtype} {list(shape)} but got {found}.")
            return {name: file.get_tensor(name) for name in expected}
    except SafetensorError as error:
        raise ValueError(f"{path}: Expected a safetensors file but {error}.") from error
