"""Packed models as compressed-tensors ``pack-quantized``, which transformers and vLLM load.

A site has one width, and one scale and zero point for every block of neighbouring channels; the blocks of all sites are
of one size. Scales are stored in the dtype of the model, which the library computes in: those of a float32 model stay
exactly what they are, others are rounded to half precision.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mpfx.hub.contents import packed_sites
from mpfx.hub.grids import GridWeight, Problem, block_size, common_problems, dense_state, grid_layers, refuse, width
from mpfx.hub.manifest import QUANTIZATION
from mpfx.hub.saving import save_config
from mpfx.nn import SEGMENT, MixedPrecisionLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_EVERYWHERE = (4, 8)
"""Widths that every version of vLLM runs."""


class _Scheme(NamedTuple):
    """What the sites of one config group have in common."""

    bits: int
    symmetric: bool


def check_compressed(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None") -> None:
    """Refuse a model that the format cannot hold.

    Raises:
        ValueError: naming sites, and the settings with which it could.
    """
    sites = dict(packed_sites(model))
    refuse([*common_problems(sites, SEGMENT), *_transposed(model), *_mixed(grid_layers(model))], "compressed-tensors")


def _mixed(layers: Mapping[str, MixedPrecisionLinear]) -> Iterator[Problem]:
    """Sites of several widths, where there are zero points: transformers 5.23 reads all by the first config group."""
    most, _ = Counter(map(width, layers.values())).most_common(1)[0]
    for path, module in layers.items():
        if width(module) != most and any(layer.zeros is not None for layer in layers.values()):
            has = f"has {width(module)} bits where others have {most}"
            holds = "sites with zero points to have one width all over the model"
            yield Problem(path, has, holds, "--grid.symmetric true` or `--optimal.widths [4]")


def _transposed(model: "PreTrainedModel") -> Iterator[Problem]:
    linears = _linears(model)
    for path in grid_layers(model):
        if path not in linears:
            yield Problem(path, "stores its weight as (in, out)", "layers of type Linear", "--scope.kinds [linear]")


def _linears(model: "PreTrainedModel") -> list[str]:
    """Paths of the Linear layers that the model has before it is packed."""
    config = copy.deepcopy(model.config)
    vars(config).pop(QUANTIZATION, None)
    with torch.device("meta"):
        dense: nn.Module = type(model)(config)
    return [path for path, module in dense.named_modules() if isinstance(module, nn.Linear)]


def write_compressed(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", folder: Path
) -> tuple[int, list[str]]:
    """Write weights, config and tokenizer to a new folder.

    Args:
        model: that :func:`check_compressed` lets pass.
        tokenizer: to store along.
        folder: to make.

    Returns:
        Bytes of the layers that have codes, and what a user should know.
    """
    from huggingface_hub import save_torch_state_dict

    layers = grid_layers(model)
    block = _common_block(layers.values())
    schemes: dict[_Scheme, list[str]] = defaultdict(list)
    weights: dict[str, Tensor] = {}
    for path, module in layers.items():
        schemes[_Scheme(width(module), module.zeros is None)].append(path)
        parts = _compressed(module, block or module.in_features)
        weights |= {f"{path}.{name}": part.cpu() for name, part in parts.items()}
    folder.mkdir()
    save_torch_state_dict({**dense_state(model), **weights}, folder, max_shard_size="50GB")
    save_config(model, _quantization(schemes, block, _linears(model)), folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    return sum(part.nbytes for part in weights.values()), _notes(schemes)


def _common_block(layers: Collection[MixedPrecisionLinear]) -> int | None:
    """Channels that share a scale in all layers; None: all channels of a row do."""
    sizes = [block_size(layer) for layer in layers]
    if all(size == layer.in_features for size, layer in zip(sizes, layers, strict=True)):
        return None
    return gcd(*sizes)


def _compressed(module: MixedPrecisionLinear, block: int) -> dict[str, Tensor]:
    weight = GridWeight.of(module)
    scales, zeros = weight.blocks(block)
    parts = {
        "weight_packed": pack_dense(weight.codes, weight.bits),
        "weight_scale": scales.to(module.weight_dtype).contiguous(),
        "weight_shape": torch.tensor([module.out_features, module.in_features]),
    }
    if not weight.symmetric:
        parts["weight_zero_point"] = pack_dense(zeros.t(), weight.bits).t().contiguous()
    return parts


def pack_dense(codes: Tensor, bits: int) -> Tensor:
    """Pack codes without a gap, as compressed-tensors does: code k of a row is its bits ``k * bits`` and following.

    Args:
        codes: integers in ``0 .. 2**bits - 1``, shape ``(rows, count)``.
        bits: width.

    Returns:
        int32 words, shape ``(rows, ceil(count * bits / 32))``.
    """
    shifts = torch.arange(bits, dtype=torch.int32, device=codes.device)
    stream = (codes[..., None].int() >> shifts & 1).flatten(1)  # (rows, count * bits)
    words = nn.functional.pad(stream, (0, -stream.shape[1] % 32)).unflatten(1, (-1, 32))
    places = torch.arange(32, dtype=torch.int32, device=codes.device)
    packed: Tensor = (words << places).sum(-1, dtype=torch.int32)  # disjoint bits: the sum is the bitwise or
    return packed


def _quantization(schemes: Mapping[_Scheme, list[str]], block: int | None, linears: list[str]) -> dict[str, Any]:
    """The ``quantization_config``; with one scheme its target is the class, which is easiest to read and to match."""
    groups = {}
    for number, (scheme, paths) in enumerate(schemes.items()):
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if block is None else "group",
            "group_size": block,
            "dynamic": False,
        }
        targets = ["Linear"] if len(schemes) == 1 else paths
        groups[f"group_{number}"] = {"targets": targets, "weights": weights, "format": "pack-quantized"}
    packed = {path for paths in schemes.values() for path in paths}
    # Up to compressed-tensors 0.20, transformers reads packed zero points only where it dequantizes while it loads;
    # without them it does so at the first call.
    dequantize = {} if all(scheme.symmetric for scheme in schemes) else {"dequantize": True}
    return {
        **dequantize,
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [path for path in linears if path not in packed],
    }


def _notes(schemes: Mapping[_Scheme, list[str]]) -> list[str]:
    if odd := sorted({scheme.bits for scheme in schemes} - set(_EVERYWHERE)):
        return [f"not every version of vLLM runs codes of {odd} bits; all run 4 and 8 (--optimal.widths [4, 8])."]
    return []
