"""The pass manager."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import fx, nn

from mpfx.passes import Pass, PassError, PassResult, run_passes


@dataclass(frozen=True)
class Recorded(Pass):
    """Appends to a log; fails where it is told to."""

    log: list[str]
    fails: str = ""
    replaces: bool = False
    made: list[fx.GraphModule] = field(default_factory=list)

    def requires(self, gm: fx.GraphModule) -> None:
        self._step("requires")

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        self._step("call")
        if self.replaces:
            gm = fx.GraphModule(gm, gm.graph)
            self.made.append(gm)
        return PassResult(gm, modified=self.replaces)

    def ensures(self, gm: fx.GraphModule) -> None:
        self._step("ensures")
        if self.replaces:
            assert gm is self.made[-1]  # what the pass returned, not what it was given

    def _step(self, name: str) -> None:
        self.log.append(name)
        if name == self.fails:
            raise ValueError(f"cannot {name}")


def graph() -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_every_pass_is_required_called_ensured_in_order() -> None:
    log: list[str] = []
    first, second = Recorded(log), Recorded(log, replaces=True)
    assert isinstance(first, Pass)
    result = run_passes(graph(), [first, second])
    assert log == ["requires", "call", "ensures"] * 2
    assert result is second.made[0]
    assert result(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("step", ["requires", "call", "ensures"])
def test_a_failure_names_the_pass_and_those_before(step: str) -> None:
    log: list[str] = []
    with pytest.raises(PassError, match=rf"pass Recorded \(after Recorded\) failed: cannot {step}") as caught:
        run_passes(graph(), [Recorded(log), Recorded(log, fails=step), Recorded(log)])
    assert isinstance(caught.value.__cause__, ValueError)
    assert log[-1] == step


def test_a_broken_graph_is_caught_before_the_next_pass() -> None:
    @dataclass(frozen=True)
    class Breaks(Pass):
        def __call__(self, gm: fx.GraphModule) -> PassResult:
            node = next(n for n in gm.graph.nodes if n.op == "call_module")
            node.target = "no.such.module"
            return PassResult(gm, modified=True)

    with pytest.raises(PassError, match="pass Breaks failed"):
        run_passes(graph(), [Breaks()])
