"""Greedy decoding, batch 1, with transformers' static cache; on a CUDA device a step is a CUDA graph."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpfx.bench.timing import captured

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPARE = 8  # positions for the steps before a graph is captured


class Decoder:
    """A model that continues a prompt, one token a step.

    Args:
        model: a causal language model in evaluation mode.
        length: tokens that the cache must hold.
        compiled: whether steps run what ``torch.compile`` makes of the model.
    """

    def __init__(self, model: "PreTrainedModel", length: int, *, compiled: bool = False) -> None:
        from transformers import StaticCache

        self._model = model
        self._step_model: Callable[..., Any] = torch.compile(model, fullgraph=True) if compiled else model
        self._graph: torch.cuda.CUDAGraph | None = None
        self._cache = StaticCache(config=model.config, max_cache_len=length + _SPARE)
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)

    @torch.no_grad()
    def prefill(self, prompt: Tensor) -> Tensor:
        """Start anew.

        Args:
            prompt: int64 ``(1, tokens)``.

        Returns:
            The first new token, ``(1, 1)``.
        """
        self._cache.reset()
        return self._take(self._model, prompt).clone()

    @torch.no_grad()
    def step(self) -> Tensor:
        """The next token, ``(1, 1)``."""
        if self._graph is None:
            self._take(self._step_model, self._token)
        else:
            self._graph.replay()
        return self._token.clone()

    @torch.no_grad()
    def capture(self, prompt: Tensor) -> None:
        """Make a CUDA graph of a step; what has been decoded is forgotten."""
        self.prefill(prompt)  # makes the cache
        self._graph = captured([lambda: self._take(self._step_model, self._token)])

    def _take(self, model: Callable[..., Any], tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens, past_key_values=self._cache, use_cache=True).logits
        return self._token.copy_(logits[:, -1:].argmax(-1))


def decode(decoder: Decoder, prompt: Tensor, count: int) -> tuple[list[int], float]:
    """Continue a prompt by ``count`` tokens; returns them, and the seconds that all but the first took."""
    tokens = [decoder.prefill(prompt)]
    _wait(prompt.device)
    started = time.perf_counter()
    tokens += [decoder.step() for _ in range(count - 1)]
    _wait(prompt.device)
    seconds = time.perf_counter() - started
    return [int(token) for token in tokens], seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
