"""A causal language model as a LightningModule: its validation loop measures perplexity."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mpfx.lm.metrics import IGNORE, Perplexity, TokenLoss, target_log_probs

Batch = Mapping[str, Tensor]
"""``input_ids (batch, length)`` and, optionally, ``attention_mask`` and ``labels`` of the same shape."""


class CausalLM(LightningModule):
    """Wraps any module that maps ``input_ids`` to next-token logits.

    ``trainer.validate`` logs two numbers over all scored tokens of the epoch: ``perplexity`` and its logarithm
    ``loss`` (nats per token). Every batch counts by its tokens, and processes are summed.

    Args:
        model: Called as ``model(input_ids=..., attention_mask=...)``, the mask only where the batch has one.
            Returns the logits ``(batch, length, vocabulary)``, alone, first in a tuple, or as ``.logits``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.perplexity = Perplexity()
        self.token_loss = TokenLoss()

    def forward(self, *args: Any, **batch: Any) -> Any:
        """Call the model."""
        return self.model(*args, **batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Score the next-token predictions of one batch; returns their mean loss in nats, differentiable."""
        log_probs, targets = scored(self.model(**model_inputs(self.model, batch)), batch)
        self.perplexity.update(log_probs, targets)
        self.token_loss.update(log_probs, targets)
        size = len(targets)
        self.log("perplexity", self.perplexity, on_step=False, on_epoch=True, prog_bar=True, batch_size=size)
        self.log("loss", self.token_loss, on_step=False, on_epoch=True, batch_size=size)
        return _mean_loss(log_probs, targets)


def losses_of(batches: Sequence[Batch]) -> Callable[[Any, int], Tensor]:
    """From what the model returned for one of the batches, and its number, to the mean loss, differentiable."""

    def loss(output: Any, index: int) -> Tensor:
        return _mean_loss(*scored(output, batches[index]))

    return loss


def scored(output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Score what a model returned.

    Args:
        output: with the logits.
        batch: that the model was called on, wherever it is.

    Returns:
        Log-probabilities of the next tokens in nats, and these tokens, ``-100`` where not scored, both ``(batch,
        length - 1)`` where the logits are.
    """
    logits = _logits(output)[:, :-1]
    targets = next_tokens(batch).to(logits.device)
    return target_log_probs(logits, targets), targets


def _mean_loss(log_probs: Tensor, targets: Tensor) -> Tensor:
    return -log_probs.sum() / targets.ne(IGNORE).sum().clamp(min=1)


def next_tokens(batch: Batch) -> Tensor:
    """Return the token to predict at each position but the last.

    A prediction is scored only where the token to predict and the token before it are both real (attention
    mask 1) and the label, if there are labels, is not ``-100``.

    Args:
        batch: ``input_ids (batch, length)``; optional ``labels`` (not shifted, as in transformers) and
            ``attention_mask``.

    Returns:
        ``(batch, length - 1)`` int64, ``-100`` where not scored.
    """
    targets = batch.get("labels", batch["input_ids"])[:, 1:]
    mask = batch.get("attention_mask")
    if mask is None:
        return targets
    real = mask.bool()
    return targets.masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORE)


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Keep what the model reads; a cache of keys and values would only cost memory."""
    inputs: dict[str, Any] = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def _logits(output: Any) -> Tensor:
    """Find the logits in what the model returned."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif isinstance(output, tuple) and output:
        output = output[0]
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise TypeError(
            "Expected the model to return logits of shape (batch, length, vocabulary), alone, first in a tuple "
            f"or as `.logits`, but got {type(output).__name__}."
        )
    return logits
