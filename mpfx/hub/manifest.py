"""What the manifest of a checkpoint may say, without a model at hand.

It says which modules are packed and which tensors share memory. It may come from anywhere: whatever is odd in it
raises :class:`CheckpointError`.

Of a transformers model it stands in two files. ``mpfx.json`` is mpfx's own and says that the folder is whole. The
``quantization_config`` of ``config.json`` says the same once more, because ``from_pretrained`` of a Hub id sees no
other file of ours, and because ``save_pretrained`` writes no other: a reference to ``mpfx.json`` would lead nowhere
there. A folder in which the two differ is refused; where ``mpfx.json`` is lacking, ``config.json`` serves.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from mpfx.nn import SEGMENT

FORMAT = "mpfx"
VERSION, VERSION_WITH_EXPERTS = 3, 4  # versions 1 and 2 had the bits of masks in another order
MANIFEST = "mpfx.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The weights file, and the file beside its shards that says which tensor is in which."""

CONFIG, GENERATION = "config.json", "generation_config.json"
"""What transformers rebuilds a model from."""

QUANTIZATION = "quantization_config"
"""The part of ``config.json`` that says what is packed."""

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
        file: that it stands in.
    """

    folder: Path
    sites: Mapping[str, SiteEntry]
    experts: Mapping[str, StackEntry]
    tied: Mapping[str, str]
    library: str | None
    file: str = MANIFEST

    @property
    def entries(self) -> dict[str, SiteEntry | StackEntry]:
        """All that is packed, by path."""
        return {**self.sites, **self.experts}

    @property
    def path(self) -> Path:
        """The manifest's file."""
        return self.folder / self.file

    @property
    def weights(self) -> Path:
        """The weights file."""
        return self.folder / WEIGHTS

    def dumps(self, extra: Mapping[str, Any]) -> str:
        """Return the text of the file.

        Raises:
            ValueError: if JSON cannot hold ``extra``.
        """
        data: dict[str, Any] = {"format": FORMAT, **self._description(), "extra": dict(extra)}
        if self.library is not None:
            data["library"] = self.library
        try:
            return json.dumps(data, indent=1, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Expected `extra` to be plain data that JSON can hold: {error}.") from error

    def quantization_config(self) -> dict[str, Any]:
        """The same for ``config.json``, without what the caller added."""
        return {"quant_method": FORMAT, **self._description()}

    def _description(self) -> dict[str, Any]:
        version = VERSION_WITH_EXPERTS if self.experts else VERSION  # earlier readers know all but the experts
        sites = {path: asdict(entry) for path, entry in self.sites.items()}
        data: dict[str, Any] = {"version": version, "segment": SEGMENT, "sites": sites, "tied": dict(self.tied)}
        if self.experts:
            data["experts"] = {path: asdict(entry) for path, entry in self.experts.items()}
        return data


def inside(sites: Iterable[str]) -> tuple[str, ...]:
    """Beginnings of the names of everything below the sites."""
    return tuple(f"{site}." if site else "" for site in sites)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a folder.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is not one that this version writes, or ``config.json`` says something else.
    """
    path = folder / MANIFEST
    if path.is_file():
        manifest = parse_manifest(folder, path.read_bytes())
        other = read_config(folder) if manifest.library is not None else None
        if other is not None:
            check_agreement(manifest, other)
        return manifest
    found = read_config(folder)
    if found is None:
        raise FileNotFoundError(
            f"{folder} holds no {MANIFEST}: not an mpfx checkpoint, or one whose saving did not finish."
        )
    return found


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a folder says that it is an mpfx checkpoint; not whether it is a sound one."""
    return (Path(path) / MANIFEST).is_file() or _quantization(Path(path)) is not None


def read_config(folder: Path) -> Manifest | None:
    """What the ``config.json`` of a folder says is packed; None if it says nothing of mpfx.

    Raises:
        CheckpointError: if it is not what this version writes.
    """
    found = _quantization(folder)
    return None if found is None else parse_config(found, folder)


def _quantization(folder: Path) -> dict[str, Any] | None:
    try:
        config = parse_json(folder / CONFIG, (folder / CONFIG).read_bytes())
    except (OSError, CheckpointError):  # none, or none that can be read: building the model will say so
        return None
    found = config.get(QUANTIZATION) if isinstance(config, dict) else None
    return found if isinstance(found, dict) and found.get("quant_method") == FORMAT else None


def check_agreement(manifest: Manifest, other: Manifest) -> None:
    """Compare two manifests of a folder.

    Raises:
        CheckpointError: if they describe different checkpoints.
    """
    for what in ("sites", "experts", "tied"):
        if getattr(manifest, what) != getattr(other, what):
            raise CheckpointError(
                f"{manifest.folder}: expected {manifest.file} and {other.file} to describe the same checkpoint but got "
                f"other `{what}`: save the model again, to a new folder."
            )


def parse_manifest(folder: Path, text: str | bytes) -> Manifest:
    """Check the text of a folder's manifest.

    Raises:
        CheckpointError: if it is not one that this version writes.
    """
    return _manifest(folder, MANIFEST, parse_json(folder / MANIFEST, text))


def parse_config(found: Mapping[str, Any], folder: Path = Path()) -> Manifest:
    """Check the ``quantization_config`` of a ``config.json``.

    Args:
        found: by the names of its fields.
        folder: of the file; left out where it is not known.

    Raises:
        CheckpointError: if it is not one that this version writes.
    """
    rest = {name: value for name, value in found.items() if name != "quant_method"}
    return _manifest(folder, CONFIG, {**rest, "format": found.get("quant_method"), "library": "transformers"})


def parse_json(path: Path, text: str | bytes) -> Any:
    """The data of a JSON file.

    Args:
        path: of the file, for the error.
        text: of the file.

    Raises:
        CheckpointError: if it is no JSON in UTF-8, or nested too deeply to be read.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged, it holds no JSON that can be read: {error}.") from error


def _manifest(folder: Path, file: str, data: Any) -> Manifest:
    path = folder / file
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
    return Manifest(folder, sites, experts, data["tied"], data.get("library"), file)


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
