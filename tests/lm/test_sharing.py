"""Batches dealt out to processes, and modules that DDP can keep in step."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from mpfx.lm import EachOnce, leave_out_of_sync


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Be one of some processes."""

    def be(rank: int, size: int) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: size)

    return be


def batches(samples: int, batch_size: int) -> list[list[int]]:
    data: Any = list(range(samples))
    loader: DataLoader[Any] = DataLoader(data, batch_size, sampler=EachOnce(data, batch_size))
    found = [batch.tolist() for batch in loader]
    assert len(loader) == len(found)
    return found


def test_a_single_process_reads_all_in_order() -> None:
    assert batches(7, 3) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize(("samples", "batch_size", "size"), [(7, 3, 2), (7, 3, 3), (12, 2, 4), (13, 1, 5)])
def test_every_batch_of_one_process_is_in_one_of_several(
    processes: Any, samples: int, batch_size: int, size: int
) -> None:
    whole = batches(samples, batch_size)
    parts = []
    for rank in range(size):
        processes(rank, size)
        parts.append(batches(samples, batch_size))
    assert sorted(batch for part in parts for batch in part) == whole
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_without_a_batch_is_refused(processes: Any) -> None:
    processes(0, 3)
    with pytest.raises(ValueError, match=r"each of 3 processes but 4 samples make 2 batches of 2"):
        batches(4, 2)


def test_it_is_what_lightning_leaves_in_place() -> None:
    data: Any = list(range(3))
    sampler = EachOnce(data)
    assert isinstance(sampler, DistributedSampler)
    sampler.set_epoch(1)
    assert list(sampler) == [0, 1, 2]


def test_what_no_backend_sends_is_named_once() -> None:
    module = nn.Module()
    module.inner = nn.Module()
    module.inner.register_buffer("order", torch.zeros(3, dtype=torch.uint16))
    module.inner.register_buffer("codes", torch.zeros(3, dtype=torch.int32))
    module._ddp_params_and_buffers_to_ignore = ["mine"]  # type: ignore[assignment]
    for _ in range(2):
        leave_out_of_sync(module)
        assert module._ddp_params_and_buffers_to_ignore == ["mine", "inner.order"]
