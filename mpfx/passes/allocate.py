"""Decide the bits of every channel."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpfx.allocate import (
    Allocation,
    Frontier,
    GroupPlan,
    block_means,
    budget,
    check_ties,
    choose,
    code_bits_per_weight,
    confined_order,
    fixed,
    importance,
    is_free,
    quantile,
    signals,
    stored_bits_per_weight,
    threshold,
)
from mpfx.graph import InputGroup, PermutationFold, blocks, traced_module
from mpfx.nn.layout import RAW_BITS, SEGMENT, WIDTHS
from mpfx.passes.base import Pass, PassResult
from mpfx.passes.config import SCORED, CompressionConfig
from mpfx.passes.frontier import (
    MeasuredGroup,
    joined_frontier,
    located_folds,
    measure_group,
    stacked_weight,
    unmeasured_frontier,
)
from mpfx.passes.locate import annotate, annotations, located, naming_sites
from mpfx.passes.ranks import ALONE, Ranks
from mpfx.solve import factorise
from mpfx.stats import Moments

PLAN = "mpfx_plan"
"""Key of ``node.meta`` under which a group's plan (:class:`mpfx.allocate.GroupPlan`) lies, by the group's name."""

ALLOCATIONS = "mpfx_allocations"
"""Key of ``gm.meta``: what allocation `optimal` measured and chose, a pair ``(Frontier, Allocation)`` per budget."""

logger = logging.getLogger("mpfx.allocate")


@dataclass(frozen=True)
class Allocate(Pass):
    """Annotate every located input group with its plan.

    Args:
        config: strategy, size and all that goes with them.
        moments: of the dense model's inputs, each behind the name of its input group; none for strategies that score
            nothing. They are taken one after the other and none is kept, as Hessians are large: an iterator may make
            them meanwhile (:func:`mpfx.passes.observe.dense_moments`). Of several processes, each has those of some
            groups.
        ranks: the processes; all come to the same plan.
    """

    config: CompressionConfig
    moments: Iterable[tuple[str, Moments]] = ()
    ranks: Ranks = ALONE

    def requires(self, gm: fx.GraphModule) -> None:
        """Groups are located, and observed where the strategy needs it."""
        groups = located(gm)
        if not groups:
            raise ValueError("Expected input groups: run LocateSites and GroupInputs before.")
        hooked = [p for p, m in _site_modules(gm).items() if m._forward_hooks or m._forward_pre_hooks]
        if hooked:
            raise ValueError(
                f"Expected no forward hooks on sites, as packed modules would not run them, but {hooked[:5]} got some "
                "since the trace: remove them, register them before, or exclude these sites (`scope.exclude`)."
            )

    @torch.no_grad()
    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Annotate."""
        groups = {group.name: group for group in located(gm)}
        measured = self.ranks.joined(lambda: dict(self._measured(gm, groups)))
        if self._measuring is not None and (lacking := [name for name in groups if name not in measured]):
            raise ValueError(f"Expected statistics of every input group but those of {lacking[:5]} are missing.")
        plans: dict[str, GroupPlan] = {}
        gm.meta[ALLOCATIONS] = []
        for target, members, _ in domains(gm, self.config):
            if self.config.allocation == "optimal":
                frontier = joined_frontier([measured[group.name] for group in members], self.config)
                chosen = _chosen(gm, frontier, target, self.config)
                plans.update({plan.name: plan for plan in chosen.plans})
                gm.meta[ALLOCATIONS].append((frontier, chosen))
                continue
            plans.update({plan.name: plan for plan in allocate(_drafts(gm, members, self.config, measured), target)})
        annotate(gm, PLAN, [(group.sites[0], name, plans[name]) for name, group in groups.items()])
        return PassResult(gm, modified=False)

    def ensures(self, gm: fx.GraphModule) -> None:
        """A budget is never exceeded by a strategy that can keep it."""
        if self.config.allocation not in ("optimal", "fixed", "budget"):
            return
        measure = stored_bits_per_weight if self.config.code_bits is None else code_bits_per_weight
        plans = annotations(gm, PLAN)
        for target, groups, _ in domains(gm, self.config):
            size = measure([plans[g.name] for g in groups])
            if size > target + 1e-9:
                raise ValueError(f"the plan takes {size:.4f} bits per weight, above the {target:g} asked for.")

    @property
    def _measuring(self) -> Callable[[fx.GraphModule, InputGroup, PermutationFold | None, Moments], Any] | None:
        """What the strategy makes of the moments of a group, if it makes use of them."""
        known = {"optimal": self._measure, **dict.fromkeys(SCORED, self._score)}
        return known.get(self.config.allocation)

    def _measured(self, gm: fx.GraphModule, groups: Mapping[str, InputGroup]) -> Iterator[tuple[str, Any]]:
        """What is measured in this process; the moments are asked for to the last, as others wait for their making."""
        measure, folds = self._measuring, located_folds(gm, self.config)
        for name, moments in self.moments:
            if measure is not None and name in groups:
                yield name, measure(gm, groups[name], folds.get(name), moments)

    def _measure(
        self, gm: fx.GraphModule, group: InputGroup, fold: PermutationFold | None, moments: Moments
    ) -> MeasuredGroup:
        return measure_group(gm, group, fold, self.config, moments)

    def _score(self, gm: fx.GraphModule, group: InputGroup, fold: PermutationFold | None, moments: Moments) -> Tensor:
        weight = stacked_weight(traced_module(gm), group, moments.hessian.device)
        with naming_sites(group):
            factor = factorise(moments.hessian, self.config.damping)
        parts = signals(weight, moments, factor.inverse_diagonal)
        score = importance(parts, self.config.importance)
        for name, part in (*parts.items(), ("importance", score)):
            logger.debug("%s: %s %.4g .. %.4g", group.name, name, float(part.min()), float(part.max()))
        return score.cpu()


def _site_modules(gm: fx.GraphModule) -> dict[str, nn.Module]:
    paths = dict.fromkeys(site.module for group in located(gm) for site in group.sites)
    return {path: traced_module(gm).get_submodule(path) for path in paths}


def _drafts(
    gm: fx.GraphModule, groups: Sequence[InputGroup], config: CompressionConfig, scores: Mapping[str, Tensor]
) -> list["Draft"]:
    folds = located_folds(gm, config)
    return [Draft(config, group, scores.get(group.name), folds.get(group.name)) for group in groups]


def _chosen(gm: fx.GraphModule, frontier: Frontier, target: float, config: CompressionConfig) -> Allocation:
    known = [site.path for group in located(gm) for site in group.sites]
    return choose(frontier, target, config.optimal, code_bits=config.code_bits is not None, known=known)


def check_feasible(gm: fx.GraphModule, config: CompressionConfig) -> None:
    """Refuse a stored budget that no plan can keep, and patterns that match no block, before any work is done.

    Raises:
        ValueError: with what was asked for and what is feasible.
    """
    shared = domains(gm, config)
    if config.allocation == "optimal":
        check_ties(
            config.optimal.ties, [[(g.name, [s.path for s in g.sites]) for g in members] for _, members, _ in shared]
        )
        for target, groups, _ in shared:
            _chosen(gm, unmeasured_frontier(gm, groups, config), target, config)
        return
    if config.code_bits is not None or config.allocation not in ("fixed", "budget"):
        return
    for target, groups, _ in shared:
        widths = (*WIDTHS, RAW_BITS) if config.allocation == "fixed" else config.tiers.widths
        drafts = _drafts(gm, groups, config, {})
        least, most = (
            stored_bits_per_weight([d.plan(torch.full((d.segments,), w)) for d in drafts])
            for w in (widths[0], widths[-1])
        )
        if target < least:
            raise ValueError(
                f"Expected `bits_per_weight` of at least {least:.3f} (up to {most:.3f} is of use) for these sites with "
                f"allocation {config.allocation}, groups of {config.grid.group_size} and sparsity {config.pattern} but "
                f"got {target:g}."
            )


def domains(gm: fx.GraphModule, config: CompressionConfig) -> list[tuple[float, list[InputGroup], bool]]:
    """Input groups that share one budget, behind that budget and before whether it is one of ``block_bits``.

    In graph order.

    Raises:
        ValueError: if a pattern of ``block_bits`` matches no block.
    """
    names = {block.index: block.name for block in blocks(gm)}
    groups = located(gm)
    used = {names[g.block] for g in groups if g.block is not None}
    for pattern in config.block_bits:
        if not any(fnmatchcase(name, pattern) for name in used):
            raise ValueError(f"Expected `block_bits` to match blocks but {pattern!r} matches none of {sorted(used)}.")
    shared: dict[str | None, list[InputGroup]] = {}
    for group in groups:
        name = "" if group.block is None else names[group.block]
        key = next((pattern for pattern in config.block_bits if fnmatchcase(name, pattern)), None)
        shared.setdefault(key, []).append(group)
    return [
        (config.target if key is None else config.block_bits[key], members, key is not None)
        for key, members in shared.items()
    ]


class Draft:
    """An input group on the way to its plan: its segments, ranked by score.

    Channels are ranked by their score and cut into segments of 32; a segment's score is the mean of its channels'.
    Where a fold keeps channels inside cells (heads), they are ranked inside of these, and segments that could share a
    group of scales share one score, as neighbours of different widths would take two.
    """

    def __init__(
        self, config: CompressionConfig, group: InputGroup, score: Tensor | None, fold: PermutationFold | None = None
    ) -> None:
        self.config, self.group = config, group
        self.channels = group.sites[0].in_features
        self.segments = -(-self.channels // SEGMENT)
        self.fold = fold
        if fold is not None and not is_free(fold) and config.grid.group_size is None:
            self.fold = None  # row scales: one for every stretch of equal width, so these have to be long
        self.confined = self.fold is not None and not is_free(self.fold)
        ranked = torch.ones(self.channels) if score is None else score.cpu()
        if config.pattern.group_m:
            ranked = block_means(ranked, config.pattern.group_m)
        self.arrangement = self._arrangement(ranked) if score is not None else None
        self.order = ranked.argsort(descending=True, stable=True) if self.arrangement is None else self.arrangement
        if self.confined and self.arrangement is None:
            self.order = torch.arange(self.channels)
        parts = ranked[self.order].split(SEGMENT)
        self.scores, self.sizes = torch.stack([part.mean() for part in parts]), [len(part) for part in parts]
        if self.confined and config.grid.group_size is not None:
            self.scores = block_means(self.scores, config.grid.group_size // SEGMENT)

    def _arrangement(self, ranked: Tensor) -> Tensor | None:
        if self.fold is None or not self.confined or self.config.pattern.group_m:
            return None
        return confined_order(self.fold, ranked)

    @property
    def numel(self) -> int:
        """Weights of the group."""
        return self.channels * sum(site.out_features for site in self.group.sites)

    def plan(self, segment_bits: Tensor) -> GroupPlan:
        """Give every channel the bits of its segment, ``(segments,)``."""
        bits = torch.empty(self.channels, dtype=torch.uint8)
        bits[self.order] = segment_bits.repeat_interleave(SEGMENT)[: self.channels].to(torch.uint8)
        return GroupPlan(
            name=self.group.name,
            rows={site.path: site.out_features for site in self.group.sites},
            bits=bits,
            sparsity=self.config.pattern,
            activation_order=self.config.activation_order,
            grid=self.config.grid,
            fold=self.fold,
            arrangement=self._stacked_order(bits) if self.arrangement is None else self.arrangement,
        )

    def _stacked_order(self, bits: Tensor) -> Tensor | None:
        """The natural order of an expert that needs no other, where its neighbours may: a stack stores all or none."""
        alone = self.group.sites[0].stack is None or not self.config.scored or self.config.activation_order
        return None if alone or bool((bits != bits[0]).any()) else torch.arange(self.channels)


def allocate(drafts: Sequence[Draft], target: float) -> list[GroupPlan]:
    """Plan the groups that share one budget.

    Args:
        drafts: the groups, of one config.
        target: stored bits per weight, or average code bits, as the config says.
    """
    config = drafts[0].config
    if config.allocation == "threshold":
        return [draft.plan(threshold(draft.scores, config.threshold)) for draft in drafts]
    if config.allocation == "quantile":
        return [draft.plan(quantile(draft.scores, config.tiers)) for draft in drafts]
    if config.allocation == "budget":
        return _within(lambda bits: _spread(drafts, bits, config.tiers.widths), target, config)
    widths = [float(w) for w in (RAW_BITS, *reversed(WIDTHS))] if config.code_bits is None else [target]
    plans: list[GroupPlan] = []
    for bits in widths:
        plans = [draft.plan(fixed(draft.scores, int(bits))) for draft in drafts]
        if config.code_bits is not None or stored_bits_per_weight(plans) <= target:
            break
    return plans


def _spread(drafts: Sequence[Draft], target: float, widths: Sequence[int]) -> list[GroupPlan]:
    """Meet an average of code bits over all groups.

    What the segments of one group leave over is handed to the next, large groups first: the last has the finest steps.
    """
    plans: dict[str, GroupPlan] = {}
    spare = 0.0
    for draft in sorted(drafts, key=lambda draft: -draft.numel):
        goal = min(target + spare / draft.numel, widths[-1])
        plan = draft.plan(budget(draft.scores, goal, widths, draft.sizes))
        spare += (target - plan.code_bits) * draft.numel
        plans[plan.name] = plan
    return [plans[draft.group.name] for draft in drafts]


def _within(spread: Callable[[float], list[GroupPlan]], target: float, config: CompressionConfig) -> list[GroupPlan]:
    """Bisect the code bits until the stored bits meet the target from below."""
    if config.code_bits is not None:
        return spread(target)
    low, high = float(config.tiers.widths[0]), float(config.tiers.widths[-1])
    best = spread(low)
    while high - low > 1e-4:
        middle = (low + high) / 2
        plans = spread(middle)
        if stored_bits_per_weight(plans) <= target:
            low, best = middle, plans
        else:
            high = middle
    return best
