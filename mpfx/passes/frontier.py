"""The frontier of a traced model: what every unit of channels costs at every width, and harms."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from mpfx.allocate import (
    MOST_ROWS,
    Frontier,
    GroupFrontier,
    block_means,
    confined_order,
    fit_signals,
    is_free,
    raw_signals,
    unit_sums,
    with_curves,
)
from mpfx.graph import InputGroup, PermutationFold, traced_module
from mpfx.nn.layout import SEGMENT
from mpfx.passes.config import CompressionConfig
from mpfx.passes.locate import FOLD, annotations, naming_sites
from mpfx.solve import factor_diagonal, factorise, quadratic_form
from mpfx.stats import Moments

logger = logging.getLogger("mpfx.allocate")


def stacked_weight(model: nn.Module, group: InputGroup, device: torch.device, step: int = 1) -> Tensor:
    """The weights of all sites of a group one below the other, every so manieth row, ``(rows, in)`` float32."""
    parts, first = [], 0
    for site in group.sites:
        parts.append(site.weight(model).detach()[-first % step :: step].to(device).float())
        first += site.out_features
    return torch.cat(parts)


@dataclass(frozen=True)
class MeasuredGroup:
    """What allocation `optimal` knows of one input group.

    Attributes:
        frontier: of the group.
        signals: of its units, ``(units, signals)``; None: not asked for.
    """

    frontier: GroupFrontier
    signals: Tensor | None


def joined_frontier(measured: Sequence[MeasuredGroup], config: CompressionConfig) -> Frontier:
    """The frontier of the input groups that share one budget."""
    groups = tuple(group.frontier for group in measured)
    frontier = Frontier(config.widths, config.grid, groups, config.activation_order)
    if config.distortion == "measured":
        return frontier
    fit = fit_signals(frontier, [group.signals for group in measured if group.signals is not None])
    logger.info("the five signals explain %.1f%% of the logarithm of the distortions", 100 * fit.explained)
    return fit.frontier


def measure_group(
    gm: fx.GraphModule,
    group: InputGroup,
    fold: PermutationFold | None,
    config: CompressionConfig,
    moments: Moments,
) -> MeasuredGroup:
    """Measure the frontier of one input group.

    Args:
        gm: traced.
        group: to measure.
        fold: that was located for it, if any.
        config: widths, grid, sparsity.
        moments: of the dense model's input; the Hessian guided by the loss, or not.
    """
    empty = Frontier(config.widths, config.grid, (), config.activation_order)
    draft = _draft(group, fold, config, moments.hessian.diagonal())
    order = draft.order.to(moments.hessian.device)
    moments = moments.reordered(order)
    with naming_sites(group):
        diagonal, inverse = _factor(moments.hessian, config)
    # Summed over tokens, not averaged: so that groups compare that saw different numbers of tokens (experts).
    scale = (2 / moments.tokens) ** 0.5
    weight = stacked_weight(traced_module(gm), group, order.device)[:, order]
    if not config.power:  # without the loss, errors of different layers compare only relative to their outputs
        sample = weight[:: -(-len(weight) // MOST_ROWS)]
        output = quadratic_form(sample, moments.hessian) * (len(weight) / len(sample)) * (moments.tokens / 4)
        scale *= max(output, 1e-30) ** 0.5
    features = None
    if inverse is not None:
        signals = raw_signals(weight, moments, inverse * scale**2)
        features = unit_sums(torch.stack(list(signals.values())), draft.unit).t().cpu() / draft.sizes[:, None]
    return MeasuredGroup(with_curves(draft, empty, config.patterns, (weight, diagonal * scale)), features)


def _factor(hessian: Tensor, config: CompressionConfig) -> tuple[Tensor, Tensor | None]:
    """The diagonal of U, and that of the inverse Hessian where signals are asked for."""
    if config.distortion == "measured":
        return factor_diagonal(hessian, config.damping), None
    factor = factorise(hessian, config.damping)
    return factor.upper.diagonal(), factor.inverse_diagonal


def unmeasured_frontier(gm: fx.GraphModule, groups: Sequence[InputGroup], config: CompressionConfig) -> Frontier:
    """The frontier with made-up distortions: sizes, limits and ties can be checked before anything is measured."""
    empty = Frontier(config.widths, config.grid, (), config.activation_order)
    folds = located_folds(gm, config)
    drafts = [_draft(g, folds.get(g.name), config, torch.zeros(g.sites[0].in_features)) for g in groups]
    return replace(empty, groups=tuple(with_curves(draft, empty, config.patterns, None) for draft in drafts))


def located_folds(gm: fx.GraphModule, config: CompressionConfig) -> dict[str, PermutationFold]:
    """The folds that a config makes use of, by name of the input group."""
    return annotations(gm, FOLD) if config.fold_permutations else {}


def _draft(
    group: InputGroup, located: PermutationFold | None, config: CompressionConfig, score: Tensor
) -> GroupFrontier:
    fold, free = _usable(located, config)
    return GroupFrontier(
        name=group.name,
        rows={site.path: site.out_features for site in group.sites},
        order=_order(score, config, fold, free).cpu(),
        unit=config.grid.group_size or 2 * SEGMENT,
        free=free,
        fold=fold,
        curves=(),
    )


def _usable(fold: PermutationFold | None, config: CompressionConfig) -> tuple[PermutationFold | None, bool]:
    """How a group's channels can be reordered without a gather, and whether in any order."""
    if fold is not None and not is_free(fold) and config.grid.group_size is None:
        fold = None  # row scales: one for every stretch of equal width, so these have to be long
    return fold, fold is None or is_free(fold)


def _order(score: Tensor, config: CompressionConfig, fold: PermutationFold | None, free: bool) -> Tensor:
    """Channels in the order in which units are cut: by activation, those that n:m masks compare together."""
    if config.pattern.group_m:
        score = block_means(score.cpu(), config.pattern.group_m).to(score.device)
    if fold is None or free:
        return score.argsort(descending=True, stable=True)
    if config.pattern.group_m:
        return torch.arange(len(score), device=score.device)
    return confined_order(fold, score)
