from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpfx.graph import bind_inputs, blocks, dead_ends, last_readers, run_block, sites, trace
from mpfx.graph.attention import attention


def test_llama_blocks(family: Any) -> None:
    model, sample = family("llama")
    gm = trace(model, (), sample(2, 5))
    parts = blocks(gm)
    assert [part.name for part in parts] == ["prefix", "model.layers.0", "model.layers.1", "suffix"]
    assert [part.index for part in parts] == [0, 1, 2, 3]
    assert [part.is_last for part in parts] == [False, False, False, True]
    assert parts[0].needs == ("input_ids", "attention_mask")
    assert parts[3].sites == ("lm_head",)
    assert [site.block for site in sites(gm)] == [1] * 7 + [2] * 7 + [None]
    assert "input_ids" not in run_block(parts[0], bind_inputs(gm, (), sample(3, 8)), last_readers(parts))


def test_what_no_other_site_reads_is_a_dead_end(family: Any) -> None:
    model, sample = family("llama")
    parts = blocks(trace(model, (), sample(2, 5)))
    assert dead_ends(parts[0]) == ()
    assert dead_ends(parts[1]) == ("model.layers.0.mlp.down_proj",)
    assert dead_ends(parts[3]) == ("lm_head",)


def test_chain_blocks(chain: nn.Module, run_in_blocks: Any) -> None:
    gm = trace(chain, (torch.randn(2, 8),))
    assert [part.name for part in blocks(gm)] == ["0", "1", "suffix"]
    x = torch.randn(5, 8)
    assert torch.equal(run_in_blocks(gm, x), chain(x))


def test_model_without_lists_is_cut_where_one_value_is_handed_on(run_in_blocks: Any) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    gm, x = trace(module, (torch.randn(2, 8),)), torch.randn(5, 8)
    assert [part.name for part in blocks(gm)] == ["part.0", "part.1", "part.2"]
    assert [site.block for site in sites(gm)] == [0, 1, 2]
    assert torch.equal(run_in_blocks(gm, x), module(x))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)) for _ in range(3)
        )
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for layer in self.layers:
            x += layer(x)
        out: Tensor = self.head(x)
        return out


class SharedLinear(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.layers[0](x))
        x = self.shared(self.layers[1](x))
        out: Tensor = self.head(self.layers[2](x))
        return out


class SharedBuffer(Layers):
    def forward(self, x: Tensor) -> Tensor:
        buffer = torch.zeros(3, x.shape[0], 4)
        for i, layer in enumerate(self.layers):
            buffer[i] = layer(x if i == 0 else buffer[i - 1])
        out: Tensor = self.head(buffer.sum(0))
        return out


class SharedView(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        flat = x.view(-1)
        x[:, :2] = self.layers[1](x)[:, :2]
        out: Tensor = self.head(self.layers[2](flat.view(-1, 4)))
        return out


def part_names(gm: Any) -> list[str]:
    return [part.name for part in blocks(gm)]


def test_block_that_writes_to_its_input_can_run_again(run_in_blocks: Any) -> None:
    module, x = Layers(), torch.randn(5, 4)
    gm = trace(module, (torch.randn(2, 4),))
    assert part_names(gm) == ["prefix", "layers.0", "layers.1", "layers.2", "suffix"]
    with torch.no_grad():
        assert torch.equal(run_in_blocks(gm, x), module(x))


def test_calls_of_one_layer_stay_in_one_block(run_in_blocks: Any) -> None:
    module, x = SharedLinear(), torch.randn(5, 4)
    gm = trace(module, (torch.randn(2, 4),))
    calls = [part.name for part in blocks(gm) if "shared" in part.sites]
    assert len(calls) == 1
    assert torch.equal(run_in_blocks(gm, x), module(x))


@pytest.mark.parametrize(
    ("kind", "names"), [(SharedBuffer, ["layers.0", "suffix"]), (SharedView, ["layers.0", "layers.2", "suffix"])]
)
def test_memory_that_several_parts_share_stays_in_one_block(kind: Any, names: list[str], run_in_blocks: Any) -> None:
    module, x = kind(), torch.randn(5, 4)
    gm = trace(module, (torch.randn(2, 4),))
    assert part_names(gm) == names
    with torch.no_grad():
        assert torch.equal(run_in_blocks(gm, x), module(x))


class Nested(nn.Module):
    """Stages of layers, both in lists that are never called."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(layer() for _ in range(2)) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for layer in stage:  # type: ignore[attr-defined]
                x = x + layer(x)
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()), ["0.0", "0.1", "1.0", "1.1"]),
        (lambda: nn.Linear(4, 4), ["0", "1"]),  # layers of one matrix each stay together
    ],
)
def test_lists_of_lists(layer: Any, names: list[str], run_in_blocks: Any) -> None:
    module = Nested(layer)
    gm, x = trace(module, (torch.randn(2, 4),)), torch.randn(5, 4)
    assert [part.name for part in blocks(gm) if part.repeated] == [f"stages.{name}" for name in names]
    assert torch.equal(run_in_blocks(gm, x), module(x))


def test_order_of_solving(family: Any) -> None:
    """q, k, v; then o, which reads what they make; then gate, up; then down."""
    model, sample = family("llama")
    block = blocks(trace(model, (), sample(2, 5)))[1]
    stages = [[path.rpartition(".")[2] for path in stage] for stage in block.stages]
    assert stages == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert block.units == (block.sites,)
    assert sorted(path for stage in block.stages for path in stage) == sorted(block.sites)


def test_a_part_that_is_called_whole_is_solved_child_by_child() -> None:
    class Branches(Layers):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                return self.head(-x)  # type: ignore[no-any-return]
            return super().forward(x)

    module = Branches()
    (block,) = blocks(trace(module, (torch.randn(2, 4),)))
    assert block.units == (
        ("layers.0.0", "layers.0.2"),
        ("layers.1.0", "layers.1.2"),
        ("layers.2.0", "layers.2.2"),
        ("head",),
    )


def test_attention_in_blocks_looks_at_its_mask(family: Any) -> None:
    model, sample = family("llama")
    layer = blocks(trace(model, (), sample(2, 5)))[1].module
    assert [node.target for node in layer.graph.nodes].count(attention) == 1
