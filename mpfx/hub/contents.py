"""What of a model goes into a checkpoint, under which names."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpfx.hub.header import STACK_PARTS
from mpfx.hub.manifest import BUFFER, PERMUTATION, RESERVED, Manifest, SiteEntry, StackEntry, inside
from mpfx.nn import MixedPrecisionLinear, validate
from mpfx.nn.experts import PackedStack, split_stack

Packed = MixedPrecisionLinear | PackedStack
"""What a checkpoint holds packed: a linear layer, or the weights of all experts in the place of a parameter."""


def packed_sites(model: nn.Module) -> Iterator[tuple[str, Packed]]:
    """Packed modules of a model, by path; those of experts by the path of the parameter that they stand for."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Packed))


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all weight tensors of a model as a checkpoint holds them: shared ones once."""
    return sum(t.nbytes for t in collect(model, dict(packed_sites(model)), Path())[0].values())


def collect(model: nn.Module, sites: Mapping[str, Packed], folder: Path) -> tuple[dict[str, Tensor], Manifest]:
    """Tensors for the file, wherever they are now, and the manifest that explains them."""
    tensors: dict[str, Tensor] = {}
    permutations: dict[tuple[torch.dtype, torch.Size, bytes], int] = {}
    linears: dict[str, SiteEntry] = {}
    experts: dict[str, StackEntry] = {}
    for path, module in sites.items():
        state = module.state_dict(prefix=f"{path}.")
        order, index = state.pop(f"{path}.permutation", None), None
        tensors |= state
        if order is not None:
            content = order.cpu().contiguous().view(torch.uint8).numpy().tobytes()
            index = permutations.setdefault((order.dtype, order.shape, content), len(permutations))
            tensors[f"{PERMUTATION}{index}"] = order
        if isinstance(module, PackedStack):
            experts[path] = replace(_stack_entry(module), permutation=index)
        else:
            linears[path] = replace(_entry(module), permutation=index)
    outside, tied = _untie(dense_tensors(model, paths_of(model, sites)))
    library = "transformers" if hasattr(getattr(model, "config", None), "save_pretrained") else None
    return tensors | outside, Manifest(folder, linears, experts, tied, library)


def _entry(module: MixedPrecisionLinear) -> SiteEntry:
    return SiteEntry(module.in_features, module.out_features, module.layout.group_size, _dtype_name(module), None)


def _stack_entry(module: PackedStack) -> StackEntry:
    sizes = (module.experts, module.in_features, module.out_features)
    return StackEntry(*sizes, module.layouts[0].group_size, _dtype_name(module), module.transposed, None)


def _dtype_name(module: Packed) -> str:
    return str(module.weight_dtype).removeprefix("torch.")


def paths_of(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Every path under which the modules can be found, with the one that names it."""
    known = {id(module): path for path, module in modules.items()}
    return {p: known[id(m)] for p, m in model.named_modules(remove_duplicate=False) if id(m) in known}


def dense_tensors(model: nn.Module, sites: Collection[str]) -> dict[str, Tensor]:
    """All that a checkpoint holds of a model beside its packed sites, by its name in the file.

    Args:
        model: packed, or still dense where the sites are.
        sites: paths of modules, and of parameters that hold the weights of experts.

    Raises:
        ValueError: for names or values that a checkpoint cannot hold.
    """
    state, below = model.state_dict(), inside(sites)
    buffers = {n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in state}
    unsaved = {f"{BUFFER}{n}": b for n, b in buffers.items() if b.numel() and b.is_floating_point()}
    kept = {n: t for n, t in state.items() if not n.startswith(below) and n not in sites}
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


def check_packed(module: Packed) -> None:
    """Check the values of a packed module, and that its tensors fit each other.

    Raises:
        ValueError: naming the tensor.
    """
    if isinstance(module, MixedPrecisionLinear):
        validate(module.packed)
    else:
        sizes = {"out_features": module.out_features, "in_features": module.in_features}
        parts = {name: getattr(module, name) for name in STACK_PARTS}
        split_stack(parts, **sizes, group_size=module.layouts[0].group_size)
    if module.permutation is not None:
        check_order(module.permutation.cpu(), module.in_features, "permutation")


def check_order(order: Tensor, channels: int, name: str) -> None:
    """Check that a tensor, or every row of one, holds every channel once.

    Raises:
        ValueError: naming the tensor.
    """
    ranks = order.long().sort(-1).values
    if not torch.equal(ranks, torch.arange(channels).expand_as(ranks)):
        raise ValueError(
            f"Expected `{name}` to be a permutation: each of 0 .. {channels - 1} once, but some are lacking."
        )
