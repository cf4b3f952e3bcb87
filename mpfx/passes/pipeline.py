"""From a calibrated graph to a compressed one: the order of the passes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpfx.graph import first_samples
from mpfx.passes.allocate import Allocate
from mpfx.passes.base import Pass, run_passes
from mpfx.passes.config import CompressionConfig
from mpfx.passes.pack import FoldPermutations, Pack
from mpfx.passes.ranks import ALONE, Ranks
from mpfx.passes.scale import FoldScales
from mpfx.passes.solve import PruneAndQuantize, SolveConfig, SolvedGroup, solved_groups
from mpfx.stats import Moments, Sensitivity

_STAGES = {
    "FoldScales": "scale",
    "Allocate": "allocate",
    "PruneAndQuantize": "solve",
    "Pack": "pack",
    "FoldPermutations": "fold",
}
"""Names of the passes' times in reports."""


@dataclass(frozen=True)
class Calibration:
    """What one loop over calibration data left.

    Attributes:
        graph_module: traced and analysed.
        calls: inputs of every call, one dict a batch, on the host; those of this process.
        moments: of the dense model's inputs in all calls, by name of the input group; of several processes, each has
            those of some groups.
        guided: the same with Hessians weighted by the sensitivity of the loss.
        sensitivities: of the loss, of all groups, in this process's calls.
        ranks: the processes that share the calls.
    """

    graph_module: fx.GraphModule
    calls: list[dict[str, Any]]
    moments: dict[str, Moments] = field(default_factory=dict)
    guided: dict[str, Moments] = field(default_factory=dict)
    sensitivities: dict[str, Sensitivity] = field(default_factory=dict)
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Compressed:
    """What came out.

    Attributes:
        graph_module: with packed modules, which the user's own model has too.
        solved: every input group, in graph order.
        seconds: by stage.
    """

    graph_module: fx.GraphModule
    solved: tuple[SolvedGroup, ...]
    seconds: dict[str, float]


@torch.no_grad()
def compress_calibrated(
    calibration: Calibration,
    config: CompressionConfig,
    *,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    on_block: Callable[[str, float], None] = lambda name, share: None,
    way_back: ExitStack | None = None,
) -> Compressed:
    """Allocate, scale, solve, pack and fold.

    Args:
        calibration: with the statistics that the config asks for.
        config: what to do.
        device: where blocks run and groups are solved.
        context: entered around every run of the model (precision plugins).
        on_block: see :class:`PruneAndQuantize`.
        way_back: if given, closing it later makes the model dense again, and the calibration can be used once more;
            else statistics are dropped as soon as they are not needed any more.

    Raises:
        PassError: naming the pass that failed; the model is dense then.
        RankError: if another process failed; likewise.
    """
    solve = PruneAndQuantize(
        calibration.calls,
        SolveConfig(damping=config.damping, guidance=config.power, correction=config.corrected, refine=config.refine),
        calibration.sensitivities,
        strict=config.strict,
        device=device,
        context=context,
        on_block=on_block,
        ranks=calibration.ranks,
    )
    sample = first_samples(calibration.graph_module, calibration.calls[0])
    sample = pytree.tree_map_only(Tensor, lambda t: t.to(device), sample)
    seconds: dict[str, float] = {}
    steps = _steps(calibration, config, solve, keep=way_back is not None)
    with ExitStack() as undo:
        with calibration.ranks.together():
            gm = run_passes(calibration.graph_module, steps, [sample], seconds=seconds, context=context, way_back=undo)
        kept = undo.pop_all()
    if way_back is not None:
        way_back.callback(kept.close)
    return Compressed(gm, solved_groups(gm), {_STAGES.get(name, name): value for name, value in seconds.items()})


def _steps(calibration: Calibration, config: CompressionConfig, solve: Pass, keep: bool) -> Iterator[Pass]:
    moments = calibration.guided if config.power else calibration.moments
    yield Allocate(config, moments, calibration.ranks)
    if config.scaled:
        yield FoldScales(moments, calibration.ranks)
    if not keep:  # the dense model's Hessians are large, and solving makes its own, block by block
        calibration.moments.clear()
        calibration.guided.clear()
    yield solve
    yield Pack()
    yield FoldPermutations()
