"""Parts of a model that a graph calls as they are: what is recorded of them, and the check of their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor, fx

from mpfx.graph.calls import leaves
from mpfx.graph.errors import Diagnosis, UnsupportedCodeError

RESULT = "result"
"""What the paths of the values in a result start with."""


_LITERAL_TYPES = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class OpaquePart(Diagnosis):
    """A module that the graph calls as a whole, as its forward cannot be recorded.

    Attributes:
        inside: Graphs of the largest modules inside that could be traced, by their path relative to this module.
            They are for analysis: the graph itself calls this module's own code.
        calls: Paths, in the traced module, of the linear layers and fused experts inside, in the order of their
            first call.
    """

    inside: Mapping[str, fx.GraphModule] = field(default_factory=dict, repr=False, compare=False)
    calls: tuple[str, ...] = ()

    def __str__(self) -> str:
        inside = ", ".join(f"`{path}`" for path in self.inside) or "nothing"
        return (
            f"{super().__str__()} It is called as it is, with {len(self.calls)} linear layers and experts; "
            f"traced inside: {inside}."
        )


class HiddenResult:
    """Stands for an object with tensors that an opaque module returned: it may be handed on, but not looked into."""

    def __init__(self, type_name: str, path: str) -> None:
        self.__dict__["_hidden"] = (type_name, path)

    @property
    def type_name(self) -> str:
        """Class name of the object that this one stands for."""
        return str(self.__dict__["_hidden"][0])

    def _refuse(self, *_: Any) -> NoReturn:
        type_name, path = self.__dict__["_hidden"]
        raise UnsupportedCodeError(f"it reads a {type_name} that `{path}` returned, which is called as it is")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    __bool__ = __len__ = __iter__ = __getitem__ = __setattr__ = __contains__ = _refuse


def checked(result: Any, path: str, forms: Mapping[str, Sequence[Any]]) -> Any:
    """Return the result of an opaque module if it has the form that the rest of the graph was recorded for.

    Args:
        result: Of the module.
        path: Of the module.
        forms: By the path of every value in the result: ``("tensor", dtype, size, ...)``, where a size of None may
            be any; ``("value", value)``; ``("object", class name)``.

    Raises:
        ValueError: If the result has another form: then the code behind the module might do something else.
    """
    found = dict(leaves(result, RESULT))
    for name in [*forms, *(found.keys() - forms.keys())]:
        expected = _described(forms[name]) if name in forms else "nothing"
        got = _form(found[name]) if name in found else None
        if name not in forms or got is None or not _fits(got, forms[name]):
            raise ValueError(
                f"Expected `{name}` of `{path}` to be {expected}, as when the module was traced, but got "
                f"{_described(got) if got else 'nothing'}. What to change: trace the module on a batch of this kind, "
                f"or let `{path}` return results of one form."
            )
    return result


def form_of_value(value: Any) -> tuple[Any, ...]:
    """The form of a value that is no tensor."""
    if isinstance(value, HiddenResult):
        return ("object", value.type_name)
    return ("value", value) if type(value) in _LITERAL_TYPES else ("object", type(value).__qualname__)


def _form(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Tensor):
        return ("tensor", value.dtype, *value.shape)
    return ("value", value)


def _fits(got: Sequence[Any], form: Sequence[Any]) -> bool:
    if form[0] == "object":
        return bool(got[0] == "value" and type(got[1]).__qualname__ == form[1])
    if got[0] != form[0] or len(got) != len(form):
        return False
    if form[0] == "value":
        return type(got[1]) is type(form[1]) and bool(got[1] == form[1])
    return all(expected is None or size == expected for size, expected in zip(got, form, strict=True))


def _described(form: Sequence[Any]) -> str:
    if form[0] == "tensor":
        sizes = ", ".join("any" if size is None else str(size) for size in form[2:])
        return f"a tensor of {form[1]} with sizes ({sizes})"
    return f"a {form[1]}" if form[0] == "object" else repr(form[1])
