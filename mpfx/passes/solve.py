"""Prune and quantize block by block."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mpfx.allocate import GroupPlan
from mpfx.graph import Block, InputGroup, blocks, run_block, sites, traced_module
from mpfx.nn import PackedWeight, own_order, pack, pack_permutation, unpack
from mpfx.passes.allocate import PLAN
from mpfx.passes.base import Pass, PassResult
from mpfx.passes.locate import annotate, annotations, located, naming_sites
from mpfx.passes.observe import Accumulators, Masks, finalised, observed, padding_masks
from mpfx.report import SiteReport
from mpfx.solve import factorise, layer_error, sweep
from mpfx.stats import Moments

SOLVED = "mpfx_solved"
"""Key of ``node.meta`` under which a group's :class:`SolvedGroup` lies, by the group's name."""

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

    def dense(self, path: str) -> Tensor:
        """The solved weight ``(out, in)`` in the input's own channel order, float32."""
        return own_order(unpack(self.weights[path]).dequantize(), self.permutation)


def solve_group(
    plan: GroupPlan, weights: Mapping[str, Tensor], moments: Moments, damping: float = 0.01, note: str | None = None
) -> SolvedGroup:
    """Solve the sites of one input group: one Hessian, one factor, one sweep over their stacked rows.

    Args:
        plan: widths, sparsity, order.
        weights: ``(out, in)`` of every site, by module path; not changed.
        moments: of the input that all of them read.
        damping: see :func:`mpfx.solve.factorise`.
        note: what had to be done about the statistics; goes to the report.
    """
    weight, hessian = torch.cat([w.detach().float() for w in weights.values()]), moments.hessian
    order = plan.order(hessian.diagonal())
    if order is not None:
        weight, hessian = weight[:, order], hessian[order][:, order]
    factor = factorise(hessian, damping)
    solved = sweep(weight, factor.upper, plan.layout, plan.grid, plan.sparsity)
    packed, errors, first = {}, {}, 0
    for path, rows in plan.rows.items():
        part = solved.rows(slice(first, first + rows))
        packed[path] = pack(part)
        errors[path] = layer_error(weight[first : first + rows], part.dequantize(), hessian)
        first += rows
    for path, error in errors.items():
        logger.debug("%s: relative error %.4g, damping %g", path, error, factor.damping)
    permutation = None if order is None else pack_permutation(order)
    fallback = "; ".join(text for text in (note, factor.fallback) if text) or None
    return SolvedGroup(plan, packed, permutation, errors, factor.damping, fallback)


@dataclass(frozen=True)
class PruneAndQuantize(Pass):
    """Solve every planned group, block after block, on inputs that passed the blocks solved before.

    Annotates each group with its :class:`SolvedGroup`; the model itself is as before when the pass ends, also after an
    exception: solved weights stand in for the dense ones only while their block hands its outputs on.

    Args:
        batches: inputs of the traced call, one dict a batch (:func:`mpfx.graph.bind_inputs`).
        damping: see :func:`mpfx.solve.factorise`.
        strict: refuse fallbacks, such as more damping than asked for, instead of reporting them.
        device: where blocks run and groups are solved; None: where the batches are.
        context: entered around every run of a block (precision plugins).
        on_block: called with the name of a block and the share of the work that is done, for progress.
    """

    batches: Sequence[Mapping[str, Any]]
    damping: float = 0.01
    strict: bool = False
    device: torch.device | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    on_block: Callable[[str, float], None] = lambda name, share: None

    def requires(self, gm: fx.GraphModule) -> None:
        """Groups are planned and there is something to calibrate on."""
        if not annotations(gm, PLAN):
            raise ValueError("Expected planned sites: run Allocate before.")
        if not self.batches:
            raise ValueError("Expected at least one calibration batch but got none.")

    @torch.no_grad()
    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Solve and annotate."""
        parts, solved = blocks(gm), dict[str, SolvedGroup]()
        steps = [list(self._steps(gm, block)) for block in parts]
        last = max(block.index for block in parts if steps[block.index])
        values = [self._to_device(batch) for batch in self.batches]
        masks = [padding_masks(batch) for batch in values]
        for block in parts[: last + 1]:
            self.on_block(block.name, block.index / (last + 1))
            here: dict[str, SolvedGroup] = {}
            for groups in steps[block.index]:
                with solved_weights(gm, here.values()):
                    moments = self._observe(gm, block, groups, values, masks)
                here.update(self._solve(gm, block, groups, moments))
            if block.index < last:
                with solved_weights(gm, here.values()):
                    for env in values:
                        self._run(block, env, parts[block.index + 1 :])
            solved.update(here)
        self.on_block(parts[last].name, 1.0)
        annotate(gm, SOLVED, [(group.sites[0], group.name, solved[group.name]) for group in located(gm)])
        return PassResult(gm, modified=False)

    def ensures(self, gm: fx.GraphModule) -> None:
        """Every planned group is solved."""
        if lacking := annotations(gm, PLAN).keys() - annotations(gm, SOLVED).keys():
            raise ValueError(f"groups {sorted(lacking)} were planned but not solved.")
        odd = [f"{group.plan.name}: {group.fallback}" for group in solved_groups(gm) if group.fallback]
        if self.strict and odd:
            raise ValueError(f"`strict` allows no fallback, but for {len(odd)} input groups one was needed: {odd[:3]}.")

    def _steps(self, gm: fx.GraphModule, block: Block) -> Iterator[list[InputGroup]]:
        """The groups of a block, those together that are solved on one run of it."""
        first = {group.sites[0].path: group for group in located(gm)}
        for paths in block.units:
            if groups := [first[path] for path in paths if path in first]:
                yield groups

    def _observe(
        self,
        gm: fx.GraphModule,
        block: Block,
        groups: Sequence[InputGroup],
        values: Sequence[dict[str, Any]],
        masks: Sequence[Masks],
    ) -> Accumulators:
        current: list[Masks] = [{}]
        with observed(gm, groups, lambda: current[0]) as moments:
            for env, mask in zip(values, masks, strict=True):
                current[0] = mask
                with self.context():
                    block.module(**{name: env[name] for name in block.needs})
        return moments

    def _solve(
        self, gm: fx.GraphModule, block: Block, groups: Sequence[InputGroup], moments: Accumulators
    ) -> Iterator[tuple[str, SolvedGroup]]:
        model, plans = traced_module(gm), annotations(gm, PLAN)
        try:
            for group, seen, note in finalised(moments, groups):
                with naming_sites(group):
                    if seen is None:
                        raise ValueError("its input was never computed")
                    weights = {site.path: site.weight(model) for site in group.sites}
                    solved = solve_group(plans[group.name], weights, seen, self.damping, note)
                yield group.name, solved
        except ValueError as error:
            raise ValueError(f"block {block.name}, {error}") from error

    def _run(self, block: Block, env: dict[str, Any], later: Sequence[Block]) -> None:
        with self.context():
            after = run_block(block, env, later)
        env.clear()
        env.update(after)

    def _to_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        move = (lambda t: t) if self.device is None else (lambda t: t.to(self.device))
        moved: dict[str, Any] = pytree.tree_map_only(Tensor, move, dict(batch))
        return moved


@contextmanager
def solved_weights(gm: fx.GraphModule, solved: Iterable[SolvedGroup]) -> Iterator[None]:
    """Let solved weights stand in for the dense ones; the dense ones are back when the context closes."""
    model, by_path = traced_module(gm), {site.path: site for site in sites(gm)}
    originals: dict[int, tuple[nn.Parameter, Tensor]] = {}
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
