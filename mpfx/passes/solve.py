"""Prune and quantize block by block."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpfx.allocate import GroupPlan
from mpfx.graph import Block, InputGroup, Site, blocks, dead_ends, last_readers, sites, traced_module
from mpfx.nn import PackedWeight, own_order, pack, pack_permutation, unpack
from mpfx.passes.allocate import PLAN
from mpfx.passes.base import Pass, PassResult
from mpfx.passes.locate import annotate, annotations, located, naming_sites
from mpfx.passes.observe import (
    Accumulators,
    Masks,
    Reading,
    Weigh,
    finalised,
    groups_of_blocks,
    inputs_read,
    observed,
    outputs_left_away,
    padding_masks,
    token_weights,
)
from mpfx.passes.ranks import ALONE, Ranks
from mpfx.passes.running import Runner
from mpfx.report import SiteReport
from mpfx.solve import factorise, layer_error, measured_refine, measured_sweep
from mpfx.stats import Moments, Sensitivity, Sums

SOLVED = "mpfx_solved"
"""Key of ``node.meta`` under which a group's :class:`SolvedGroup` lies, by the group's name."""

_AMISS = (
    "it reads other tokens after compression, as its calls depend on the values: those that neither sensitivities nor "
    "the dense model's values fit count like all others"
)

logger = logging.getLogger("mpfx.solve")


@dataclass(frozen=True)
class SolvedGroup:
    """The packed weights of one input group and how it went.

    Attributes:
        plan: that was followed.
        weights: by module path, channels in sweep order.
        permutation: of the input's channels, stored form ``(in,)``, shared by all sites; None: the input's own order.
        relative_error: of every site's output on the calibration data, by module path.
        damping: fraction of the mean diagonal that the Hessian needed.
        fallback: what had to be done otherwise than asked; None where nothing had to.
    """

    plan: GroupPlan
    weights: Mapping[str, PackedWeight]
    permutation: Tensor | None
    relative_error: Mapping[str, float]
    damping: float
    fallback: str | None

    @property
    def stored_bytes(self) -> int:
        """Bytes of all sites and of the permutation that they share."""
        order = 0 if self.permutation is None else self.permutation.nbytes
        return order + sum(weight.nbytes for weight in self.weights.values())

    def reports(self) -> list[SiteReport]:
        """One entry per site; the permutation is shared out by rows."""
        order = 0 if self.permutation is None else self.permutation.nbytes
        rows = sum(self.plan.rows.values())
        return [
            SiteReport(
                path=path,
                bits_per_weight=8 * (weight.nbytes / weight.out_features + order / rows) / weight.layout.in_features,
                code_bits=weight.layout.code_bits,
                sparsity=weight.sparsity,
                relative_error=self.relative_error[path],
                damping=self.damping,
                fallback=self.fallback,
            )
            for path, weight in self.weights.items()
        ]

    def to(self, device: torch.device) -> "SolvedGroup":
        """The same group on another device."""
        weights = {path: weight.to(device) for path, weight in self.weights.items()}
        order = None if self.permutation is None else self.permutation.to(device)
        return replace(self, weights=weights, permutation=order)

    def dense(self, path: str) -> Tensor:
        """The solved weight ``(out, in)`` in the input's own channel order, float32."""
        return own_order(unpack(self.weights[path]).dequantize(), self.permutation)


@dataclass(frozen=True, kw_only=True)
class SolveConfig:
    """How groups are solved.

    Args:
        damping: see :func:`mpfx.solve.factorise`.
        guidance: power of the sensitivities with which tokens count in the Hessians.
        correction: share of the earlier blocks' error that is made up for, where it reaches a group past all other
            sites of its block: what comes through these is made up for there.
        refine: rounds of coordinate descent after a sweep that prunes.
    """

    damping: float = 0.01
    guidance: float = 0.0
    correction: float = 0.0
    refine: int = 0


def solve_group(
    plan: GroupPlan,
    weights: Mapping[str, Tensor],
    moments: Moments,
    config: SolveConfig = SolveConfig(),
    note: str | None = None,
) -> SolvedGroup:
    """Solve the sites of one input group: one Hessian, one factor, one sweep over their stacked rows.

    Args:
        plan: widths, sparsity, order.
        weights: ``(out, in)`` of every site, by module path; not changed.
        moments: of the input that all of them read.
        config: how.
        note: what had to be done about the statistics; goes to the report.
    """
    weight = torch.cat([w.detach().float() for w in weights.values()])
    order = plan.order(moments.hessian.diagonal())
    if order is not None:
        weight, moments = weight[:, order], moments.reordered(order)
    factor = factorise(moments.hessian, config.damping)
    target = corrected(weight, moments, factor.upper, config.correction)
    solved, damped = measured_sweep(target, factor.upper, plan.layout, plan.grid, plan.sparsity)
    if plan.sparsity and config.refine:
        solved, lower = measured_refine(target, solved, moments.hessian, factor.damping, config.refine)
        damped = damped - lower
    packed, errors, first = {}, {}, 0
    for path, rows in plan.rows.items():
        inside = slice(first, first + rows)
        part = solved.rows(inside)
        packed[path] = pack(part)
        errors[path] = layer_error(target[inside], part.dequantize(), moments.hessian, damped[inside], factor.ridge)
        first += rows
    for path, error in errors.items():
        logger.debug("%s: relative error %.4g, damping %g", path, error, factor.damping)
    permutation = None if order is None else pack_permutation(order)
    fallback = "; ".join(text for text in (note, factor.fallback) if text) or None
    return SolvedGroup(plan, packed, permutation, errors, factor.damping, fallback)


def corrected(weight: Tensor, moments: Moments, upper: Tensor, share: float) -> Tensor:
    """The weight that makes up for some of the error in its input.

    Least squares for ``|W y - V x|^2`` over V, where y is the dense model's input and x the compressed one's, is
    ``V = W + W (sum c (y - x) x^T) H^-1`` (error propagation: Arai & Ichikawa, QEP, 2025; GPTAQ, Li et al., 2025). All
    of it overshoots; measured, half is best.

    Args:
        weight: ``(rows, in)``.
        moments: with the drift ``sum c (y - x) x^T``, channels likewise; without one the weight comes back.
        upper: factor of the inverse Hessian.
        share: of the correction.
    """
    if moments.drift is None or not share:
        return weight
    return weight + share * (((weight @ moments.drift) @ upper.t()) @ upper)


@dataclass(frozen=True)
class PruneAndQuantize(Pass):
    """Solve every planned group, block after block, on inputs that passed the blocks solved before.

    Annotates each group with its :class:`SolvedGroup`; the model itself is as before when the pass ends, also after an
    exception: solved weights stand in for the dense ones only while their block hands its outputs on.

    Args:
        batches: inputs of the traced call, one dict a batch (:func:`mpfx.graph.bind_inputs`).
        config: how groups are solved.
        sensitivities: of the loss by name of the group, for the same batches; needed with `guidance`.
        strict: refuse fallbacks, such as more damping than asked for, instead of reporting them.
        runner: how blocks run; groups are solved where they do.
        on_block: called with the name of a block and the share of the work that is done, for progress.
        ranks: the processes, each with batches of its own; groups that are solved on one run of a block are shared out.
    """

    batches: Sequence[Mapping[str, Any]]
    config: SolveConfig = field(default_factory=SolveConfig)
    sensitivities: Mapping[str, Sensitivity] = field(default_factory=dict)
    strict: bool = False
    runner: Runner = field(default_factory=Runner)
    on_block: Callable[[str, float], None] = lambda name, share: None
    ranks: Ranks = ALONE

    def requires(self, gm: fx.GraphModule) -> None:
        """Groups are planned and there is something to calibrate on."""
        if not annotations(gm, PLAN):
            raise ValueError("Expected planned sites: run Allocate before.")
        if not self.batches:
            raise ValueError("Expected at least one calibration batch but got none.")
        lacking = [g.name for g in located(gm) if g.sites[0].stack is None and g.name not in self.sensitivities]
        if self.config.guidance and lacking:
            raise ValueError(
                f"Expected sensitivities of every input group with guidance but {lacking[:5]} have none: "
                "gather them in calibration (`guidance` above 0 there too), or set `guidance: 0`."
            )
        counts = {len(found.batches) for found in self.sensitivities.values()} if self.config.guidance else set()
        if counts - {len(self.batches)}:
            raise ValueError(
                f"Expected sensitivities of {len(self.batches)} batches, those that are calibrated on, but got some of "
                f"{sorted(counts)}."
            )

    @torch.no_grad()
    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Solve and annotate."""
        groups = groups_of_blocks(gm)
        parts = blocks(gm)[: max(index for index, found in enumerate(groups) if found) + 1]
        by_path = {site.path: site for site in sites(gm)}
        weigh = token_weights(gm, located(gm))
        work = _Work(gm, parts[-1].index, last_readers(parts), annotations(gm, PLAN), by_path, weigh)
        kept = (self.runner.kept(self.runner.fetched(batch)) for batch in self.batches)
        streams = [_Stream(values, padding_masks(batch)) for values, batch in zip(kept, self.batches, strict=True)]
        solved: dict[str, SolvedGroup] = {}
        with self.runner.placed(parts) as placed:
            for block in placed:
                self.on_block(block.name, block.index / len(parts))
                here = self._solve_block(work, block, _steps(block, groups[block.index]), streams)
                solved.update({n: g.to(torch.device("cpu")) for n, g in here.items()} if self.runner.crowded else here)
        self.on_block(parts[-1].name, 1.0)
        annotate(gm, SOLVED, [(group.sites[0], group.name, solved[group.name]) for group in located(gm)])
        return PassResult(gm, modified=False)

    def ensures(self, gm: fx.GraphModule) -> None:
        """Every planned group is solved."""
        if lacking := annotations(gm, PLAN).keys() - annotations(gm, SOLVED).keys():
            raise ValueError(f"groups {sorted(lacking)} were planned but not solved.")
        odd = [f"{group.plan.name}: {group.fallback}" for group in solved_groups(gm) if group.fallback]
        if self.strict and odd:
            raise ValueError(f"`strict` allows no fallback, but for {len(odd)} input groups one was needed: {odd[:3]}.")

    def _solve_block(
        self,
        work: "_Work",
        block: Block,
        steps: Sequence[Sequence[InputGroup]],
        streams: Sequence["_Stream"],
    ) -> dict[str, SolvedGroup]:
        here: dict[str, SolvedGroup] = {}
        alike = [stream.dense is None for stream in streams]
        for groups in steps:
            with solved_weights(work.gm, here.values(), work.sites):
                moments, amiss = self._observe(work, block, groups, streams, first=not here)
            here.update(self._shared(work, block, groups, moments, amiss))
        if block.index == work.last:  # nothing that is solved comes after it
            return here
        for stream, same in zip(streams, alike, strict=True):
            if (same and steps and self.config.correction) or (not same and not steps):
                # From the first solved block on the dense model's values are others than the compressed one's.
                stream.dense = self._after(work, block, stream.values if stream.dense is None else stream.dense)
        with solved_weights(work.gm, here.values(), work.sites):
            for stream in streams:
                stream.values = self._after(work, block, stream.values)
        return here

    def _observe(
        self, work: "_Work", block: Block, groups: Sequence[InputGroup], streams: Sequence["_Stream"], first: bool
    ) -> tuple[Accumulators, set[str]]:
        """Gather the moments of what groups read, next to the dense model's, which goes on to the next block.

        Returns:
            The moments, and the groups that read other tokens than weights or the dense model's values were known for.
        """
        reading, amiss, idle = [Reading()], set[str](), dead_ends(block)
        with observed(work.gm, groups, lambda: reading[0], work.weigh, Sums(channels=False)) as moments:
            for index, stream in enumerate(streams):
                references = {}
                if stream.dense is not None and first:
                    reading[0] = Reading(paused=True)
                    references = self._dense_step(work, block, groups, stream)
                reading[0] = Reading(stream.masks, self._weights(groups, index), references, amiss=amiss)
                with outputs_left_away(work.gm, idle):
                    self.runner.run(block, stream.values, {})
        return moments, amiss

    def _weights(self, groups: Sequence[InputGroup], batch: int) -> dict[str, list[Tensor]]:
        if not self.config.guidance:
            return {}
        seen = {group.name: self.sensitivities.get(group.name) for group in groups}
        return {name: found.weights(batch, self.config.guidance) for name, found in seen.items() if found is not None}

    def _dense_step(
        self, work: "_Work", block: Block, groups: Sequence[InputGroup], stream: "_Stream"
    ) -> dict[str, list[Tensor]]:
        """Run the dense model's block; returns what groups read there whose inputs carry earlier blocks' errors."""
        direct = [g for g in groups if g.sites[0].stack is None and all(s.path in block.direct for s in g.sites)]
        found: dict[str, list[Tensor]] = {group.name: [] for group in direct}
        with inputs_read(work.gm, direct, lambda name, x: found[name].append(x.detach())):
            assert stream.dense is not None
            stream.dense = self._after(work, block, stream.dense)
        return found

    def _shared(
        self,
        work: "_Work",
        block: Block,
        groups: Sequence[InputGroup],
        moments: Accumulators,
        amiss: set[str],
    ) -> dict[str, SolvedGroup]:
        """Solve groups in as many processes as there are, on the batches of all, and hand the results to all."""
        amiss = set().union(*self.ranks.gathered(lambda: amiss))
        own = self.ranks.summed(moments, groups)
        return self.ranks.joined(lambda: dict(self._solve(work, block, own, moments, amiss)))

    def _solve(
        self,
        work: "_Work",
        block: Block,
        groups: Sequence[InputGroup],
        moments: Accumulators,
        amiss: set[str],
    ) -> Iterator[tuple[str, SolvedGroup]]:
        model = traced_module(work.gm)
        try:
            for group, seen, note in finalised(moments, groups):
                with naming_sites(group):
                    if seen is None:
                        raise ValueError("its input was never computed")
                    weights = {site.path: site.weight(model) for site in group.sites}
                    notes = [note, self._unguided(group), _AMISS if group.name in amiss else None]
                    told = "; ".join(filter(None, notes)) or None
                    solved = solve_group(work.plans[group.name], weights, seen, self.config, told)
                yield group.name, solved
        except ValueError as error:
            raise ValueError(f"block {block.name}, {error}") from error

    def _unguided(self, group: InputGroup) -> str | None:
        """Why the tokens of a group count all alike although guidance was asked for."""
        if not self.config.guidance or group.name in self.sensitivities:
            return None
        return "its tokens count all alike: nobody sees the outputs of experts in one parameter"

    def _after(self, work: "_Work", block: Block, values: Mapping[str, Any]) -> dict[str, Any]:
        return self.runner.kept(self.runner.run(block, values, work.readers))


def _steps(block: Block, groups: Sequence[InputGroup]) -> list[list[InputGroup]]:
    """The groups of a block, those together that are solved on one run of it."""
    first = {group.sites[0].path: group for group in groups}
    found = [[first[path] for path in paths if path in first] for paths in block.units]
    return [step for step in found if step]


@dataclass(frozen=True)
class _Work:
    """What all blocks need.

    Attributes:
        gm: traced.
        last: index of the last block to solve.
        readers: of the values between blocks.
        plans: by name of the input group.
        sites: by path.
        weigh: makes weights of tokens.
    """

    gm: fx.GraphModule
    last: int
    readers: Mapping[str, int]
    plans: Mapping[str, GroupPlan]
    sites: Mapping[str, Site]
    weigh: Weigh


@dataclass
class _Stream:
    """One batch on its way through the blocks.

    Attributes:
        values: what later blocks need, from blocks that are compressed already.
        masks: padding.
        dense: the same values in the dense model; None: as long as they are the same.
    """

    values: dict[str, Any]
    masks: Masks
    dense: dict[str, Any] | None = None


@contextmanager
def solved_weights(
    gm: fx.GraphModule, solved: Iterable[SolvedGroup], by_path: Mapping[str, Site] | None = None
) -> Iterator[None]:
    """Let solved weights stand in for the dense ones; the dense ones are back when the context closes.

    Args:
        gm: traced.
        solved: weights to use.
        by_path: the graph's sites, where they are at hand.
    """
    by_path = {site.path: site for site in sites(gm)} if by_path is None else by_path
    model, originals = traced_module(gm), dict[int, tuple[nn.Parameter, Tensor]]()
    try:
        for group in solved:
            for path in group.weights:
                parameter = by_path[path].parameter(model)
                if id(parameter) not in originals:
                    originals[id(parameter)] = (parameter, parameter.data)
                    parameter.data = parameter.data.clone()
                by_path[path].weight(model).copy_(group.dense(path))
        yield
    finally:
        for parameter, data in originals.values():
            parameter.data = data


def solved_groups(gm: fx.GraphModule) -> tuple[SolvedGroup, ...]:
    """Everything solved, in graph order."""
    return tuple(annotations(gm, SOLVED).values())
