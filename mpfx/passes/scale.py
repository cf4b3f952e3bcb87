"""Scale channels before they are rounded, where the graph allows to divide the scale out again for free."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from mpfx.allocate import SAMPLE, ChannelScales, GroupPlan, search_scales
from mpfx.graph import InputGroup, ScaleFold, rescale, scale_folds, traced_module
from mpfx.passes.allocate import PLAN
from mpfx.passes.base import Pass, PassResult
from mpfx.passes.frontier import stacked_weight
from mpfx.passes.locate import annotations, located
from mpfx.passes.ranks import ALONE, Ranks
from mpfx.stats import ChannelMoments

logger = logging.getLogger("mpfx.scale")


@dataclass(frozen=True)
class FoldScales(Pass):
    """Multiply weight columns by a power of the size of their activations, and divide it out of what makes these.

    For every planned input group whose input comes from a norm's weight or from rows of one other site, the power is
    searched that lowers the error of rounding to the planned widths (:func:`mpfx.allocate.search_scales`). The dense
    weights are changed in place.

    Args:
        moments: of the dense model's inputs, by name of the input group. Of several processes, each searches for the
            groups whose moments it has.
        ranks: the processes; all scale alike.
    """

    preserves_function = True

    moments: Mapping[str, ChannelMoments]
    ranks: Ranks = ALONE

    def requires(self, gm: fx.GraphModule) -> None:
        """Groups are planned and observed."""
        known = self.ranks.joined(lambda: dict.fromkeys(self.moments))
        if lacking := [name for name in annotations(gm, PLAN) if name not in known]:
            raise ValueError(f"Expected statistics of every input group but those of {lacking[:5]} are missing.")
        if not annotations(gm, PLAN):
            raise ValueError("Expected planned sites: run Allocate before.")

    @torch.no_grad()
    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Search and fold."""
        scalable = list(_scalable(gm))
        found = self.ranks.joined(lambda: dict(self._searched(gm, scalable)))
        before = _Saved(traced_module(gm))
        try:
            for group, fold, _ in scalable:
                if group.name in found and found[group.name].exponent > 0:
                    before.add(fold)
                    rescale(before.model, fold, found[group.name].scales.cpu())
        except BaseException:
            before.put_back()
            raise
        return PassResult(gm, modified=True, undo=before.put_back)

    def _searched(
        self, gm: fx.GraphModule, scalable: Iterable[tuple[InputGroup, ScaleFold, Tensor]]
    ) -> Iterator[tuple[str, ChannelScales]]:
        """The scales of groups whose moments are here; those of one change no weight that another's follow from."""
        model, plans = traced_module(gm), annotations(gm, PLAN)
        for group, fold, unit in scalable:
            half = any(p.dtype.itemsize < 4 for p in _parameters(model, fold))
            if half and fold.kind == "norm_plus_one":  # even a power of two changes what 1 + w rounds to
                continue
            if group.name in self.moments:
                moments = self.moments[group.name]
                step = -(-sum(site.out_features for site in group.sites) // SAMPLE)
                weight = stacked_weight(model, group, moments.power.device, step)
                found = search(weight, moments, unit, plans[group.name], powers_of_two=half)
                logger.debug("%s: exponent %g, error x %.3f", group.name, found.exponent, found.gain)
                yield group.name, found


def search(
    weight: Tensor, moments: ChannelMoments, unit: Tensor, plan: GroupPlan, *, powers_of_two: bool = False
) -> ChannelScales:
    """Search the scales of one input group for the widths and the order of its plan."""
    order = plan.order(moments.power)
    if order is None:
        order = torch.arange(weight.shape[1], device=weight.device)
    unit, moments = unit.to(order.device)[order], moments.reordered(order)
    return search_scales(weight[:, order], moments, unit, plan.layout, plan.grid, powers_of_two=powers_of_two)


def _scalable(gm: fx.GraphModule) -> Iterator[tuple[InputGroup, ScaleFold, Tensor]]:
    """Input groups with the fold that scales their whole input, and the unit of every channel."""
    folds: dict[str, list[ScaleFold]] = defaultdict(list)  # by what reads them, in graph order
    for fold in scale_folds(gm):
        for path in dict.fromkeys(path for path, _ in fold.consumers):
            folds[path].append(fold)
    for group in located(gm):
        paths = {site.path for site in group.sites}
        for fold in folds[group.sites[0].path]:
            units = [unit for path, unit in fold.consumers if path in paths]
            if len(units) == len(paths) and all(torch.equal(unit, units[0]) for unit in units) and units[0].min() >= 0:
                yield group, fold, units[0]
                break


def _parameters(model: nn.Module, fold: ScaleFold) -> Iterator[nn.Parameter]:
    for path in (fold.producer, *(path for path, _ in fold.consumers)):
        yield from model.get_submodule(path).parameters()


class _Saved:
    """Parameters as they were; on the host, as they are nearly the whole model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def add(self, fold: ScaleFold) -> None:
        for parameter in _parameters(self.model, fold):
            if id(parameter) not in self.values:
                self.values[id(parameter)] = (parameter, parameter.detach().to("cpu", copy=True))

    def put_back(self) -> None:
        with torch.no_grad():
            for parameter, value in self.values.values():
                parameter.copy_(value)
