"""The processes that share one compression: each calibrates on its own batches and solves its own input groups."""

import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mpfx.graph import InputGroup
from mpfx.stats import MomentAccumulator, Sums

T = TypeVar("T")

_TOLD = "_mpfx_told"


class RankError(RuntimeError):
    """Another process failed; the message says which, and how."""


class Ranks:
    """The processes of PyTorch's default process group, all of which make the same calls in the same order.

    A single process shares with nobody: then every method does what its name says on this process's own, and no process
    group is needed.

    Args:
        rank: number of this process.
        size: number of processes.
        device: where this process computes; the process group has to carry tensors that lie there.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)

    @classmethod
    def of(cls, size: int, device: torch.device) -> "Ranks":
        """The processes of a Trainer.

        Args:
            size: how many it has (``trainer.world_size``).
            device: of this one.

        Raises:
            RuntimeError: if the Trainer has not started them.
        """
        if size == 1:
            return cls(device=device)
        if not dist.is_initialized() or dist.get_world_size() != size:
            raise RuntimeError(f"Expected {size} processes that know each other: the Trainer has not started them.")
        return cls(dist.get_rank(), size, device)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.rank == 0

    def gathered(self, work: Callable[[], T]) -> list[T]:
        """Do some work in every process and hand the results of all to all, in the order of the ranks.

        Tensors on the processes' own devices arrive on the device of whoever receives them.

        Raises:
            RankError: if the work failed in another process only; what it raised here is raised as it is.
        """
        with self.together() as exchange:
            mine = work()
            return exchange(mine)

    def joined(self, work: Callable[[], Mapping[str, T]]) -> dict[str, T]:
        """Like :meth:`gathered`, for mappings of which every process makes a part."""
        return {name: item for part in self.gathered(work) for name, item in part.items()}

    def once(self, work: Callable[[], T]) -> T:
        """Do some work in the first process only, while the others wait, and hand the result to all."""
        found: list[Any] = self.gathered(lambda: work() if self.first else None)
        result: T = found[0]
        return result

    @contextmanager
    def together(self) -> Iterator[Callable[[T], list[T]]]:
        """Inside, a failure of one process is one of all: the others learn of it at their next exchange, or at the end.

        Yields:
            What exchanges one result for those of all, at the end of the block and in its stead.

        Raises:
            RankError: if another process failed.
        """
        done = False

        def exchange(mine: T) -> list[T]:
            nonlocal done
            done = True
            return [mine] if self.size == 1 else self._exchanged(mine)

        try:
            yield exchange
            if not done and self.size > 1:
                self._exchanged(None)
        except Exception as error:
            if self.size > 1 and not was_told(error):
                setattr(error, _TOLD, True)
                self._exchanged(None, f"{type(error).__name__}: {error}")
            raise

    def summed(
        self, accumulators: MutableMapping[str, MomentAccumulator], groups: Sequence[InputGroup]
    ) -> list[InputGroup]:
        """Share out input groups, and add up what all processes saw of each in the process that it goes to.

        Experts of one stack go to one process, as those that saw little are topped up from the others.

        Args:
            accumulators: by name of the group; afterwards those of the groups that are this process's, with the sums of
                all processes. What was called in no process has none.
            groups: to share out.

        Returns:
            The groups that are this process's.
        """
        owners = self._owners(groups)
        if self.size == 1:
            return list(groups)
        seen = self.gathered(lambda: {name: (a.tokens, a.drifting, a.taken) for name, a in accumulators.items()})
        for group in groups:
            known = [facts[group.name] for facts in seen if group.name in facts]
            sums = accumulators.pop(group.name, None)
            if not known:
                continue
            if sums is None:
                sums = MomentAccumulator(group.sites[0].in_features, self.device, known[0][2])
            self._reduced(sums, owners[group.name], known)
            if owners[group.name] == self.rank:
                accumulators[group.name] = sums
        return [group for group in groups if owners[group.name] == self.rank]

    def _reduced(self, sums: MomentAccumulator, owner: int, known: Sequence[tuple[int, bool, Sums]]) -> None:
        tokens, drifting, _ = zip(*known, strict=True)
        sums.add_up(partial(dist.reduce, dst=owner), sum(tokens), drifting=any(drifting))

    def _owners(self, groups: Sequence[InputGroup]) -> dict[str, int]:
        members: dict[Any, list[InputGroup]] = defaultdict(list)
        for group in groups:
            members[group.sites[0].stack or group.name].append(group)
        shares = shared([sum(map(_cost, part)) for part in members.values()], self.size)
        return {group.name: rank for part, rank in zip(members.values(), shares, strict=True) for group in part}

    def _exchanged(self, mine: T, failure: str | None = None) -> list[T]:
        """What every process hands in. A process that failed takes part too, or the others would wait for ever."""
        data, tensors = _written(mine, self.device)
        sizes = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        messages: list[Any] = [None] * self.size
        dist.all_gather_object(messages, (failure, data, sizes))
        if failure is not None:
            return []
        failures = {rank: message[0] for rank, message in enumerate(messages) if message[0] is not None}
        if failures:
            error = RankError("; ".join(f"process {rank} failed: {failure}" for rank, failure in failures.items()))
            setattr(error, _TOLD, True)
            raise error
        return [self._received(mine, tensors, rank, *message[1:]) for rank, message in enumerate(messages)]

    def _received(self, mine: T, tensors: Sequence[Tensor], rank: int, data: bytes, sizes: Sequence[Any]) -> T:
        own = rank == self.rank
        sent = tensors if own else [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in sizes]
        for tensor in sent:
            if tensor.numel():
                dist.broadcast(tensor.view(-1).view(torch.uint8), rank)  # bytes: no backend knows every dtype
        found: T = mine if own else _Reader(data, sent).load()
        return found


ALONE = Ranks()
"""A single process."""


def was_told(error: BaseException | None) -> bool:
    """Whether all processes know of an error, or of one that it came from."""
    while error is not None:
        if getattr(error, _TOLD, False):
            return True
        error = error.__cause__ or error.__context__
    return False


def shared(costs: Sequence[float], size: int) -> list[int]:
    """Who does which of some pieces of work: the most costly ones first, each to whoever has least to do.

    Args:
        costs: of the pieces.
        size: number of processes.

    Returns:
        A rank for every piece; the same in every process.
    """
    loads, ranks = [0.0] * size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        ranks[index] = min(range(size), key=loads.__getitem__)
        loads[ranks[index]] += costs[index]
    return ranks


def _cost(group: InputGroup) -> float:
    """Operations of a factor and of a sweep."""
    channels = group.sites[0].in_features
    return float(channels) ** 2 * (2 / 3 * channels + sum(site.out_features for site in group.sites))


def _written(item: Any, device: torch.device) -> tuple[bytes, list[Tensor]]:
    """An object as bytes, without the tensors on a device, and these."""
    stream = BytesIO()
    writer = _Writer(stream, device)
    writer.dump(item)
    return stream.getvalue(), writer.tensors


class _Writer(pickle.Pickler):
    """Leaves the places of tensors empty; between processes of one program, which trust each other."""

    def __init__(self, stream: BytesIO, device: torch.device) -> None:
        super().__init__(stream)
        self.tensors: list[Tensor] = []
        self._device, self._places = device, dict[int, int]()

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) is not Tensor or obj.device != self._device:
            return None
        if id(obj) not in self._places:
            self._places[id(obj)] = len(self.tensors)
            self.tensors.append(obj.detach().contiguous())
        return self._places[id(obj)]


class _Reader(pickle.Unpickler):
    """Puts tensors into their places."""

    def __init__(self, data: bytes, tensors: Sequence[Tensor]) -> None:
        super().__init__(BytesIO(data))
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        found: Tensor = self._tensors[pid]
        return found
