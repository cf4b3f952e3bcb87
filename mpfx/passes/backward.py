"""Sensitivities of the loss block by block: a block runs once more, on what it read, when its gradient is needed."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpfx.graph import Block, InputGroup, blocks, last_readers, traced_module
from mpfx.passes.observe import groups_of_blocks
from mpfx.passes.ranks import ALONE, Ranks
from mpfx.passes.running import Runner, Values
from mpfx.passes.sense import Call, Sensing, check_loss, differentiating

logger = logging.getLogger("mpfx.sense")

Loss = Callable[[Any, int], Tensor]
"""From the result of the traced module and the number of the batch to a scalar that can be differentiated."""


@dataclass
class _Stream:
    """One batch on its way forward and back.

    Attributes:
        index: of the batch.
        values: what later blocks need.
        read: by every block, on the way forward.
        gradients: of what earlier blocks handed on, by name, on the way back.
    """

    index: int
    values: Values
    read: list[Values] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def sense_by_blocks(
    sensing: Sensing,
    gm: fx.GraphModule,
    batches: Sequence[Mapping[str, Any]],
    loss: Loss,
    runner: Runner,
    ranks: Ranks = ALONE,
) -> None:
    """Let sensitivities of the loss be gathered; activations of one block at a time are alive.

    Args:
        sensing: gathers.
        gm: traced and analysed.
        batches: inputs of the traced call, one dict a batch.
        loss: of one batch, in the order of the batches.
        runner: how blocks run.
        ranks: the processes, each with batches of its own, that share the host's memory.

    Raises:
        ValueError: if the loss cannot be differentiated, or it or its gradient is not finite.
    """
    way = _Way(gm, loss, runner)
    chunks = way.chunks(batches, _free_bytes() // ranks.size)
    if runner.fetches(way.parts):
        logger.info("blocks are fetched %d times, for at most %d batches each", 2 * len(chunks), chunks[0][1])
    for first, last in chunks:
        streams = [_Stream(index, runner.fetched(batches[index])) for index in range(first, last)]
        way.forward(streams)
        way.back(streams, sensing)
    sensing.fetch()


class _Way:
    """Through the blocks of a graph and back."""

    def __init__(self, gm: fx.GraphModule, loss: Loss, runner: Runner) -> None:
        self.gm, self.loss, self.runner = gm, loss, runner
        self.parts, self.groups = blocks(gm), groups_of_blocks(gm)
        self.readers = last_readers(self.parts)
        self.first = next(index for index, found in enumerate(self.groups) if found)
        self.handed_on: set[str] = set()  # by blocks from the first one with sites on: what gradients go back through

    def chunks(self, batches: Sequence[Mapping[str, Any]], free: int) -> list[tuple[int, int]]:
        """Batches that go together: each alone, but where blocks have to be fetched, as many as the host can keep."""
        count = 1
        if self.runner.fetches(self.parts):
            size = max(sum(t.nbytes for t in pytree.tree_leaves(dict(b)) if isinstance(t, Tensor)) for b in batches)
            width = max(group.sites[0].in_features for found in self.groups for group in found)
            # Token ids take 8 bytes; values between blocks at most so many channels of as many bytes.
            count = max(1, free // 4 // max(1, size * width * len(self.parts) // 2))
        return [(start, min(start + count, len(batches))) for start in range(0, len(batches), count)]

    @torch.no_grad()
    def forward(self, streams: Sequence[_Stream]) -> None:
        """Run all blocks but the last one, which runs on the way back; keep what each read."""
        with self.runner.placed(self.parts[:-1]) as placed:
            for block in placed:
                for stream in streams:
                    before = stream.values
                    stream.read.append({name: before[name] for name in block.needs})
                    stream.values = self.runner.kept(self.runner.run(block, before, self.readers))
                    if block.index >= self.first:
                        self.handed_on |= stream.values.keys() - before.keys()
        for stream in streams:
            stream.read.append({name: stream.values[name] for name in self.parts[-1].needs})
            stream.values = {}

    def back(self, streams: Sequence[_Stream], sensing: Sensing) -> None:
        """Run blocks again, the last one first, each forward and backward."""
        backwards = self.parts[self.first :][::-1]
        with differentiating(traced_module(self.gm)), self.runner.placed(backwards) as placed:
            for block in placed:
                for stream in streams:
                    self._back(block, self.groups[block.index], stream, sensing)

    def _back(self, block: Block, groups: Sequence[InputGroup], stream: _Stream, sensing: Sensing) -> None:
        calls: dict[str, list[Call]] = {group.name: [] for group in groups if group.sites[0].stack is None}
        read, stream.gradients = self.runner.fetched(stream.read.pop()), self.runner.fetched(stream.gradients)
        inputs = {name: self._leaf(value) for name, value in read.items() if name in self.handed_on}
        with sensing.listening(calls, groups):
            with self.runner.context():
                result = block.module(**{**read, **inputs})
                if block.is_last:
                    result = self.loss(result, stream.index)
            if block.is_last:
                check_loss(result)
                result.backward()
            else:
                made = {name: stream.gradients.pop(name) for name in result if name in stream.gradients}
                ends = [name for name in made if result[name].requires_grad]
                if ends:
                    torch.autograd.backward([result[name] for name in ends], [made[name] for name in ends])
        sensing.take(calls)
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.grad is not None:
                known = stream.gradients.get(name)
                stream.gradients[name] = value.grad if known is None else known + value.grad
        stream.gradients = self.runner.kept(stream.gradients)  # blocks that are fetched go through many batches

    @staticmethod
    def _leaf(value: Any) -> Any:
        return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _free_bytes() -> int:
    """Memory of the host that can be had: files that it keeps in the meantime make room."""
    return int(psutil.virtual_memory().available)
