"""Whether a graph is right for a batch with a size of one, which no trace can have as a dynamic size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mpfx.graph.calls import leaves, map_leaves, private_copy, result_tensors, tensors_in
from mpfx.graph.isolation import unobserved
from mpfx.graph.live import TraceRecord

_ROUNDING = 8  # units in the last place of the largest value: other kernels, not another computation


def failed_comparison(gm: fx.GraphModule, record: TraceRecord, values: Mapping[str, Any]) -> str | None:
    """Run model and graph on one batch, unless they were found equal on one of this form.

    Neither hooks nor random state, buffers or attributes of the model show that they ran.

    Args:
        gm: The traced graph.
        record: Of its trace.
        values: Of all placeholders, and whatever else the call has, by name.

    Returns:
        What speaks against the graph on this batch; None if it gives what the model gives.
    """
    form = _form(values)
    if form in record.verified:
        return None
    inputs = {str(node.target) for node in gm.graph.find_nodes(op="placeholder")}
    positional, keywords = record.call.split(record.call.without_defaults(values))
    try:
        expected = _run(record, lambda args, kwargs: record.model(*args, **kwargs), positional, keywords)
        # Its forward, as the call itself has the hook that led here.
        found = _run(record, lambda _, kwargs: gm.forward(**kwargs), [], {n: values[n] for n in inputs})
        equal = _equal(expected, found)
    except Exception as error:  # whatever it is, the graph is not known to be right
        return f"a comparison of model and graph on it ended in {type(error).__name__}: {error}"
    if not equal:
        return "there the graph does not give what the model gives"
    record.verified.add(form)
    return None


def _form(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides whether one batch speaks for another: sizes, and where all is one value (no padding, say)."""
    found = (item for name, value in values.items() for item in leaves(value, name))
    return tuple((path, leaf.shape, _only_value(leaf)) for path, leaf in found if isinstance(leaf, Tensor))


def _only_value(tensor: Tensor) -> Any:
    if tensor.is_meta or not tensor.numel():
        return None
    first = tensor.flatten()[0]
    return first.item() if bool((tensor == first).all()) else None


def _run(record: TraceRecord, call: Callable[[Any, Any], Any], args: Any, kwargs: Any) -> dict[str, Tensor]:
    args, kwargs = map_leaves((args, kwargs), _copied, "")
    tensors = [*tensors_in((args, kwargs)), *record.model.parameters()]
    cuda = sorted({t.device.index for t in tensors if t.is_cuda})
    with unobserved(record.model, record.hooks, _buffers(record), cuda):
        result = dict(leaves(result_tensors(call(args, kwargs)), ""))
        return {path: tensor.clone() for path, tensor in result.items()}  # it may be one of the buffers


def _buffers(record: TraceRecord) -> list[Tensor]:
    """What a run may write to. Linear layers and their replacements, whose buffers may be large, write to none."""
    read_only = {id(b) for path in record.linears for b in record.model.get_submodule(path).buffers()}
    return [b for b in (*record.model.buffers(), *record.constants.buffers()) if id(b) not in read_only]


def _copied(path: str, leaf: Any) -> Any:
    """The forward may write to its inputs."""
    return leaf.clone() if isinstance(leaf, Tensor) else private_copy(path, leaf)


def _equal(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> bool:
    return expected.keys() == found.keys() and all(_close(tensor, found[path]) for path, tensor in expected.items())


def _close(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(expected, found)
    largest = expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    margin = _ROUNDING * torch.finfo(expected.dtype).eps * largest
    return torch.allclose(found, expected, rtol=0.0, atol=margin, equal_nan=True)
