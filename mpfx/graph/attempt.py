"""One recording of a call: the forward runs once on fakes of its arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpfx.graph.calls import (
    Fixed,
    TensorSpec,
    TracedCall,
    given_or_traced,
    has_tensor,
    is_literal,
    leaves,
    map_leaves,
    private_copy,
    result_tensors,
    tensors_in,
)
from mpfx.graph.compat import (
    compiler_flags_set,
    dynamic_fake,
    python_dispatcher,
    storage_key,
    symbolic_expression,
)
from mpfx.graph.forms import LearnedForms
from mpfx.graph.isolation import module_calls_through
from mpfx.graph.live import CONSTANTS, WHOLE, NodeInfo
from mpfx.graph.recorder import Parts, Recorder
from mpfx.graph.rehearsal import CallLog, RealRun


def new_recorder(module: nn.Module, call: TracedCall, parts: Parts, log: CallLog) -> Recorder:
    """A recorder of the call, in the autocast state of this moment."""
    device = next((t.device for t in tensors_in(list(call.values.values()))), torch.device("cpu"))
    return Recorder(module, parts, device, log)


def record(module: nn.Module, call: TracedCall, recorder: Recorder, runs: Sequence[RealRun]) -> None:
    """Run the module on fakes of its arguments under the recorder.

    Args:
        module: The traced module.
        call: Its call; what its arguments are is noted there.
        recorder: Gets the graph.
        runs: Real runs, which show the results of modules that cannot run on fakes; none are needed otherwise.

    Raises:
        Exception: Whatever the forward raises on fakes; `Recorder.failure` says where.
    """
    faked = _add_inputs(call, recorder)
    recorder.forms = LearnedForms(runs, call.specs, faked, recorder.env)
    result = _run(module, call, recorder, faked)
    recorder.output(result_tensors(result))
    recorder.finish()


def record_whole(module: nn.Module, call: TracedCall, recorder: Recorder, run: bool) -> None:
    """Make a graph that does nothing but to call the module.

    Args:
        module: The traced module.
        call: Its call.
        recorder: Gets the graph; its parts must have the module itself among the opaque ones.
        run: Whether to run the module on fakes first, to see that it runs and what it calls.

    Raises:
        Exception: Whatever the forward raises on fakes.
        UnsupportedCodeError: If the module returns no tensor.
    """
    faked = _add_inputs(call, recorder)
    if run:
        result_tensors(_run(module, call, recorder, faked))
        recorder.finish()
    nodes = {str(node.target): node for node in recorder.builder.graph.find_nodes(op="placeholder")}
    values = {name: _value_of(name, call, recorder, nodes) for name in call.values}
    positional, keywords = call.split(values)
    # What it writes to is not known; blocks then run it on copies of the inputs.
    written = frozenset(storage_key(tensor) for tensor in tensors_in(faked))
    whole = recorder.builder.add("call_module", WHOLE, tuple(positional), keywords, NodeInfo(mutates=written))
    recorder.builder.graph.output(recorder.builder.add("call_function", result_tensors, (whole,)))


def _value_of(name: str, call: TracedCall, recorder: Recorder, nodes: Mapping[str, Any]) -> Any:
    """The node of an argument for a call of the whole module; objects that may be left out come from the trace."""
    value = call.values[name]
    if has_tensor(value) or is_literal(value):
        return nodes[name]
    setattr(recorder.builder.constants, name, value)
    traced = recorder.builder.add("get_attr", f"{CONSTANTS}.{name}")
    return recorder.builder.add("call_function", given_or_traced, (nodes[name], traced))


def _add_inputs(call: TracedCall, recorder: Recorder) -> dict[str, Any]:
    with recorder.env.operator():
        faked = _fake_arguments(call, recorder)
    for name in sorted(faked, key=lambda name: not has_tensor(faked[name])):  # those with a default go last
        recorder.placeholder(name, faked[name], call.placeholder_default(name))
    for name in call.optional:
        recorder.placeholder(name, None, call.placeholder_default(name))
    return faked


def _run(module: nn.Module, call: TracedCall, recorder: Recorder, faked: Mapping[str, Any]) -> Any:
    positional, keywords = call.split(faked)
    with (
        compiler_flags_set(),
        python_dispatcher(),
        module_calls_through(recorder.call_module),
        recorder.mode,
        recorder,
    ):
        return module(*positional, **keywords)


def _fake_arguments(call: TracedCall, recorder: Recorder) -> dict[str, Any]:
    """Fakes of the tensors and private copies of other objects, by name; fills in ``call.specs``."""
    widen = _has_batch_of_one(call.values)

    def fake(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            call.specs[path] = Fixed(leaf)
            return private_copy(path, leaf)
        # A fresh tensor of the same form, as the caller's may be an inference tensor or a view.
        shape = [2 if widen and dim == 0 and size == 1 else size for dim, size in enumerate(leaf.shape)]
        fresh = torch.empty(shape, dtype=leaf.dtype, device=leaf.device)
        static = _image_dims(fresh) if recorder.parts.static_images else ()
        faked = dynamic_fake(recorder.mode, fresh, static)
        sizes = tuple(s if isinstance(s, int) else symbolic_expression(s) for s in faked.shape)
        for dim, symbol in enumerate(sizes):
            if not isinstance(symbol, int):
                recorder.env.add_input(symbol, shape[dim], dim in _image_dims(fresh))
        call.specs[path] = TensorSpec(leaf.dtype, sizes)
        return faked

    for name, value in call.optional.items():
        call.specs.update({path: Fixed(leaf) for path, leaf in leaves(value, name)})
    return {name: map_leaves(value, fake, name) for name, value in call.values.items()}


def _image_dims(tensor: Tensor) -> range:
    """The dimensions of channels, height and width, where a tensor looks like a batch of images (or of videos)."""
    return range(1, tensor.dim()) if tensor.dim() > 3 and tensor.is_floating_point() else range(0)


def _has_batch_of_one(values: Mapping[str, Any]) -> bool:
    """Whether all inputs are batches of one, which PyTorch would make a fixed size: then two is traced."""
    tensors = list(tensors_in(list(values.values())))
    batched = [t for t in tensors if t.dim() > 1] or [t for t in tensors if t.dim() == 1]
    return all(t.shape[0] == 1 for t in batched)
