"""From a frontier to a plan that meets a budget, under the constraints that a user sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor

from mpfx.allocate.frontier import Curve, Frontier, GroupFrontier
from mpfx.allocate.optimal import Mode, Solution, feasible_range, optimal
from mpfx.allocate.plan import GroupPlan
from mpfx.nn.layout import LAYOUT_WIDTHS, SEGMENT, permutation_bytes

_MOST_CORRECTIONS = 20


@dataclass(frozen=True, kw_only=True)
class WidthLimit:
    """Bits that some sites may have.

    Args:
        pattern: of module paths (``fnmatch``); an input group is bound by the limits of all of its sites.
        least: fewest bits of a channel.
        most: most bits of a channel.
    """

    pattern: str
    least: int = 0
    most: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ValueError(f"Expected `least` <= `most` for {self.pattern!r} but got {self.least} and {self.most}.")


@dataclass(frozen=True, kw_only=True)
class OptimalConfig:
    """What allocation `optimal` chooses from.

    Args:
        widths: code widths, ascending; 0 leaves channels out.
        uniform: one width for all channels of an input group, as exports to other formats ask for.
        limits: fewest and most bits for some sites.
        ties: lists of patterns of module paths: the input groups that match one list get the same widths, unit by unit.
    """

    widths: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8)
    uniform: bool = False
    limits: tuple[WidthLimit, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.widths or list(self.widths) != sorted(set(self.widths)) or not set(self.widths) <= {*LAYOUT_WIDTHS}:
            raise ValueError(
                f"Expected `optimal.widths` to be ascending widths out of 0..8 (or 16) but got {list(self.widths)}."
            )
        if self.widths[-1] == 0:
            raise ValueError("Expected `optimal.widths` to hold a width above 0 but got only 0.")


@dataclass(frozen=True)
class Allocation:
    """Plans that meet a budget.

    Attributes:
        plans: in the order of the frontier's groups.
        distortion: estimated increase of the loss, up to a factor that the whole model shares.
        bound: no plan within the budget has less.
        stored_bytes: of all plans.
    """

    plans: tuple[GroupPlan, ...]
    distortion: float
    bound: float
    stored_bytes: int

    @property
    def gap(self) -> float:
        """How far the distortion may be from the best possible, relative to it."""
        return relative_gap(self.distortion, self.bound)


def relative_gap(distortion: float, bound: float) -> float:
    """How far a distortion is above a bound, relative to it."""
    return distortion / bound - 1 if bound > 0 else 0.0


def check_ties(ties: Sequence[Sequence[str]], budgets: Sequence[Sequence[tuple[str, Sequence[str]]]]) -> None:
    """Refuse ties between groups that do not share one budget.

    Args:
        ties: see :class:`OptimalConfig`.
        budgets: per budget its groups, a name and the paths of the sites each.

    Raises:
        ValueError: naming the tie, and the groups on both sides.
    """
    for tie in ties:
        bound = [
            [name for name, paths in groups if any(fnmatchcase(path, pattern) for path in paths for pattern in tie)]
            for groups in budgets
        ]
        if sum(map(bool, bound)) > 1:
            raise ValueError(
                f"Expected what `optimal.ties` holds together to share one budget but `block_bits` parts {list(tie)}: "
                f"{' from '.join(str(names[:3]) for names in bound if names)}."
            )


def choose(
    frontier: Frontier,
    target: float,
    config: OptimalConfig,
    *,
    code_bits: bool = False,
    known: Sequence[str] | None = None,
) -> Allocation:
    """Solve a budget over all groups of a frontier.

    Args:
        frontier: what every unit costs and harms.
        target: stored bits per weight, never exceeded.
        config: constraints.
        code_bits: the target is the average nominal width of the codes instead.
        known: paths of all sites of the model, which patterns may match; None: those of the frontier.

    Raises:
        ValueError: if the budget is infeasible, naming the feasible range, or a pattern matches nothing.
    """
    if not 0 <= target < float("inf"):
        raise ValueError(f"Expected a budget of finite bits but got {target}.")
    problem = _Problem(frontier, config, code_bits, known)
    numel = sum(group.numel for group in frontier.groups)
    scale = 1 if code_bits else 8
    fewest, most = feasible_range(problem.modes)
    budget = allowed = int(target * numel / scale + 1e-6)
    name = "code_bits" if code_bits else "bits_per_weight"
    if budget < fewest:
        raise ValueError(
            f"Expected `{name}` of at least {_up(fewest * scale / numel)} (up to {most * scale / numel:.3f} is of "
            f"use) for these sites, their widths and limits but got {target:g}."
        )
    bound = None
    for _ in range(_MOST_CORRECTIONS):
        solution = optimal(problem.modes, budget)
        bound = solution.bound if bound is None else bound  # that of the whole budget
        plans = problem.plans(solution)
        stored = sum(plan.stored_bytes() for plan in plans)
        if code_bits or stored <= allowed or budget <= fewest:
            break
        # What no table of units can know: row scales of single stretches, streams of surviving codes.
        budget = max(fewest, min(budget, solution.stored) - (stored - allowed))
    if not code_bits and stored > allowed:
        raise ValueError(
            f"Expected `{name}` of at least {_up(stored * 8 / numel)} for these sites, their widths and limits but got "
            f"{target:g}."
        )
    assert bound is not None
    return Allocation(plans, solution.distortion, bound, stored)


def feasible_bits(
    frontier: Frontier, config: OptimalConfig, *, code_bits: bool = False, known: Sequence[str] | None = None
) -> tuple[float, float]:
    """The fewest bits possible, and those beyond which more buy nothing; arguments as of :func:`choose`."""
    fewest, most = feasible_range(_Problem(frontier, config, code_bits, known).modes)
    scale = (1 if code_bits else 8) / sum(group.numel for group in frontier.groups)
    return fewest * scale, most * scale


def _up(bits: float) -> str:
    return f"{np.ceil(bits * 1000) / 1000:.3f}"


class _Problem:
    """The knapsack behind a frontier: groups that are tied are one, units of a uniform group are one."""

    def __init__(
        self, frontier: Frontier, config: OptimalConfig, code_bits: bool, known: Sequence[str] | None = None
    ) -> None:
        self.frontier, self.config = frontier, config
        _check_patterns(config, [path for group in frontier.groups for path in group.rows] if known is None else known)
        self.members = list(_tied(frontier.groups, config.ties))
        _check_ties(self.members, config)
        self.modes = [self._modes(groups, code_bits) for groups in self.members]

    def _modes(self, groups: Sequence[GroupFrontier], code_bits: bool) -> list[Mode]:
        return [self._mode(groups, index, code_bits) for index in range(len(groups[0].curves))]

    def _mode(self, groups: Sequence[GroupFrontier], index: int, code_bits: bool) -> Mode:
        curves = [group.curves[index] for group in groups]
        stored, distortion = zip(*map(self._table, groups, curves, [code_bits] * len(groups)), strict=True)
        barred = ~np.logical_and.reduce([self._allowed(group) for group in groups])
        harm = np.sum(distortion, axis=0)
        harm[:, barred] = np.inf
        base = (
            0
            if code_bits
            else sum(curve.base - self._saved(group) for group, curve in zip(groups, curves, strict=True))
        )
        return Mode(np.sum(stored, axis=0), harm, base)

    @property
    def _plain(self) -> bool:
        """Whether all channels stay as the model itself has them."""
        return self.config.uniform and not self.frontier.activation_order

    def _saved(self, group: GroupFrontier) -> int:
        """Bytes of the permutation that the curve of a group counts and its plan does without."""
        return permutation_bytes(group.channels) if self._plain and group.fold is None else 0

    def _table(self, group: GroupFrontier, curve: Curve, code_bits: bool) -> tuple[np.ndarray, np.ndarray]:
        stored = curve.stored
        if code_bits:
            stored = group.sizes[:, None] * torch.tensor(self.frontier.widths) * sum(group.rows.values())
        distortion = curve.distortion
        if self.config.uniform:
            stored, distortion = stored.sum(0, keepdim=True), distortion.sum(0, keepdim=True)
        return stored.numpy(), distortion.numpy()

    def _allowed(self, group: GroupFrontier) -> np.ndarray:
        widths = np.asarray(self.frontier.widths)
        allowed = np.ones(len(widths), dtype=bool)
        for limit in self.config.limits:
            if any(fnmatchcase(path, limit.pattern) for path in group.rows):
                allowed &= (widths >= limit.least) & (widths <= limit.most)
        if not allowed.any():
            raise ValueError(
                f"Expected `optimal.limits` to leave a width for {', '.join(group.rows)} but none of {widths.tolist()} "
                "lies within them."
            )
        return allowed

    def plans(self, solution: Solution) -> tuple[GroupPlan, ...]:
        """The plans that a solution stands for, in the order of the frontier."""
        found: dict[str, GroupPlan] = {}
        for groups, mode, options in zip(self.members, solution.modes, solution.options, strict=True):
            for group in groups:
                bits = torch.tensor(self.frontier.widths)[torch.from_numpy(options)]
                found[group.name] = self._plan(group, group.curves[mode], bits.expand(len(group.sizes)))
        return tuple(found[group.name] for group in self.frontier.groups)

    def _plan(self, group: GroupFrontier, curve: Curve, bits: Tensor) -> GroupPlan:
        order: Tensor | None = group.order
        if self._plain:
            order = None
        elif group.free:
            order = _arranged(group, bits, natural=not self.frontier.activation_order)
        of_channels = torch.empty(group.channels, dtype=torch.uint8)
        of_channels[group.order] = bits.repeat_interleave(group.sizes).to(torch.uint8)
        return GroupPlan(
            name=group.name,
            rows=group.rows,
            bits=of_channels,
            sparsity=curve.sparsity,
            activation_order=self.frontier.activation_order,
            grid=self.frontier.grid,
            fold=group.fold,
            arrangement=order,
        )


def _arranged(group: GroupFrontier, bits: Tensor, natural: bool) -> Tensor:
    """Wide units first, which makes the stretches of one width long; a unit that ends inside a segment stays last."""
    ragged = group.channels % SEGMENT != 0
    whole = len(bits) - 1 if ragged else len(bits)
    parts, ranked = group.order.split(group.unit), bits[:whole].argsort(descending=True, stable=True).tolist()
    if natural:  # n:m masks choose among neighbours: inside a width as the model itself has them
        stretches = [
            torch.cat([parts[i] for i in ranked if bits[i] == width]) for width in bits[:whole].unique().flip(0)
        ]
        ordered = [stretch.sort().values for stretch in stretches]
    else:
        ordered = [parts[i] for i in ranked]
    return torch.cat([*ordered, *parts[whole:]])


def _tied(groups: Sequence[GroupFrontier], ties: Sequence[Sequence[str]]) -> Iterable[list[GroupFrontier]]:
    """Groups that get the same widths, together; in the order of the first of each."""
    tie_of: dict[str, object] = {}
    for group in groups:
        for tie in ties:
            if any(fnmatchcase(path, pattern) for path in group.rows for pattern in tie):
                tie_of.setdefault(group.name, tie)
    together: dict[object, list[GroupFrontier]] = {}
    for group in groups:
        together.setdefault(tie_of.get(group.name, group.name), []).append(group)
    return together.values()


def _check_ties(members: Iterable[Sequence[GroupFrontier]], config: OptimalConfig) -> None:
    for groups in members:
        counts = {group.name: group.channels for group in groups}
        if not config.uniform and len(set(counts.values())) > 1:
            raise ValueError(
                f"Expected the groups of one of `optimal.ties` to have equally many input channels but got {counts}; "
                "with `optimal.uniform` any may be tied."
            )


def _check_patterns(config: OptimalConfig, paths: Sequence[str]) -> None:
    named = [("limits", limit.pattern) for limit in config.limits]
    named += [("ties", pattern) for tie in config.ties for pattern in tie]
    for name, pattern in named:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ValueError(f"Expected `optimal.{name}` to match sites but {pattern!r} matches none of {paths[:8]}.")
