"""What a failed trace tells its user: where it happened, in which line of the model's code, and what to change."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from dataclasses import dataclass

import torch
from torch import nn

from mpfx.graph.compat import DATA_DEPENDENT_ERRORS

_OWN_FOLDER = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TORCH_FOLDER = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep

_NOT_THE_USERS = (_OWN_FOLDER, _TORCH_FOLDER, os.path.abspath(contextlib.__file__))

_LEAF_ADVICE = "move that code into a module of its own without children, which is called as a whole"


class TraceError(RuntimeError):
    """The forward of a module cannot be recorded as one graph that holds for other inputs."""


class UnsupportedCodeError(Exception):
    """Raised by the recorder where the forward does something a graph cannot hold.

    Args:
        problem: What the forward does.
        advice: What its author can change.
    """

    def __init__(self, problem: str, advice: str = _LEAF_ADVICE) -> None:
        super().__init__(problem)
        self.advice = advice


class FixedSizeError(UnsupportedCodeError):
    """Raised where code fixes a size of the inputs, so that its graph would hold for this size alone."""

    def __init__(self) -> None:
        super().__init__(
            "the forward branches on a size or loops over it, so that one graph cannot hold for other sizes",
            f"compute on the whole tensor instead, or {_LEAF_ADVICE}",
        )


class ImageSizeError(UnsupportedCodeError):
    """Raised where a graph for images of every size is not worth its price; one for images of one size is."""

    def __init__(self) -> None:
        super().__init__("the forward computes with the height and width of images in a way that fixes them")


@dataclass(frozen=True)
class Diagnosis:
    """Why a module is no part of a graph: the one text of errors and of reports.

    Attributes:
        path: Path of the module in the traced one, "" for the traced module itself.
        module_type: Its class name.
        problem: What its forward does.
        where: ``file:line`` of the code that does it.
        advice: What its author can change.
    """

    path: str
    module_type: str
    problem: str
    where: str
    advice: str

    def __str__(self) -> str:
        place = f"`{self.path}`" if self.path else "the traced module"
        return f"{place} ({self.module_type}) at {self.where}: {self.problem}. What to change: {self.advice}."


def diagnose(error: Exception, path: str, module: nn.Module) -> Diagnosis:
    """Say what stopped a trace, where, and what to change.

    Args:
        error: The exception that left the module's forward.
        path: Path of the innermost module that was running.
        module: That module.
    """
    problem, advice = _problem(error)
    return Diagnosis(path, type(module).__name__, problem, _user_line(error) or _forward_line(module), advice)


def trace_error(diagnosis: Diagnosis) -> TraceError:
    """The error that tells a diagnosis."""
    return TraceError(f"Cannot trace {diagnosis}")


def _problem(error: Exception) -> tuple[str, str]:
    """Say what is wrong and what to change."""
    if isinstance(error, UnsupportedCodeError):
        return str(error), error.advice
    if isinstance(error, DATA_DEPENDENT_ERRORS):
        return (
            "the forward depends on the values of a tensor, so one graph cannot hold for all inputs",
            f"decide with torch.where instead of `if`, or {_LEAF_ADVICE}",
        )
    message = (str(error).strip() or "no message").splitlines()[0].rstrip(".")
    return (
        f"{type(error).__name__}: {message}",
        "check that the same call works without tracing (call mpfx before anything that changes the module's "
        f"calls, such as torch.compile or hooks that read values); if it does, {_LEAF_ADVICE}",
    )


def asking_line() -> str:
    """The innermost ``file:line`` of the running code that is neither PyTorch's nor this package's."""
    frame = sys._getframe(1)
    while frame is not None and os.path.abspath(frame.f_code.co_filename).startswith(_NOT_THE_USERS):
        frame = frame.f_back  # type: ignore[assignment]
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""


def _user_line(error: Exception) -> str | None:
    """The innermost ``file:line`` of the traceback that is neither PyTorch's nor this package's."""
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [f for f in frames if not os.path.abspath(f.filename).startswith(_NOT_THE_USERS)]
    return f"{foreign[-1].filename}:{foreign[-1].lineno}" if foreign else None


def _forward_line(module: nn.Module) -> str:
    """Where the module's forward begins, for code without lines of its own (compiled, or PyTorch's)."""
    code = getattr(getattr(type(module), "forward", None), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else "code that is not written in Python"
