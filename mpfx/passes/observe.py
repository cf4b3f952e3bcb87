"""Statistics of the inputs of sites, taken while the model runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpfx.graph import InputGroup
from mpfx.stats import MomentAccumulator


def padding_mask(values: Mapping[str, Any]) -> Tensor | None:
    """Return the ``(batch, length)`` attention mask among a model's inputs, if there is one.

    Padding tells nothing about the inputs that matter, so its tokens weigh nothing in the statistics.
    """
    mask = values.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


@contextmanager
def observed(
    model: nn.Module, groups: Sequence[InputGroup], mask: Callable[[], Tensor | None] = lambda: None
) -> Iterator[dict[str, MomentAccumulator]]:
    """Accumulate the moments of every group's input while the context is open; leaves no hook behind.

    Args:
        model: whose submodules the groups' paths name.
        groups: to observe, each at its first site.
        mask: called for every input; returns the current batch's padding mask. Inputs of another number of tokens
            (the other side of an encoder-decoder model) count in full.
    """
    moments: dict[str, MomentAccumulator] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            if name not in moments:
                moments[name] = MomentAccumulator(x.shape[-1], x.device)
            weights = mask()
            if weights is not None and weights.numel() * x.shape[-1] != x.numel():
                weights = None
            with torch.autocast(x.device.type, enabled=False):  # sums are float32 whatever the model computes in
                moments[name].update(x, weights)

        return hook

    with ExitStack() as hooks:
        for group in groups:
            site = model.get_submodule(group.sites[0].path)
            handle = site.register_forward_pre_hook(hook_for(group.name), with_kwargs=True)
            hooks.callback(handle.remove)
        yield moments
