"""How much the loss feels a change of what a layer puts out, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sensitivity:
    """Squared gradient of the loss at the outputs of the sites of one input group.

    A change ``dy`` of the outputs at token t changes the loss by about ``(g_t . dy)^2 / 2`` on average (the Fisher
    approximation of its curvature), so that tokens with large gradients are those whose outputs have to be kept
    ("guided" Hessians, Kim et al., GuidedQuant, 2025).

    Attributes:
        batches: mean over the outputs of the squared gradient, for every batch and in it for every call of the sites
            ``(tokens,)`` float32, on the host.
        total: sum over all tokens, also of batches that other processes hold.
        tokens: how many these are.
    """

    batches: tuple[tuple[Tensor, ...], ...]
    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Over all tokens."""
        return self.total / max(self.tokens, 1)

    @classmethod
    def of(cls, batches: Sequence[Sequence[Tensor]]) -> "Sensitivity":
        """Take in what every batch gave."""
        tokens = np.concatenate([np.empty(0), *(call.double().numpy() for batch in batches for call in batch)])
        return cls(tuple(map(tuple, batches)), float(tokens.sum()), len(tokens))

    def among(self, others: Sequence["Sensitivity"]) -> "Sensitivity":
        """The same batches, as some of those that several processes hold.

        Args:
            others: of all processes, this one's too, in the same order everywhere.
        """
        return replace(self, total=sum(o.total for o in others), tokens=sum(o.tokens for o in others))

    def weights(self, batch: int, power: float) -> list[Tensor]:
        """Weights of the tokens of one batch in a Hessian, ``(tokens,)`` for every call.

        Args:
            batch: its number.
            power: of the sensitivity relative to its mean: 1 weighs by the loss alone, 0 all tokens alike.
        """
        if not self.mean > 0:  # a part that the loss does not depend on
            return [torch.ones_like(call) for call in self.batches[batch]]
        return [(call / self.mean).pow(power) for call in self.batches[batch]]
