from typing import Any

import pytest
import torch
from torch import nn

from mpfx.hub.grids import GridWeight, Problem, block_size, common_problems, dense_state, grid_layers, is_raw, refuse
from mpfx.nn import own_order
from tests.hub.exports import layer, pack_all, tiny

GROUPS_SWAPPED = torch.cat([torch.arange(64, 128), torch.arange(64)])
REVERSED = torch.arange(128).flip(0)
MIXED = torch.randperm(128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("order", [None, GROUPS_SWAPPED, MIXED], ids=["natural", "groups", "mixed"])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 8, (4, 0, 4, 4), (0, 0, 0, 0)])
def test_a_grid_says_what_the_layer_computes(order: Any, pruned: bool, symmetric: bool, bits: Any) -> None:
    module = layer(24, 128, bits, order=order, pruned=pruned, symmetric=symmetric)
    grid = GridWeight.of(module)
    dense = (grid.codes - grid.zeros[:, grid.group]) * grid.scales[:, grid.group]
    assert torch.equal(dense, module.weight)
    assert (grid.codes >= 0).all()
    assert (grid.codes < 1 << grid.bits).all()


@pytest.mark.parametrize(
    ("channels", "group_size", "order", "size"),
    [
        (128, 64, None, 64),
        (128, None, None, 128),
        (96, 64, None, 32),
        (80, 64, None, 16),
        (128, 64, GROUPS_SWAPPED, 64),
        (128, 64, REVERSED, 64),
        (128, 64, MIXED, 1),
        (128, None, MIXED, 128),
    ],
)
def test_blocks_are_the_largest_that_share_a_scale(channels: int, group_size: Any, order: Any, size: int) -> None:
    module = layer(8, channels, group_size=group_size, order=order)
    assert block_size(module) == size
    grid = GridWeight.of(module)
    scales, zeros = grid.blocks(size)
    codes = grid.codes.unflatten(1, (-1, size))
    dense = (codes - zeros[..., None]) * scales[..., None]
    assert torch.equal(dense.flatten(1), module.weight)


def test_problems_are_told_by_site_and_setting() -> None:
    sites: dict[str, Any] = {
        "mixed": layer(8, 128, (2, 3, 0, 0)),
        "order": layer(8, 128, order=MIXED),
        "fine": layer(8, 128, order=GROUPS_SWAPPED),
        "raw": layer(8, 128, 16, order=MIXED, coded=False),
    }
    found = list(common_problems(sites, 32))
    assert [problem.site for problem in found] == ["mixed", "order"]
    with pytest.raises(ValueError, match=r"mixed has widths 2, 3: compress with .*uniform true") as caught:
        refuse(found, "some format")
    assert "order stores its channels in another order: compress with `--order natural" in str(caught.value)


def test_many_problems_are_summed_up() -> None:
    refuse([], "some format")
    with pytest.raises(ValueError, match=r"s0 is odd; s1 is odd; s2 is odd; and 2 more sites: compress with `--x`"):
        refuse([Problem(f"s{i}", "is odd", "even ones", "--x") for i in range(5)], "some format")


def test_the_rest_of_a_model_is_dense() -> None:
    model = pack_all(tiny("qwen2", tie_word_embeddings=True))
    raw = layer(96, 64, 16, coded=False)
    model.set_submodule("model.layers.0.mlp.up_proj", raw)
    state = dense_state(model)
    assert is_raw(raw)
    assert "model.layers.0.mlp.up_proj" not in grid_layers(model)
    assert torch.equal(state["model.layers.0.mlp.up_proj.weight"], raw.weight)
    assert "model.layers.1.self_attn.q_proj.bias" in state
    assert not [name for name in state if "codes" in name or "mpfx" in name or name == "lm_head.weight"]
    assert isinstance(model, nn.Module)


def test_orders_are_undone() -> None:
    module = layer(8, 128, order=MIXED)
    plain = layer(8, 128)
    assert torch.equal(GridWeight.of(module).codes, own_order(GridWeight.of(plain).codes, MIXED))
