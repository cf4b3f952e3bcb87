"""Two processes on the CPU do what one does: the same plans, weights within rounding, both alike to the bit."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.processes import CASES, kept

ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What two processes found, by rank."""
    folder, port = tmp_path_factory.mktemp("processes"), str(free_port())
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    shared.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-W", "ignore", "-m", "tests.callbacks.processes", str(folder)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**shared, "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else bool(one == two)


@pytest.mark.parametrize("case", [name for name in CASES if name != "perplexity"])
def test_two_processes_compress_as_one_does(both: list[Any], case: str) -> None:
    one, (first, second) = CASES[case](1), (found[case] for found in both)
    assert equal(first, second)
    for key in ("bits", "pruned", "fallbacks"):
        assert equal(first[key], one[key])
    assert first["after"] == pytest.approx(one["after"], rel=1e-3)
    for path, weight in one["weights"].items():
        assert float((first["weights"][path] - weight).norm() / weight.norm()) < 0.02
        assert first["errors"][path] == pytest.approx(one["errors"][path], rel=0.01)


def test_each_process_keeps_the_moments_of_its_own_groups(both: list[Any]) -> None:
    for one, first, second in zip(kept(1), *(found["kept"] for found in both), strict=True):
        assert one
        assert sorted((*first, *second)) == one  # none twice, none of both missing


def test_perplexity_counts_every_window_once(both: list[Any]) -> None:
    one = CASES["perplexity"](1)["perplexity"]
    assert [found["perplexity"]["perplexity"] for found in both] == pytest.approx([one, one], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("repeated", "can share evenly but got 95, of which the sampler repeats 1"),
        ("same", "batches of its own in every process but 1 got the same first one"),
        ("infeasible", "ValueError: Expected `bits_per_weight`"),
    ],
)
def test_what_is_refused_is_refused_in_both(both: list[Any], name: str, message: str) -> None:
    for found in both:
        told, unchanged = found["failing"][name]
        assert message in told
        assert unchanged


@pytest.mark.parametrize("name", ["located_graph", "measure_group", "padding_masks", "solve_group"])
def test_a_failure_of_one_process_ends_both(both: list[Any], name: str) -> None:
    (other, kept), (own, also_kept) = (found["failing"][name] for found in both)
    assert "process 1 failed" in other
    assert "something of its own" in other
    assert "something of its own" in own
    assert "process" not in own
    assert kept
    assert also_kept
