"""The weights of a checkpoint on the disk: one safetensors file, or shards and an index, as transformers has them.

They may come from anywhere: whatever is odd in them raises :class:`CheckpointError`.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpfx.hub.header import TensorInfo, read_header
from mpfx.hub.manifest import INDEX, WEIGHTS, CheckpointError, parse_json


class Weights:
    """Open weights files: their header is read, their tensors are not.

    Args:
        files: one file, or all shards.

    Attributes:
        header: what the files say of every tensor, by name.

    Raises:
        FileNotFoundError: if a file is missing.
        CheckpointError: if one is damaged, or two hold the same tensor.
    """

    header: dict[str, TensorInfo]

    def __init__(self, files: Sequence[Path]) -> None:
        self.header, self._places = {}, dict[str, tuple[Path, Any]]()
        with ExitStack() as stack:
            for path in files:
                file = stack.enter_context(_open(path))
                for name, info in read_header(file, path).items():
                    if name in self.header:
                        raise CheckpointError(f"{path}: expected {name} once but {self._places[name][0]} has it too.")
                    self.header[name], self._places[name] = info, (path, file)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; tensors that were read stay."""
        self._places.clear()
        self._stack.close()

    @property
    def files(self) -> dict[str, str]:
        """The name of the file that holds a tensor, by the tensor's name."""
        return {name: path.name for name, (path, _) in self._places.items()}

    def read(self, name: str) -> Tensor:
        """Read one tensor, on the CPU.

        Raises:
            CheckpointError: if it cannot be read.
        """
        path, file = self._places[name]
        try:
            tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {name} cannot be read: {error}.") from error
        return tensor


def open_weights(folder: Path) -> Weights:
    """Open the weights of a checkpoint's folder.

    Raises:
        FileNotFoundError: if a file is missing.
        CheckpointError: if one is damaged, or the index says something else than the shards.
    """
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return Weights([folder / WEIGHTS])
    index = _read_index(folder / INDEX)
    weights = Weights([folder / name for name in sorted(set(index.values()))])
    if weights.files != index:
        odd = sorted(name for name, _ in weights.files.items() ^ index.items())
        weights.close()
        raise CheckpointError(
            f"{folder / INDEX}: expected to say what the shards hold but {odd[:5]} are not where it says."
        )
    return weights


def _open(path: Path) -> Any:
    try:
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} holds no {path.name}.")
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise CheckpointError(f"{path} cannot be opened: {error}.") from error


def _read_index(path: Path) -> Mapping[str, str]:
    data = parse_json(path, path.read_bytes())
    found = data.get("weight_map") if isinstance(data, dict) else None
    if not (isinstance(found, dict) and found and all(_is_shard(name) for name in found.values())):
        raise CheckpointError(
            f"{path}: expected `weight_map` to map names of tensors to names of .safetensors files beside it."
        )
    return found


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:")
