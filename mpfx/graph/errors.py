"""What a failed trace tells its user: where it happened, in which line of the model's code, and what to change."""

from __future__ import annotations

import os
import traceback

import torch

from mpfx.graph.compat import DATA_DEPENDENT_ERRORS

_OWN_FOLDER = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TORCH_FOLDER = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep

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


def trace_error(error: Exception, module_path: str, module_type: str) -> TraceError:
    """Turn what stopped a trace into an error that names the place, the problem and the remedy.

    Args:
        error: The exception that left the module's forward.
        module_path: Path of the innermost module that was running.
        module_type: Class name of that module.
    """
    problem, advice = _diagnose(error)
    where = f"`{module_path}` ({module_type})" if module_path else f"the traced module ({module_type})"
    return TraceError(f"Cannot trace {where} at {_user_line(error)}: {problem}. What to change: {advice}.")


def _diagnose(error: Exception) -> tuple[str, str]:
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


def _user_line(error: Exception) -> str:
    """The innermost ``file:line`` of the traceback that is neither PyTorch's nor this package's."""
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [f for f in frames if not os.path.abspath(f.filename).startswith((_OWN_FOLDER, _TORCH_FOLDER))]
    if not foreign:
        return "a line inside PyTorch"
    return f"{foreign[-1].filename}:{foreign[-1].lineno}"
