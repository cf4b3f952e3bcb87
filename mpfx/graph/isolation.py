"""Context managers that keep a trace and the rest of the program apart."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpfx.graph.errors import TraceError

AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")

_CONTAINERS = (dict, list, set)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_trace_lock = threading.Lock()
_tracing_threads: set[int] = set()


@contextmanager
def undisturbed(root: nn.Module) -> Iterator[None]:
    """Run a trace of ``root`` in a neutral setting, and leave model, random state and modes as they were."""
    with ExitStack() as stack:
        stack.enter_context(_one_trace_at_a_time())
        stack.enter_context(_attributes_restored(root))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        # Fake tensors need version counters, which inference tensors lack.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
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
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
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
def _values_restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, saved in zip(tensors, before, strict=True):
            if not torch.equal(tensor, saved):  # only then, as a write counts as a change to others
                tensor.copy_(saved)


@contextmanager
def _attributes_restored(root: nn.Module) -> Iterator[None]:
    """Undo what a forward on fake tensors stores on the modules: caches, counters, replaced buffers."""
    before = [(namespace, dict(namespace)) for module in root.modules() for namespace in _namespaces(module)]
    contents = [(item, type(item)(item)) for _, saved in before for item in saved.values() if type(item) in _CONTAINERS]
    try:
        yield
    finally:
        for namespace, saved in before:
            _restore(namespace, saved)
        for item, saved in contents:
            _restore_container(item, saved)


def _namespaces(module: nn.Module) -> Iterator[dict[str, Any]]:
    yield module.__dict__
    yield from (module._parameters, module._buffers, module._modules)


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
