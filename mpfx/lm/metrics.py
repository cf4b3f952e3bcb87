"""Perplexity and mean token loss of next-token predictions, exact to float32 and bounded in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.text.perplexity import Perplexity as _Perplexity

IGNORE = -100
"""Target that is not scored: the convention of PyTorch and transformers."""

_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_CUDA = 2**22, 2**24
"""Logits that are normalised at a time: 16 MiB as float32, and four times as many where launches take longer."""


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of every target token.

    The softmax is never formed: a log-softmax of (at least) float32 logits keeps tokens whose probability
    underflows. Chunks of rows are normalised one after another, so that the extra memory is a constant
    16 MiB, 64 on a CUDA device (or one position, if that is larger), and never a copy of all logits; unless they
    require a gradient, for which the log-softmax of all is kept.

    Args:
        logits: ``(batch, tokens, vocabulary)``, unnormalised, of any floating dtype.
        targets: ``(batch, tokens)`` int64, the tokens to be predicted *at* these positions (already shifted);
            positions that hold ``-100`` are not scored.

    Returns:
        ``(batch, tokens)`` in nats, float32 (float64 for float64 logits), exactly 0 where not scored.

    Raises:
        ValueError: If the shapes do not belong together.

    Example:
        >>> target_log_probs(torch.tensor([[[0.0, 200.0]]]), torch.tensor([[0]]))
        tensor([[-200.]])
    """
    if logits.ndim != 3 or logits.shape[:2] != targets.shape:
        raise ValueError(
            "Expected `logits` of shape (batch, tokens, vocabulary) and `targets` of shape (batch, tokens), "
            f"but got {tuple(logits.shape)} and {tuple(targets.shape)}."
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    size = _CHUNK_ELEMENTS_CUDA if logits.is_cuda else _CHUNK_ELEMENTS
    positions, found = max(1, size // logits.shape[2]), [torch.zeros(0, dtype=dtype, device=logits.device)]
    for row_logits, row_targets in zip(logits, targets, strict=True):
        # Split, not sliced: the gradient of every slice would be as large as that of the row.
        for chunk, wanted in zip(row_logits.split(positions), row_targets.split(positions), strict=True):
            found.append(-F.cross_entropy(chunk.to(dtype), wanted, reduction="none", ignore_index=IGNORE))
    return torch.cat(found).view(targets.shape)


class Perplexity(_Perplexity):
    """torchmetrics' perplexity, computed from log-probabilities.

    torchmetrics takes the logarithm of a softmax in the dtype of the logits: a token whose probability
    underflows makes the result infinite, half precision makes it wrong, and the states follow the model into
    half precision under ``Trainer(precision="bf16-true")``. Here log-probabilities come from
    :func:`target_log_probs`, and the states stay float32. States, their sum over processes, and the result are
    torchmetrics' own.
    """

    total_log_probs: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__(ignore_index=IGNORE)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add the predictions of one batch.

        Args:
            preds: Logits ``(batch, tokens, vocabulary)``, or the targets' own log-probabilities
                ``(batch, tokens)`` where :func:`target_log_probs` has already been called.
            target: ``(batch, tokens)`` int64; ``-100`` is not scored.
        """
        log_probs = preds if preds.ndim == 2 else target_log_probs(preds, target)
        self.total_log_probs -= log_probs.sum().to(self.total_log_probs.dtype)
        self.count += target.ne(IGNORE).sum()

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Perplexity:
        """Follow the module to another device, but never to another dtype."""
        super()._apply(lambda state: state.to(fn(state).device), exclude_state)
        return self


class TokenLoss(Perplexity):
    """Mean negative log-likelihood of the scored tokens, in nats: the logarithm of the perplexity."""

    def compute(self) -> Tensor:
        """Return the mean over all tokens of all batches and processes."""
        return self.total_log_probs / self.count
