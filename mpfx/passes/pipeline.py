"""From a calibrated graph to a compressed one: the order of the passes."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from mpfx.graph import first_samples
from mpfx.passes.allocate import Allocate
from mpfx.passes.base import Pass, run_passes
from mpfx.passes.config import CompressionConfig
from mpfx.passes.observe import Sensed, dense_moments, tokens_of
from mpfx.passes.pack import FoldPermutations, Pack
from mpfx.passes.ranks import ALONE, Ranks
from mpfx.passes.running import Runner
from mpfx.passes.scale import FoldScales
from mpfx.passes.solve import PruneAndQuantize, SolveConfig, SolvedGroup, solved_groups
from mpfx.solve import prepare
from mpfx.stats import ALL_SUMS, ChannelMoments, Moments, Sensitivity, Sums

_STAGES = {
    "FoldScales": "scale",
    "Allocate": "allocate",
    "PruneAndQuantize": "solve",
    "Pack": "pack",
    "FoldPermutations": "fold",
}
"""Names of the passes' times in reports."""

_PROCESSES = (2, 3, 4, 8)
"""Numbers of processes among which chosen batches go round."""


@dataclass(frozen=True)
class Calibration:
    """What one loop over calibration data left.

    Attributes:
        graph_module: traced and analysed.
        calls: inputs of every call, one dict a batch, on the host; those of this process.
        sensed: how the loss feels the sites' outputs, in these calls.
        moments: of the dense model's inputs in the calls of all processes, by name of the input group, on the host; of
            several processes, each has those of some groups. None: they are observed when they are asked for, and none
            is kept.
        guided: the same with Hessians weighted by the sensitivity of the loss.
        ranks: the processes that share the calls.
    """

    graph_module: fx.GraphModule
    calls: list[dict[str, Any]]
    sensed: Sensed = field(default_factory=Sensed)
    moments: Mapping[str, Moments] | None = None
    guided: Mapping[str, Moments] | None = None
    ranks: Ranks = ALONE

    @property
    def sensitivities(self) -> Mapping[str, Sensitivity]:
        """Of the loss, by name of the input group."""
        return self.sensed.sensitivities

    def keeping(self, configs: Sequence[CompressionConfig], runner: Runner) -> "Calibration":
        """The same, with moments observed now and kept, as several configs make use of them.

        Raises:
            RankError: if another process failed.
        """
        tokens = configs[0].allocation_tokens
        wanted = {bool(config.power) for config in configs if config.measured}
        with self.ranks.together():
            moments, guided = (
                self._kept(which, runner, tokens) if which in wanted else None for which in (False, True)
            )
        return replace(self, moments=moments, guided=guided)

    def statistics(self, config: CompressionConfig, runner: Runner) -> Iterator[tuple[str, Moments]]:
        """The moments that a config allocates by, one input group after the other; all processes ask for all."""
        kept = self.guided if config.power else self.moments
        if kept is None:
            guided = bool(config.power)
            taken = Sums(config.looks_at_channels, config.looks_at_products or guided)
            yield from self._observed(guided, runner, config.allocation_tokens, taken)
            return
        for name, moments in kept.items():
            yield name, moments if runner.device is None else moments.to(runner.device)

    def _kept(self, guided: bool, runner: Runner, tokens: int | None) -> dict[str, Moments]:
        return {name: moments.to(torch.device("cpu")) for name, moments in self._observed(guided, runner, tokens)}

    def _observed(
        self, guided: bool, runner: Runner, tokens: int | None, taken: Sums = ALL_SUMS
    ) -> Iterator[tuple[str, Moments]]:
        chosen, share = self._chosen(tokens)
        calls = [self.calls[index] for index in chosen]
        sensed = self.sensed.of(chosen, share) if guided else None
        return dense_moments(self.graph_module, calls, runner, sensed, self.ranks, taken)

    def _chosen(self, tokens: int | None) -> tuple[list[int], float]:
        """Numbers of this process's calls that hold, with those of the others, so many tokens; and their share of all.

        Calls count in the order in which they are dealt out (:class:`mpfx.lm.EachOnce`), as in a single process.
        """
        counts = self.ranks.gathered(lambda: [tokens_of(call) for call in self.calls])
        dealt = sorted((index, rank) for rank, own in enumerate(counts) for index in range(len(own)))
        chosen = _spread([counts[rank][index] for index, rank in dealt], tokens)
        own = [index for index, rank in (dealt[number] for number in chosen) if rank == self.ranks.rank]
        return own, len(chosen) / len(dealt)


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
    enough = range(-(-least // max(counts)), len(counts) + 1)
    tried = (_every(len(counts), number) for number in enough)
    return next(chosen for chosen in tried if sum(counts[i] for i in chosen) >= least)


def _every(count: int, number: int) -> list[int]:
    """Some of many numbers, one of every stretch, such that each of several processes has as many.

    Batches are dealt out in turn: every fourth one would be the first process's alone, of two as of four. How many
    processes there are must not matter to the choice.
    """
    chosen, loads = list[int](), {processes: [0] * processes for processes in _PROCESSES}
    for index in range(number):
        stretch = range(index * count // number, (index + 1) * count // number)
        chosen.append(min(stretch, key=lambda n: sum(size * load[n % size] for size, load in loads.items())))
        for size, load in loads.items():
            load[chosen[-1] % size] += 1
    return chosen


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
        RankError: if another process failed; likewise.
    """
    solve = PruneAndQuantize(
        calibration.calls,
        SolveConfig(damping=config.damping, guidance=config.power, correction=config.corrected, refine=config.refine),
        calibration.sensitivities,
        strict=config.strict,
        runner=runner,
        on_block=on_block,
        ranks=calibration.ranks,
    )
    sample = runner.fetched(first_samples(calibration.graph_module, calibration.calls[0]))
    seconds: dict[str, float] = {}
    with ExitStack() as undo:
        # No hook is left if a pass fails.
        with (
            calibration.ranks.together(),
            _prepared(config, runner) as wait_for_kernels,
            closing(_steps(calibration, config, solve, runner, seconds, wait_for_kernels)) as steps,
        ):
            gm = run_passes(calibration.graph_module, steps, [sample], seconds=seconds, run=runner.whole, way_back=undo)
        kept = undo.pop_all()
    if way_back is not None:
        way_back.callback(kept.close)
    seconds["Allocate"] -= seconds.get("observe", 0.0)
    return Compressed(gm, solved_groups(gm), {_STAGES.get(name, name): value for name, value in seconds.items()})


@contextmanager
def _prepared(config: CompressionConfig, runner: Runner) -> Iterator[Callable[[], Any]]:
    """Kernels that solving needs are compiled meanwhile; gives what waits for that."""
    device = torch.device("cpu") if runner.device is None else runner.device
    with ThreadPoolExecutor(1) as background:
        patterns = [(pattern, bool(pattern) and config.refine > 0) for pattern in config.patterns]
        compiling = [background.submit(prepare, config.grid, *pattern, device) for pattern in patterns]
        yield lambda: wait(compiling)


def _steps(
    calibration: Calibration,
    config: CompressionConfig,
    solve: Pass,
    runner: Runner,
    seconds: dict[str, float],
    wait_for_kernels: Callable[[], Any],
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
        yield Allocate(config, stream, calibration.ranks)
    if config.scaled:
        yield FoldScales(channels, calibration.ranks)
    wait_for_kernels()
    yield solve
    yield Pack()
    yield FoldPermutations(runner.device)
