"""What the manifest of a checkpoint may say, without a model at hand.

It says which modules are packed and which tensors share memory. It may come from anywhere: whatever is odd in it
raises :class:`CheckpointError`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

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

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What a layer can compute in."""

_FLOAT_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in FLOATS)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: which file, what is wrong with it, and what was expected."""


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
