"""Models that gguf and transformers read back, and such that the format cannot hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mpfx.hub.export import export
from mpfx.hub.export_gguf import BLOCK_TYPES, block_type, pack_blocks
from mpfx.hub.grids import GridWeight
from mpfx.nn import MixedPrecisionLinear
from tests.conftest import build_opt
from tests.hub.exports import byte_level_tokenizer, layer, logits, pack_all, relative_error, tiny

HALF = 2.0**-11
"""Largest relative error of rounding to float16."""

SUBNORMAL = 2.0**-25
"""Largest error of rounding a number below 6e-5 to float16."""


def dequantized(grid: GridWeight, name: str) -> Tensor:
    kind = next(kind for kind in BLOCK_TYPES if kind.name == name)
    return torch.from_numpy(
        gguf.dequantize(pack_blocks(grid, kind), gguf.GGMLQuantizationType[name]).astype(np.float32)
    )


@pytest.mark.parametrize(
    ("bits", "symmetric", "name"),
    [
        (1, False, "Q4_0"),
        (3, False, "Q4_0"),
        (4, True, "Q4_0"),
        (4, False, "Q4_1"),
        (5, True, "Q5_0"),
        (5, False, "Q5_1"),
        (6, False, "Q8_0"),
        (8, True, "Q8_0"),
    ],
)
@pytest.mark.parametrize("coded", [False, True])
def test_the_smallest_type_holds_the_weight(bits: int, symmetric: bool, name: str, coded: bool) -> None:
    module = layer(24, 128, bits, symmetric=symmetric, group_size=64, coded=coded, pruned=bits == 3)
    grid = GridWeight.of(module)
    kind = block_type(grid)
    assert kind is not None
    assert kind.name == name
    error = (dequantized(grid, name) - module.weight).abs()
    scales = grid.scales[:, grid.group]
    if not coded and name.endswith("_0"):
        assert not error.any()  # these scales are float16 already
    rounding = (HALF * scales).clamp(min=SUBNORMAL)
    counts = (grid.codes - grid.zeros[:, grid.group]).abs()
    if kind.minimum:  # rounded too, to within as much of itself
        counts += grid.zeros[:, grid.group]
    assert (error <= 1.01 * rounding * counts).all()


def test_eight_bits_with_zero_points_have_no_type() -> None:
    assert block_type(GridWeight.of(layer(24, 128, 8))) is None


@pytest.mark.parametrize("name", [kind.name for kind in BLOCK_TYPES])
def test_the_library_reads_every_type(name: str) -> None:
    """A weight that every type holds exactly comes back as it was."""
    grid = GridWeight.of(layer(4, 64, 3, symmetric=True, coded=False))
    assert torch.equal(dequantized(grid, name), (grid.codes - 4) * grid.scales[:, grid.group])


def test_scales_beyond_float16_are_refused() -> None:
    grid = GridWeight.of(layer(4, 64))
    grid.scales.mul_(1e8)
    with pytest.raises(ValueError, match="scales that float16 can hold"):
        pack_blocks(grid, BLOCK_TYPES[1])


@pytest.mark.parametrize(
    ("kind", "fields", "kinds"),
    [
        ("llama", {}, {"bits": 4}),
        ("llama", {"tie_word_embeddings": True}, {"bits": lambda number: 2 + number % 6, "group_size": 64}),
        ("mistral", {"sliding_window": None}, {"bits": 5}),
        ("qwen2", {}, {"bits": 4, "symmetric": True}),
        ("qwen3", {"head_dim": 128}, {"bits": 8, "symmetric": True}),
    ],
)
def test_logits_are_those_of_the_packed_model(
    tmp_path: Path, kind: str, fields: dict[str, Any], kinds: dict[str, Any]
) -> None:
    model = pack_all(tiny(kind, **fields), **kinds)
    done = export(model, tmp_path / "model.gguf", "gguf", tokenizer=byte_level_tokenizer())
    assert done.packed_bits_per_weight < done.bits_per_weight <= 8.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert relative_error(logits(loaded), logits(model)) < 3e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_what_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    model = pack_all(tiny().to(dtype))
    export(model, tmp_path / "model.gguf", "gguf", tokenizer=byte_level_tokenizer())
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    embedding = found["token_embd.weight"]
    assert embedding.tensor_type.name == {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    values = torch.from_numpy(gguf.dequantize(embedding.data, embedding.tensor_type).copy())
    assert torch.equal(values.to(dtype), model.model.embed_tokens.weight)
    assert found["output_norm.weight"].tensor_type.name == "F32"


def with_ragged() -> Any:
    model = pack_all(tiny(intermediate_size=80))
    assert isinstance(model.model.layers[0].mlp.down_proj, MixedPrecisionLinear)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pack_all(tiny(), 8), r"q_proj has 8 bits with zero points.*--grid.symmetric true"),
        (lambda: pack_all(tiny(), shuffled=True), "another order.*--order natural --optimal.uniform true"),
        (with_ragged, r"down_proj has 80 channels.*--scope.exclude \[model.layers.0.mlp.down_proj\]"),
        (lambda: pack_all(build_opt()), "llama, mistral, qwen2, qwen3 but got 'opt'.*compressed-tensors"),
        (lambda: pack_all(tiny(hidden_act="gelu")), "no word for hidden_act of 'llama'"),
        (lambda: pack_all(tiny("mistral", sliding_window=8)), "no word for sliding_window of 'mistral'"),
        (lambda: pack_all(tiny("qwen3", head_dim=32)), "no word for head_dim of 'qwen3'"),
    ],
    ids=["bits", "order", "channels", "architecture", "activation", "window", "heads"],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export(make(), tmp_path / "model.gguf", "gguf", tokenizer=byte_level_tokenizer())
    assert not list(tmp_path.iterdir())
