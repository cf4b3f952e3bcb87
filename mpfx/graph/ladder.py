"""The ladder of tracing: what cannot be recorded becomes a plain module call, part by part, up to the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpfx.graph.attempt import new_recorder, record, record_whole
from mpfx.graph.calls import TensorSpec, TracedCall, map_leaves, tensors_in
from mpfx.graph.compat import FakeTensor, is_transformed, size_hint
from mpfx.graph.errors import Diagnosis, FixedSizeError, ImageSizeError, TraceError, diagnose, trace_error
from mpfx.graph.experts import describe_experts
from mpfx.graph.isolation import AutocastState, hook_keys, undisturbed
from mpfx.graph.linear import describe_linears, is_experts, is_leaf, is_linear, paths_around
from mpfx.graph.live import META_KEY, TraceRecord, live_module, node_info
from mpfx.graph.opaque import OpaquePart, checked
from mpfx.graph.recorder import Parts, Recorder
from mpfx.graph.rehearsal import CallLog, FirstCall, Rehearsal
from mpfx.graph.sizes import SizeRules


class Ladder:
    """Traces one call: tries to record it, and gives up one part after the other until that succeeds.

    Args:
        module: The traced module.
        call: Its call.
        autocast: What autocast does around it.
        has_values: Whether the arguments hold the values of a real call, so that the module may run on them.
    """

    def __init__(
        self, module: nn.Module, call: TracedCall, autocast: AutocastState = (), has_values: bool = True
    ) -> None:
        self._module, self._call, self._autocast = module, call, autocast
        self._modules = dict(module.named_modules())
        linears = {id(m._parameters.get("weight")): path for path, m in self._modules.items() if path and is_linear(m)}
        leaves = frozenset(id(m) for m in module.modules() if is_leaf(m))
        self._rehearsal = Rehearsal(module, call, linears, has_values)
        self._parts = Parts(leaves, linears, dynamic=self._rehearsal.possible, holders=_holders(self._modules))
        self._given_up_for_sizes = False
        self._problems: dict[str, Diagnosis] = {}

    def whole(self) -> fx.GraphModule:
        """The graph of the whole forward.

        Raises:
            TraceError: If it cannot be recorded.
        """
        recorder, error = self._attempt()
        if error is not None and self._fixes_images(error[0]):
            recorder, error = self._attempt()
        if error is None:
            return self._graph(recorder, {})
        raise trace_error(self._diagnosis(*error)) from error[0]

    def climb(self) -> fx.GraphModule:
        """The graph with as few opaque parts as possible.

        Raises:
            TraceError: If the module does not run at all, or returns no tensor.
        """
        first: Exception | None = None
        self._parts = replace(self._parts, strict_sizes=self._rehearsal.possible)
        while True:
            recorder, error = self._attempt()
            if error is None:
                return self._graph(recorder, self._opaque_parts(recorder))
            if self._fixes_images(error[0]):
                continue
            if first is None:
                first, reason = error[0], self._diagnosis(*error)
            if not self._give_way(*error):
                if self._allows_fixed_sizes():
                    first = None
                    continue
                gm = self._call_of_all(self._diagnosis(*error))
                if gm is None:  # the first failure is the closest to the cause
                    raise trace_error(self._with_way_out(reason)) from first
                return gm

    def _attempt(self) -> tuple[Recorder, tuple[Exception, tuple[str, ...]] | None]:
        """Record once; the recorder, and the error with the paths of the modules that it left."""
        log = CallLog(wanted=self._is_traced_inside)
        with undisturbed(self._module, self._autocast):
            recorder = new_recorder(self._module, self._call, self._parts, log)
            try:
                record(self._module, self._call, recorder, self._rehearsal.runs() if self._parts.learned else ())
            except TraceError:
                raise
            except Exception as error:  # whatever it is, it is reported with the place where it happened
                known = recorder.failure is not None and recorder.failure[0] is error
                return recorder, (error, recorder.failure[1] if known and recorder.failure else ("",))
        return recorder, None

    def _give_way(self, error: Exception, stack: tuple[str, ...]) -> bool:
        """Give up what failed, or the next module around it that is entered; False if that is the whole model."""
        diagnosis = self._diagnosis(error, stack)
        self._given_up_for_sizes |= self._parts.strict_sizes and isinstance(error, FixedSizeError)
        for path in reversed(stack):
            if path in self._parts.holders and self._given_up_for_sizes:
                return False
            called = path in self._parts.opaque or (path and id(self._modules[path]) in self._parts.leaves)
            if not path or path in self._parts.learned or (called and not self._rehearsal.possible):
                if path:
                    continue
                return False
            alike = frozenset(p for p in self._alike(path))
            if called:
                self._parts = replace(self._parts, learned=self._parts.learned | alike)
            else:
                self._parts = replace(self._parts, opaque=self._parts.opaque | alike)
                self._problems.update({p: replace(diagnosis, path=p) for p in alike})
            return True
        return False

    def _fixes_images(self, error: Exception) -> bool:
        """Take the height and width of images for numbers, where symbols for them have failed."""
        if not isinstance(error, ImageSizeError) or self._parts.static_images:
            return False
        self._parts = replace(self._parts, static_images=True)
        return True

    def _allows_fixed_sizes(self) -> bool:
        """Begin anew with sizes as code fixes them, where else most of the model would have to be given up."""
        if not self._given_up_for_sizes:
            return False
        self._parts = replace(self._parts, opaque=frozenset(), learned=frozenset(), strict_sizes=False)
        self._given_up_for_sizes = False
        self._problems.clear()
        return True

    def _alike(self, path: str) -> Iterator[str]:
        """The paths of all modules of the same class: a model of many layers then needs no attempt for each."""
        kind = type(self._modules[path])
        return (other for other, module in self._modules.items() if other and type(module) is kind)

    def _diagnosis(self, error: Exception, stack: tuple[str, ...]) -> Diagnosis:
        return diagnose(error, stack[-1], self._modules[stack[-1]])

    def _with_way_out(self, diagnosis: Diagnosis) -> Diagnosis:
        if self._rehearsal.possible:
            return diagnosis
        advice = (
            "load the weights before the trace (the meta device has none), so that this part can be called as it is"
        )
        return replace(diagnosis, advice=f"{diagnosis.advice}; or {advice}")

    # The results

    def _graph(self, recorder: Recorder, opaque: dict[str, OpaquePart], rules: bool = True) -> fx.GraphModule:
        """The recorded graph on the module's own children, with its record."""
        graph, constants = recorder.builder.graph, recorder.builder.constants
        _remove_dead_nodes(graph)
        gm = live_module(self._module, graph, constants)
        whole = {id(m) for path in opaque for m in self._modules[path].modules()}
        gm.meta[META_KEY] = TraceRecord(
            model=self._module,
            constants=constants,
            call=self._call,
            sizes=SizeRules(_symbol_names(self._call), recorder.env.rules() if rules else (), recorder.env.places()),
            linears=describe_linears(self._module, recorder.log.direct_weight_uses),
            hooks=hook_keys(self._module, without=whole | self._parts.leaves),
            experts=describe_experts(self._module),
            opaque=opaque,
        )
        self._call.forget_tensors()
        return gm

    def _call_of_all(self, diagnosis: Diagnosis) -> fx.GraphModule | None:
        """The graph that calls the whole module; None if this runs neither on fakes nor for real."""
        self._parts = replace(self._parts, opaque=frozenset({""}), learned=frozenset(), dynamic=False)
        self._problems = {"": replace(diagnosis, path="", module_type=type(self._module).__name__)}
        recorder = self._recorded_call(on_fakes=True)
        if recorder is None and self._rehearsal.possible:
            recorder = self._recorded_call(on_fakes=False)
        if recorder is None:
            return None
        return self._graph(recorder, self._opaque_parts(recorder), rules=False)

    def _recorded_call(self, on_fakes: bool) -> Recorder | None:
        """A graph with nothing but the call of the module; None if it does not run."""
        with undisturbed(self._module, self._autocast):
            log = CallLog(wanted=self._is_traced_inside)
            recorder = new_recorder(self._module, self._call, self._parts, log)
            try:
                if not on_fakes:
                    self._rehearsal.run(log)
                record_whole(self._module, self._call, recorder, run=on_fakes)
            except Exception:  # the caller goes on, or reports what stopped the recording in the first place
                return None
        recorder.called[""] = None
        return recorder

    def _opaque_parts(self, recorder: Recorder) -> dict[str, OpaquePart]:
        """What is known of the opaque modules that the graph calls."""
        log = recorder.log
        if any(path in self._parts.learned for path in recorder.called):
            with undisturbed(self._module, self._autocast):
                self._rehearsal.run(log)
        inside: dict[str, list[str]] = {path: [] for path in recorder.called}
        for path in log.order:
            for part in filter(inside.__contains__, paths_around(path)):
                inside[part].append(path)
        return {path: self._opaque_part(path, inside[path], log) for path in recorder.called}

    def _opaque_part(self, path: str, inside: list[str], log: CallLog) -> OpaquePart:
        problem = self._problems[path]
        calls = tuple(p for p in inside if is_linear(self._modules[p]) or is_experts(self._modules[p]))
        return OpaquePart(**vars(problem), inside=dict(self._inside(path, path, log.first)), calls=calls)

    def _inside(self, part: str, path: str, first: Mapping[str, FirstCall]) -> Iterator[tuple[str, fx.GraphModule]]:
        """Graphs of the largest modules below ``path`` that can be traced, by their path in ``part``."""
        for name, child in self._modules[path].named_children():
            child_path = f"{path}.{name}".lstrip(".")
            if is_leaf(child):
                continue
            gm = _traced_alone(child, first[child_path]) if child_path in first else None
            if gm is None:
                yield from self._inside(part, child_path, first)
            else:
                yield child_path.removeprefix(part).lstrip("."), gm

    def _is_traced_inside(self, path: str) -> bool:
        """Whether the first call of a module is kept, as the module is traced alone."""
        return not is_leaf(self._modules[path]) and not self._parts.opaque.isdisjoint(paths_around(path))


def _holders(modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """Paths of the modules around the outermost lists of layers, "" among them."""
    lists: list[str] = []
    for path, module in modules.items():
        if _is_list_of_layers(module) and not any(path.startswith(f"{other}.") for other in lists):
            lists.append(path)
    around = {path.rsplit(".", count)[0] for path in lists for count in range(1, path.count(".") + 1)}
    return frozenset({"", *lists, *around})


def _is_list_of_layers(module: nn.Module) -> bool:
    kinds = [type(child) for child in module.children() if not is_leaf(child)]
    if isinstance(module, nn.ModuleList):
        return bool(kinds)
    return isinstance(module, nn.Sequential) and len(kinds) > len(set(kinds))


def _traced_alone(module: nn.Module, first: FirstCall) -> fx.GraphModule | None:
    """The graph of a module for its first call inside an opaque one; None if it can only be called as a whole."""
    try:
        args, kwargs = map_leaves((first.args, first.kwargs), _detached, "")
        real = all(tensor is detached for tensor, detached in _pairs(first, args, kwargs))
        call = TracedCall.of(module, args, kwargs)
        gm = Ladder(module, call, first.autocast, has_values=real).climb()
    except (TraceError, TypeError):
        return None
    return None if "" in gm.meta[META_KEY].opaque else gm


def _pairs(first: FirstCall, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(tensors_in((first.args, first.kwargs)), tensors_in((args, kwargs)), strict=True)


def _detached(path: str, leaf: Any) -> Any:
    """A tensor of the same form, where the real one has no values outside its call."""
    if not isinstance(leaf, Tensor) or not (isinstance(leaf, FakeTensor) or is_transformed(leaf)):
        return leaf
    sizes = [size_hint(size) for size in leaf.shape]
    if None in sizes:
        raise TraceError(f"The sizes of `{path}` depend on the values of a tensor.")
    return torch.empty([size for size in sizes if size is not None], dtype=leaf.dtype, device=leaf.device)


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
        kept = node.op in ("placeholder", "output") or node.target is checked or node_info(node).mutates
        if not node.users and not kept:
            graph.erase_node(node)
