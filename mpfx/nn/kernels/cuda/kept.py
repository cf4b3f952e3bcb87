"""What kernels keep on disk from one process to the next: compiled code, and how to cut the work on a device."""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """``MPFX_CACHE``, or ``mpfx`` in the user's cache folder."""
    if chosen := os.environ.get("MPFX_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpfx"


def kept_bytes(name: str, make: Callable[[], bytes]) -> bytes:
    """Read a file of the cache; the first time, make it.

    A cache that cannot be written does not matter: what it would save is made again by the next process.
    """
    path = cache_folder() / name
    with suppress(OSError):
        return path.read_bytes()
    content = make()
    with suppress(OSError):
        replace(path, content)
    return content


def replace(path: Path, content: bytes) -> None:
    """Write a file at once: other processes see all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.replace(temporary, path)
