"""mpfx's own checkpoint: a folder with ``model.safetensors`` and ``mpfx.json``.

``model.safetensors`` holds, little-endian, for every packed site ``<path>.codes``, ``.scales``, ``.widths`` and
where they exist ``.zeros``, ``.mask`` and ``.bias`` (see :class:`mpfx.nn.PackedWeight`), every permutation once as
``permutation.<k>``, all other parameters and persistent buffers of the model under their own names, and floating
buffers that its state dict leaves out (rotary tables, whose dtype depends on the model's history) as
``buffer.<name>``. ``mpfx.json`` is the manifest: format version, the packed sites with their sizes, which tensors
share memory, and anything the caller adds. It is written last, so a folder with a manifest is whole. Beside them
lies whatever the model's own library needs (config, tokenizer).
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mpfx.nn import SEGMENT, Layout, MixedPrecisionLinear, PackedWeight, validate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "mpfx"
VERSION = 1
MANIFEST = "mpfx.json"
WEIGHTS = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: what is wrong and where."""


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    extra: Mapping[str, Any] | None = None,
) -> int:
    """Write a model with packed modules to a folder.

    A transformers model also gets its config and generation config, and its tokenizer if one is given.

    Args:
        model: any module; its :class:`mpfx.nn.MixedPrecisionLinear` are stored packed, all else as it is.
        path: folder; made if needed. Files of the same names are replaced, each at once.
        tokenizer: to store along.
        extra: plain data for the manifest, under "extra".

    Returns:
        Bytes of the weight tensors in the file.

    Raises:
        ValueError: if the model holds no packed module.
    """
    sites = dict(packed_sites(model))
    if not sites:
        raise ValueError("Expected a model with packed modules but found none: compress it first.")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # until the new one stands, the folder is not a checkpoint
    tensors, manifest = _collect(model, sites)
    _replace(folder / WEIGHTS, lambda target: save_file(tensors, target, metadata={"format": "pt"}))
    if hasattr(model, "config") and hasattr(model.config, "save_pretrained"):
        _save_skeleton(model, folder)
        manifest["library"] = "transformers"
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    manifest["extra"] = dict(extra or {})
    text = json.dumps(manifest, indent=1, sort_keys=True)
    _replace(folder / MANIFEST, lambda target: Path(target).write_text(text, encoding="utf-8"))
    return sum(t.nbytes for t in tensors.values())


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all weight tensors of a model as a checkpoint holds them: shared ones once."""
    return sum(t.nbytes for t in _collect(model, dict(packed_sites(model)))[0].values())


def packed_sites(model: nn.Module) -> Iterator[tuple[str, MixedPrecisionLinear]]:
    """Packed modules of a model, by path."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, MixedPrecisionLinear))


def _collect(model: nn.Module, sites: Mapping[str, MixedPrecisionLinear]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors for the file and the manifest that explains them."""
    tensors: dict[str, Tensor] = {}
    permutations: dict[bytes, int] = {}
    entries: dict[str, Any] = {}
    for path, module in sites.items():
        entries[path] = {
            "in_features": module.in_features,
            "out_features": module.out_features,
            "group_size": module.layout.group_size,
            "dtype": str(module.weight_dtype).removeprefix("torch."),
            "permutation": None,
        }
        if module.permutation is not None:
            order = module.permutation.cpu().contiguous()
            index = permutations.setdefault(order.view(torch.uint8).numpy().tobytes(), len(permutations))
            entries[path]["permutation"] = index
            tensors[f"permutation.{index}"] = order
    tied: dict[str, str] = {}
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[2] == "permutation" and name.rpartition(".")[0] in sites:
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and (original := first.setdefault(key, name)) != name:
            tied[name] = original
        else:
            tensors[name] = tensor.detach().cpu().contiguous()
    for name, buffer in unsaved_buffers(model).items():
        tensors[f"buffer.{name}"] = buffer.detach().cpu().contiguous()
    manifest = {"format": FORMAT, "version": VERSION, "segment": SEGMENT, "sites": entries, "tied": tied}
    return tensors, manifest


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Floating buffers that the state dict leaves out, by name."""
    saved = set(model.state_dict())
    return {n: b for n, b in model.named_buffers() if n not in saved and b.numel() and b.is_floating_point()}


def _save_skeleton(model: Any, folder: Path) -> None:
    model.config.save_pretrained(str(folder))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(folder))


def _replace(target: Path, write: Any) -> None:
    """Write to a temporary name beside the target, flush it to the disk, then rename: never half a file."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask makes of a new file; some writers are stricter
        write(str(temporary))
        temporary.chmod(mode)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load a checkpoint; its logits are bit for bit those of the model that was saved.

    Args:
        path: the folder.
        model: an instance of the model's class to fill, for modules that are not from transformers; its weights are
            replaced. A transformers model is built from the folder's config (code from the folder is never run).

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        CheckpointError: if a file is damaged, of another version, or does not fit the model.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    with _open_weights(folder) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (not a dict)
        skeleton = _skeleton(folder, manifest) if model is None else model
        _check_names(skeleton, manifest, shapes)
        modules = {s: _site(file, s, entry, skeleton.get_submodule(s)) for s, entry in manifest.sites.items()}
        for site, module in modules.items():
            skeleton.set_submodule(site, module)
        _fill(skeleton, file, manifest)
    return skeleton.eval()


@dataclass(frozen=True)
class _Manifest:
    path: Path
    sites: Mapping[str, Mapping[str, Any]]
    tied: Mapping[str, str]
    library: str | None


def _read_manifest(folder: Path) -> _Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {MANIFEST}: not an mpfx checkpoint, or one whose saving did not finish."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        name, version = data["format"], data["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a manifest of mpfx: {error!r}.") from error
    if name != FORMAT or version != VERSION:
        raise CheckpointError(f"Expected {path} to be {FORMAT} version {VERSION} but got {name} version {version}.")
    if (
        data.get("segment") != SEGMENT
        or not isinstance(data.get("sites"), dict)
        or not isinstance(data.get("tied"), dict)
    ):
        raise CheckpointError(f"{path} lacks or misstates `segment`, `sites` or `tied` of version {VERSION}.")
    for site, entry in data["sites"].items():
        if not _is_entry(entry):
            raise CheckpointError(f"{path} lacks or misstates a field of site {site}: {entry}.")
    if not all(isinstance(name, str) for name in data["tied"].values()):
        raise CheckpointError(f"{path} misstates `tied`: expected names of tensors.")
    return _Manifest(path, data["sites"], data["tied"], data.get("library"))


def _is_entry(entry: Any) -> bool:
    """Whether what a manifest says of a site is what a manifest may say."""
    if not isinstance(entry, dict):
        return False
    sizes = [entry.get("in_features"), entry.get("out_features")]
    optional = [entry.get("group_size"), entry.get("permutation")]
    return (
        all(isinstance(size, int) and size > 0 for size in sizes)
        and all(number is None or (isinstance(number, int) and number >= 0) for number in optional)
        and isinstance(getattr(torch, str(entry.get("dtype")), None), torch.dtype)
    )


def _open_weights(folder: Path) -> Any:
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}.")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error


def _skeleton(folder: Path, manifest: _Manifest) -> nn.Module:
    if manifest.library != "transformers":
        raise CheckpointError(
            f"{folder} holds a module that is not from transformers: build it and call mpfx.load(path, model=...)."
        )
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    with init_empty_weights(include_buffers=False):  # buffers that no file holds (rotary tables) are computed for real
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)  # type: ignore[assignment]
    return model


def _check_names(skeleton: nn.Module, manifest: _Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the file's names and sizes with the model's before anything is read or replaced."""
    modules = dict(skeleton.named_modules())
    if unknown := sorted(set(manifest.sites) - set(modules)):
        raise CheckpointError(f"{manifest.path} names sites that {type(skeleton).__name__} lacks: {unknown[:5]}.")
    inside = tuple(f"{site}." for site in manifest.sites)
    wanted = {n: tuple(t.shape) for n, t in skeleton.state_dict().items() if not n.startswith(inside)}
    wanted |= {f"buffer.{n}": tuple(b.shape) for n, b in unsaved_buffers(skeleton).items()}
    found = {n: s for n, s in shapes.items() if not n.startswith((*inside, "permutation."))}
    found |= {n: shapes[o] for n, o in manifest.tied.items() if o in shapes and not n.startswith(inside)}
    if lacking := sorted(set(wanted) - set(found)):
        raise CheckpointError(f"{manifest.path.parent / WEIGHTS} lacks {lacking[:5]} of {type(skeleton).__name__}.")
    if extra := sorted(set(found) - set(wanted)):
        raise CheckpointError(
            f"{manifest.path.parent / WEIGHTS} holds {extra[:5]}, unknown to {type(skeleton).__name__}."
        )
    if odd := [f"{n} {found[n]} instead of {wanted[n]}" for n in wanted if found[n] != wanted[n]]:
        raise CheckpointError(f"{manifest.path.parent / WEIGHTS} holds other shapes than the model: {odd[:5]}.")


def _site(file: Any, site: str, entry: Mapping[str, Any], dense: nn.Module) -> MixedPrecisionLinear:
    names = set(file.keys())

    def read(part: str) -> Tensor | None:
        return file.get_tensor(f"{site}.{part}") if f"{site}.{part}" in names else None

    try:
        widths, codes, scales = read("widths"), read("codes"), read("scales")
        if widths is None or codes is None or scales is None:
            raise ValueError("`codes`, `scales` or `widths` is missing.")
        layout = Layout(entry["in_features"], tuple(widths.tolist()), entry.get("group_size"))
        weight = PackedWeight(codes, scales, read("zeros"), read("mask"), widths, layout)
        validate(weight)
        if weight.out_features != entry["out_features"]:
            raise ValueError(f"Expected {entry['out_features']} rows but got {weight.out_features}.")
        permutation = _read_permutation(file, entry)
        bias = read("bias")
        if (bias is None) != (getattr(dense, "bias", None) is None):
            raise ValueError("the model has a bias where the file has none, or the other way round.")
        if bias is not None and tuple(bias.shape) != (weight.out_features,):
            raise ValueError(f"Expected a bias of {weight.out_features} but got shape {tuple(bias.shape)}.")
    except ValueError as error:
        raise CheckpointError(f"site {site}: {error}") from error
    return MixedPrecisionLinear(
        weight,
        permutation=permutation,
        bias=None if bias is None else nn.Parameter(bias),
        dtype=getattr(torch, entry["dtype"]),
    )


def _read_permutation(file: Any, entry: Mapping[str, Any]) -> Tensor | None:
    if entry.get("permutation") is None:
        return None
    name = f"permutation.{entry['permutation']}"
    if name not in file.keys():  # noqa: SIM118  (not a dict)
        raise ValueError(f"`{name}` is missing.")
    order: Tensor = file.get_tensor(name)
    if not torch.equal(order.long().sort().values, torch.arange(entry["in_features"])):
        raise ValueError(f"Expected `{name}` to be a permutation of {entry['in_features']} channels.")
    return order


def _fill(skeleton: nn.Module, file: Any, manifest: _Manifest) -> None:
    inside = tuple(f"{site}." for site in manifest.sites)
    names = [n for n in file.keys() if not n.startswith((*inside, "permutation."))]  # noqa: SIM118
    state = {name: file.get_tensor(name) for name in names}
    for name, original in manifest.tied.items():
        if not name.startswith(inside):
            state[name] = state[original]
    for name in [name for name in state if name.startswith("buffer.")]:
        path, _, leaf = name.removeprefix("buffer.").rpartition(".")
        skeleton.get_submodule(path)._buffers[leaf] = state.pop(name)
    skeleton.load_state_dict(state, strict=False, assign=True)
    _tie(skeleton, manifest)


def _tie(skeleton: nn.Module, manifest: _Manifest) -> None:
    """Assigned parameters are distinct objects even over one tensor: share them as the saved model did."""
    for name, original in manifest.tied.items():
        path, _, leaf = name.rpartition(".")
        owner = skeleton.get_submodule(path)
        source = skeleton.get_submodule(original.rpartition(".")[0])
        value = getattr(source, original.rpartition(".")[2])
        if leaf in owner._parameters:
            owner._parameters[leaf] = value
