"""Attention under a causal mask, without the mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

_KNOWN = "_mpfx_causal"  # attribute of a mask: its version when it was looked at, and what was found


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Compute :func:`torch.nn.functional.scaled_dot_product_attention`; masks that say no more than "causal" are named.

    Models leave such a mask away where they run, which lets kernels skip half of the work and the reading of the mask;
    while a graph is recorded, they make it. Called on what is in a batch, this can look at the values.
    """
    if attn_mask is not None and not is_causal and _is_causal(attn_mask, query.shape[-2], key.shape[-2]):
        attn_mask, is_causal = None, True
    return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)


def naming_causal_masks(node: fx.Node) -> None:
    """Let a node that computes attention look at its mask."""
    if node.op == "call_function" and node.target is scaled_dot_product_attention:
        node.target = attention


def _is_causal(mask: Tensor, queries: int, keys: int) -> bool:
    """Whether every query may see itself and what is before it, and nothing else; looked at once for a mask."""
    if mask.is_meta or mask.dtype != torch.bool or queries != keys or mask.shape[-2:] != (queries, keys):
        return False
    if mask.is_inference():  # nobody counts what is written to these
        return _looks_causal(mask)
    known = getattr(mask, _KNOWN, None)
    if known is None or known[0] != mask._version:
        known = (mask._version, _looks_causal(mask))
        setattr(mask, _KNOWN, known)
    return known[1]


def _looks_causal(mask: Tensor) -> bool:
    of_one = mask[tuple(slice(1) if stride == 0 else slice(None) for stride in mask.stride()[:-2])]
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return bool((of_one == causal).all())
