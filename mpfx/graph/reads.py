"""Where the output channels of modules end up: what following them through a graph finds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from mpfx.graph.tags import NO_CHANNEL, Layer


@dataclass(frozen=True)
class Read:
    """What one call of a module reads.

    Attributes:
        layers: As in `Tags`, but ids of form ``(in,)``.
        context: int64 ``(in,)``, as in `Tags`.
    """

    layers: tuple[Layer, ...]
    context: Tensor


@dataclass
class Rules:
    """What the modules of a graph are to the channels.

    Attributes:
        sources: Number of output channels by the path of every module that is followed, in graph order.
        may_read: Whether a module, called by a node on this many channels, reads them as columns of a matrix.
        refusal: Why a module's weights cannot be changed, or None.
    """

    sources: Mapping[str, int]
    may_read: Callable[[fx.Node, int], bool]
    refusal: Callable[[str], str | None]


@dataclass
class Followed:
    """Where the channels have gone.

    Attributes:
        first: The id of channel 0 by the path of the module that makes it.
        reads: By path, for every call of a module that reads channels, in graph order.
        lost: bool, by id: whether the channel reaches something else too.
        reasons: By path of the making module where the first of its channels were lost.
    """

    first: dict[str, int]
    reads: dict[str, list[Read]]
    lost: Tensor
    reasons: dict[str, str]
    _owners: Tensor = field(repr=False)
    _paths: list[str] = field(repr=False)

    def lose(self, ids: Tensor, reason: str) -> None:
        """Note that the channels with these ids go elsewhere too."""
        ids = ids[ids != NO_CHANNEL]
        self.lost[ids] = True
        for path in self.makers(ids):
            self.reasons.setdefault(path, reason)

    def makers(self, ids: Tensor) -> list[str]:
        """Paths of the modules that make the channels with these ids, in graph order."""
        owners = self._owners[ids[ids != NO_CHANNEL]].unique_consecutive()  # neighbours mostly have the same
        return [self._paths[owner] for owner in owners.unique().tolist()]

    @classmethod
    def nowhere(cls, sources: Mapping[str, int]) -> Followed:
        """Before anything is followed."""
        first, total = {}, 0
        for path, width in sources.items():
            first[path], total = total, total + width
        widths = torch.tensor(list(sources.values()), dtype=torch.int64)
        owners = torch.arange(len(first)).repeat_interleave(widths)
        return cls(first, defaultdict(list), torch.zeros(total, dtype=torch.bool), {}, owners, list(first))
