"""Context managers that keep a trace and the rest of the program apart."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpfx.graph.compat import TorchDispatchMode, compiled_code_runs_eagerly, storage_key, written_arguments
from mpfx.graph.errors import TraceError

AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")

_CONTAINERS = (dict, list, set)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_trace_lock = threading.Lock()
_tracing_threads: set[int] = set()


AutocastState = tuple[tuple[str, torch.dtype], ...]
"""The devices on which autocast is on, and the type that it casts to."""


def autocast_state() -> AutocastState:
    """What autocast does at this moment."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in AUTOCAST_DEVICES if torch.is_autocast_enabled(d))


@contextmanager
def undisturbed(root: nn.Module, autocast: AutocastState = ()) -> Iterator[None]:
    """Run a trace of ``root`` in a neutral setting, and leave model, random state and modes as they were.

    Args:
        root: The traced module.
        autocast: What autocast does meanwhile, whatever it did before.
    """
    with ExitStack() as stack:
        stack.enter_context(_one_trace_at_a_time())
        stack.enter_context(_attributes_restored(root))
        stack.enter_context(_random_state_restored([]))
        stack.enter_context(_defaults_restored())
        stack.enter_context(compiled_code_runs_eagerly())
        # Fake tensors need version counters, which inference tensors lack.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        for device, dtype in autocast:
            stack.enter_context(torch.autocast(device, dtype=dtype))
        yield


@contextmanager
def rehearsed(root: nn.Module, written: Sequence[Tensor], cuda: Sequence[int]) -> Iterator[None]:
    """Inside `undisturbed`: a run on real tensors, of which nothing stays.

    Args:
        root: The module that runs.
        written: Tensors that a run may write to, such as buffers; their values are put back.
        cuda: Devices whose random state is put back.
    """
    with _attributes_restored(root), _values_restored(written), _random_state_restored(cuda), _parameters_kept(root):
        yield


@contextmanager
def unobserved(
    root: nn.Module, kept_hooks: Collection[int], written: Sequence[Tensor], cuda: Sequence[int]
) -> Iterator[None]:
    """Run modules on real tensors so that nothing of it stays and no hook but the kept ones takes part.

    Args:
        root: The module that runs, or whose children do.
        kept_hooks: Keys of hooks that belong to the computation.
        written: Tensors that a run may write to, such as buffers; their values are put back.
        cuda: Devices whose random state is put back.
    """
    with _one_trace_at_a_time(), _attributes_restored(root), _values_restored(written):
        for module in root.modules():
            for name in _HOOKS:  # others hold on to these very dicts
                hooks = module.__dict__[name].items()
                module.__dict__[name] = OrderedDict((key, hook) for key, hook in hooks if key in kept_hooks)
        with _random_state_restored(cuda), torch.no_grad(), _parameters_kept(root):
            yield


def hook_keys(root: nn.Module, without: Collection[int]) -> frozenset[int]:
    """The keys of all hooks in ``root``, but for those on modules whose ids are in ``without``."""
    modules = [module for module in root.modules() if id(module) not in without]
    return frozenset(key for module in modules for name in _HOOKS for key in module.__dict__[name])


@contextmanager
def module_calls_through(handler: Callable[..., Any]) -> Iterator[None]:
    """Let every call of a module go through ``handler(original_call, module, args, kwargs)``."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return handler(original, module, args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


@contextmanager
def _one_trace_at_a_time() -> Iterator[None]:
    """Module calls are redirected for the whole process, so traces of several threads take turns."""
    thread = threading.get_ident()
    if thread in _tracing_threads:
        raise TraceError(
            "The traced module traces itself, probably in a forward hook. What to change: remove that hook "
            "before the trace."
        )
    with _trace_lock:
        _tracing_threads.add(thread)
        try:
            yield
        finally:
            _tracing_threads.discard(thread)


@contextmanager
def _random_state_restored(cuda: Sequence[int]) -> Iterator[None]:
    """Put back the random states of PyTorch, Python and NumPy."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _defaults_restored() -> Iterator[None]:
    """Put back PyTorch's default type, and run ``nn.TransformerEncoder`` through its linear layers.

    Its fast path reads their weights without calling them, and only where no gradient is needed.
    """
    dtype, fast_path = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.set_default_dtype(dtype)


@contextmanager
def _values_restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, saved in zip(tensors, before, strict=True):
            if not torch.equal(tensor, saved):  # only then, as a write counts as a change to others
                tensor.copy_(saved)


@contextmanager
def _parameters_kept(root: nn.Module) -> Iterator[None]:
    """Put back the parameters that a run has written to, which are too large to copy them all before it."""
    keeper = _Keeper(root)
    try:
        with keeper:
            yield
    finally:
        keeper.restore()


class _Keeper(TorchDispatchMode):
    """Copies a parameter when an operator is about to write to its memory, through whatever view."""

    supports_higher_order_operators = True

    def __init__(self, root: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memories = [(parameter, parameter.data) for parameter in root.parameters()]
        self._unwritten: dict[int, list[Tensor]] = {}
        for _, memory in self._memories:
            self._unwritten.setdefault(storage_key(memory), []).append(memory)
        self._saved: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        for tensor in written_arguments(func, args, kwargs or {}):
            for memory in self._unwritten.pop(storage_key(tensor), ()):
                self._saved.append((memory, memory.clone()))
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def restore(self) -> None:
        """Give every parameter its memory and its values again."""
        for parameter, memory in self._memories:
            if storage_key(parameter) != storage_key(memory) or parameter.shape != memory.shape:
                parameter.data = memory
        for memory, values in self._saved:
            memory.copy_(values)


@contextmanager
def _attributes_restored(root: nn.Module) -> Iterator[None]:
    """Undo what a forward on fake tensors stores on the modules: caches, counters, replaced buffers."""
    before = [(namespace, dict(namespace)) for module in root.modules() for namespace in _namespaces(module)]
    gradients = [(p, p.requires_grad) for p in root.parameters()]
    contents = [(item, type(item)(item)) for _, saved in before for item in saved.values() if type(item) in _CONTAINERS]
    try:
        yield
    finally:
        for namespace, saved in before:
            _restore(namespace, saved)
        for item, saved in contents:
            _restore_container(item, saved)
        for parameter, needed in gradients:
            if parameter.requires_grad != needed:
                parameter.requires_grad_(needed)


def _namespaces(module: nn.Module) -> Iterator[dict[str, Any]]:
    yield module.__dict__
    for namespace in (module._parameters, module._buffers, module._modules):
        if isinstance(namespace, dict):  # TorchScript keeps its own outside of Python
            yield namespace


def _restore(namespace: dict[str, Any], saved: dict[str, Any]) -> None:
    """Put back what was replaced, key by key, as others hold on to this very dict."""
    if list(namespace) == list(saved) and all(namespace[key] is saved[key] for key in saved):
        return
    namespace.clear()
    namespace.update(saved)


def _restore_container(item: Any, saved: Any) -> None:
    if len(item) == len(saved) and all(a is b for a, b in zip(_parts(item), _parts(saved), strict=True)):
        return
    item.clear()
    item.extend(saved) if isinstance(item, list) else item.update(saved)


def _parts(item: Any) -> Iterator[Any]:
    yield from item
    if isinstance(item, dict):
        yield from item.values()
