"""Models that compressed-tensors and transformers read back, and such that the format cannot hold."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpfx.hub.export import export
from mpfx.hub.export_compressed import pack_dense
from tests.conftest import build_gpt2
from tests.hub.exports import byte_level_tokenizer, layer, logits, pack_all, relative_error, tiny

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)

ROUNDING = {torch.float32: 0.0, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative error of the logits: scales are rounded to the dtype, and so is every weight; nothing is in float32."""


@pytest.mark.parametrize("count", [1, 31, 32, 80])
@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_those_of_the_library(bits: int, count: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = torch.randint(1 << bits, (5, count), generator=torch.Generator().manual_seed(bits))
    signed = (codes - (1 << bits - 1)).to(torch.int8)
    packed = pack_dense(codes, bits)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), signed)


@pytest.mark.filterwarnings("ignore")  # of the library
@pytest.mark.parametrize(
    ("dtype", "kinds"),
    [
        (torch.float32, {"bits": 4, "pruned": True}),
        (torch.float32, {"bits": 3, "group_size": None}),
        (torch.float32, {"bits": lambda number: 2 + number % 7, "symmetric": True, "group_size": 64}),
        (torch.float16, {"bits": 4}),
        (torch.bfloat16, {"bits": 8, "symmetric": True}),
    ],
    ids=["zeros", "rows", "widths", "float16", "bfloat16"],
)
def test_logits_are_those_of_the_packed_model(tmp_path: Path, dtype: torch.dtype, kinds: dict[str, Any]) -> None:
    model = pack_all(tiny("qwen2").to(dtype), **kinds)
    done = export(model, tmp_path / "out", "compressed-tensors")
    assert 0 < done.packed_bits_per_weight < done.bits_per_weight < 10
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
    assert relative_error(logits(loaded), logits(model)) <= ROUNDING[dtype]


@pytest.mark.filterwarnings("ignore")
def test_what_is_dense_stays_and_the_tokenizer_comes_along(tmp_path: Path) -> None:
    model, tokenizer = pack_all(tiny()), byte_level_tokenizer()
    model.set_submodule("model.layers.0.mlp.up_proj", layer(96, 64, 16, coded=False))
    export(model, tmp_path / "out", "compressed-tensors", tokenizer=tokenizer)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["model.layers.0.mlp.up_proj", "lm_head"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the size").input_ids == tokenizer("the size").input_ids


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: pack_all(tiny(), lambda number: 3 + number % 2),
            r"k_proj has 4 bits where .* `--optimal\.widths \[4\]`",
        ),
        (lambda: pack_all(tiny(), shuffled=True), "another order.*--order natural --optimal.uniform true"),
        (lambda: pack_all(build_gpt2()), r"c_attn stores its weight as \(in, out\).*scope.kinds \[linear\]"),
    ],
    ids=["widths", "order", "transposed"],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export(make(), tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.iterdir())
