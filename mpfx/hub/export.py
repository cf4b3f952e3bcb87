"""Packed models in the formats of other libraries."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from mpfx.hub.checkpoint import is_checkpoint, load
from mpfx.hub.export_compressed import check_compressed, write_compressed
from mpfx.hub.export_gguf import check_gguf, write_gguf
from mpfx.hub.grids import grid_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Format = Literal["compressed-tensors", "gguf"]
"""What can be written."""

_Check = Callable[["PreTrainedModel", "PreTrainedTokenizerBase | None"], None]
_Write = Callable[["PreTrainedModel", "PreTrainedTokenizerBase | None", Path], tuple[int, list[str]]]

_FORMATS: dict[str, tuple[_Check, _Write]] = {
    "compressed-tensors": (check_compressed, write_compressed),
    "gguf": (check_gguf, write_gguf),
}
FORMATS: tuple[str, ...] = get_args(Format)
assert set(_FORMATS) == set(FORMATS)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: folder or file.
        bits_per_weight: stored bits of the compressed weights there, everything counted.
        packed_bits_per_weight: the same in mpfx's own checkpoint.
        notes: what a user should know.
    """

    path: Path
    bits_per_weight: float
    packed_bits_per_weight: float
    notes: tuple[str, ...]


def export(
    source: "str | os.PathLike[str] | nn.Module",
    target: str | os.PathLike[str],
    format: Format,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Exported:
    """Write a packed model in the format of another library.

    Args:
        source: folder of an mpfx checkpoint, or a transformers model with packed modules.
        target: what to write; must not exist, or be an empty folder. compressed-tensors: a folder for
            ``from_pretrained`` and vLLM; gguf: a file for llama.cpp.
        format: compressed-tensors (one width per site) or gguf (one width per site, groups of 32 or more, an
            architecture that is named as llama.cpp names it).
        tokenizer: to store along; None: that of the folder, if it has one.

    Raises:
        ValueError: if the format cannot hold the model, before anything is written: naming the first sites, and the
            setting with which it could.
    """
    if format not in FORMATS:
        raise ValueError(f"Expected `format` to be one of {list(FORMATS)} but got {format!r}.")
    path = Path(target)
    _check_target(path, format)
    model, tokenizer = _open(source, tokenizer)
    check, write = _FORMATS[format]
    check(model, tokenizer)
    with _staged(path) as staged:
        stored, notes = write(model, tokenizer, staged)
    layers = grid_layers(model).values()
    weights = max(1, sum(layer.in_features * layer.out_features for layer in layers))
    orders = {id(p): p.nbytes for layer in layers if (p := layer.permutation) is not None}
    packed = sum(layer.packed.nbytes for layer in layers) + sum(orders.values())
    return Exported(path, stored * 8 / weights, packed * 8 / weights, tuple(notes))


def _check_target(path: Path, format: str) -> None:
    if format == "gguf" and path.suffix != ".gguf":
        raise ValueError(f"Expected `output` to be a file that ends in .gguf but got {str(path)!r}.")
    empty = format != "gguf" and path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty:
        raise ValueError(
            f"Expected `output` to be new but {str(path)!r} exists: name another path, or remove it first."
        )
    if files := [str(parent) for parent in path.parents if parent.is_file()]:
        raise ValueError(f"Expected `output` in a folder but {files[0]!r} is a file: name another path.")


def _open(source: Any, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, PreTrainedModel

    if isinstance(source, nn.Module):
        model: nn.Module = source
    elif not is_checkpoint(source):
        raise ValueError(f"Expected the folder of an mpfx checkpoint but got {os.fspath(source)!r}: compress it first.")
    else:
        model = load(source)
        if tokenizer is None and (Path(source) / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Expected a model of transformers but got {type(model).__name__}: others read no other class."
        )
    if not grid_layers(model):
        raise ValueError("Expected a model with quantized layers but found none: compress it first.")
    return model, tokenizer


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """Where to write so that the target is whole or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mpfx-", dir=target.parent) as folder:
        staged = Path(folder) / target.name
        yield staged
        _share(staged, Path(folder))
        if target.is_dir():
            target.rmdir()  # an empty one
        staged.replace(target)


def _share(written: Path, folder: Path) -> None:
    """Give files the rights that the user's umask gives a new one; their writers may be stricter."""
    (plain := folder / ".plain").touch()
    for file in [written, *written.rglob("*")]:
        if file.is_file():
            file.chmod(plain.stat().st_mode)
