"""transformers' own way: ``from_pretrained`` loads an mpfx checkpoint, ``save_pretrained`` writes one.

Importing this module registers both classes with transformers; ``import mpfx.hub`` does. ``config.json`` says what is
packed (:mod:`mpfx.hub.manifest` says why there). The model is built on the meta device, the header of the weights is
compared with it as :func:`mpfx.load` does, packed modules without values take the places of dense ones, and
transformers puts every tensor of the file where its name says. What a file names in mpfx's own words
(``mpfx:permutation:<k>``, ``mpfx:buffer:<name>``) is small: it is read here, and handed out when the rest is loaded.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mpfx.hub.contents import Packed, check_packed
from mpfx.hub.header import Header, check_header
from mpfx.hub.loading import check_model, packed_modules, replacements, set_buffer
from mpfx.hub.manifest import (
    BUFFER,
    FORMAT,
    MANIFEST,
    PERMUTATION,
    RESERVED,
    CheckpointError,
    Manifest,
    check_agreement,
    parse_config,
    read_manifest,
)
from mpfx.hub.saving import savable
from mpfx.hub.weights import Weights
from mpfx.nn import MixedPrecisionLinear, join_input_groups
from mpfx.nn.experts import PackedExperts


@register_quantization_config(FORMAT)
class MpfxConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed model: which modules are packed, with their sizes.

    Args:
        fields: as ``config.json`` has them.

    Raises:
        CheckpointError: if they are not what this version writes.
    """

    def __init__(self, **fields: Any) -> None:
        vars(self).update(parse_config({"quant_method": FORMAT, **fields}).quantization_config())

    def manifest(self, folder: Path) -> Manifest:
        """The same as the manifest of a folder."""
        return parse_config(vars(self), folder)

    def __repr__(self) -> str:
        fields: dict[str, Any] = vars(self)
        return f"{type(self).__name__}(sites={len(fields['sites'])}, experts={len(fields.get('experts', ()))})"


@register_quantizer(FORMAT)
class MpfxQuantizer(HfQuantizer):
    """Loads packed modules inside of ``from_pretrained``; it quantizes nothing itself.

    Args:
        quantization_config: of the checkpoint.
        kwargs: from transformers.

    Raises:
        ValueError: if the model is not packed yet.
    """

    requires_calibration = True
    quantization_config: MpfxConfig

    def __init__(self, quantization_config: MpfxConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._sites: dict[str, Packed] = {}
        self._orders: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._packed: list[MixedPrecisionLinear | PackedExperts] = []  # not the model, which would wait for gc then

    def update_weight_conversions(self, weight_conversions: Any, *_: Any) -> list[Any]:
        """No conversion: the file has the names and shapes of the model itself."""
        return []

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What ``save_pretrained`` writes: the weights as :func:`mpfx.save` writes them, and the config for them."""
        tensors, manifest = savable(model, Path())
        self.quantization_config = MpfxConfig(**manifest.quantization_config())
        model.config.quantization_config = self.quantization_config
        return tensors, {}

    def is_serializable(self) -> bool:
        """``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile a step when it uses a static cache.

        It makes CUDA graphs of what it compiles. Those can hold ``mpfx::linear``, but no weight with a bitmask, whose
        codes are counted at its first call (:func:`mpfx.nn.fill_masks` may have filled it), and no experts, of which
        other ones run for other tokens.
        """
        return bool(self._packed) and all(isinstance(m, MixedPrecisionLinear) and m.mask is None for m in self._packed)

    def look_at(self, model: nn.Module) -> None:
        """Find the packed modules of a model, which tell whether it can be compiled."""
        self._packed = [m for m in model.modules() if isinstance(m, MixedPrecisionLinear | PackedExperts)]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        files = _weights_files(kwargs.get("checkpoint_files"))
        manifest = self.quantization_config.manifest(files[0].parent)
        if (manifest.folder / MANIFEST).is_file():
            check_agreement(read_manifest(manifest.folder), manifest)
        with Weights(files) as weights, torch.device("cpu"):  # transformers makes "meta" the default here
            check_header(manifest, weights.header)
            paths = check_model(model, manifest, weights.header)
            packed = packed_modules(manifest, weights.header, _outline(weights))
            buffers = [name for name in weights.header if name.startswith(BUFFER)]
            self._buffers = {name.removeprefix(BUFFER): weights.read(name).clone() for name in buffers}
            header = weights.header
        self._take_apart(packed)
        for path, module in replacements(model, paths, packed, manifest).items():
            model.set_submodule(path, module)
        _set_dtypes(model, packed, header)
        _expect_names(model, manifest)
        return model

    def _take_apart(self, packed: Mapping[str, Packed]) -> None:
        """Keep what transformers must not see while it loads, and drop what it reads itself."""
        self._sites = dict(packed)
        for path, module in packed.items():
            if module.permutation is not None:
                self._orders[path], module.permutation = module.permutation, None
            module.to("meta")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        manifest = self.quantization_config.manifest(Path(model.name_or_path or ""))
        self._hand_out_orders()
        for path, module in self._sites.items():
            if module.codes.is_meta:
                raise ValueError(
                    f"Expected packed weights in memory but {path} is offloaded: leave `offload_buffers` out."
                )
            try:
                check_packed(module)
            except ValueError as error:
                raise CheckpointError(f"{manifest.weights}, site {path}: {error}") from error
        for name, value in self._buffers.items():
            set_buffer(model, name, value.to(model.get_buffer(name).device))
        for name, original in _tied_buffers(model, manifest).items():
            set_buffer(model, name, model.get_buffer(original))
        self._sites, self._orders, self._buffers = {}, {}, {}
        join_input_groups(model)
        self.look_at(model)
        return model

    def _hand_out_orders(self) -> None:
        """Sites that share a permutation share one tensor per device."""
        placed: dict[tuple[int, torch.device], Tensor] = {}
        for path, order in self._orders.items():
            device = self._sites[path].codes.device
            self._sites[path].permutation = placed.setdefault((id(order), device), order.to(device))


def adopt(model: nn.Module, manifest: Manifest) -> None:
    """Make ``save_pretrained`` of a model write a packed checkpoint; nothing, if it is not transformers'.

    Args:
        model: with packed modules.
        manifest: that says which.
    """
    if isinstance(model, PreTrainedModel):
        config = MpfxConfig(**manifest.quantization_config())
        model.config.quantization_config = config
        quantizer = MpfxQuantizer(config)
        quantizer.look_at(model)
        model.hf_quantizer = quantizer  # type: ignore[assignment]
        model._weight_conversions = []  # type: ignore[assignment]


def _weights_files(files: Sequence[str] | None) -> list[Path]:
    if not files or not all(file.endswith(".safetensors") for file in files):
        raise CheckpointError(
            f"Expected the weights of an mpfx checkpoint to be .safetensors files but got {files or 'none'}: name the "
            "folder that mpfx.save wrote, or its name on the Hub."
        )
    paths = [Path(file) for file in files]
    if strange := [str(path) for path in paths if path.parent != paths[0].parent]:
        raise CheckpointError(f"{paths[0].parent}: expected all weights in this folder but got {strange[:5]}.")
    return paths


def _outline(weights: Weights) -> Any:
    """Read what packed modules cannot be built without; all else on the meta device."""

    def read(name: str) -> Tensor:
        if name.startswith(PERMUTATION):
            return weights.read(name).clone()  # kept: a view would keep the whole file, which transformers maps again
        if name.endswith((".widths", ".mask")):
            return weights.read(name)
        info = weights.header[name]
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    return read


def _set_dtypes(model: PreTrainedModel, packed: Mapping[str, Packed], header: Header) -> None:
    """Every tensor in the dtype it was saved in; if another dtype than the model's was asked for, as ``.to`` casts it.

    The dtype of the config, as transformers writes and reads it, is that of the first parameter.
    """
    floats = {n: p for n, p in model.named_parameters() if n in header and p.is_floating_point()}
    saved = next((header[name].dtype for name in floats), None)
    wanted = model.config.dtype
    if saved is not None and wanted != saved:
        for module in packed.values():
            module.to(wanted)
        return
    model._keep_in_fp32_modules = model._keep_in_fp32_modules_strict = None
    for name, tensor in (*floats.items(), *model.named_buffers()):
        if name in header:
            tensor.data = tensor.data.to(header[name].dtype)


def _expect_names(model: PreTrainedModel, manifest: Manifest) -> None:
    """Tell transformers which names of the file and of the model have no counterpart, and what is tied."""
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), f"^{RESERVED}"}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    model.all_tied_weights_keys = {name: source for name, source in manifest.tied.items() if name in parameters}
    lacking = {f"^{re.escape(name)}$" for name in _tied_buffers(model, manifest)}
    model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *lacking}


def _tied_buffers(model: PreTrainedModel, manifest: Manifest) -> dict[str, str]:
    buffers = dict(model.named_buffers(remove_duplicate=False))
    tied = {name.removeprefix(BUFFER): source.removeprefix(BUFFER) for name, source in manifest.tied.items()}
    return {name: source for name, source in tied.items() if name in buffers}
