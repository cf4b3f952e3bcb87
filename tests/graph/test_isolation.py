from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpfx.graph import TraceError, trace
from mpfx.graph.compat import mode_stacks
from mpfx.graph.live import opaque_parts


class Keeps(nn.Module):
    """Stores something on itself with each call."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.count, self.log = nn.Linear(4, 4), 0, ["start"]
        self.cache: dict[str, Any] = {"first": 1}
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.cache["x"] = x
        self.log.append("call")
        self.state = self.state + 1
        self.new = x
        y: Tensor = self.a(x) + self.state
        return y


def test_module_is_as_before() -> None:
    module = Keeps()
    state, attributes = module.state, set(module.__dict__)
    trace(module, (torch.randn(2, 4),))
    assert module.state is state
    assert set(module.__dict__) == attributes
    assert (module.count, module.cache, module.log) == (0, {"first": 1}, ["start"])


def test_other_threads_call_modules_meanwhile() -> None:
    results: list[type] = []
    stop = threading.Event()

    def work(layer: nn.Module) -> None:
        while not stop.is_set():
            results.append(type(layer(torch.ones(2, 4))))

    thread = threading.Thread(target=work, args=(nn.Linear(4, 4),))
    thread.start()
    try:
        trace(nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)]), (torch.randn(2, 4),))
    finally:
        stop.set()
        thread.join()
    assert set(results) == {Tensor}


def test_traces_of_several_threads_take_turns() -> None:
    call, nodes = nn.Module.__call__, []

    def work() -> None:
        gm = trace(nn.Sequential(*[nn.Linear(4, 4) for _ in range(10)]), (torch.randn(2, 4),))
        nodes.append(len(gm.graph.nodes))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nodes == [12, 12, 12]
    assert nn.Module.__call__ is call


class Restless(nn.Module):
    """Changes whatever a forward can change, then computes in a way that can be recorded, called, or neither."""

    state: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.kind, self.count, self.log = kind, 0, ["start"]
        self.plain, self.cache = torch.ones(4), {"first": torch.ones(4)}
        self.w = nn.Parameter(torch.ones(4))
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.rand_like(x) + random.random() + float(np.random.rand())
        self.state += 1
        self.count += 1
        self.log.append("call")
        self.cache["x"], self.last = x, x
        self.register_buffer("late", torch.zeros(4))
        self.w.requires_grad_(False)
        if self.kind != "recorded":  # no graph writes to parameters
            self.w.mul_(2)
        self.b.train(not self.b.training)
        y: Tensor = self.norm(self.a(x))
        torch.set_default_dtype(torch.float64)
        if self.kind != "recorded" and y.sum() > -1e9:
            y = y + self.plain
        if self.kind == "fails" or (self.kind == "fails late" and not hasattr(y, "fake_mode")):
            raise RuntimeError("on purpose")
        result: Tensor = y * self.w + self.state + self.b(y)
        return result


def model_state(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, child in module.named_modules():
        hooks = {name: list(vars(child)[name].items()) for name in vars(child) if name.endswith("_hooks")}
        held = {key: value for key, value in vars(child).items() if not key.startswith("_")}
        log, cache = list(vars(child).get("log", [])), dict(vars(child).get("cache", {}))
        found[path] = (hooks, held, log, cache, list(child._buffers), list(child._modules), child.training)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    found["tensors"] = [(name, id(t), t.data_ptr(), t.requires_grad, t.grad) for name, t in tensors]
    return found


def process_state() -> dict[str, Any]:
    return {
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "autocast": torch.get_autocast_dtype("cpu"),
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "stacks": mode_stacks(),
        "call": nn.Module.__call__,
        "flags": (torch.compiler.is_compiling(), torch.compiler.is_exporting()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "filters": list(warnings.filters),
        "random": (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())),
        "threads": threading.active_count(),
    }


def observed(module: nn.Module, result: list[Any]) -> Callable[..., None]:
    return lambda *args: result.append(type(args[0]).__name__)


@pytest.mark.parametrize("around", ["nothing", "no_grad", "inference", "autocast"])
@pytest.mark.parametrize("kind", ["recorded", "called", "fails", "fails late"])
@pytest.mark.parametrize("root", [False, True])
def test_tracing_changes_nothing(root: bool, kind: str, around: str) -> None:
    inner = Restless(kind)
    module: nn.Module = inner if root else nn.Sequential(nn.Linear(4, 4), inner).eval()
    called: list[Any] = []
    inner.a.register_forward_hook(observed(inner, called))
    inner.register_forward_pre_hook(observed(inner, called))
    module(torch.randn(3, 4)).sum().backward() if not kind.startswith("fails") else None
    torch.set_default_dtype(torch.float32)
    inner.w.requires_grad_()
    values = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(2, 4)
    example = x.clone()
    contexts: dict[str, Any] = {
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu"),
    }
    with contexts.get(around, torch.enable_grad()):
        before, process = model_state(module), process_state()
        if kind.startswith("fails"):
            with pytest.raises(TraceError, match=r"Restless.*test_isolation.py:\d+"):
                trace(module, (x,))
        else:
            gm = trace(module, (x,))
            assert [part.path for part in opaque_parts(gm)] == ([] if kind == "recorded" else ["" if root else "1"])
        assert process_state() == process
        after = model_state(module)
    assert same(after, before)
    assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())
    assert torch.equal(x, example)
    assert "Restless" in called


def same(a: Any, b: Any) -> bool:
    """Equal, tensors only if they are the same."""
    if isinstance(a, Tensor):
        return a is b
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
