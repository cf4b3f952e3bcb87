"""Prune and quantize block by block."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mpfx.allocate import GroupPlan
from mpfx.graph import Block, InputGroup, blocks, linear_weight, run_block
from mpfx.nn import PackedWeight, pack, pack_permutation, unpack
from mpfx.nn.packing import QuantizedWeight
from mpfx.passes.allocate import PLAN
from mpfx.passes.base import PassResult
from mpfx.passes.locate import GROUP, annotated
from mpfx.passes.observe import observed, padding_mask
from mpfx.report import SiteReport
from mpfx.solve import factorise, layer_error, sweep
from mpfx.stats import Moments

SOLVED = "mpfx_solved"
"""Key of ``node.meta`` under which a group's first site holds its :class:`SolvedGroup`."""

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
        ordered = unpack(self.weights[path]).dequantize()
        if self.permutation is None:
            return ordered
        return torch.empty_like(ordered).index_copy_(1, self.permutation.long(), ordered)


def solve_group(plan: GroupPlan, weights: Mapping[str, Tensor], moments: Moments, damping: float = 0.01) -> SolvedGroup:
    """Solve the sites of one input group: one Hessian, one factor, one sweep over their stacked rows.

    Args:
        plan: widths, sparsity, order.
        weights: ``(out, in)`` of every site, by module path; not changed.
        moments: of the input that all of them read.
        damping: see :func:`mpfx.solve.factorise`.
    """
    weight, hessian = torch.cat([w.detach().float() for w in weights.values()]), moments.hessian
    order = plan.order(hessian.diagonal())
    if order is not None:
        weight, hessian = weight[:, order], hessian[order][:, order]
    factor = factorise(hessian, damping)
    solved = sweep(weight, factor.upper, plan.layout, plan.grid, plan.sparsity)
    packed, errors, first = {}, {}, 0
    for path, rows in plan.rows.items():
        part = _rows(solved, slice(first, first + rows))
        packed[path] = pack(part)
        errors[path] = layer_error(weight[first : first + rows], part.dequantize(), hessian)
        first += rows
    for path, error in errors.items():
        logger.debug("%s: relative error %.4g, damping %g", path, error, factor.damping)
    permutation = None if order is None else pack_permutation(order)
    return SolvedGroup(plan, packed, permutation, errors, factor.damping, factor.fallback)


def _rows(solved: QuantizedWeight, rows: slice) -> QuantizedWeight:
    return QuantizedWeight(
        codes=solved.codes[rows],
        scales=solved.scales[rows],
        zeros=None if solved.zeros is None else solved.zeros[rows],
        kept=None if solved.kept is None else solved.kept[rows],
        layout=solved.layout,
    )


@dataclass(frozen=True)
class PruneAndQuantize:
    """Solve every planned group, block after block, on inputs that passed the blocks solved before.

    Annotates each group with its :class:`SolvedGroup`; the model itself is as before when the pass ends, also after an
    exception: solved weights stand in for the dense ones only while their block hands its outputs on.

    Args:
        batches: inputs of the traced call, one dict a batch (:func:`mpfx.graph.bind_inputs`).
        damping: see :func:`mpfx.solve.factorise`.
        device: where blocks run and groups are solved; None: where the batches are.
        context: entered around every run of a block (precision plugins).
        on_block: called with the name of a block and the share of the work that is done, for progress.
    """

    batches: Sequence[Mapping[str, Any]]
    damping: float = 0.01
    device: torch.device | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    on_block: Callable[[str, float], None] = lambda name, share: None

    def requires(self, gm: fx.GraphModule) -> None:
        """Groups are planned and there is something to calibrate on."""
        if not any(annotated(gm, PLAN)):
            raise ValueError("Expected planned sites: run Allocate before.")
        if not self.batches:
            raise ValueError("Expected at least one calibration batch but got none.")

    @torch.no_grad()
    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Solve and annotate."""
        parts = blocks(gm)
        planned = {index: list(nodes) for index, nodes in _by_block(gm, parts).items()}
        last = max(planned)
        values = [self._to_device(batch) for batch in self.batches]
        for block in parts[: last + 1]:
            self.on_block(block.name, block.index / (last + 1))
            nodes = planned.get(block.index, [])
            masks = [padding_mask(batch) for batch in self.batches]
            self._solve_block(gm, block, nodes, values, masks)
            if block.index < last:
                with solved_weights(gm, [node.meta[SOLVED] for node in nodes]):
                    for env in values:
                        self._run(block, env, parts[block.index + 1 :])
        self.on_block(parts[last].name, 1.0)
        return PassResult(gm, modified=False)

    def ensures(self, gm: fx.GraphModule) -> None:
        """Every planned group is solved."""
        if lacking := [node.target for node in annotated(gm, PLAN) if SOLVED not in node.meta]:
            raise ValueError(f"groups {lacking} were planned but not solved.")

    def _solve_block(
        self,
        gm: fx.GraphModule,
        block: Block,
        nodes: Sequence[fx.Node],
        values: Sequence[dict[str, Any]],
        masks: Sequence[Tensor | None],
    ) -> None:
        if not nodes:
            return
        groups: list[InputGroup] = [node.meta[GROUP] for node in nodes]
        current: list[Tensor | None] = [None]
        with observed(gm, groups, lambda: current[0]) as moments:
            for env, mask in zip(values, masks, strict=True):
                current[0] = mask if mask is None or self.device is None else mask.to(self.device)
                with self.context():
                    block.module(**{name: env[name] for name in block.needs})
        for node, group in zip(nodes, groups, strict=True):
            weights = {site.path: linear_weight(gm.get_submodule(site.path)) for site in group.sites}
            try:
                seen = moments[group.name].finalise()
                node.meta[SOLVED] = solve_group(node.meta[PLAN], weights, seen, self.damping)
            except (ValueError, KeyError) as error:
                reason = "its input was never computed" if isinstance(error, KeyError) else error
                raise ValueError(f"block {block.name}, sites {', '.join(weights)}: {reason}") from error
            del moments[group.name]

    def _run(self, block: Block, env: dict[str, Any], later: Sequence[Block]) -> None:
        with self.context():
            after = run_block(block, env, later)
        env.clear()
        env.update(after)

    def _to_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        move = (lambda t: t) if self.device is None else (lambda t: t.to(self.device))
        moved: dict[str, Any] = pytree.tree_map_only(Tensor, move, dict(batch))
        return moved


def _by_block(gm: fx.GraphModule, parts: Sequence[Block]) -> dict[int, list[fx.Node]]:
    owner = {path: block.index for block in reversed(parts) for path in block.sites}
    planned: dict[int, list[fx.Node]] = {}
    for node in annotated(gm, PLAN):
        planned.setdefault(owner[str(node.target)], []).append(node)
    return planned


@contextmanager
def solved_weights(gm: fx.GraphModule, solved: Sequence[SolvedGroup]) -> Iterator[None]:
    """Let solved weights stand in for the dense ones; the dense ones are back when the context closes."""
    originals: list[tuple[nn.Module, Tensor]] = []
    try:
        for group in solved:
            for path in group.weights:
                module = gm.get_submodule(path)
                weight = module.get_parameter("weight")
                originals.append((module, weight.data))
                weight.data = weight.data.clone()
                linear_weight(module).copy_(group.dense(path))
        yield
    finally:
        for module, data in originals:
            module.get_parameter("weight").data = data


def solved_groups(gm: fx.GraphModule) -> tuple[SolvedGroup, ...]:
    """Everything solved, in graph order."""
    return tuple(node.meta[SOLVED] for node in annotated(gm, SOLVED))
