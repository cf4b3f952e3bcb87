"""What several processes need: a data set shared out, every sample once, and modules that DDP can keep in step."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data.distributed import DistributedSampler

_NOT_CARRIED = (torch.uint16, torch.uint32, torch.uint64, torch.int16)
"""Types of tensors that neither NCCL nor gloo can send."""


def leave_out_of_sync(module: nn.Module) -> None:
    """Tell DDP not to send what it cannot: stored permutations, which are the same in all processes anyway.

    Strategy ddp copies the first process's buffers to the others whenever a loop starts.

    Args:
        module: that is handed to a Trainer; it keeps the names under the attribute that DDP reads.
    """
    names = [name for name, buffer in module.named_buffers() if buffer.dtype in _NOT_CARRIED]
    known = list(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    if added := [name for name in names if name not in known]:
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [*known, *added])


class EachOnce(DistributedSampler[Any]):
    """Deals whole batches out to the processes in turn, in the order of the data set; none is repeated or left out.

    Batches are those that a single process would run, so that what is summed over them is the same up to the order of
    the sums. PyTorch's default process group is asked which process this is when batches are wanted, so that loaders
    can be made before a Trainer has started the others. Lightning leaves samplers of this kind in their place.

    Args:
        data: what is shared out.
        batch_size: of the loader.

    Raises:
        ValueError: when it is asked for batches, if there are fewer than processes.
    """

    def __init__(self, data: Sized, batch_size: int = 1) -> None:
        # Not DistributedSampler's, which asks for the processes at once: what it sets are properties here.
        self.data, self.batch_size = data, batch_size
        self.drop_last = False

    @property
    def dataset(self) -> Sized:  # type: ignore[override]
        """What is shared out."""
        return self.data

    @property
    def total_size(self) -> int:  # type: ignore[override]
        """Samples of all processes together."""
        return len(self.data)

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """Number of processes."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Number of this process."""
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the order is always the same."""

    def __len__(self) -> int:
        return sum(map(len, self._batches()))

    def __iter__(self) -> Iterator[int]:
        return (index for batch in self._batches() for index in batch)

    def _batches(self) -> list[range]:
        """Samples of every batch that is this process's."""
        starts = range(0, len(self.data), self.batch_size)
        if 0 < len(starts) < self.num_replicas:
            raise ValueError(
                f"Expected at least one batch for each of {self.num_replicas} processes but {len(self.data)} samples "
                f"make {len(starts)} batches of {self.batch_size}: lower the batch size, or the number of devices."
            )
        return [range(s, min(s + self.batch_size, len(self.data))) for s in starts[self.rank :: self.num_replicas]]
