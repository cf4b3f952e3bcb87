from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from mpfx.graph import trace


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
