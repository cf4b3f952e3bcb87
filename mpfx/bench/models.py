"""Language models with random weights, dense or packed, made on the device they run on, no larger than they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpfx.bench.weights import mixed_layout, random_order, random_weight
from mpfx.graph import is_linear, linear_weight
from mpfx.nn import MixedPrecisionLinear, join_input_groups

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LLAMA: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-5}
PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        **_LLAMA,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "llama-3-8b": {
        **_LLAMA,
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
"""Sizes of models by name, as fields of a Llama config."""

_SPREAD = 0.02  # of dense weights, as models are initialised


def config_of(name: str) -> "PretrainedConfig":
    """Find the config of a model.

    Args:
        name: of a preset; or the path of a ``config.json``, or of a folder that holds one. Weights are not read.

    Raises:
        ValueError: if there is none, or none that can be read.
    """
    from transformers import AutoConfig, LlamaConfig

    if name in PRESETS:
        return LlamaConfig(**PRESETS[name])
    path = Path(name)
    if not path.is_file() and not (path / "config.json").is_file():
        raise ValueError(
            f"Expected `model` to be one of {', '.join(PRESETS)}, a config.json, or a folder that holds one, but got "
            f"{name!r}."
        )
    with _named_errors(name):
        config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=True)
    vars(config).pop("quantization_config", None)  # only the sizes count
    return config


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Say which model it was; checks and models of transformers raise whatever they stumble over."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"Expected `model` to be the config of a causal language model but {name} is not: {reason[:300]}"
        ) from error


def check_bits(config: "PretrainedConfig", bits: float) -> None:
    """Refuse, before anything is made, a size that the layers of a model cannot have.

    Raises:
        ValueError: naming the weight and the sizes that it can have; if the config is of no causal language model.
    """
    for _, module in _sites(_skeleton(config, torch.float32)):
        rows, channels = linear_weight(module).shape
        mixed_layout(rows, channels, bits)


def _skeleton(config: "PretrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    """A model whose parameters have no values."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with _named_errors(config.name_or_path or config.model_type), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model


def _sites(model: "PreTrainedModel") -> list[tuple[str, nn.Module]]:
    """The Linear layers, by path, without the output head."""
    head = model.get_output_embeddings()
    return [(path, m) for path, m in model.named_modules() if is_linear(m) and m is not head]


def random_model(
    config: "PretrainedConfig", device: torch.device, dtype: torch.dtype, *, bits: float | None = None
) -> "PreTrainedModel":
    """Make a causal language model with random weights.

    Args:
        config: of the model.
        device: that holds it; the host never does.
        dtype: of dense weights.
        bits: stored bits per weight of all its Linear layers but the output head, which like the embedding stays
            dense, as by default when a model is compressed. None: nothing is packed.

    Raises:
        ValueError: if the config is of no causal language model, or ``bits`` are impossible.
    """
    model = _skeleton(config, dtype)
    generator = torch.Generator(device).manual_seed(0)
    if bits is not None:
        _pack(model, bits, dtype, generator)
    _fill(model, generator)
    model.tie_weights()
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    _share_orders(model)
    return model


def _pack(model: "PreTrainedModel", bits: float, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Put random packed layers in the place of Linear ones, site by site.

    Where mpfx reorders the rows that make an input (o, down), it needs no permutation: the time of a gather is counted
    all the same.
    """
    for path, module in _sites(model):
        rows, channels = linear_weight(module).shape
        bias = getattr(module, "bias", None)
        packed = MixedPrecisionLinear(
            random_weight(mixed_layout(rows, channels, bits), rows, generator),
            permutation=random_order(channels, generator),
            bias=None if bias is None else nn.Parameter(torch.zeros(rows, dtype=dtype, device=generator.device)),
            dtype=dtype,
        )
        model.set_submodule(path, packed)


@torch.no_grad()
def _share_orders(model: "PreTrainedModel") -> None:
    """Give the sites of an input group one permutation, as a compressed model has it; one call tells which they are."""
    read: list[tuple[MixedPrecisionLinear, Tensor]] = []

    def note(module: MixedPrecisionLinear, inputs: tuple[Tensor, ...]) -> None:
        read.append((module, inputs[0]))

    packed = [module for module in model.modules() if isinstance(module, MixedPrecisionLinear)]
    hooks = [module.register_forward_pre_hook(note) for module in packed]
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    orders: dict[int, Tensor | None] = {}
    for module, x in read:
        module.permutation = orders.setdefault(id(x), module.permutation)
    join_input_groups(model)


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Give all parameters that have none values: matrices normally distributed ones, norms 1, biases 0."""
    known: dict[nn.Parameter, nn.Parameter] = {}  # what is shared stays shared
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in known:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=generator.device)
                if parameter.dim() > 1:
                    value.normal_(0, _SPREAD, generator=generator)
                else:
                    value.fill_(0.0 if name == "bias" else 1.0)
                known[parameter] = nn.Parameter(value, requires_grad=False)
            module._parameters[name] = known[parameter]


def stored_bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    return sum(tensor.nbytes for tensor in _tensors(model))


def packed_bits_of(model: nn.Module) -> float | None:
    """Stored bits per weight of the packed layers, everything counted; None without any."""
    packed = [module for module in model.modules() if isinstance(module, MixedPrecisionLinear)]
    orders = {id(m.permutation): m.permutation.nbytes for m in packed if m.permutation is not None}
    weights = sum(module.in_features * module.out_features for module in packed)
    return 8 * (sum(m.packed.nbytes for m in packed) + sum(orders.values())) / weights if weights else None


def _tensors(model: nn.Module) -> list[Tensor]:
    found = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return list(found.values())
