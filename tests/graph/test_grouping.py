from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mpfx.graph import blocks, input_groups, sites, trace


def names(gm: fx.GraphModule, skip: tuple[str, ...] = ()) -> list[list[str]]:
    return [[site.path.rpartition(".")[2] for site in group.sites] for group in input_groups(gm, skip)]


def test_llama_groups(family: Any) -> None:
    model, sample = family("llama")
    gm = trace(model, (), sample(2, 5))
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert names(gm) == [*layer, *layer, ["lm_head"]]
    first = input_groups(gm)[0]
    assert first.name == "model.layers.0.self_attn.q_proj"
    assert blocks(gm)[first.block or 0].name == "model.layers.0"
    assert (first.sites[1].in_features, first.sites[1].out_features) == (64, 32)


def test_skipped_and_dense_sites_are_left_out(family: Any) -> None:
    model, sample = family("llama", tie_word_embeddings=True)
    gm = trace(model, (), sample(2, 5))
    groups = names(gm, skip=("model.layers.0.self_attn.q_proj",))
    assert groups[0] == ["k_proj", "v_proj"]
    assert ["lm_head"] not in groups


def test_groups_do_not_span_blocks(family: Any) -> None:
    model, sample = family("t5")
    gm = trace(model, (), sample(2, 8))
    cross = [group for group in input_groups(gm) if "EncDecAttention.k" in group.name]
    assert [len(group.sites) for group in cross] == [2, 2]  # k and v of one layer, not of both
    assert [blocks(gm)[group.block or 0].name for group in cross] == ["decoder.block.0", "decoder.block.1"]


def test_sites_survive_their_replacement(chain: nn.Module) -> None:
    gm = trace(chain, (torch.randn(2, 8),))
    chain.set_submodule("0.gate", nn.Identity())
    assert [site.path for site in sites(gm)][:2] == ["0.gate", "0.up"]
    assert names(gm) == [["gate", "up"], ["down"], ["gate", "up"], ["down"], ["2"]]


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        q, k = self.b(y), self.c(y.clone().view(-1, 1, 4)).view(-1, 4)
        y[:, :2] = 0
        out: Tensor = q + k + self.d(y)
        return out


def test_value_that_is_written_to_in_between_is_another_input() -> None:
    assert names(trace(Written(), (torch.randn(3, 4),))) == [["a"], ["b", "c"], ["d"]]


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x) + self.b(self.drop(x))
        return out


@pytest.mark.parametrize(("training", "expected"), [(False, [["a", "b"]]), (True, [["a"], ["b"]])])
def test_dropout_matters_in_training_only(training: bool, expected: list[list[str]]) -> None:
    assert names(trace(Dropped().train(training), (torch.randn(3, 4),))) == expected


def test_graph_from_elsewhere_is_refused() -> None:
    with pytest.raises(TypeError, match=r"mpfx\.graph\.trace"):
        sites(fx.symbolic_trace(nn.Linear(2, 2)))
