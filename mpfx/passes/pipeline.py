"""From a calibrated graph to a compressed one: the order of the passes."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mpfx.graph import first_samples
from mpfx.passes.allocate import Allocate
from mpfx.passes.base import Pass, run_passes
from mpfx.passes.config import CompressionConfig
from mpfx.passes.observe import Sensed, dense_moments, tokens_of
from mpfx.passes.pack import FoldPermutations, Pack
from mpfx.passes.running import Runner
from mpfx.passes.scale import FoldScales
from mpfx.passes.solve import PruneAndQuantize, SolveConfig, SolvedGroup, solved_groups
from mpfx.stats import ChannelMoments, Moments, Sensitivity

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
        calls: inputs of every call, one dict a batch, on the host.
        sensed: how the loss feels the sites' outputs.
        moments: of the dense model's inputs, by name of the input group, on the host: kept where several configs make
            use of them. Else they are observed when they are asked for, and none is kept.
        guided: the same with Hessians weighted by the sensitivity of the loss.
    """

    graph_module: fx.GraphModule
    calls: list[dict[str, Any]]
    sensed: Sensed = field(default_factory=Sensed)
    moments: dict[str, Moments] = field(default_factory=dict)
    guided: dict[str, Moments] = field(default_factory=dict)

    @property
    def sensitivities(self) -> Mapping[str, Sensitivity]:
        """Of the loss, by name of the input group."""
        return self.sensed.sensitivities

    def keep(self, configs: Sequence[CompressionConfig], runner: Runner) -> None:
        """Observe now, and keep on the host, what several configs need."""
        measured = [config for config in configs if config.measured]
        for kept, guided in ((self.moments, False), (self.guided, True)):
            if any(bool(config.power) == guided for config in measured):
                for name, moments in self._observed(guided, runner, tokens=configs[0].allocation_tokens):
                    kept[name] = moments.to(torch.device("cpu"))

    def statistics(self, config: CompressionConfig, runner: Runner) -> Iterator[tuple[str, Moments]]:
        """The moments that a config allocates by, one input group after the other."""
        kept = self.guided if config.power else self.moments
        if not kept:
            guided, tokens = bool(config.power), config.allocation_tokens
            needs = {"channels": config.looks_at_channels, "products": config.looks_at_products or guided}
            yield from self._observed(guided, runner, tokens=tokens, **needs)
        for name, moments in kept.items():
            yield name, moments if runner.device is None else moments.to(runner.device)

    def _observed(
        self, guided: bool, runner: Runner, *, tokens: int | None, channels: bool = True, products: bool = True
    ) -> Iterator[tuple[str, Moments]]:
        chosen = _spread([tokens_of(call) for call in self.calls], tokens)
        sensed = self.sensed.of(chosen) if guided else None
        calls = [self.calls[i] for i in chosen]
        return dense_moments(self.graph_module, calls, runner, sensed, channels=channels, products=products)


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


def _spread(counts: Sequence[int], least: int | None) -> list[int]:
    """Numbers of batches, evenly spread, that hold at least so many tokens; all if there are no more than that."""
    if least is None or sum(counts) <= least:
        return list(range(len(counts)))
    number = next(k for k in range(1, len(counts) + 1) if sum(counts[i] for i in _every(len(counts), k)) >= least)
    return _every(len(counts), number)


def _every(count: int, number: int) -> list[int]:
    return [index * count // number for index in range(number)]


@torch.no_grad()
def compress_calibrated(
    calibration: Calibration,
    config: CompressionConfig,
    *,
    runner: Runner,
    on_block: Callable[[str, float], None] = lambda name, share: None,
    way_back: ExitStack | None = None,
) -> Compressed:
    """Allocate, scale, solve, pack and fold.

    Args:
        calibration: with the statistics that the config asks for.
        config: what to do.
        runner: where blocks run and groups are solved, and how.
        on_block: see :class:`PruneAndQuantize`.
        way_back: if given, closing it later makes the model dense again, and the calibration can be used once more.

    Raises:
        PassError: naming the pass that failed; the model is dense then.
    """
    solve = PruneAndQuantize(
        calibration.calls,
        SolveConfig(damping=config.damping, guidance=config.power, correction=config.corrected, refine=config.refine),
        calibration.sensitivities,
        strict=config.strict,
        runner=runner,
        on_block=on_block,
    )
    sample = runner.fetched(first_samples(calibration.graph_module, calibration.calls[0]))
    seconds: dict[str, float] = {}
    with closing(_steps(calibration, config, solve, runner, seconds)) as steps:  # no hook is left if one fails
        gm = run_passes(calibration.graph_module, steps, [sample], seconds=seconds, run=runner.whole, way_back=way_back)
    seconds["Allocate"] -= seconds.get("observe", 0.0)
    return Compressed(gm, solved_groups(gm), {_STAGES.get(name, name): value for name, value in seconds.items()})


def _steps(
    calibration: Calibration, config: CompressionConfig, solve: Pass, runner: Runner, seconds: dict[str, float]
) -> Generator[Pass]:
    channels: dict[str, ChannelMoments] = {}

    def noted() -> Generator[tuple[str, Moments]]:
        started = time.perf_counter()
        for name, moments in calibration.statistics(config, runner) if config.measured else ():
            channels[name] = moments.channels
            seconds["observe"] = seconds.get("observe", 0.0) + time.perf_counter() - started
            yield name, moments
            started = time.perf_counter()

    with closing(noted()) as stream:
        yield Allocate(config, stream)
    if config.scaled:
        yield FoldScales(channels)
    yield solve
    yield Pack()
    yield FoldPermutations(runner.device)
