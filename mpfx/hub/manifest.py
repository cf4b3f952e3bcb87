"""What the two files of a checkpoint may say, each checked for itself, without a model at hand.

The manifest says which modules are packed and which tensors share memory; the header of the weights file gives names,
dtypes and shapes. Both may come from anywhere: whatever is odd in them raises :class:`CheckpointError`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from mpfx.nn import SEGMENT

FORMAT = "mpfx"
VERSION, VERSION_WITH_EXPERTS = 1, 2
MANIFEST = "mpfx.json"
WEIGHTS = "model.safetensors"

RESERVED = "mpfx:"
"""Begins the names in the weights file that are no name of a model; a model with such names is not saved."""

BUFFER = f"{RESERVED}buffer:"
PERMUTATION = f"{RESERVED}permutation:"

DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "C64": torch.complex64},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
"""Dtypes by their names in the weights file."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What a layer can compute in."""

_FLOAT_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in FLOATS)
_INTEGERS = (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64)

PARTS: Mapping[str, tuple[torch.dtype, ...]] = {
    "codes": (torch.int32,),
    "scales": (torch.float16,),
    "zeros": (torch.int32,),
    "mask": (torch.int32,),
    "widths": (torch.uint8,),
    "bias": FLOATS,
}
"""Tensors of a packed site and the dtypes that each may have."""

STACK_PARTS: Mapping[str, tuple[torch.dtype, ...]] = {n: dtypes for n, dtypes in PARTS.items() if n != "bias"}
"""Tensors of packed experts and the dtypes that each may have."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: which file, what is wrong with it, and what was expected."""


class TensorInfo(NamedTuple):
    """What the header of the weights file says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


Header = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class SiteEntry:
    """What the manifest says of a packed site.

    Attributes:
        in_features: input channels.
        out_features: rows.
        group_size: channels per scale; None: all of one width.
        dtype: name of the dtype of the layer that the packed one stands for.
        permutation: number of its channel order, or None.
    """

    in_features: int
    out_features: int
    group_size: int | None
    dtype: str
    permutation: int | None


@dataclass(frozen=True)
class StackEntry:
    """What the manifest says of the packed weights of all experts in the place of one parameter.

    Attributes:
        experts: number of experts.
        in_features: input channels of each.
        out_features: rows of each.
        group_size: channels per scale; None: all of one width.
        dtype: name of the dtype of the parameter.
        transposed: whether the parameter is ``(experts, in, out)`` instead of ``(experts, out, in)``.
        permutation: number of the channel orders ``(experts, in)``, or None.
    """

    experts: int
    in_features: int
    out_features: int
    group_size: int | None
    dtype: str
    transposed: bool
    permutation: int | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the parameter."""
        sizes = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        return (self.experts, *sizes)


@dataclass(frozen=True)
class Manifest:
    """The manifest of a checkpoint.

    Attributes:
        folder: that it belongs to.
        sites: packed linear layers by path.
        experts: packed stacks of experts by the path of the parameter that each one stands for.
        tied: tensors that are not stored, with the stored tensor whose memory each one shares.
        library: "transformers" or None.
    """

    folder: Path
    sites: Mapping[str, SiteEntry]
    experts: Mapping[str, StackEntry]
    tied: Mapping[str, str]
    library: str | None

    @property
    def entries(self) -> dict[str, SiteEntry | StackEntry]:
        """All that is packed, by path."""
        return {**self.sites, **self.experts}

    @property
    def path(self) -> Path:
        """The manifest's file."""
        return self.folder / MANIFEST

    @property
    def weights(self) -> Path:
        """The weights file."""
        return self.folder / WEIGHTS

    def dumps(self, extra: Mapping[str, Any]) -> str:
        """Return the text of the file.

        Raises:
            ValueError: if JSON cannot hold ``extra``.
        """
        sites = {path: asdict(entry) for path, entry in self.sites.items()}
        version = VERSION_WITH_EXPERTS if self.experts else VERSION  # earlier readers know all but the experts
        data: dict[str, Any] = {"format": FORMAT, "version": version, "segment": SEGMENT, "sites": sites}
        if self.experts:
            data["experts"] = {path: asdict(entry) for path, entry in self.experts.items()}
        data |= {"tied": dict(self.tied), "extra": dict(extra)}
        if self.library is not None:
            data["library"] = self.library
        try:
            return json.dumps(data, indent=1, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Expected `extra` to be plain data that JSON can hold: {error}.") from error


def inside(sites: Iterable[str]) -> tuple[str, ...]:
    """Beginnings of the names of everything below the sites."""
    return tuple(f"{site}." if site else "" for site in sites)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a folder.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is not one that this version writes.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {MANIFEST}: not an mpfx checkpoint, or one whose saving did not finish."
        )
    return parse_manifest(folder, path.read_bytes())


def parse_manifest(folder: Path, text: str | bytes) -> Manifest:
    """Check the text of a folder's manifest.

    Raises:
        CheckpointError: if it is not one that this version writes.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(text if isinstance(text, str) else text.decode())
    except ValueError as error:
        raise CheckpointError(f"{path} is not a manifest of mpfx: {error}.") from error
    _check_top(path, data)
    found_sites, found_experts = data["sites"], data.get("experts", {})
    for site, entry in found_sites.items():
        _check_entry(f"{path}, site {site}", entry, _ENTRY)
    for site, entry in found_experts.items():
        _check_entry(f"{path}, experts {site}", entry, _STACK_ENTRY)
    if both := sorted(set(found_sites) & set(found_experts)):
        raise CheckpointError(f"{path}: expected {both[:5]} in one of `sites` and `experts` but got it in both.")
    sites = {site: SiteEntry(**entry) for site, entry in found_sites.items()}
    experts = {site: StackEntry(**entry) for site, entry in found_experts.items()}
    return Manifest(folder, sites, experts, data["tied"], data.get("library"))


def _is(value: Any) -> Callable[[Any], bool]:
    """Test for a value and its type: True and 1.0 are not 1."""
    return lambda found: type(found) is type(value) and found == value


def _is_positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_names(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value.values())


_Fields = Mapping[str, tuple[Callable[[Any], bool], str]]

_TOP: _Fields = {
    "segment": (_is(SEGMENT), str(SEGMENT)),
    "sites": (lambda v: isinstance(v, dict) and bool(v) and "" not in v, "an object with an entry per packed module"),
    "tied": (_is_names, "an object that maps names of tensors to names of tensors"),
    "library": (lambda v: v is None or v == "transformers", "'transformers' or absent"),
    "extra": (lambda v: isinstance(v, dict), "an object"),
}
_TOP_WITH_EXPERTS: _Fields = {
    **_TOP,
    "sites": (lambda v: isinstance(v, dict) and "" not in v, "an object with an entry per packed linear layer"),
    "experts": (
        lambda v: isinstance(v, dict) and bool(v) and all("." in name.strip(".") for name in v),
        "an object with an entry per packed parameter `module.name`",
    ),
}
_OPTIONAL: Mapping[str, Any] = {"library": None, "extra": {}}
_ENTRY: _Fields = {
    "in_features": (_is_positive, "a positive integer"),
    "out_features": (_is_positive, "a positive integer"),
    "group_size": (
        lambda v: v is None or (_is_positive(v) and v % SEGMENT == 0),
        f"null or a positive multiple of {SEGMENT}",
    ),
    "dtype": (lambda v: isinstance(v, str) and v in _FLOAT_NAMES, f"one of {', '.join(_FLOAT_NAMES)}"),
    "permutation": (lambda v: v is None or (type(v) is int and v >= 0), "null or an integer of at least 0"),
}
_STACK_ENTRY: _Fields = {
    **_ENTRY,
    "experts": (_is_positive, "a positive integer"),
    "transposed": (lambda v: isinstance(v, bool), "true or false"),
}
assert set(_STACK_ENTRY) == {field.name for field in fields(StackEntry)}
assert set(_ENTRY) == {field.name for field in fields(SiteEntry)}


def _check_top(path: Path, data: Any) -> None:
    if not isinstance(data, dict) or not {"format", "version"} <= set(data):
        raise CheckpointError(
            f"{path} is not a manifest of mpfx: expected an object with `format` and `version` but got {_short(data)}."
        )
    name, version = data["format"], data["version"]
    known = [expected for expected in (VERSION, VERSION_WITH_EXPERTS) if _is(expected)(version)]
    if name != FORMAT or not known:
        raise CheckpointError(
            f"Expected {path} to be {FORMAT!r} version {VERSION} or {VERSION_WITH_EXPERTS} but got {_short(name)} "
            f"version {_short(version)}: read it with the version of mpfx that wrote it."
        )
    rest = {name: value for name, value in data.items() if name not in ("format", "version")}
    _check_fields(str(path), {**_OPTIONAL, **rest}, _TOP if known == [VERSION] else _TOP_WITH_EXPERTS)


def _check_entry(where: str, entry: Any, expected: _Fields) -> None:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: expected the entry to be an object but got {_short(entry)}.")
    _check_fields(where, entry, expected)


def _check_fields(where: str, found: Mapping[str, Any], expected: _Fields) -> None:
    if set(found) != set(expected):
        lacking, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        raise CheckpointError(
            f"{where}: expected the fields {sorted(expected)} but {lacking} are lacking and {unknown[:5]} are unknown."
        )
    for name, (test, allowed) in expected.items():
        if not test(found[name]):
            raise CheckpointError(f"{where}: expected `{name}` to be {allowed} but got {_short(found[name])}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
    parts = STACK_PARTS if site in manifest.experts else PARTS
    if name.startswith(below) and not (site in manifest.entries and part in parts):
        raise CheckpointError(
            f"{manifest.weights} holds {name}, but below a packed site it may hold only {', '.join(parts)}."
        )
    if name in manifest.experts:
        raise CheckpointError(f"{manifest.weights} holds {name}, but {MANIFEST} says that it is packed.")


_REQUIRED = ("codes", "scales", "widths")
_Shapes = Mapping[str, tuple[int | None, ...]]  # None: any, for now


def _site_shapes(site: str, entry: SiteEntry, header: Header) -> _Shapes:
    rows, segments = entry.out_features, -(-entry.in_features // SEGMENT)
    return {
        "codes": (None,) if f"{site}.mask" in header else (rows, None),
        "scales": (rows, None),
        "zeros": (None,),
        "mask": (rows, segments),
        "widths": (segments,),
        "bias": (rows,),
    }


def _stack_shapes(entry: StackEntry) -> _Shapes:
    segments = -(-entry.in_features // SEGMENT)
    return {
        "codes": (None,),
        "scales": (None,),
        "zeros": (None,),
        "mask": (entry.experts, entry.out_features, segments),
        "widths": (entry.experts, segments),
    }


def _check_parts(manifest: Manifest, where: str, path: str, shapes: _Shapes, header: Header) -> None:
    for part, shape in shapes.items():
        found = header.get(f"{path}.{part}")
        if found is None and part in _REQUIRED:
            raise CheckpointError(f"{manifest.weights}, {where}: `{part}` is missing.")
        if found is not None and not (found.dtype in PARTS[part] and _fits(found.shape, shape)):
            _refuse(manifest, f"{where}: Expected `{part}`", PARTS[part], shape, found)


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
