"""What the header of a checkpoint's weights file may say: names, dtypes and shapes, as the manifest asks for them.

It may come from anywhere: whatever is odd in it raises :class:`CheckpointError`, before a tensor is read.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from mpfx.hub.manifest import (
    BUFFER,
    FLOATS,
    MANIFEST,
    PERMUTATION,
    RESERVED,
    WEIGHTS,
    CheckpointError,
    Manifest,
    SiteEntry,
    StackEntry,
    inside,
)
from mpfx.nn import SEGMENT
from mpfx.nn.packing import PARTS

DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "C64": torch.complex64},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
"""Dtypes by their names in the weights file."""

_INTEGERS = (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64)

STACK_PARTS: Mapping[str, tuple[torch.dtype, ...]] = {
    "codes": (torch.int32,),
    "scales": (torch.float16,),
    "scale_codes": (torch.int32,),
    "row_scales": (torch.float16,),
    "group_scales": (torch.float16,),
    "zeros": (torch.int32,),
    "mask": (torch.int32,),
    "widths": (torch.uint8,),
}
"""Tensors of packed experts and the dtypes that each may have."""

SITE_PARTS: Mapping[str, tuple[torch.dtype, ...]] = {**STACK_PARTS, "bias": FLOATS}
"""Tensors of a packed site and the dtypes that each may have."""
assert set(STACK_PARTS) == set(PARTS)


class TensorInfo(NamedTuple):
    """What the header of the weights file says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


Header = Mapping[str, TensorInfo]


def read_header(file: Any, path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of an open weights file.

    Raises:
        CheckpointError: for a dtype that no checkpoint holds.
    """
    header = {}
    for name in file.keys():  # noqa: SIM118  (not a dict)
        part = file.get_slice(name)
        dtype = DTYPES.get(str(part.get_dtype()))
        if dtype is None:
            raise CheckpointError(f"{path}: expected {name} to be one of {list(DTYPES)} but got {part.get_dtype()}.")
        header[name] = TensorInfo(dtype, tuple(part.get_shape()))
    return header


def check_header(manifest: Manifest, header: Header) -> None:
    """Compare the weights file's header with the manifest.

    Raises:
        CheckpointError: if a tensor of a site is lacking, unknown, or of another dtype or shape than the manifest
            asks for, or a permutation or tied tensor does not fit.
    """
    below = inside(manifest.entries)
    for name in header:
        _check_name(manifest, name, below)
    for path, entry in manifest.entries.items():
        if isinstance(entry, SiteEntry):
            _check_parts(manifest, f"site {path}", path, _site_shapes(path, entry, header), header)
        else:
            _check_parts(manifest, f"experts {path}", path, _stack_shapes(entry), header)
        _check_permutation(manifest, path, entry, header)
    used = {f"{PERMUTATION}{entry.permutation}" for entry in manifest.entries.values()}
    if unused := sorted(name for name in header if name.startswith(PERMUTATION) and name not in used):
        raise CheckpointError(f"{manifest.weights} holds {unused[:5]}, which no site of {MANIFEST} uses.")
    for name, original in manifest.tied.items():
        _check_tied(manifest, name, original, header, below)


def _check_name(manifest: Manifest, name: str, below: tuple[str, ...]) -> None:
    if name.startswith(RESERVED) and not name.startswith((BUFFER, PERMUTATION)):
        raise CheckpointError(
            f"{manifest.weights} holds {name}, but names that begin with {RESERVED} must go on as {BUFFER}<name> or "
            f"{PERMUTATION}<number>."
        )
    site, _, part = name.rpartition(".")
    parts = STACK_PARTS if site in manifest.experts else SITE_PARTS
    if name.startswith(below) and not (site in manifest.entries and part in parts):
        raise CheckpointError(
            f"{manifest.weights} holds {name}, but below a packed site it may hold only {', '.join(parts)}."
        )
    if name in manifest.experts:
        raise CheckpointError(f"{manifest.weights} holds {name}, but {MANIFEST} says that it is packed.")


_REQUIRED = ("codes", "widths")
_FLOAT_SCALES, _CODED_SCALES = ("scales",), ("scale_codes", "row_scales", "group_scales")
_Shapes = Mapping[str, tuple[int | None, ...]]  # None: any, for now


def _site_shapes(site: str, entry: SiteEntry, header: Header) -> _Shapes:
    rows, segments = entry.out_features, -(-entry.in_features // SEGMENT)
    return {
        "codes": (None,) if f"{site}.mask" in header else (None, rows),
        "scales": (rows, None),
        "scale_codes": (None,),
        "row_scales": (rows,),
        "group_scales": (None,),
        "zeros": (None,),
        "mask": (segments, rows),
        "widths": (segments,),
        "bias": (rows,),
    }


def _stack_shapes(entry: StackEntry) -> _Shapes:
    segments = -(-entry.in_features // SEGMENT)
    return {
        "codes": (None,),
        "scales": (None,),
        "scale_codes": (None,),
        "row_scales": (entry.experts, entry.out_features),
        "group_scales": (None,),
        "zeros": (None,),
        "mask": (entry.experts, segments, entry.out_features),
        "widths": (entry.experts, segments),
    }


def _check_parts(manifest: Manifest, where: str, path: str, shapes: _Shapes, header: Header) -> None:
    present = {part for part in shapes if f"{path}.{part}" in header}
    if "scales" in present and (both := sorted(present & set(_CODED_SCALES))):
        raise CheckpointError(f"{manifest.weights}, {where}: expected one kind of scales but got `scales` and {both}.")
    required = (*_REQUIRED, *(_CODED_SCALES if present & set(_CODED_SCALES) else _FLOAT_SCALES))
    for part, shape in shapes.items():
        if part in required and part not in present:
            raise CheckpointError(f"{manifest.weights}, {where}: `{part}` is missing.")
        if part in present:
            found = header[f"{path}.{part}"]
            if not (found.dtype in SITE_PARTS[part] and _fits(found.shape, shape)):
                _refuse(manifest, f"{where}: Expected `{part}`", SITE_PARTS[part], shape, found)


def _check_permutation(manifest: Manifest, path: str, entry: SiteEntry | StackEntry, header: Header) -> None:
    if entry.permutation is None:
        return
    name = f"{PERMUTATION}{entry.permutation}"
    if name not in header:
        raise CheckpointError(f"{manifest.weights}, site {path}: `{name}` is missing.")
    shape = (entry.in_features,) if isinstance(entry, SiteEntry) else (entry.experts, entry.in_features)
    if header[name].dtype not in _INTEGERS or header[name].shape != shape:
        _refuse(manifest, f"site {path}: Expected `{name}`", _INTEGERS, shape, header[name])


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(
        size is None or size == n for n, size in zip(shape, expected, strict=True)
    )


def _refuse(
    manifest: Manifest,
    what: str,
    dtypes: Iterable[torch.dtype],
    shape: tuple[int | None, ...],
    found: TensorInfo,
) -> NoReturn:
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    raise CheckpointError(f"{manifest.weights}, {what} to be {names} of shape [{sizes}] but got {found}.")


def _check_tied(manifest: Manifest, name: str, original: str, header: Header, below: tuple[str, ...]) -> None:
    where = f"{manifest.path}, `tied`: {name} -> {original}"
    if name.startswith((*below, PERMUTATION)) or original.startswith((*below, PERMUTATION)) or name in manifest.experts:
        raise CheckpointError(f"{where}: expected tensors outside the packed sites.")
    if name in header:
        raise CheckpointError(f"{where}: expected a tensor that is not stored, but {WEIGHTS} holds {name}.")
    if original not in header:
        raise CheckpointError(f"{where}: expected the name of a stored tensor, but {WEIGHTS} lacks {original}.")
