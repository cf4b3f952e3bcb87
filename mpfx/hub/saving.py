"""Writing a checkpoint, so that an earlier one is lost only when the new one is whole."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpfx.hub.contents import CONFIG, GENERATION, Packed, check_order, collect, packed_sites
from mpfx.hub.header import DTYPES, STACK_PARTS, TensorInfo, check_header
from mpfx.hub.manifest import MANIFEST, WEIGHTS, parse_manifest
from mpfx.nn import MixedPrecisionLinear, validate
from mpfx.nn.experts import PackedExperts, split_stack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        model: any module; its :class:`mpfx.nn.MixedPrecisionLinear` and the stacks of its
            :class:`mpfx.nn.experts.PackedExperts` are stored packed, all else as it is.
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
    tensors, manifest = collect(model, sites, folder)
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


def _check_savable(model: nn.Module, sites: Mapping[str, Packed], folder: Path) -> None:
    if not sites:
        raise ValueError("Expected a model with packed modules but found none: compress it first.")
    if "" in sites or isinstance(model, PackedExperts):
        raise ValueError("Expected a model with packed modules but got a packed module itself: wrap it in a model.")
    for path, module in sites.items():
        owner = model.get_submodule(path.rpartition(".")[0])
        if not isinstance(module, MixedPrecisionLinear) and not isinstance(owner, PackedExperts):
            raise ValueError(
                f"Expected packed experts inside of PackedExperts but {path} is in {type(owner).__name__}."
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise ValueError(f"Expected a dense tensor with values but {name} is {tensor.layout} on {tensor.device}.")
    found = [name for name in (WEIGHTS, CONFIG) if (folder / name).exists()]
    if found and not (folder / MANIFEST).exists():
        raise ValueError(
            f"Expected `path` to be a new folder or an mpfx checkpoint but {str(folder)!r} holds {', '.join(found)} "
            f"without {MANIFEST}: another model, or a save that was cut off. Name another folder, or remove them first."
        )


def _check_values(sites: Mapping[str, Packed]) -> None:
    """Refuse values that :func:`load` would refuse."""
    for path, module in sites.items():
        try:
            if isinstance(module, MixedPrecisionLinear):
                validate(module.packed)
            else:
                sizes = {"out_features": module.out_features, "in_features": module.in_features}
                parts = {name: getattr(module, name) for name in STACK_PARTS}
                split_stack(parts, **sizes, group_size=module.layouts[0].group_size)
            if module.permutation is not None:
                check_order(module.permutation.cpu(), module.in_features, "permutation")
        except ValueError as error:
            raise ValueError(f"site {path} cannot be saved: {error}") from error


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
        (folder / GENERATION).unlink(missing_ok=True)  # the new model may have none
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
