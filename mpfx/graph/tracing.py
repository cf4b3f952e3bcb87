"""`trace`: the torch.fx graph of a module as it is really called, on the module's own children."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from mpfx.graph.calls import TracedCall, map_leaves, name_arguments, tensors_in
from mpfx.graph.ladder import Ladder
from mpfx.graph.live import record_of
from mpfx.graph.verify import failed_comparison


def trace(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    whole: bool = False,
) -> fx.GraphModule:
    """Trace the call ``module(*args, **kwargs)``.

    The forward runs on fake tensors, which need no memory and no weights. Childless modules, linear layers and
    fused experts become ``call_module`` nodes; everything else becomes the PyTorch calls it makes. Batch and
    length stay dynamic.

    A module whose forward cannot be recorded, for example as it branches on the values of a tensor, becomes a
    ``call_module`` node too: an opaque part, which runs its own code in every call of the graph. If that is the
    module itself, the graph is a single call of it. What such a part returns must have the form that it had while
    tracing, which each call of the graph checks. `opaque_parts` lists them with the reason and the remedy. Code
    that needs the values of tensors runs for real on the example and on examples of other sizes, which needs weights.

    Args:
        module: In training or evaluation mode, on any device, the meta device included.
        args: Positional arguments: tensors, plain values, nested lists and dicts of these, other objects.
        kwargs: Keyword arguments of the same kinds.
        whole: Whether to refuse a module with opaque parts.

    Returns:
        A GraphModule called as ``gm(**values)``, by the names of forward's parameters. It shares the module's
        children: ``module.set_submodule(path, new)`` changes both. It returns the nested tensors of the module's
        result, a dict for dataclasses and mappings; caches and plain values are left out.

    Raises:
        TraceError: If the module does not run on these arguments, or returns no tensor; with ``whole``, if the
            forward cannot be one graph.
        TypeError: If the arguments do not fit the module's forward.
    """
    ladder = Ladder(module, TracedCall.of(module, args, kwargs or {}))
    gm = ladder.whole() if whole else ladder.climb()
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


def first_samples(gm: fx.GraphModule, values: Mapping[str, Any], count: int = 2) -> dict[str, Any]:
    """The first samples of a batch, for trials that need no more: what has the batch's size in front is cut.

    Args:
        gm: Traced graph.
        values: Of all placeholders, as `bind_inputs` gives them.
        count: Samples to keep.

    Returns:
        A smaller batch; the given one where the graph does not take the smaller one.
    """
    sizes = Counter(t.shape[0] for t in tensors_in(list(values.values())) if t.dim())
    batch = sizes.most_common(1)[0][0] if sizes else 0

    def cut(path: str, leaf: Any) -> Any:
        return leaf[:count] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch else leaf

    smaller = {name: map_leaves(value, cut, name) for name, value in values.items()}
    try:
        _check(gm, smaller)
    except ValueError:
        return dict(values)
    return smaller


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
