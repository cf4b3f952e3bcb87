"""What a pass is, and the loop that runs passes."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of two equivalent outputs, relative to the largest value, by dtype: tens of layers of rounding."""


_CHUNK = 1 << 20  # values compared at a time, as outputs are large


@dataclass(frozen=True)
class PassResult:
    """What a pass hands on.

    Attributes:
        graph_module: the module to go on with, the one given or a new one.
        modified: whether graph, modules or weights were changed; False for passes that only annotate.
        undo: puts back what the pass changed; called if something fails after it. None: there is nothing to put back.
            A pass that raises has to put back by itself what it has changed so far.
    """

    graph_module: fx.GraphModule
    modified: bool
    undo: Callable[[], None] | None = None


@dataclass(frozen=True)
class Pass(ABC):
    """One step on a graph: analysis passes write ``node.meta``, rewriting passes read it.

    Subclasses are frozen dataclasses; their fields are their settings.

    Attributes:
        preserves_function: whether the model has to compute the same before and after. Then `run_passes` compares
            the outputs, if it has inputs to do so on.
    """

    preserves_function: ClassVar[bool] = False

    def requires(self, gm: fx.GraphModule) -> None:  # noqa: B027  (most passes need nothing)
        """Raise if ``gm`` lacks what the pass needs; called before anything is touched."""

    @abstractmethod
    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Do the work. A pass that raises here leaves everything as it was."""

    def ensures(self, gm: fx.GraphModule) -> None:  # noqa: B027
        """Raise if the module that the pass returned is not what it promises."""


class PassError(RuntimeError):
    """A pass failed; the message names it and those that had run before it."""


def run_passes(
    gm: fx.GraphModule,
    passes: Iterable[Pass],
    inputs: Sequence[Mapping[str, Any]] = (),
    *,
    seconds: dict[str, float] | None = None,
    run: Callable[[fx.GraphModule, Mapping[str, Any]], Any] = lambda gm, values: gm(**values),
    way_back: ExitStack | None = None,
) -> fx.GraphModule:
    """Run passes in order; check and recompile the graph after each.

    If one fails, or is interrupted, the `undo` of its result and of those before it is called, the last one first.

    Args:
        gm: traced module.
        passes: to run; from an iterator, each one is made when the ones before it are done.
        inputs: values of all placeholders (:func:`mpfx.graph.bind_inputs`), one mapping a batch: on these, passes that
            preserve the function are compared before and after. None given: they are not.
        seconds: if given, the time that every pass took is added under its name.
        run: runs the graph on one batch.
        way_back: if given, closing it later calls the `undo` of every pass. It may hold on to dense weights.

    Raises:
        PassError: naming the pass that failed and its predecessors; the cause is chained.
    """
    done: list[str] = []
    undo, name = ExitStack(), "the next"
    try:
        for step in passes:
            name, started = type(step).__name__, time.perf_counter()
            gm = _run(gm, step, inputs, run, undo)
            if seconds is not None:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
            done.append(name)
            name = "the next"
    except BaseException as error:
        _put_back(undo, error)
        if not isinstance(error, Exception):
            raise
        before = f" (after {', '.join(done)})" if done else ""
        raise PassError(f"pass {name}{before} failed: {error}") from error
    kept = undo.pop_all()
    if way_back is not None:
        way_back.callback(kept.close)
    return gm


def _put_back(undo: ExitStack, error: BaseException) -> None:
    try:
        undo.close()
    except Exception as problem:
        error.add_note(f"Besides, not everything could be put back: {type(problem).__name__}: {problem}")


def _run(
    gm: fx.GraphModule,
    step: Pass,
    inputs: Sequence[Mapping[str, Any]],
    run: Callable[[fx.GraphModule, Mapping[str, Any]], Any],
    undo: ExitStack,
) -> fx.GraphModule:
    step.requires(gm)
    compared = inputs if step.preserves_function else ()
    before = [_outputs(gm, batch, run) for batch in compared]
    result = step(gm)
    if not isinstance(result, PassResult):
        raise TypeError(f"expected it to return a PassResult but got {type(result).__name__}.")
    if result.undo is not None:
        undo.callback(result.undo)
    result.graph_module.graph.lint()
    if result.modified:
        result.graph_module.recompile()
    step.ensures(result.graph_module)
    for batch, expected in zip(compared, before, strict=True):
        check_equal(expected, _outputs(result.graph_module, batch, run))
    return result.graph_module


@torch.no_grad()
def _outputs(
    gm: fx.GraphModule, batch: Mapping[str, Any], run: Callable[[fx.GraphModule, Mapping[str, Any]], Any]
) -> list[Tensor]:
    """Run on a copy of a batch, which the model may write to, with the same random numbers every time."""
    copied: dict[str, Any] = pytree.tree_map_only(Tensor, torch.clone, dict(batch))
    cuda = {leaf.device for leaf in pytree.tree_leaves(copied) if isinstance(leaf, Tensor) and leaf.is_cuda}
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(0)
        return [leaf for leaf in pytree.tree_leaves(run(gm, copied)) if isinstance(leaf, Tensor)]


def check_equal(expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Check that a model computes what it computed before, up to rounding.

    Raises:
        ValueError: with the largest difference relative to the largest value, and what its dtype allows.
    """
    if [t.shape for t in expected] != [t.shape for t in found]:
        raise ValueError("the model's outputs have other shapes than before, though the pass preserves its function.")
    for index, (old, new) in enumerate(zip(expected, found, strict=True)):
        if not old.is_floating_point() or not old.numel():
            continue
        tolerance = _TOLERANCE.get(old.dtype, _TOLERANCE[torch.bfloat16])
        difference = _relative_difference(old, new.to(old.device))
        if difference > tolerance:
            raise ValueError(
                f"output {index} of the model changed by {difference:.2g} of its largest value, though the pass "
                f"preserves the function of the model; {tolerance:g} is rounding in {old.dtype}."
            )


def _chunks(tensor: Tensor) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = tensor.flatten().split(_CHUNK)
    return parts


def _relative_difference(old: Tensor, new: Tensor) -> float:
    """Largest difference relative to the largest value; values that are not finite have to stay what they are."""
    largest = off = 0.0
    parts = ((a.double(), b.double()) for a, b in zip(_chunks(old), _chunks(new), strict=True))
    for a, b in parts:
        same = (a == b) | (a.isnan() & b.isnan())
        if not bool((same | (a.isfinite() & b.isfinite())).all()):
            return float("inf")
        off = max(off, float((a - b).masked_fill_(same, 0.0).abs().max()))
        largest = max(largest, float(a.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    return off / max(largest, 1e-30)
