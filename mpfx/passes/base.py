"""What a pass is, and the loop that runs passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import fx


@dataclass(frozen=True)
class PassResult:
    """What a pass hands on.

    Attributes:
        graph_module: the module to go on with, the one given or a new one.
        modified: whether graph or modules were changed; False for passes that only annotate.
    """

    graph_module: fx.GraphModule
    modified: bool


@runtime_checkable
class Pass(Protocol):
    """One step on a graph: analysis passes write ``node.meta``, rewriting passes read it."""

    def requires(self, gm: fx.GraphModule) -> None:
        """Raise if ``gm`` lacks what the pass needs; called before anything is touched."""

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Do the work."""
        ...

    def ensures(self, gm: fx.GraphModule) -> None:
        """Raise if the module that the pass returned is not what it promises."""


class PassError(RuntimeError):
    """A pass failed; the message names it and those that had run before it."""


def run_passes(gm: fx.GraphModule, passes: Sequence[Pass]) -> fx.GraphModule:
    """Run passes in order; check and recompile the graph after each.

    Raises:
        PassError: naming the pass that failed and its predecessors; the cause is chained.
    """
    done: list[str] = []
    for step in passes:
        name = type(step).__name__
        try:
            step.requires(gm)
            result = step(gm)
            gm = result.graph_module
            gm.graph.lint()
            if result.modified:
                gm.recompile()
            step.ensures(gm)
        except Exception as error:
            before = f" (after {', '.join(done)})" if done else ""
            raise PassError(f"pass {name}{before} failed: {error}") from error
        done.append(name)
    return gm
