"""Reading a checkpoint: everything is checked before anything is installed."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mpfx.graph import is_linear, linear_weight
from mpfx.hub.contents import Packed, check_order, dense_tensors, paths_of
from mpfx.hub.header import SITE_PARTS, STACK_PARTS, Header, TensorInfo, check_header
from mpfx.hub.manifest import (
    BUFFER,
    CONFIG,
    FLOATS,
    GENERATION,
    PERMUTATION,
    QUANTIZATION,
    CheckpointError,
    Manifest,
    SiteEntry,
    StackEntry,
    inside,
    parse_json,
    read_manifest,
)
from mpfx.hub.weights import Weights, open_weights
from mpfx.nn import Layout, MixedPrecisionLinear, PackedWeight, join_input_groups, validate
from mpfx.nn.experts import PackedExperts, PackedStack, split_stack


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
        FileNotFoundError: if the folder, its manifest or its weights are missing.
        CheckpointError: if a file is damaged, of another version, or does not fit the model.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    with open_weights(folder) as weights:
        check_header(manifest, weights.header)
        outline = _outline(folder, manifest, weights.header) if model is None else model
        paths = check_model(outline, manifest, weights.header)
        skeleton = _skeleton(folder, outline) if model is None else model
        packed = packed_modules(manifest, weights.header, weights.read)
        state = _read_dense(weights, manifest)
    modules = replacements(skeleton, paths, packed, manifest)
    with _all_or_nothing(skeleton):
        for name, module in modules.items():
            skeleton.set_submodule(name, module)
        _fill(skeleton, state, manifest)
    join_input_groups(skeleton)
    if manifest.library is not None:
        _adopt(skeleton, manifest)
    return skeleton.eval()


def _adopt(model: nn.Module, manifest: Manifest) -> None:
    """Make ``save_pretrained`` write the model as it was read."""
    from mpfx.hub.transformers import adopt

    adopt(model, manifest)


def _outline(folder: Path, manifest: Manifest, header: Header) -> nn.Module:
    """The model of a folder's config, wholly on the meta device: whatever sizes that names, nothing is allocated."""
    if manifest.library != "transformers":
        raise CheckpointError(
            f"{folder} holds a module that is not from transformers: build it and call mpfx.load(path, model=...)."
        )
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG}, which a model from transformers is built from.")
    with _named_build(folder):
        from transformers import AutoConfig, AutoModelForCausalLM

        most = len(header) + len(manifest.tied)
        _check_layers(parse_json(folder / CONFIG, (folder / CONFIG).read_bytes()), most)
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        vars(config).pop(QUANTIZATION, None)  # the manifest says it
        with torch.device("meta"), _at_most(100 + 2 * most):  # some register a parameter again
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def _skeleton(folder: Path, outline: Any) -> nn.Module:
    """The same model, with values for the buffers that no file holds (rotary tables), which are computed."""
    with _named_build(folder):
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM, GenerationConfig

        with init_empty_weights(include_buffers=False):
            model: nn.Module = AutoModelForCausalLM.from_config(outline.config, trust_remote_code=False)
        if (folder / GENERATION).is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)  # type: ignore[assignment]
    return model


@contextmanager
def _named_build(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # model code raises whatever an odd config makes it stumble over
        raise CheckpointError(
            f"{folder}: no model can be built from its {CONFIG} and {GENERATION}: {type(error).__name__}: {error} "
            "If it is no causal language model, build it and call mpfx.load(path, model=...)."
        ) from error


def _check_layers(config: Any, most: int, kind: Any = None) -> None:
    """Check how many layers a config, or one inside it, asks for: a list of their kinds alone could fill the memory.

    Args:
        config: as ``config.json`` has it.
        most: layers.
        kind: class of the config; None: what its ``model_type`` says.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") in CONFIG_MAPPING:
        kind = CONFIG_MAPPING[config["model_type"]]
    name = "num_hidden_layers"
    for key in (name, getattr(kind, "attribute_map", {}).get(name)):
        layers = config.get(key, 0)
        if isinstance(layers, int | float) and not layers <= most:
            raise ValueError(f"Expected `{key}` to be at most {most}, the number of stored tensors, but got {layers}.")
    for key, inner in config.items():
        if isinstance(inner, dict):
            _check_layers(inner, most, getattr(kind, "sub_configs", {}).get(key))


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Stop building a model that has more parameters than its checkpoint could hold."""
    thread, found = get_ident(), 0

    def check(*_: object) -> None:
        nonlocal found
        found += get_ident() == thread
        if found > count and get_ident() == thread:
            raise ValueError(f"Expected a model of at most {count} parameters, as the weights have no more.")

    handle = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


def check_model(skeleton: nn.Module, manifest: Manifest, header: Header) -> dict[str, str]:
    """Check that the checkpoint holds all of a model and nothing else.

    Args:
        skeleton: the model, dense or packed; its values do not matter.
        manifest: of the checkpoint.
        header: of its weights, which fits the manifest.

    Returns:
        Every path under which a packed module can be found, with the one that the manifest names.

    Raises:
        CheckpointError: naming what the one has and the other lacks, or has otherwise.
    """
    paths = _check_modules(skeleton, manifest, header)
    _check_tensors(dense_tensors(skeleton, paths), manifest, header)
    return paths


def _check_modules(skeleton: nn.Module, manifest: Manifest, header: Header) -> dict[str, str]:
    """Check that the model has a layer or a parameter of the same sizes for all that is packed.

    Returns:
        Every path under which a site can be found, with the one that the manifest names.
    """
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    holders = {path: path.rpartition(".")[0] for path in manifest.experts}
    if unknown := sorted({*manifest.sites, *holders.values()} - set(modules)):
        raise CheckpointError(
            f"{manifest.path} names sites that {type(skeleton).__name__} lacks: {unknown[:5]}. Load it with the class "
            "of model that was saved."
        )
    for site, entry in manifest.sites.items():
        _check_module(f"{manifest.path}, site {site}", entry, modules[site], f"{site}.bias" in header)
    for path, stack in manifest.experts.items():
        name = path.rpartition(".")[2]
        _check_stack(f"{manifest.path}, experts {path}", stack, modules[holders[path]], name)
    paths = paths_of(skeleton, {site: modules[site] for site in manifest.sites})
    for path, holder in paths_of(skeleton, {holder: modules[holder] for holder in holders.values()}).items():
        paths |= {f"{path}.{name.rpartition('.')[2]}": name for name, owner in holders.items() if owner == holder}
    if twice := sorted(set(manifest.entries) - set(paths.values())):
        raise CheckpointError(f"{manifest.path}: sites {twice[:5]} are the same modules as other sites of the model.")
    packed = {name for name, module in modules.items() if isinstance(module, Packed)}
    if unlisted := sorted(packed - set(paths)):
        raise CheckpointError(f"{manifest.path} lacks sites that are packed in the given model: {unlisted[:5]}.")
    return paths


def _check_stack(where: str, entry: StackEntry, module: nn.Module, name: str) -> None:
    """Check the parameter, or what is packed in its place already."""
    found = module._parameters.get(name)
    known = module.packed_stacks.get(name, found) if isinstance(module, PackedExperts) else found
    if known is None:
        raise CheckpointError(f"{where}: expected a parameter but {type(module).__name__} has none of that name.")
    if tuple(known.shape) != entry.shape:
        raise CheckpointError(f"{where}: expected the parameter's shape, {tuple(known.shape)}, but got {entry.shape}.")
    if isinstance(known, PackedStack) and known.transposed != entry.transposed:
        raise CheckpointError(f"{where}: expected `transposed` to be {known.transposed} as in the given model.")


def replacements(
    skeleton: nn.Module, paths: Mapping[str, str], packed: Mapping[str, Packed], manifest: Manifest
) -> dict[str, nn.Module]:
    """The module for every path: packed linear layers, and experts that run on packed stacks.

    Args:
        skeleton: the model.
        paths: as :func:`check_model` returns them.
        packed: packed modules by the names of the manifest.
        manifest: of the checkpoint.

    Raises:
        CheckpointError: if the model's experts cannot run on the stacks.
    """
    modules: dict[str, nn.Module] = {}
    stacks: dict[str, dict[str, PackedStack]] = {}
    for path, site in paths.items():
        module = packed[site]
        if isinstance(module, PackedStack):
            holder, _, name = path.rpartition(".")
            stacks.setdefault(holder, {})[name] = module
        else:
            modules[path] = module
    made: dict[int, PackedExperts] = {}
    for path, parts in stacks.items():
        experts = skeleton.get_submodule(path)
        order = list(experts.packed_stacks if isinstance(experts, PackedExperts) else experts._parameters)
        in_order = {name: parts[name] for name in sorted(parts, key=order.index)}  # as saved, so that it is saved alike
        try:
            made.setdefault(id(experts), PackedExperts(experts, in_order))
        except ValueError as error:
            raise CheckpointError(f"{manifest.path}, experts {path}: {error}") from error
        modules[path] = made[id(experts)]
    return modules


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
    below = (*inside(manifest.entries), PERMUTATION)
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


Read = Callable[[str], Tensor]
"""Gives a tensor of the weights by its name."""


def packed_modules(manifest: Manifest, header: Header, read: Read) -> dict[str, Packed]:
    """Build all that a checkpoint holds packed, by the names of the manifest.

    Args:
        manifest: of the checkpoint.
        header: of its weights, which fits the manifest.
        read: gives the tensors; only widths, masks and permutations must have values.

    Raises:
        CheckpointError: if tensors have impossible values or do not fit each other.
    """
    orders = _read_orders(manifest, read)
    modules: dict[str, Packed] = {}
    for site, entry in manifest.entries.items():
        parts = SITE_PARTS if isinstance(entry, SiteEntry) else STACK_PARTS
        tensors = {part: read(f"{site}.{part}") if f"{site}.{part}" in header else None for part in parts}
        order = None if entry.permutation is None else orders[entry.permutation]
        try:
            if isinstance(entry, SiteEntry):
                modules[site] = _packed_module(entry, order, **tensors)
            else:
                modules[site] = _packed_stack(entry, order, tensors)
        except ValueError as error:
            raise CheckpointError(f"{manifest.weights}, site {site}: {error}") from error
    return modules


def _packed_stack(entry: StackEntry, permutation: Tensor | None, parts: Mapping[str, Tensor | None]) -> PackedStack:
    sizes = {"out_features": entry.out_features, "in_features": entry.in_features}
    weights = split_stack(parts, **sizes, group_size=entry.group_size)
    dtype = getattr(torch, entry.dtype)
    return PackedStack(weights, permutation=permutation, dtype=dtype, transposed=entry.transposed)


def _read_orders(manifest: Manifest, read: Read) -> dict[int, Tensor]:
    """Every permutation once: the sites of an input group share it."""
    sizes = {e.permutation: e.in_features for e in manifest.entries.values() if e.permutation is not None}
    orders = {}
    for number, channels in sizes.items():
        orders[number] = read(f"{PERMUTATION}{number}")
        try:
            check_order(orders[number], channels, f"{PERMUTATION}{number}")
        except ValueError as error:
            raise CheckpointError(f"{manifest.weights}: {error}") from error
    return orders


def _packed_module(
    entry: SiteEntry, permutation: Tensor | None, *, bias: Tensor | None, **parts: Tensor | None
) -> MixedPrecisionLinear:
    widths = parts["widths"]
    assert widths is not None  # the header was checked
    weight = PackedWeight.of(parts, Layout(entry.in_features, tuple(widths.tolist()), entry.group_size))
    validate(weight)
    parameter = None if bias is None else nn.Parameter(bias)
    return MixedPrecisionLinear(weight, permutation=permutation, bias=parameter, dtype=getattr(torch, entry.dtype))


def _read_dense(weights: Weights, manifest: Manifest) -> dict[str, Tensor]:
    below = (*inside(manifest.entries), PERMUTATION)
    state = {name: weights.read(name) for name in weights.header if not name.startswith(below)}
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
        set_buffer(skeleton, name.removeprefix(BUFFER), state.pop(name))
    try:
        unknown = skeleton.load_state_dict(state, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:  # of a module with rules of its own
        raise CheckpointError(f"{manifest.weights} does not fit the model: {error}") from error
    if unknown:
        raise CheckpointError(f"{manifest.weights} holds {unknown[:5]}, which the model does not take.")
    _tie(skeleton, manifest)


def set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a buffer, whether the state dict holds it or not."""
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._buffers[leaf] = value


def _tie(skeleton: nn.Module, manifest: Manifest) -> None:
    """Assigned parameters are distinct objects even over one tensor: share them as the saved model did."""
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    for name, original in manifest.tied.items():
        if name in parameters and original in parameters:
            path, _, leaf = name.rpartition(".")
            skeleton.get_submodule(path)._parameters[leaf] = parameters[original]
