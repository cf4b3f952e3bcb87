"""Clocks, and copies that no cache holds."""

from collections.abc import Callable

import pytest
import torch

from mpfx.bench import timing
from mpfx.bench.timing import copies, copy_speed, stopwatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("device", "times"), [(CPU, 4), (CUDA, 6)])
def test_copies_exceed_the_cache(device: torch.device, times: int) -> None:
    for nbytes in (10_000, 99_999, 100_000, 100_001, 10**9):
        count = copies(nbytes, device, 100_000)
        assert count * nbytes > times * 100_000
        assert count == 2 or (count - 1) * nbytes <= times * 100_000
    with pytest.raises(ValueError, match="choose larger `shapes`"):
        copies(10, device, 100_000)


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that only moves when told to."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def passes(duration: float) -> None:
        now[0] += duration

    return passes


def test_the_median_of_calls_that_take_turns(seconds: Callable[[float], None]) -> None:
    order: list[str] = []

    def call(name: str, copy: int) -> None:
        order.append(f"{name}{copy}")
        slow = name == "a" and len(order) % 5 == 0  # one of five calls is disturbed
        seconds(1.0 if slow else {"a": 1e-3, "b": 2e-3}[name])

    calls = {name: [lambda name=name, copy=copy: call(name, copy) for copy in range(12)] for name in "ab"}
    assert stopwatch(CPU)(calls) == pytest.approx({"a": 1e-3, "b": 2e-3})
    timed = [name for name in order if name.startswith("a")][3:]  # after those that warm up
    assert timed[:14] == [f"a{copy % 12}" for copy in range(14)]  # a round goes on where the last one ended
    assert "".join(name[0] for name in order[6:38]) == "a" * 8 + "b" * 8 + "a" * 8 + "b" * 8


def test_slow_calls_are_timed_a_few_times(seconds: Callable[[float], None]) -> None:
    count = [0]

    def call() -> None:
        count[0] += 1
        seconds(10.0)

    assert stopwatch(CPU)({"a": [call, call]}) == {"a": 10.0}
    assert count[0] == 2 + 3 * 2  # to warm up, and three rounds


def test_a_copy_reads_and_writes() -> None:
    assert copy_speed(CPU, 1000, lambda calls: dict.fromkeys(calls, 2e-6)) == pytest.approx(2 * 4000 / 2e-6)


@pytest.mark.gpu
def test_graphs_are_timed() -> None:
    """Twice the work takes longer, on a device that is idle otherwise; every call is in the graph once."""
    device = torch.device("cuda", 0)
    x = torch.zeros(1, device=device)
    graph = timing.captured([lambda: x.add_(1)] * 5)
    x.zero_()
    graph.replay()
    assert float(x) == 5
    large = torch.zeros(1 << 26, device=device)
    found = stopwatch(device)({"one": [lambda: large.add_(1)] * 2, "four": [lambda: [large.add_(1) for _ in "four"]]})
    assert found["four"] > 2 * found["one"] > 0


@pytest.mark.gpu
def test_what_waits_for_the_device_is_found() -> None:
    x = torch.zeros(1, device="cuda")
    with timing.never_waiting(x.device):
        x.add_(1)
    with pytest.raises(RuntimeError, match="synchroniz"), timing.never_waiting(x.device):
        x.item()
    assert x.item() == 1
