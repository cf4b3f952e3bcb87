"""What the command line prints and writes of a measurement."""

from typing import Any, Protocol


class BenchReport(Protocol):
    """Results of a bench."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be measured, and why."""
        ...

    def title(self) -> str:
        """A line that says on what it was measured."""
        ...

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Plain data: all figures, with the environment."""
        ...


def place(environment: dict[str, str | int]) -> str:
    """Device, dtype and versions of an environment, as text."""
    versions = [f"{n} {environment[n]}" for n in ("torch", "numba") if environment[n] != "none"]
    return f"{environment['device']}, {environment['dtype']}, {', '.join(versions)}"
