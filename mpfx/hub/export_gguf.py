"""Packed models as GGUF, which llama.cpp runs and transformers reads.

Every block of 32 neighbouring channels has a float16 scale, and the types that end in _1 a float16 minimum. A site gets
the smallest type whose integers hold its codes, so that all that is rounded are the scales.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpfx.hub.contents import packed_sites
from mpfx.hub.gguf_tokenizer import check_tokenizer, write_tokenizer
from mpfx.hub.grids import GridWeight, Problem, common_problems, dense_state, grid_layers, is_raw, refuse
from mpfx.nn import MixedPrecisionLinear

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BLOCK = 32
"""Channels that share a scale."""

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Types of transformers models that can be written, with llama.cpp's names for them."""

_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "head_count": "num_attention_heads",
    "head_count_kv": "num_key_value_heads",
    "layer_norm_rms_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
"""What GGUF says of all of them, with the fields of the config that it stands for."""

_NO_MATTER = {
    *("architectures", "attention_dropout", "dtype", "initializer_range", "model_type", "name_or_path"),
    *("max_window_layers", "pretraining_tp", "quantization_config", "tie_word_embeddings", "transformers_version"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
}
"""Fields of a config that change no logits, or that GGUF says by what tensors there are."""


class BlockType(NamedTuple):
    """A type of GGUF: integers of ``bits`` bits times a scale, signed, or unsigned and added to a minimum."""

    name: str
    bits: int
    minimum: bool

    def holds(self, weight: GridWeight) -> bool:
        """Whether its integers are enough for all codes of a weight."""
        if self.minimum:
            return int(weight.codes.max()) < 1 << self.bits
        offsets = weight.codes - weight.zeros[:, weight.group]
        return -(1 << self.bits - 1) <= int(offsets.min()) and int(offsets.max()) < 1 << self.bits - 1


BLOCK_TYPES = (
    BlockType("Q4_0", 4, False),
    BlockType("Q4_1", 4, True),
    BlockType("Q5_0", 5, False),
    BlockType("Q5_1", 5, True),
    BlockType("Q8_0", 8, False),
)
"""The types that are written, the smallest first."""


def block_type(weight: GridWeight) -> BlockType | None:
    """The smallest type that holds a weight's codes, or None."""
    return next((kind for kind in BLOCK_TYPES if kind.holds(weight)), None)


def check_gguf(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None") -> None:
    """Refuse a model that the format cannot hold.

    Raises:
        ValueError: naming what it cannot hold, and the settings with which it could.
    """
    _check_architecture(model.config)
    check_tokenizer(tokenizer, model.config.vocab_size)
    sites = dict(packed_sites(model))
    problems = [*common_problems(sites, BLOCK), *_ragged(sites)]
    refuse(problems, "GGUF")
    refuse(_wide(grid_layers(model)), "GGUF")
    _names(model, [*dense_state(model), *(f"{path}.weight" for path in sites)])


def _ragged(sites: Mapping[str, Any]) -> Iterator[Problem]:
    for path, module in sites.items():
        if isinstance(module, MixedPrecisionLinear) and not is_raw(module) and module.in_features % BLOCK:
            has = f"has {module.in_features} channels"
            yield Problem(path, has, f"whole blocks of {BLOCK} channels", f"--scope.exclude [{path}]")


def _wide(layers: Mapping[str, MixedPrecisionLinear]) -> Iterator[Problem]:
    for path, module in layers.items():
        if block_type(weight := GridWeight.of(module)) is None:
            has = f"has {weight.bits} bits with zero points"
            holds = "8 bits without zero points, or at most 7 bits"
            yield Problem(path, has, holds, "--grid.symmetric true` or `--optimal.widths [4, 5]")


def _check_architecture(config: "PretrainedConfig") -> None:
    """Refuse what llama.cpp has no name for, and settings that would be lost on the way."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"Expected a model of type {', '.join(ARCHITECTURES)} but got {config.model_type!r}, which is written "
            "for no reader yet: export it with `--format compressed-tensors`."
        )
    if lost := _unsaid(config):
        raise ValueError(
            f"Expected a config that GGUF can say but it has no word for {', '.join(lost)} of {config.model_type!r}: "
            "export it with `--format compressed-tensors`."
        )


def _unsaid(config: "PretrainedConfig") -> list[str]:
    """The fields that matter and that a reader of the file would set otherwise."""
    from transformers import AutoConfig

    said = {field: getattr(config, field) for field in _KEYS.values()}
    said["rope_theta"] = config.rope_parameters["rope_theta"]
    if ARCHITECTURES[config.model_type] == "llama":
        said["head_dim"] = _head_size(config)
    read = AutoConfig.for_model(ARCHITECTURES[config.model_type], **said).to_dict()
    other = [name for name, value in config.to_dict().items() if (read.get(name) or None) != (value or None)]
    return [name for name in other if name not in _NO_MATTER and not name.startswith("_")]


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _names(model: "PreTrainedModel", tensors: list[str]) -> dict[str, str]:
    """The names of the tensors in the file."""
    import gguf

    name = ARCHITECTURES[model.config.model_type]
    architecture = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    known = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    found = {tensor: known.get_name(tensor, try_suffixes=(".weight", ".bias")) for tensor in tensors}
    names = {tensor: called for tensor, called in found.items() if called is not None}
    if unknown := sorted(set(found) - set(names)):
        raise ValueError(f"Expected tensors that GGUF has names for but got {unknown[:5]} in a model of type {name!r}.")
    return names


def write_gguf(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", file: Path
) -> tuple[int, list[str]]:
    """Write weights, config and tokenizer to one file.

    Args:
        model: that :func:`check_gguf` lets pass.
        tokenizer: its tokenizer.
        file: to write.

    Returns:
        Bytes of the layers that have codes, and what a user should know.
    """
    import gguf

    assert tokenizer is not None  # checked
    layers, dense = grid_layers(model), dense_state(model)
    names = _names(model, [*(f"{path}.weight" for path in layers), *dense])
    writer = gguf.GGUFWriter(str(file), ARCHITECTURES[model.config.model_type])
    _add_config(writer, model.config, file.stem)
    types, stored = Counter[str](), 0
    for path, module in layers.items():
        weight = GridWeight.of(module)
        kind = block_type(weight)
        assert kind is not None  # checked
        name = f"{path}.weight"
        blocks = pack_blocks(weight, kind)[_row_order(model.config, name, module.out_features)]
        writer.add_tensor(names[name], blocks, raw_dtype=gguf.GGMLQuantizationType[kind.name])
        types[kind.name] += 1
        stored += blocks.nbytes
    for name, tensor in dense.items():
        _add_dense(writer, names[name], tensor[_row_order(model.config, name, len(tensor))])
    most = types.most_common(1)[0][0]
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    with tempfile.TemporaryDirectory() as folder:
        notes = write_tokenizer(writer, tokenizer, model.config, Path(folder))
    _finish(writer)
    return stored, [f"types: {', '.join(f'{name} {count}' for name, count in sorted(types.items()))}.", *notes]


def _finish(writer: "GGUFWriter") -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_config(writer: "GGUFWriter", config: Any, name: str) -> None:
    writer.add_name("Mistral" if name == "mistral" else name)  # by that name transformers 5.23 fails to read a llama
    for key, field in _KEYS.items():
        getattr(writer, f"add_{key}")(getattr(config, field))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(_head_size(config))
    if _head_size(config) * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(_head_size(config))
        writer.add_value_length(_head_size(config))


def _row_order(config: Any, name: str, rows: int) -> Tensor:
    """The order of rows in the file: in q and k of a llama, llama.cpp rotates neighbours, transformers half heads."""
    order = torch.arange(rows)
    projection = name.split(".")[-2]
    if ARCHITECTURES[config.model_type] != "llama" or projection not in ("q_proj", "k_proj"):
        return order
    heads = config.num_attention_heads if projection == "q_proj" else config.num_key_value_heads
    return order.view(heads, 2, -1).transpose(1, 2).flatten()


def _add_dense(writer: "GGUFWriter", name: str, tensor: Tensor) -> None:
    """Matrices as they are, in float32 what has one dimension: llama.cpp asks for that."""
    import gguf

    if tensor.dim() > 1 and tensor.dtype == torch.bfloat16:
        values = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        half = tensor.dim() > 1 and tensor.dtype == torch.float16
        writer.add_tensor(name, (tensor if half else tensor.float()).contiguous().numpy())


def pack_blocks(weight: GridWeight, kind: BlockType) -> np.ndarray:
    """Bytes of a weight, uint8 ``(out, in / 32 * bytes of a block)``.

    Args:
        weight: whose groups are whole blocks.
        kind: a type that holds it.

    Raises:
        ValueError: if a scale is beyond float16.
    """
    scales, zeros = weight.blocks(BLOCK)
    steps = scales.half()
    heads = [steps, -zeros * steps.float()] if kind.minimum else [steps]  # a zero weight stays next to zero
    values = torch.stack([head.half() for head in heads], -1).cpu()  # (out, blocks, 1 or 2)
    if not values.isfinite().all():
        raise ValueError(f"Expected scales that float16 can hold but got {float(scales.max()):g}.")
    codes = weight.codes if kind.minimum else weight.codes - weight.zeros[:, weight.group] + _middle(kind)
    parts = [values.numpy().view(np.uint8), *_planes(codes.cpu().numpy(), kind)]
    return np.concatenate(parts, -1).reshape(len(codes), -1)


def _middle(kind: BlockType) -> int:
    """What a signed type stores for 0; Q8_0 stores two's complement."""
    return 0 if kind.bits == 8 else 1 << kind.bits - 1


def _planes(codes: np.ndarray, kind: BlockType) -> Iterator[np.ndarray]:
    """The integers of all blocks: fifth bits first, then the lower four of code k beside those of code k + 16."""
    blocks = codes.astype(np.int8).view(np.uint8).reshape(len(codes), -1, BLOCK)
    if kind.bits == 8:
        yield blocks
        return
    if kind.bits == 5:
        yield np.packbits(blocks >> 4, axis=-1, bitorder="little")
    yield blocks[..., :16] & 15 | (blocks[..., 16:] & 15) << 4
