"""The frontier of a traced model: what every unit of channels costs at every width, and harms."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from mpfx.allocate import (
    Frontier,
    GroupFrontier,
    block_means,
    confined_order,
    fit_signals,
    is_free,
    raw_signals,
    with_curves,
)
from mpfx.graph import InputGroup, PermutationFold, traced_module
from mpfx.nn.layout import SEGMENT
from mpfx.passes.config import CompressionConfig
from mpfx.passes.locate import FOLD, annotations, naming_sites
from mpfx.passes.ranks import ALONE, Ranks
from mpfx.solve import factorise
from mpfx.stats import Moments

logger = logging.getLogger("mpfx.allocate")


def stacked_weight(model: nn.Module, group: InputGroup) -> Tensor:
    """The weights of all sites of a group one below the other, ``(rows, in)`` float32."""
    return torch.cat([site.weight(model).detach().float() for site in group.sites])


def measured_frontier(
    gm: fx.GraphModule,
    groups: Sequence[InputGroup],
    config: CompressionConfig,
    moments: Mapping[str, Moments],
    ranks: Ranks = ALONE,
) -> Frontier:
    """Measure the frontier of some input groups.

    Args:
        gm: traced, with folds located.
        groups: that share one budget.
        config: widths, grid, sparsity.
        moments: of the dense model's inputs by name of the group; Hessians guided by the loss, or not. Of several
            processes, each measures the groups whose moments it has.
        ranks: the processes.
    """
    empty = Frontier(config.widths, config.grid, (), config.activation_order)

    def measure() -> dict[str, tuple[GroupFrontier, Tensor]]:
        own = [group for group in groups if group.name in moments]
        drafts = _drafts(gm, own, config, lambda group: moments[group.name].hessian.diagonal())
        pairs = zip(own, drafts, strict=True)
        return {group.name: _measured(gm, group, draft, config, moments[group.name], empty) for group, draft in pairs}

    measured = ranks.joined(measure)
    found, features = zip(*(measured[group.name] for group in groups), strict=True)
    frontier = replace(empty, groups=found)
    if config.distortion == "measured":
        return frontier
    fit = fit_signals(frontier, features)
    logger.info("the five signals explain %.1f%% of the logarithm of the distortions", 100 * fit.explained)
    return fit.frontier


def _measured(
    gm: fx.GraphModule,
    group: InputGroup,
    draft: GroupFrontier,
    config: CompressionConfig,
    moments: Moments,
    empty: Frontier,
) -> tuple[GroupFrontier, Tensor]:
    """The frontier of one group, and the signals of its units ``(units, signals)``."""
    order = draft.order.to(moments.hessian.device)
    moments = moments.reordered(order)
    with naming_sites(group):
        factor = factorise(moments.hessian, config.damping)
    # Summed over tokens, not averaged: so that groups compare that saw different numbers of tokens (experts).
    scale = (2 / moments.tokens) ** 0.5
    weight = stacked_weight(traced_module(gm), group)[:, order]
    if not config.power:  # without the loss, errors of different layers compare only relative to their outputs
        output = ((weight @ moments.hessian) * weight).sum(dtype=torch.float64) * (moments.tokens / 4)
        scale *= float(output.clamp(min=1e-30).sqrt())
    signals = raw_signals(weight, moments, factor.inverse_diagonal * scale**2)
    features = torch.stack([torch.stack([p.mean() for p in s.split(draft.unit)]) for s in signals.values()], 1)
    return with_curves(draft, empty, config.patterns, (weight, factor.upper.diagonal() * scale)), features


def unmeasured_frontier(gm: fx.GraphModule, groups: Sequence[InputGroup], config: CompressionConfig) -> Frontier:
    """The frontier with made-up distortions: sizes, limits and ties can be checked before anything is measured."""
    empty = Frontier(config.widths, config.grid, (), config.activation_order)
    drafts = _drafts(gm, groups, config, lambda group: torch.zeros(group.sites[0].in_features))
    return replace(empty, groups=tuple(with_curves(draft, empty, config.patterns, None) for draft in drafts))


def _drafts(
    gm: fx.GraphModule, groups: Sequence[InputGroup], config: CompressionConfig, score: Callable[[InputGroup], Tensor]
) -> Iterator[GroupFrontier]:
    folds = annotations(gm, FOLD) if config.fold_permutations else {}
    return (_draft(group, folds.get(group.name), config, score(group)) for group in groups)


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
