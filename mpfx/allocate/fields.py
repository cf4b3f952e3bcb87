"""JSON files that may come from anywhere, read field by field; and files that are written at once or not at all."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """Hand out a path beside the target to write to; it takes the target's place if nothing goes wrong."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, form: str, version: int) -> "Fields":
    """Read an object of a known format and version.

    Raises:
        ValueError: if it is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: Expected JSON but {error}.") from error
    top = Fields(data, str(path))
    if (found := top.take("format")) != form:
        raise top.wrong("format", repr(form), found)
    if (found := top.take("version")) != version or isinstance(found, bool):
        raise top.wrong("version", f"{version}, which this version of mpfx reads,", found)
    return top


class Fields:
    """An object of a JSON file; every reader checks what it hands out.

    Args:
        data: what should be an object.
        where: file and place, for messages.
    """

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"{where}: Expected an object but got {type(data).__name__}.")
        self.data: dict[str, Any] = data
        self.where = where
        self._taken: set[str] = set()

    def wrong(self, name: str, expected: str, found: Any) -> ValueError:
        """An error about one field."""
        return ValueError(f"{self.where}: Expected `{name}` to be {expected} but got {str(found)[:100]!s}.")

    def take(self, name: str) -> Any:
        """The raw value of a field that has to be there."""
        if name not in self.data:
            raise ValueError(f"{self.where}: Expected a field `{name}` but it is missing.")
        self._taken.add(name)
        return self.data[name]

    def done(self, known: Iterable[str] = ()) -> None:
        """Refuse fields that nobody asked for."""
        if odd := sorted(self.data.keys() - self._taken - {*known}):
            raise ValueError(f"{self.where}: Expected no fields besides {sorted(self._taken)} but got {odd[:5]}.")

    def integer(self, name: str, least: int, most: int) -> int:
        """A whole number within bounds."""
        return self._integer(name, self.take(name), least, most)

    def integers(self, name: str, least: int, most: int) -> tuple[int, ...]:
        """A list of whole numbers within bounds."""
        return tuple(self._integer(name, value, least, most) for value in self._list(name))

    def _integer(self, name: str, value: Any, least: int, most: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"a whole number from {least} to {most}", value)
        return value

    def number(self, name: str) -> float:
        """A finite number above 0."""
        value = self.take(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise self.wrong(name, "a finite number above 0", value)
        return float(value)

    def boolean(self, name: str) -> bool:
        """True or false."""
        value = self.take(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def text(self, name: str) -> str:
        """A text."""
        return self._text(name, self.take(name))

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        return tuple(self._text(name, value) for value in self._list(name))

    def _text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.wrong(name, "a text", value)
        return value

    def _list(self, name: str) -> list[Any]:
        value = self.take(name)
        if not isinstance(value, list):
            raise self.wrong(name, "a list", value)
        return value

    def object(self, name: str) -> "Fields":
        """An object inside of this one."""
        return Fields(self.take(name), f"{self.where}, {name}")

    def optional(self, name: str) -> "Fields | None":
        """An object inside of this one, or null."""
        return None if self.take(name) is None else self.object(name)

    def items(self, name: str) -> list["Fields"]:
        """A list of objects."""
        return [Fields(value, f"{self.where}, {name}[{index}]") for index, value in enumerate(self._list(name))]
