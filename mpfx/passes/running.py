"""Runs the blocks of a graph one after the other on many batches; blocks and values move to where there is room."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mpfx.graph import OUTPUT, Block, blocks, last_readers, run_block, run_on

Values = dict[str, Any]
"""What later blocks read of one batch, by name."""

_SMALL = 1 << 20  # bytes; tensors below stay where they are and as they are: positions, masks of short batches


class _Alike(WeakValueDictionary[str, Tensor]):
    """Large masks by name, of the batch that had another one last; a copy in another process starts with none."""

    def __reduce__(self) -> tuple[type["_Alike"], tuple[()]]:
        return _Alike, ()


@dataclass(frozen=True)
class Runner:
    """How blocks run.

    A block whose weights lie elsewhere than on the device (on the host, or mapped from a file) is copied there for as
    long as it is at work, and the next one is fetched meanwhile: at most two blocks take memory on the device.

    Attributes:
        device: where blocks run; None: where weights and batches are.
        context: entered around every run of a block (precision plugins).
        most_bytes: allocated on the device at which values between blocks, and results, wait on the host instead, in
            pinned memory; None: they stay on the device. The host's own memory is not counted.
    """

    device: torch.device | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    most_bytes: int | None = None
    _alike: _Alike = field(default_factory=_Alike, init=False, repr=False, compare=False)

    def placed(self, parts: Sequence[Block]) -> AbstractContextManager[Iterator[Block]]:
        """Iterate over blocks, each of which lies on the device until the next one is asked for."""
        return closing(self._placed(parts))  # type: ignore[type-var]

    def run(self, block: Block, values: Mapping[str, Any], readers: Mapping[str, int]) -> Values:
        """Run a block that is placed; see :func:`mpfx.graph.run_block`.

        Batches share masks that they have alike, so nobody may write to values.
        """
        with self.context():
            result = run_block(block, self.fetched(values), readers)
        return {name: value if name in values else self._shared(name, value) for name, value in result.items()}

    def fetched(self, values: Mapping[str, Any]) -> Values:
        """Bring values to the device."""
        moved: Values = pytree.tree_map_only(Tensor, self._to_device, dict(values))
        return moved

    def kept(self, values: Values) -> Values:
        """Put values where they wait for the next block."""
        if not self.crowded:
            return values
        moved: Values = pytree.tree_map_only(Tensor, _to_host, values)
        return moved

    @property
    def crowded(self) -> bool:
        """Whether so much is allocated on the device that what can wait has to do so on the host."""
        return self.most_bytes is not None and allocated_bytes(self.device) >= self.most_bytes

    def fetches(self, parts: Sequence[Block]) -> bool:
        """Whether blocks lie elsewhere than where they run."""
        return any(is_away(slot.home, self.device) for block in parts for slot in _slots(block))

    @torch.no_grad()
    def whole(self, gm: fx.GraphModule, values: Mapping[str, Any]) -> Any:
        """Run the whole graph on one batch, block by block."""
        (result,) = self.outputs(gm, [values])
        return result

    def outputs(self, gm: fx.GraphModule, batches: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
        """Run the whole graph, each block on all batches before the next one; yields a result for every batch."""
        parts = blocks(gm)
        readers, streams = last_readers(parts), [self.kept(self.fetched(batch)) for batch in batches]
        with self.placed(parts) as placed:
            for block in placed:
                for index, values in enumerate(streams):
                    if block.is_last:
                        yield self.run(block, values, readers)[OUTPUT]
                    else:
                        streams[index] = self.kept(self.run(block, values, readers))

    def _shared(self, name: str, value: Any) -> Any:
        """What the batch before has in the place of a large mask, if it is the same."""
        if not isinstance(value, Tensor) or value.dtype != torch.bool or value.nbytes < _SMALL or value.is_meta:
            return value
        other = self._alike.get(name)
        if other is not None and other.device == value.device and torch.equal(other, value):
            return other
        self._alike[name] = value
        return value

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor if self.device is None else tensor.to(self.device, non_blocking=tensor.is_pinned())

    def _placed(self, parts: Sequence[Block]) -> Iterator[Block]:
        homes = {slot.home.device for block in parts for slot in _slots(block) if is_away(slot.home, self.device)}
        if self.device is not None and homes - {self.device}:
            for block in parts:
                run_on(block, self.device, homes)
        with ExitStack() as stack:
            fetch = _Fetcher(self.device, stack)
            for block, following in zip(parts, (*parts[1:], None), strict=True):
                with fetch.installed(block, following):
                    yield block


@dataclass(frozen=True)
class _Slot:
    """A tensor that modules hold, and where: of a parameter the data is exchanged, a buffer itself, in all modules."""

    tensor: Tensor
    home: Tensor
    places: list[tuple[nn.Module, str]]

    def put(self, tensor: Tensor) -> None:
        if isinstance(self.tensor, nn.Parameter):
            self.tensor.data = tensor
            return
        for owner, name in self.places:
            owner._buffers[name] = tensor


def _slots(block: Block) -> Iterable[_Slot]:
    """The parameters and buffers that a block reads; those that several modules share are one."""
    found: dict[int, _Slot] = {}
    for owner, name in _places(block):
        tensor = owner._parameters.get(name, owner._buffers.get(name))
        if tensor is not None:
            home = tensor.data if isinstance(tensor, nn.Parameter) else tensor
            found.setdefault(id(tensor), _Slot(tensor, home, [])).places.append((owner, name))
    return found.values()


def _places(block: Block) -> Iterator[tuple[nn.Module, str]]:
    for node in block.module.graph.nodes:
        if node.op == "call_module":
            for owner in block.module.get_submodule(str(node.target)).modules():
                yield from ((owner, name) for name in (*owner._parameters, *owner._buffers))
        elif node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            yield block.module.get_submodule(path), name


_Copies = list[tuple[_Slot, Tensor]]


class _Fetcher:
    """Copies blocks to a device, the next one while the last one is at work.

    Args:
        device: to copy to; None: nothing is copied.
        stack: closed when all is done.
    """

    def __init__(self, device: torch.device | None, stack: ExitStack) -> None:
        self._device = device
        self._side = None if device is None or device.type != "cuda" else torch.cuda.Stream(device)
        self._pool = stack.enter_context(ThreadPoolExecutor(1))
        self._ahead: Future[_Copies] | None = None

    @contextmanager
    def installed(self, block: Block, following: Block | None) -> Iterator[None]:
        """Inside, a block's tensors are on the device; the following block is on its way there."""
        copies = self._fetch(block).result() if self._ahead is None else self._ahead.result()
        if self._side is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_stream(self._side)
            for _, tensor in copies:
                tensor.record_stream(now)
        self._ahead = None if following is None else self._fetch(following)
        try:
            for slot, tensor in copies:
                slot.put(tensor)
            yield
        finally:
            for slot, _ in copies:
                slot.put(slot.home)

    def _fetch(self, block: Block) -> "Future[_Copies]":
        # What is away is looked up here: a block at work may share tensors with the following one.
        away = [slot for slot in _slots(block) if is_away(slot.home, self._device)]
        if away:
            return self._pool.submit(self._copies, away)
        nothing: Future[_Copies] = Future()
        nothing.set_result([])
        return nothing

    @torch.inference_mode(False)
    @torch.no_grad()
    def _copies(self, away: Sequence[_Slot]) -> _Copies:
        with nullcontext() if self._side is None else torch.cuda.stream(self._side):
            return [(slot, self._copy(slot.home)) for slot in away]

    def _copy(self, tensor: Tensor) -> Tensor:
        pinned = tensor if self._side is None or tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(self._device, copy=True, non_blocking=self._side is not None)


def is_away(tensor: Tensor, device: torch.device | None) -> bool:
    """Whether a tensor has to be copied to the device where it is to be read."""
    if device is None:
        return False
    return tensor.device.type != device.type or device.index not in (None, tensor.device.index)


def most_bytes(device: torch.device, offload: str) -> int | None:
    """What a :class:`Runner` may fill with values between blocks, for `offload` as configs name it."""
    if device.type != "cuda" or offload == "never":
        return None
    return 0 if offload == "always" else _total(device) // 2


def stays_on_host(model: nn.Module, device: torch.device, offload: str) -> bool:
    """Whether the blocks of a model are to move to a device one at a time, instead of the model as a whole."""
    if offload != "auto" or device.type != "cuda":
        return offload == "always" and device.type != "cpu"
    away = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if is_away(tensor, device))
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return away > (torch.cuda.mem_get_info(device)[0] + cached) // 2


def _total(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)


def allocated_bytes(device: torch.device | None) -> int:
    """Memory that is taken on a CUDA device, in this process; 0 on any other device."""
    return torch.cuda.memory_allocated(device) if device is not None and device.type == "cuda" else 0


def _to_host(tensor: Tensor) -> Tensor:
    """Copy a large tensor to the host, into pinned memory where the device can copy in the background."""
    if tensor.nbytes < _SMALL or not tensor.is_floating_point():
        return tensor
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return pinned.copy_(tensor, non_blocking=tensor.is_cuda)
