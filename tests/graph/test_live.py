from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mpfx.graph import TraceError, sites, trace


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.graph = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.graph(x)
        return y


def test_child_with_a_name_of_fx_is_refused() -> None:
    with pytest.raises(TraceError, match="`graph`"):
        trace(Hidden(), (torch.randn(2, 4),))


def test_child_with_such_a_name_may_lie_deeper() -> None:
    module = nn.Sequential(Hidden())
    assert [site.path for site in sites(trace(module, (torch.randn(2, 4),)))] == ["0.graph"]


def test_graph_shares_children_and_parameters(chain: nn.Module) -> None:
    gm = trace(chain, (torch.randn(2, 8),))
    assert gm._modules is chain._modules
    assert dict(gm.named_parameters()).keys() == dict(chain.named_parameters()).keys()


def test_analyses_follow_a_changed_graph(chain: nn.Module) -> None:
    gm = trace(chain, (torch.randn(2, 8),))
    assert len(sites(gm)) == 7
    gm.graph.erase_node(gm.graph.output_node())
    gm.graph.output(next(node for node in gm.graph.nodes if node.target == "0.gate"))
    gm.graph.eliminate_dead_code()
    assert [site.path for site in sites(gm)] == ["0.gate"]
