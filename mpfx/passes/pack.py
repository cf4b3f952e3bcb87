"""Install packed modules in the user's own model, and get rid of the gathers that reordering rows makes needless."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from mpfx.graph import ExpertStack, PermutationFold, linear_weight, row_order, sites, traced_module
from mpfx.nn import MixedPrecisionLinear, PackedExperts, PackedStack, PackedWeight, join_input_groups, reordered_rows
from mpfx.passes.base import Pass, PassResult
from mpfx.passes.locate import annotate, annotations, located
from mpfx.passes.solve import SOLVED, SolvedGroup


@dataclass(frozen=True)
class Pack(Pass):
    """Put a :class:`mpfx.nn.MixedPrecisionLinear` in the place of every solved linear layer.

    Experts become a :class:`mpfx.nn.PackedExperts` around the code of their module. All modules are made before the
    first one is installed, so a failure leaves the model as it was.
    """

    def requires(self, gm: fx.GraphModule) -> None:
        """Something is solved."""
        if not annotations(gm, SOLVED):
            raise ValueError("Expected solved sites: run PruneAndQuantize before.")

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Replace."""
        solved = {path: group for group in annotations(gm, SOLVED).values() for path in group.weights}
        modules = {**packed_linears(gm, solved), **packed_experts(gm, solved)}
        return PassResult(gm, modified=True, undo=installed(traced_module(gm), modules))

    def ensures(self, gm: fx.GraphModule) -> None:
        """Every solved site runs packed."""
        model, solved = traced_module(gm), {p for g in annotations(gm, SOLVED).values() for p in g.weights}
        for site in sites(gm):
            packed = isinstance(model.get_submodule(site.module), MixedPrecisionLinear | PackedExperts)
            if site.path in solved and not packed:
                raise ValueError(f"site {site.path} was solved but is not packed.")


@dataclass(frozen=True)
class FoldPermutations(Pass):
    """Reorder the rows that make an input instead of gathering the input, wherever the plan says so.

    An input's new channel order is the order of rows in the sites that make it: up and gate for down, v for o inside
    the heads. What is left to gather at run time is what comes out of norms.

    Args:
        device: where rows are reordered; None: where they are.
    """

    preserves_function = True

    device: torch.device | None = None

    def requires(self, gm: fx.GraphModule) -> None:
        """Packed modules are installed."""
        if not annotations(gm, SOLVED):
            raise ValueError("Expected packed sites: run PruneAndQuantize and Pack before.")
        Pack().ensures(gm)

    @torch.no_grad()
    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Replace modules by such with reordered rows, and without permutation."""
        model, groups = traced_module(gm), annotations(gm, SOLVED)
        folded = {n: g for n, g in groups.items() if g.plan.fold is not None and g.permutation is not None}
        rows = _row_orders(folded.values())
        dropped = {path for group in folded.values() for path in group.weights}
        modules = {}
        for path in dict.fromkeys([*rows, *dropped]):
            modules[path] = _reordered(model.get_submodule(path), rows.get(path), path in dropped, self.device)
        packed = {path: m.packed for path, m in modules.items() if isinstance(m, MixedPrecisionLinear)}
        after = {n: _with_weights(g, packed, drop=n in folded) for n, g in groups.items()}
        annotate(gm, SOLVED, [(group.sites[0], group.name, after[group.name]) for group in located(gm)])
        return PassResult(gm, modified=True, undo=installed(model, modules))

    def ensures(self, gm: fx.GraphModule) -> None:
        """No folded group is gathered any more."""
        for solved in annotations(gm, SOLVED).values():
            if solved.plan.fold is not None and solved.permutation is not None:
                raise ValueError(f"group {solved.plan.name} still has a permutation.")


def packed_linears(gm: fx.GraphModule, solved: Mapping[str, SolvedGroup]) -> dict[str, nn.Module]:
    """Build the modules of all solved linear layers, by path; those of one group share the permutation."""
    modules: dict[str, nn.Module] = {}
    for path in (site.path for site in sites(gm) if site.stack is None and site.path in solved):
        layer, group = gm.get_submodule(path), solved[path]
        dense = layer.get_parameter("weight")
        bias = getattr(layer, "bias", None)
        packed = MixedPrecisionLinear(group.weights[path], permutation=group.permutation, bias=bias, dtype=dense.dtype)
        modules[path] = packed.to(dense.device).train(layer.training)
    return modules


def packed_experts(gm: fx.GraphModule, solved: Mapping[str, SolvedGroup]) -> dict[str, nn.Module]:
    """Build the packed experts of all modules that hold solved ones, by path."""
    model = traced_module(gm)
    stacks: dict[str, dict[str, PackedStack]] = defaultdict(dict)
    for stack, members in _solved_stacks(gm, solved):
        groups = [solved[path] for path in members]
        weights = [group.weights[path] for group, path in zip(groups, members, strict=True)]
        dense = model.get_submodule(stack.module).get_parameter(stack.parameter)
        orders = [group.permutation for group in groups if group.permutation is not None]
        packed = PackedStack(weights, permutation=orders or None, transposed=stack.transposed, dtype=dense.dtype)
        stacks[stack.module][stack.parameter] = packed.to(dense.device)
    return {path: PackedExperts(model.get_submodule(path), parts) for path, parts in stacks.items()}


def _solved_stacks(gm: fx.GraphModule, solved: Mapping[str, SolvedGroup]) -> Iterator[tuple[ExpertStack, list[str]]]:
    members: dict[ExpertStack, list[str]] = defaultdict(list)
    for site in sites(gm):
        if site.stack is not None and site.path in solved:
            members[site.stack].append(site.path)
    return iter(members.items())


def installed(model: nn.Module, modules: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Put modules in their places; returns what puts the old ones back."""
    before = {path: model.get_submodule(path) for path in modules}

    def undo() -> None:
        for path, module in before.items():
            model.set_submodule(path, module)
        join_input_groups(model)

    try:
        for path, module in modules.items():
            model.set_submodule(path, module)
    except BaseException:
        undo()
        raise
    join_input_groups(model)
    return undo


def _row_orders(folded: Iterable[SolvedGroup]) -> dict[str, Tensor]:
    """The new order of the rows of every producer, by path."""
    rows: dict[str, Tensor] = {}
    for group in folded:
        assert group.plan.fold is not None
        assert group.permutation is not None
        units = _unit_order(group.plan.fold, group.permutation.long().cpu())
        for path, order in row_order(group.plan.fold, units).items():
            rows[path] = order if path not in rows else rows[path][order]
    return rows


def _unit_order(fold: PermutationFold, channels: Tensor) -> Tensor:
    """Which unit takes the place of each: new channel j is old channel ``channels[j]``."""
    order = torch.empty_like(fold.cell)
    order[fold.unit] = fold.unit[channels]
    if not torch.equal(order[fold.unit], fold.unit[channels]):
        raise ValueError("the sweep order moves the channels of one unit apart, so it cannot be folded.")
    return order


def _reordered(module: nn.Module, rows: Tensor | None, drop: bool, device: torch.device | None) -> nn.Module:
    """A copy of a linear layer with its rows in another order, and without permutation if that is dropped."""
    bias = getattr(module, "bias", None)
    if rows is not None and bias is not None:
        bias = nn.Parameter(bias.detach()[rows.to(bias.device)], requires_grad=bias.requires_grad)
    if isinstance(module, MixedPrecisionLinear):
        weight, home = module.packed, module.packed.codes.device
        if rows is not None:
            weight = reordered_rows(weight.to(home if device is None else device), rows).to(home)
        order = None if drop else module.permutation
        packed = MixedPrecisionLinear(weight, permutation=order, bias=bias, dtype=module.weight_dtype)
        return packed.train(module.training)
    assert rows is not None  # a site that stays dense
    dense = copy.copy(module)
    dense._parameters = {**module._parameters, "weight": nn.Parameter(module.get_parameter("weight").detach().clone())}
    if bias is not None:
        dense._parameters["bias"] = bias
    linear_weight(dense).copy_(linear_weight(module)[rows.to(linear_weight(module).device)])
    return dense


def _with_weights(group: SolvedGroup, packed: Mapping[str, PackedWeight], drop: bool) -> SolvedGroup:
    """What is known of a group, after its sites' rows were reordered and its permutation dropped."""
    weights = {path: packed.get(path, weight) for path, weight in group.weights.items()}
    return replace(group, weights=weights, permutation=None if drop else group.permutation)
