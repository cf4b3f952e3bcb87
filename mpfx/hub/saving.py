"""Writing a checkpoint, so that an earlier one is lost only when the new one is whole."""

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpfx.hub.card import model_card, write_card
from mpfx.hub.contents import Packed, check_packed, collect, packed_sites
from mpfx.hub.header import DTYPES, TensorInfo, check_header
from mpfx.hub.manifest import (
    CONFIG,
    GENERATION,
    INDEX,
    MANIFEST,
    WEIGHTS,
    Manifest,
    is_checkpoint,
    parse_manifest,
)
from mpfx.nn import MixedPrecisionLinear
from mpfx.nn.experts import PackedExperts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    extra: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "50GB",
) -> int:
    """Write a model with packed modules to a folder.

    A transformers model also gets its config and generation config, a model card, and its tokenizer if one is given:
    ``from_pretrained`` loads the folder after ``import mpfx.hub``, from the disk or uploaded to the Hub. Every file is
    written whole before the first one of an earlier checkpoint is replaced: if that fails, the earlier one stands.

    Args:
        model: any module; its :class:`mpfx.nn.MixedPrecisionLinear` and the stacks of its
            :class:`mpfx.nn.experts.PackedExperts` are stored packed, all else as it is.
        path: folder; made if needed. An earlier checkpoint in it is replaced.
        tokenizer: to store along.
        extra: plain data for the manifest, under "extra".
        max_shard_size: most bytes of a weights file, as a number or like "5GB"; larger models are written as shards
            with an index. A single tensor is never cut.

    Returns:
        Bytes of the weight tensors in the file.

    Raises:
        ValueError: if the model holds no packed module or something that no checkpoint can hold, if the folder holds
            a model that is not an mpfx checkpoint, or for a size that is none.
    """
    folder = Path(path)
    _check_folder(folder)
    tensors, manifest = savable(model, folder)
    text = manifest.dumps(extra or {})
    shards = _split(tensors, max_shard_size)
    with _staging(folder) as staged:
        _write_weights(tensors, shards, staged)
        if manifest.library is not None:
            save_config(model, manifest.quantization_config(), staged)
            write_card(staged, folder, model_card(folder, model))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staged))
        (staged / MANIFEST).write_text(text, encoding="utf-8")
        _swap(staged, folder)
    return sum(t.nbytes for t in tensors.values())


def savable(model: nn.Module, folder: Path) -> tuple[dict[str, Tensor], Manifest]:
    """Everything that a checkpoint of a model holds, and nothing that could not be loaded from it.

    Args:
        model: with packed modules.
        folder: that the manifest is for.

    Returns:
        Tensors by their names in the weights file, on the CPU, no two over one memory; and the manifest.

    Raises:
        ValueError: if the model holds no packed module or something that no checkpoint can hold.
    """
    sites = dict(packed_sites(model))
    _check_savable(model, sites)
    tensors, manifest = collect(model, sites, folder)
    tensors = _apart({name: _plain(tensor) for name, tensor in tensors.items()})
    parse_manifest(folder, manifest.dumps({}))
    check_header(manifest, {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    _check_values(sites)
    return tensors, manifest


def _check_savable(model: nn.Module, sites: Mapping[str, Packed]) -> None:
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


def _check_folder(folder: Path) -> None:
    found = [name for name in (WEIGHTS, INDEX, CONFIG) if (folder / name).exists()]
    if found and not is_checkpoint(folder):
        raise ValueError(
            f"Expected `path` to be a new folder or an mpfx checkpoint but {str(folder)!r} holds {', '.join(found)} "
            f"without {MANIFEST}: another model, or a save that was cut off. Name another folder, or remove them first."
        )


def _check_values(sites: Mapping[str, Packed]) -> None:
    """Refuse values that :func:`load` would refuse."""
    for path, module in sites.items():
        try:
            check_packed(module)
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


def _split(tensors: Mapping[str, Tensor], max_shard_size: int | str) -> Any:
    """Which tensors go into which file, in the words of ``huggingface_hub``."""
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        return split_state_dict_into_shards_factory(
            dict[str, Any](tensors),
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern=WEIGHTS.replace(".", "{suffix}.", 1),
            get_storage_id=lambda _: None,  # tensors of a file that was loaded are parts of one memory, but no aliases
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ValueError(
            f"Expected `max_shard_size` to be bytes or a text such as '5GB' but got {max_shard_size!r}."
        ) from error


def _write_weights(tensors: Mapping[str, Tensor], shards: Any, folder: Path) -> None:
    for file, names in shards.filename_to_tensors.items():
        _write_file({name: tensors[name] for name in names}, folder / file)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")


def _write_file(tensors: dict[str, Tensor], target: Path) -> None:
    target.touch()
    mode = target.stat().st_mode  # what the user's umask makes of a new file; the writer may be stricter
    save_file(tensors, str(target), metadata={"format": "pt"})
    target.chmod(mode)
    _flush(target)


def save_config(model: Any, quantization: Mapping[str, Any], folder: Path) -> None:
    """Write the config of a transformers model, with what says how it is quantized, and its generation config."""
    config = copy.deepcopy(model.config)
    config.quantization_config = dict(quantization)
    config.architectures = [type(model).__name__]  # these two as `save_pretrained` sets them
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(str(folder))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(folder))


def _swap(staged: Path, folder: Path) -> None:
    """Put the new files in the place of the old ones; in between, none says that the folder is whole."""
    new = [file.relative_to(staged) for file in staged.rglob("*") if file.is_file()]
    for name in new:
        _flush(staged / name)
    weights = sorted(name for name in new if _is_weights(name.name))
    last = [Path(name) for name in (CONFIG, MANIFEST) if Path(name) in new]
    earlier = is_checkpoint(folder)
    old = [name for name in last if (folder / name).exists()]
    for name in old:
        (folder / name).replace(staged / f"old-{name}")
    try:
        (staged / weights[0]).replace(folder / weights[0])
    except OSError:  # nothing is lost yet: some systems refuse while another process reads the file
        for name in old:
            (staged / f"old-{name}").replace(folder / name)
        raise
    if earlier:
        _remove_others(folder, new)
    for name in [*weights[1:], *(name for name in new if name not in (*weights, *last))]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).replace(folder / name)
    _flush_folder(folder)
    for name in last:
        (staged / name).replace(folder / name)
    _flush_folder(folder)


def _is_weights(name: str) -> bool:
    return re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name) is not None


def _remove_others(folder: Path, new: Collection[Path]) -> None:
    """Remove what an earlier checkpoint had and the new one has not."""
    for file in folder.iterdir():
        if (_is_weights(file.name) or file.name == GENERATION) and Path(file.name) not in new:
            file.unlink()


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
