"""Packed models and tokenizers that the tests of exports share."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from mpfx.graph import is_linear, linear_weight
from mpfx.nn import (
    LEFT_OUT,
    RAW_BITS,
    Layout,
    MixedPrecisionLinear,
    QuantizedWeight,
    Scales,
    pack,
    pack_permutation,
)
from tests.hub.models import coded_scales

VOCABULARY = 300
IDS = torch.arange(5, 60)[None]


def layer(
    rows: int,
    channels: int,
    bits: int | tuple[int, ...] = 4,
    *,
    group_size: int | None = 32,
    symmetric: bool = False,
    coded: bool = True,
    pruned: bool = False,
    order: Tensor | None = None,
    seed: int = 0,
) -> MixedPrecisionLinear:
    """A layer with random codes."""
    generator = torch.Generator().manual_seed(seed)
    segments = -(-channels // 32)
    layout = Layout(channels, (bits,) * segments if isinstance(bits, int) else bits, group_size)
    codes = torch.zeros(rows, channels, dtype=torch.int32)
    for run in layout.runs:
        part = codes[:, run.start : run.stop]
        if run.bits == RAW_BITS:
            part.copy_(torch.randn(part.shape, generator=generator).half().view(torch.int16))
        elif run.bits != LEFT_OUT:
            part.random_(1 << run.bits, generator=generator)
    grids = [group.bits for group in layout.grids]
    zeros = torch.stack([torch.randint(1 << b, (rows,), generator=generator) for b in grids], 1) if grids else None
    stored = torch.tensor(layout.widths).repeat_interleave(32)[:channels] != LEFT_OUT
    kept = (torch.rand(rows, channels, generator=generator) < 0.5) & stored if pruned else None
    scales: Scales = (0.01 * torch.rand(rows, len(grids), generator=generator) + 0.01).half()
    if coded:
        scales = coded_scales(rows, len(grids), generator)
        scales = replace(scales, row=scales.row * 0.25)
    weight = QuantizedWeight(
        codes=codes if kept is None else codes * kept,
        scales=scales,
        zeros=None if symmetric or zeros is None else zeros.to(torch.uint8),
        kept=kept,
        layout=layout,
    )
    return MixedPrecisionLinear(pack(weight), permutation=None if order is None else pack_permutation(order))


Bits = int | Callable[[int], int]


def pack_all(model: Any, bits: Bits = 4, *, shuffled: bool = False, **kinds: Any) -> Any:
    """Put random packed layers in the place of all but the head; ``bits`` may depend on the number of the layer."""
    linears = [(p, m) for p, m in model.named_modules() if is_linear(m) and "head" not in p]
    for number, (path, module) in enumerate(linears):
        width = bits(number) if callable(bits) else bits
        rows, channels = linear_weight(module).shape
        order = torch.randperm(channels) if shuffled else None
        packed = layer(rows, channels, width, order=order, seed=number, **kinds)
        packed.bias = module.bias
        model.set_submodule(path, packed.to(module.weight.dtype))
    return model


def tiny(kind: str = "llama", **fields: Any) -> Any:
    """A random model of a type that transformers knows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0}
    sizes |= {"max_position_embeddings": 128, "eos_token_id": 1, **fields}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name or "head" in name:
                parameter.mul_(30)
            elif "bias" in name:
                parameter.normal_()
    return model


def byte_level_tokenizer() -> Any:
    """A tokenizer that learned a few merges, with two special tokens."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special, alphabet = ["<s>", "</s>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 6, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the model of the size, the size of the model, 1234 models"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS.to(model.device), use_cache=False).logits
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
