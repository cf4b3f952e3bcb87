"""`trace`: the torch.fx graph of a module as it is really called, on the module's own children."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpfx.graph.calls import (
    Fixed,
    TensorSpec,
    TracedCall,
    has_tensor,
    leaves,
    map_leaves,
    name_arguments,
    private_copy,
    result_tensors,
    tensors_in,
)
from mpfx.graph.compat import (
    FakeTensorMode,
    compiler_flags_set,
    dynamic_fake,
    python_dispatcher,
    symbolic_expression,
)
from mpfx.graph.errors import TraceError, trace_error
from mpfx.graph.isolation import hook_keys, module_calls_through, undisturbed
from mpfx.graph.linear import describe_linears, is_experts, is_leaf, is_linear
from mpfx.graph.live import META_KEY, TraceRecord, live_module, node_info, record_of
from mpfx.graph.recorder import Recorder
from mpfx.graph.sizes import SizeRules
from mpfx.graph.verify import failed_comparison


def trace(module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> fx.GraphModule:
    """Trace the call ``module(*args, **kwargs)``.

    The forward runs once on fake tensors, which need no memory and no weights. Childless modules, linear layers
    and fused experts become ``call_module`` nodes; everything else becomes the PyTorch calls it makes. Batch and
    length stay dynamic.

    Args:
        module: In training or evaluation mode, on any device, the meta device included.
        args: Positional arguments: tensors, plain values, nested lists and dicts of these, other objects.
        kwargs: Keyword arguments of the same kinds.

    Returns:
        A GraphModule called as ``gm(**values)``, by the names of forward's parameters. It shares the module's
        children: ``module.set_submodule(path, new)`` changes both. It returns the nested tensors of the module's
        result, a dict for dataclasses and mappings; caches and plain values are left out.

    Raises:
        TraceError: If the forward cannot be one graph, for example as it branches on the values of a tensor.
        TypeError: If the arguments do not fit the module's forward.
    """
    call = TracedCall.of(module, args, kwargs or {})
    weights = {id(m.weight): path for path, m in module.named_modules() if path and is_linear(m)}
    leaf_modules = {id(m) for m in module.modules() if is_leaf(m)}
    device = next((t.device for t in tensors_in(list(call.values.values()))), torch.device("cpu"))
    with undisturbed(module):
        recorder = Recorder(module, leaf_modules, weights, device)
        _record(module, call, recorder)
    _remove_dead_nodes(recorder.builder.graph)
    gm = live_module(module, recorder.builder.graph, recorder.builder.constants)
    gm.meta[META_KEY] = TraceRecord(
        model=module,
        constants=recorder.builder.constants,
        call=call,
        sizes=SizeRules(_symbol_names(call), recorder.env.rules()),
        linears=describe_linears(module, recorder.direct_weight_uses),
        hooks=hook_keys(module, without=leaf_modules),
        experts=frozenset(path for path, m in module.named_modules() if path and is_experts(m)),
    )
    call.forget_tensors()
    gm.register_forward_pre_hook(_check_call, with_kwargs=True)
    return gm


def bind_inputs(
    gm: fx.GraphModule, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Name the arguments of a call of the traced module, check them, and fill in what was left out.

    Returns:
        A value for every placeholder of ``gm``: call ``gm(**values)``, or run the blocks on them.

    Raises:
        TypeError: If the arguments do not fit the module's forward, or a traced one is missing.
        ValueError: If they break what the trace assumed: a size, a type, a flag. Where this is only that a size is
            not one, model and graph run once on the batch, and it is refused if their results differ.
    """
    values = name_arguments(record_of(gm).call.signature, args, kwargs or {})
    env = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if name not in values and not node.args:
            raise TypeError(f"Expected the argument `{name}`, which the traced call had.")
        env[name] = values[name] if name in values else node.args[0]
    _check(gm, {**env, **values})
    return env


def _check_call(gm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a traced graph: what the trace assumed must hold."""
    assert isinstance(gm, fx.GraphModule)
    inputs = gm.graph.find_nodes(op="placeholder")
    defaults = {str(node.target): node.args[0] for node in inputs if node.args}
    given = zip((str(node.target) for node in inputs), args, strict=False)
    _check(gm, {**defaults, **dict(given), **kwargs})


def _check(gm: fx.GraphModule, values: Mapping[str, Any]) -> None:
    record = record_of(gm)
    record.call.check(values, record.sizes, lambda: failed_comparison(gm, record, values))


def _record(module: nn.Module, call: TracedCall, recorder: Recorder) -> None:
    """Run the module on fakes of its arguments under the recorder."""
    with recorder.env.operator():
        faked = _fake_arguments(call, recorder.mode)
    for name in sorted(faked, key=lambda name: not has_tensor(faked[name])):  # those with a default go last
        recorder.placeholder(name, faked[name], call.placeholder_default(name))
    for name in call.optional:
        recorder.placeholder(name, None, call.placeholder_default(name))
    positional, keywords = call.split(faked)
    try:
        with (
            compiler_flags_set(),
            python_dispatcher(),
            module_calls_through(recorder.call_module),
            recorder.mode,
            recorder,
        ):
            result = module(*positional, **keywords)
        recorder.output(result_tensors(result))
    except TraceError:
        raise
    except Exception as error:  # whatever it is, it is reported with the place where it happened
        path = recorder.failure[1] if recorder.failure else ""
        raise trace_error(error, path, type(module.get_submodule(path)).__name__) from error


def _fake_arguments(call: TracedCall, mode: FakeTensorMode) -> dict[str, Any]:
    """Fakes of the tensors and private copies of other objects, by name; fills in ``call.specs``."""
    widen = _has_batch_of_one(call.values)

    def fake(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            call.specs[path] = Fixed(leaf)
            return private_copy(path, leaf)
        # A fresh tensor of the same form, as the caller's may be an inference tensor or a view.
        shape = [2 if widen and dim == 0 and size == 1 else size for dim, size in enumerate(leaf.shape)]
        faked = dynamic_fake(mode, torch.empty(shape, dtype=leaf.dtype, device=leaf.device))
        sizes = tuple(s if isinstance(s, int) else symbolic_expression(s) for s in faked.shape)
        call.specs[path] = TensorSpec(leaf.dtype, sizes)
        return faked

    for name, value in call.optional.items():
        call.specs.update({path: Fixed(leaf) for path, leaf in leaves(value, name)})
    return {name: map_leaves(value, fake, name) for name, value in call.values.items()}


def _has_batch_of_one(values: Mapping[str, Any]) -> bool:
    """Whether all inputs are batches of one, which PyTorch would make a fixed size: then two is traced."""
    tensors = list(tensors_in(list(values.values())))
    batched = [t for t in tensors if t.dim() > 1] or [t for t in tensors if t.dim() == 1]
    return all(t.shape[0] == 1 for t in batched)


def _symbol_names(call: TracedCall) -> dict[Any, str]:
    return {
        size: f"{path}.shape[{dim}]"
        for path, spec in call.specs.items()
        if isinstance(spec, TensorSpec)
        for dim, size in enumerate(spec.sizes)
        if not isinstance(size, int)
    }


def _remove_dead_nodes(graph: fx.Graph) -> None:
    """Erase what nothing uses; fx's own elimination would also take in-place methods."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not node_info(node).mutates:
            graph.erase_node(node)
