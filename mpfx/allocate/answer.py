"""What a stored frontier answers: the best plan for a budget, without the model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mpfx.allocate.choose import Allocation, OptimalConfig, check_ties, choose, feasible_bits, relative_gap
from mpfx.allocate.frontier import Frontier
from mpfx.allocate.plan import GroupPlan
from mpfx.allocate.storage import Domain
from mpfx.nn.layout import permutation_bytes


@dataclass(frozen=True)
class Kind:
    """Sites whose paths end alike (q_proj).

    Attributes:
        name: last part of the paths.
        sites: how many.
        bits_per_weight: stored bits, permutations shared out by rows.
        sparsity: number of sites by pattern.
        left_out: input channels left out, in all sites together.
        channels: input channels of all sites together.
    """

    name: str
    sites: int
    bits_per_weight: float
    sparsity: dict[str, int]
    left_out: int
    channels: int


@dataclass(frozen=True)
class Answer:
    """Plans for a whole model.

    Attributes:
        plans: in graph order.
        target: what was asked for.
        bits_per_weight: stored bits, everything counted.
        code_bits: average nominal width of the codes.
        distortion: estimated increase of the loss, up to a factor that the whole model shares.
        bound: no plan within the budgets has less.
        stored_bytes: of all plans.
        feasible: least bits of use and the most, in the unit of the target, of the groups that share it.
        kinds: by the last part of the sites' paths, in graph order.
    """

    plans: tuple[GroupPlan, ...]
    target: float
    bits_per_weight: float
    code_bits: float
    distortion: float
    bound: float
    stored_bytes: int
    feasible: tuple[float, float]
    kinds: tuple[Kind, ...]

    @property
    def gap(self) -> float:
        """How far the distortion may be from the best possible, relative to it."""
        return relative_gap(self.distortion, self.bound)


def answer(
    domains: Sequence[Domain], target: float, config: OptimalConfig | None = None, *, code_bits: bool = False
) -> Answer:
    """Solve a budget; blocks with a budget of their own keep it.

    Args:
        domains: from :func:`mpfx.allocate.load_frontier`.
        target: stored bits per weight, never exceeded.
        config: constraints, widths among those that were measured; None: those that the plans of the run had.
        code_bits: the target is the average nominal width of the codes instead.

    Raises:
        ValueError: if the budget is infeasible, or a constraint matches nothing.
    """
    config = replace(domains[0].constraints, widths=domains[0].frontier.widths) if config is None else config
    check_ties(config.ties, [[(g.name, list(g.rows)) for g in domain.frontier.groups] for domain in domains])
    known = [path for domain in domains for group in domain.frontier.groups for path in group.rows]
    chosen: list[Allocation] = []
    ranges: list[tuple[float, float]] = []
    for domain in domains:
        frontier = _narrowed(domain.frontier, config.widths)
        bits, codes = (domain.target, domain.code_bits) if domain.own else (target, code_bits)
        chosen.append(choose(frontier, bits, config, code_bits=codes, known=known))
        if not domain.own:
            ranges.append(feasible_bits(frontier, config, code_bits=code_bits, known=known))
    plans = tuple(plan for allocation in chosen for plan in allocation.plans)
    numel = sum(plan.numel for plan in plans)
    stored = sum(allocation.stored_bytes for allocation in chosen)
    return Answer(
        plans=plans,
        target=target,
        bits_per_weight=8 * stored / numel,
        code_bits=sum(plan.code_bits * plan.numel for plan in plans) / numel,
        distortion=sum(allocation.distortion for allocation in chosen),
        bound=sum(allocation.bound for allocation in chosen),
        stored_bytes=stored,
        feasible=(max(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else (target, target),
        kinds=kinds(plans),
    )


def kinds(plans: Iterable[GroupPlan]) -> tuple[Kind, ...]:
    """Sum plans up by the last part of their sites' paths; experts of one stack by its name."""
    found: dict[str, list[tuple[GroupPlan, int]]] = {}
    for plan in plans:
        for path, rows in plan.rows.items():
            parts = [part for part in path.split(".") if not part.isdigit()] or [path]
            found.setdefault(parts[-1], []).append((plan, rows))
    return tuple(_kind(name, members) for name, members in found.items())


def _kind(name: str, members: Sequence[tuple[GroupPlan, int]]) -> Kind:
    bits = weights = 0.0
    sparsity: dict[str, int] = {}
    for plan, rows in members:
        alone = replace(plan, rows={name: rows})
        order = permutation_bytes(len(plan.bits)) if plan.permuted and plan.fold is None else 0
        bits += 8 * (alone.stored_bytes() - order * (1 - rows / sum(plan.rows.values())))
        weights += rows * len(plan.bits)
        sparsity[str(plan.sparsity)] = sparsity.get(str(plan.sparsity), 0) + 1
    left_out = sum(int((plan.bits == 0).sum()) for plan, _ in members)
    return Kind(name, len(members), bits / weights, sparsity, left_out, sum(len(plan.bits) for plan, _ in members))


def _narrowed(frontier: Frontier, widths: Sequence[int]) -> Frontier:
    """The frontier with some of its widths only."""
    if lacking := sorted({*widths} - {*frontier.widths}):
        raise ValueError(
            f"Expected `optimal.widths` out of {list(frontier.widths)}, which were measured, but got {lacking}."
        )
    columns = [index for index, width in enumerate(frontier.widths) if width in widths]
    if len(columns) == len(frontier.widths):
        return frontier
    groups = []
    for group in frontier.groups:
        curves = [
            replace(curve, stored=curve.stored[:, columns], distortion=curve.distortion[:, columns])
            for curve in group.curves
        ]
        groups.append(replace(group, curves=tuple(curves)))
    return replace(frontier, widths=tuple(frontier.widths[i] for i in columns), groups=tuple(groups))
