"""mpfx's own checkpoint: a folder with ``model.safetensors`` and ``mpfx.json``.

``model.safetensors`` holds, little-endian, for every packed site ``<path>.codes``, ``.scales``, ``.widths`` and
where they exist ``.zeros``, ``.mask`` and ``.bias`` (see :class:`mpfx.nn.PackedWeight`), every permutation once as
``mpfx:permutation:<k>``, all other parameters and persistent buffers of the model under their own names, and floating
buffers that its state dict leaves out (rotary tables, whose dtype depends on the model's history) as
``mpfx:buffer:<name>``. ``mpfx.json`` is the manifest: format version, the packed sites with their sizes, which
tensors share memory, and anything the caller adds. It is put in place last, so a folder with a manifest is whole.
Beside them lies whatever the model's own library needs (config, tokenizer).
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mpfx.graph import is_linear, linear_weight
from mpfx.hub.manifest import (
    BUFFER,
    DTYPES,
    FLOATS,
    MANIFEST,
    PARTS,
    PERMUTATION,
    RESERVED,
    WEIGHTS,
    CheckpointError,
    Header,
    Manifest,
    SiteEntry,
    TensorInfo,
    check_header,
    inside,
    parse_manifest,
    read_header,
    read_manifest,
)
from mpfx.nn import Layout, MixedPrecisionLinear, PackedWeight, validate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MANIFEST", "WEIGHTS", "CheckpointError", "load", "packed_sites", "save", "tensor_bytes"]

_CONFIG, _GENERATION = "config.json", "generation_config.json"


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    extra: Mapping[str, Any] | None = None,
) -> int:
    """Write a model with packed modules to a folder.

    A transformers model also gets its config and generation config, and its tokenizer if one is given. Every file is
    written whole before the first one of an earlier checkpoint is replaced: if that fails, the earlier one stands.

    Args:
        model: any module; its :class:`mpfx.nn.MixedPrecisionLinear` are stored packed, all else as it is.
        path: folder; made if needed. An earlier checkpoint in it is replaced.
        tokenizer: to store along.
        extra: plain data for the manifest, under "extra".

    Returns:
        Bytes of the weight tensors in the file.

    Raises:
        ValueError: if the model holds no packed module or something that no checkpoint can hold, or if the folder
            holds a model that is not an mpfx checkpoint.
    """
    folder = Path(path)
    sites = dict(packed_sites(model))
    _check_savable(model, sites, folder)
    tensors, manifest = _collect(model, sites, folder)
    tensors = _apart({name: _plain(tensor) for name, tensor in tensors.items()})
    text = manifest.dumps(extra or {})
    parse_manifest(folder, text)  # nothing is written that could not be loaded
    check_header(manifest, {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    _check_values(sites)
    with _staging(folder) as staged:
        _write_weights(tensors, staged / WEIGHTS)
        if manifest.library is not None:
            _save_skeleton(model, staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staged))
        (staged / MANIFEST).write_text(text, encoding="utf-8")
        _swap(staged, folder)
    return sum(t.nbytes for t in tensors.values())


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all weight tensors of a model as a checkpoint holds them: shared ones once."""
    return sum(t.nbytes for t in _collect(model, dict(packed_sites(model)), Path())[0].values())


def packed_sites(model: nn.Module) -> Iterator[tuple[str, MixedPrecisionLinear]]:
    """Packed modules of a model, by path."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, MixedPrecisionLinear))


def _check_savable(model: nn.Module, sites: Mapping[str, nn.Module], folder: Path) -> None:
    if not sites:
        raise ValueError("Expected a model with packed modules but found none: compress it first.")
    if "" in sites:
        raise ValueError("Expected a model with packed modules but got a packed module itself: wrap it in a model.")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise ValueError(f"Expected a dense tensor with values but {name} is {tensor.layout} on {tensor.device}.")
    found = [name for name in (WEIGHTS, _CONFIG) if (folder / name).exists()]
    if found and not (folder / MANIFEST).exists():
        raise ValueError(
            f"Expected `path` to be a new folder or an mpfx checkpoint but {str(folder)!r} holds {', '.join(found)} "
            f"without {MANIFEST}: another model, or a save that was cut off. Name another folder, or remove them first."
        )


def _check_values(sites: Mapping[str, MixedPrecisionLinear]) -> None:
    """Refuse values that :func:`load` would refuse."""
    for path, module in sites.items():
        try:
            validate(module.packed)
            if module.permutation is not None:
                _check_order(module.permutation.cpu(), module.in_features, "permutation")
        except ValueError as error:
            raise ValueError(f"site {path} cannot be saved: {error}") from error


def _collect(
    model: nn.Module, sites: Mapping[str, MixedPrecisionLinear], folder: Path
) -> tuple[dict[str, Tensor], Manifest]:
    """Tensors for the file, wherever they are now, and the manifest that explains them."""
    tensors: dict[str, Tensor] = {}
    permutations: dict[tuple[torch.dtype, bytes], int] = {}
    entries: dict[str, SiteEntry] = {}
    for path, module in sites.items():
        entries[path] = _entry(module)
        state = module.state_dict(prefix=f"{path}.")
        order = state.pop(f"{path}.permutation", None)
        tensors |= state
        if order is not None:
            content = order.cpu().contiguous().view(torch.uint8).numpy().tobytes()
            index = permutations.setdefault((order.dtype, content), len(permutations))
            entries[path] = replace(entries[path], permutation=index)
            tensors[f"{PERMUTATION}{index}"] = order
    outside, tied = _untie(_dense_tensors(model, _paths(model, sites)))
    library = "transformers" if hasattr(getattr(model, "config", None), "save_pretrained") else None
    return tensors | outside, Manifest(folder, entries, tied, library)


def _entry(module: MixedPrecisionLinear) -> SiteEntry:
    dtype = str(module.weight_dtype).removeprefix("torch.")
    return SiteEntry(module.in_features, module.out_features, module.layout.group_size, dtype, None)


def _paths(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Every path under which the modules can be found, with the one that names it."""
    known = {id(module): path for path, module in modules.items()}
    return {p: known[id(m)] for p, m in model.named_modules(remove_duplicate=False) if id(m) in known}


def _dense_tensors(model: nn.Module, sites: Iterable[str]) -> dict[str, Tensor]:
    """All that a checkpoint holds of a model beside its packed sites, by its name in the file.

    Raises:
        ValueError: for names or values that a checkpoint cannot hold.
    """
    state, below = model.state_dict(), inside(sites)
    buffers = {n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in state}
    unsaved = {f"{BUFFER}{n}": b for n, b in buffers.items() if b.numel() and b.is_floating_point()}
    kept = {n: t for n, t in state.items() if not n.startswith(below)}
    for name, value in state.items():
        if name.startswith(RESERVED):
            raise ValueError(f"Expected no name that begins with {RESERVED} but got {name}: rename that child.")
        if not isinstance(value, Tensor):
            raise ValueError(f"Expected tensors in the state dict but {name} is {type(value).__name__}.")
    return kept | {n: b for n, b in unsaved.items() if not n.removeprefix(BUFFER).startswith(below)}


def _untie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors without those that are another one over again, and which one each of these is."""
    first: dict[Any, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and (original := first.setdefault(_memory(tensor), name)) != name:
            tied[name] = original
    return {name: tensor for name, tensor in tensors.items() if name not in tied}, tied


def _memory(tensor: Tensor) -> Any:
    """What two tensors have in common if they are one and the same."""
    place = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (*place, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())


def _plain(tensor: Tensor) -> Tensor:
    if tensor.dtype not in DTYPES.values():
        raise ValueError(f"Expected tensors of {list(DTYPES)} but got {tensor.dtype}.")
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy what overlaps with another tensor: the file format knows no shared memory."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            tensors[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return tensors


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder inside the folder, for new files until all of them are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".mpfx-", dir=folder))
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _write_weights(tensors: dict[str, Tensor], target: Path) -> None:
    target.touch()
    mode = target.stat().st_mode  # what the user's umask makes of a new file; the writer may be stricter
    save_file(tensors, str(target), metadata={"format": "pt"})
    target.chmod(mode)
    _flush(target)


def _save_skeleton(model: Any, folder: Path) -> None:
    model.config.save_pretrained(str(folder))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(folder))


def _swap(staged: Path, folder: Path) -> None:
    """Put the new files in the place of the old ones; in between, no manifest says that the folder is whole."""
    new = [file.relative_to(staged) for file in staged.rglob("*") if file.is_file()]
    for name in new:
        _flush(staged / name)
    manifest, old = folder / MANIFEST, staged / "old"
    if earlier := manifest.exists():
        manifest.replace(old)
    try:
        (staged / WEIGHTS).replace(folder / WEIGHTS)
    except OSError:  # nothing is lost yet: some systems refuse while another process reads the file
        if earlier:
            old.replace(manifest)
        raise
    if earlier:
        (folder / _GENERATION).unlink(missing_ok=True)  # the new model may have none
    for name in new:
        if name not in (Path(WEIGHTS), Path(MANIFEST)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).replace(folder / name)
    _flush_folder(folder)
    (staged / MANIFEST).replace(manifest)
    _flush_folder(folder)


def _flush(file: Path) -> None:
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load a checkpoint; its logits are bit for bit those of the model that was saved.

    Args:
        path: the folder.
        model: an instance of the model's class to fill, for modules that are not from transformers; its weights are
            replaced, or left as they are if the checkpoint cannot be loaded. A transformers model is built from the
            folder's config (code from the folder is never run).

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        FileNotFoundError: if the folder or one of mpfx's two files is missing.
        CheckpointError: if a file is damaged, of another version, or does not fit the model.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    with _open_weights(folder) as file:
        header = read_header(file, manifest.weights)
        check_header(manifest, header)
        skeleton = _skeleton(folder, manifest) if model is None else model
        paths = _check_modules(skeleton, manifest, header)
        _check_tensors(_dense_tensors(skeleton, paths), manifest, header)
        modules = _read_sites(file, manifest)
        state = _read_dense(file, manifest, header)
    with _all_or_nothing(skeleton):
        for site, original in paths.items():
            skeleton.set_submodule(site, modules[original])
        _fill(skeleton, state, manifest)
    return skeleton.eval()


def _open_weights(folder: Path) -> Any:
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}.")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error


def _skeleton(folder: Path, manifest: Manifest) -> nn.Module:
    if manifest.library != "transformers":
        raise CheckpointError(
            f"{folder} holds a module that is not from transformers: build it and call mpfx.load(path, model=...)."
        )
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {_CONFIG}, which a model from transformers is built from.")
    try:
        return _build(folder)
    except Exception as error:  # model code raises whatever an odd config makes it stumble over
        raise CheckpointError(
            f"{folder}: no model can be built from its {_CONFIG} and {_GENERATION}: {type(error).__name__}: {error}"
        ) from error


def _build(folder: Path) -> nn.Module:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    with init_empty_weights(include_buffers=False):  # buffers that no file holds (rotary tables) are computed for real
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if (folder / _GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)  # type: ignore[assignment]
    return model


def _check_modules(skeleton: nn.Module, manifest: Manifest, header: Header) -> dict[str, str]:
    """Check that every site is a linear layer of the same sizes; return every path of each, with its site."""
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    if unknown := sorted(set(manifest.sites) - set(modules)):
        raise CheckpointError(f"{manifest.path} names sites that {type(skeleton).__name__} lacks: {unknown[:5]}.")
    for site, entry in manifest.sites.items():
        _check_module(f"{manifest.path}, site {site}", entry, modules[site], f"{site}.bias" in header)
    paths = _paths(skeleton, {site: modules[site] for site in manifest.sites})
    if twice := sorted(set(manifest.sites) - set(paths.values())):
        raise CheckpointError(f"{manifest.path}: sites {twice[:5]} are the same modules as other sites of the model.")
    packed = {name for name, module in modules.items() if isinstance(module, MixedPrecisionLinear)}
    if unlisted := sorted(packed - set(paths)):
        raise CheckpointError(f"{manifest.path} lacks sites that are packed in the given model: {unlisted[:5]}.")
    return paths


def _check_module(where: str, entry: SiteEntry, module: nn.Module, bias: bool) -> None:
    if isinstance(module, MixedPrecisionLinear):
        sizes: tuple[int, ...] = (module.out_features, module.in_features)
    elif is_linear(module):
        sizes = tuple(linear_weight(module).shape)
    else:
        raise CheckpointError(f"{where}: expected a linear layer but the model has a {type(module).__name__} there.")
    found = (entry.out_features, entry.in_features)
    if found != sizes:
        raise CheckpointError(f"{where}: expected the layer's sizes (out, in), {sizes}, but got {found}.")
    if bias != (getattr(module, "bias", None) is not None):
        owner, other = ("file", "model") if bias else ("model", "file")
        raise CheckpointError(f"{where}: the {owner} has a bias where the {other} has none.")


def _check_tensors(dense: Mapping[str, Tensor], manifest: Manifest, header: Header) -> None:
    """Compare names, sizes and dtypes outside the packed sites with the model's."""
    below = (*inside(manifest.sites), PERMUTATION)
    found = {name: info for name, info in header.items() if not name.startswith(below)}
    found |= {name: header[original] for name, original in manifest.tied.items()}
    wanted = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in dense.items()}
    if lacking := sorted(set(wanted) - set(found)):
        raise CheckpointError(f"{manifest.weights} lacks {lacking[:5]} of the model.")
    if extra := sorted(set(found) - set(wanted)):
        raise CheckpointError(f"{manifest.weights} or `tied` holds {extra[:5]}, unknown to the model.")
    if odd := [f"{n}: {found[n]} instead of {wanted[n]}" for n in wanted if found[n].shape != wanted[n].shape]:
        raise CheckpointError(f"{manifest.weights} holds other shapes than the model: {odd[:5]}.")
    if odd := [f"{n}: {found[n]} instead of {wanted[n]}" for n in wanted if not _serves(found[n], wanted[n])]:
        raise CheckpointError(f"{manifest.weights} holds other dtypes than the model: {odd[:5]}.")


def _serves(found: TensorInfo, wanted: TensorInfo) -> bool:
    """Whether a dtype may stand for another: floating ones may, as a model can be saved in half precision."""
    return found.dtype == wanted.dtype or (wanted.dtype.is_floating_point and found.dtype in FLOATS)


def _read_sites(file: Any, manifest: Manifest) -> dict[str, MixedPrecisionLinear]:
    names, orders = set(file.keys()), _read_orders(file, manifest)
    modules = {}
    for site, entry in manifest.sites.items():
        tensors = {p: _read(file, f"{site}.{p}", manifest) if f"{site}.{p}" in names else None for p in PARTS}
        order = None if entry.permutation is None else orders[entry.permutation]
        try:
            modules[site] = _packed_module(entry, order, **tensors)
        except ValueError as error:
            raise CheckpointError(f"{manifest.weights}, site {site}: {error}") from error
    return modules


def _read_orders(file: Any, manifest: Manifest) -> dict[int, Tensor]:
    """Every permutation once: the sites of an input group share it."""
    sizes = {e.permutation: e.in_features for e in manifest.sites.values() if e.permutation is not None}
    orders = {}
    for number, channels in sizes.items():
        orders[number] = _read(file, f"{PERMUTATION}{number}", manifest)
        try:
            _check_order(orders[number], channels, f"{PERMUTATION}{number}")
        except ValueError as error:
            raise CheckpointError(f"{manifest.weights}: {error}") from error
    return orders


def _packed_module(
    entry: SiteEntry, permutation: Tensor | None, *, bias: Tensor | None, **parts: Tensor | None
) -> MixedPrecisionLinear:
    codes, scales, widths = parts["codes"], parts["scales"], parts["widths"]
    assert codes is not None  # the header was checked
    assert scales is not None
    assert widths is not None
    layout = Layout(entry.in_features, tuple(widths.tolist()), entry.group_size)
    weight = PackedWeight(codes, scales, parts["zeros"], parts["mask"], widths, layout)
    validate(weight)
    parameter = None if bias is None else nn.Parameter(bias)
    return MixedPrecisionLinear(weight, permutation=permutation, bias=parameter, dtype=getattr(torch, entry.dtype))


def _check_order(order: Tensor, channels: int, name: str) -> None:
    if not torch.equal(order.long().sort().values, torch.arange(channels)):
        raise ValueError(
            f"Expected `{name}` to be a permutation: each of 0 .. {channels - 1} once, but some are lacking."
        )


def _read(file: Any, name: str, manifest: Manifest) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{manifest.weights} is damaged: {name} cannot be read: {error}.") from error
    return tensor


def _read_dense(file: Any, manifest: Manifest, header: Header) -> dict[str, Tensor]:
    below = (*inside(manifest.sites), PERMUTATION)
    state = {name: _read(file, name, manifest) for name in header if not name.startswith(below)}
    return state | {name: state[original] for name, original in manifest.tied.items()}


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Give the model its own children and tensors back if the block fails."""
    kinds = ("_modules", "_parameters", "_buffers")
    before = [(module, {kind: dict(getattr(module, kind)) for kind in kinds}) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, members in before:
            for kind, content in members.items():
                getattr(module, kind).clear()
                getattr(module, kind).update(content)
        raise


def _fill(skeleton: nn.Module, state: dict[str, Tensor], manifest: Manifest) -> None:
    for name in [name for name in state if name.startswith(BUFFER)]:
        path, _, leaf = name.removeprefix(BUFFER).rpartition(".")
        skeleton.get_submodule(path)._buffers[leaf] = state.pop(name)
    try:
        unknown = skeleton.load_state_dict(state, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:  # of a module with rules of its own
        raise CheckpointError(f"{manifest.weights} does not fit the model: {error}") from error
    if unknown:
        raise CheckpointError(f"{manifest.weights} holds {unknown[:5]}, which the model does not take.")
    _tie(skeleton, manifest)


def _tie(skeleton: nn.Module, manifest: Manifest) -> None:
    """Assigned parameters are distinct objects even over one tensor: share them as the saved model did."""
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    for name, original in manifest.tied.items():
        if name in parameters and original in parameters:
            path, _, leaf = name.rpartition(".")
            skeleton.get_submodule(path)._parameters[leaf] = parameters[original]
