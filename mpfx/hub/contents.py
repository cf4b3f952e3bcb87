"""What of a model goes into a checkpoint, under which names."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpfx.hub.manifest import BUFFER, PERMUTATION, RESERVED, Manifest, SiteEntry, inside
from mpfx.nn import MixedPrecisionLinear

CONFIG, GENERATION = "config.json", "generation_config.json"
"""What transformers rebuilds a model from."""


def packed_sites(model: nn.Module) -> Iterator[tuple[str, MixedPrecisionLinear]]:
    """Packed modules of a model, by path."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, MixedPrecisionLinear))


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all weight tensors of a model as a checkpoint holds them: shared ones once."""
    return sum(t.nbytes for t in collect(model, dict(packed_sites(model)), Path())[0].values())


def collect(
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
    outside, tied = _untie(dense_tensors(model, paths_of(model, sites)))
    library = "transformers" if hasattr(getattr(model, "config", None), "save_pretrained") else None
    return tensors | outside, Manifest(folder, entries, tied, library)


def _entry(module: MixedPrecisionLinear) -> SiteEntry:
    dtype = str(module.weight_dtype).removeprefix("torch.")
    return SiteEntry(module.in_features, module.out_features, module.layout.group_size, dtype, None)


def paths_of(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Every path under which the modules can be found, with the one that names it."""
    known = {id(module): path for path, module in modules.items()}
    return {p: known[id(m)] for p, m in model.named_modules(remove_duplicate=False) if id(m) in known}


def dense_tensors(model: nn.Module, sites: Iterable[str]) -> dict[str, Tensor]:
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


def check_order(order: Tensor, channels: int, name: str) -> None:
    """Check that a tensor holds every channel once.

    Raises:
        ValueError: naming the tensor.
    """
    if not torch.equal(order.long().sort().values, torch.arange(channels)):
        raise ValueError(
            f"Expected `{name}` to be a permutation: each of 0 .. {channels - 1} once, but some are lacking."
        )
