"""Masks that say no more than "causal" are named; all others reach the attention as they are."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mpfx.graph import attention as room

LENGTH = 6


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def padded() -> Tensor:
    mask = causal().repeat(2, 1, 1, 1)
    mask[1, ..., 0] = False
    mask[1, :, 0, 0] = True  # a query has to see something
    return mask


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, bool]]:
    """The mask and `is_causal` of every call."""
    calls: list[tuple[Any, bool]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float, is_causal: bool, **options: Any) -> Tensor:
        calls.append((mask, is_causal))
        return scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, **options)

    monkeypatch.setattr(room, "scaled_dot_product_attention", spy)
    return calls


def qkv(queries: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, generator=generator) for n in (queries, LENGTH, LENGTH))
    return query, key, value


MASKS = {
    "causal": (causal(), True),
    "of every sample": (causal().expand(2, 1, LENGTH, LENGTH), True),
    "of every head": (causal().repeat(2, 3, 1, 1), True),
    "window": (causal() & causal().t().roll(2, 0), False),
    "all": (torch.ones(LENGTH, LENGTH, dtype=torch.bool), False),
    "padding in one sample": (padded(), False),
    "added": (torch.zeros(LENGTH, LENGTH).masked_fill(~causal(), -torch.inf), False),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_named_only_if_they_are_causal(name: str, given: list[tuple[Any, bool]]) -> None:
    mask, named = MASKS[name]
    if name == "window":
        mask = mask | torch.eye(LENGTH, dtype=torch.bool)
    found = room.attention(*qkv(), mask)
    assert given[0][1] == named
    assert (given[0][0] is None) == named
    torch.testing.assert_close(found, scaled_dot_product_attention(*qkv(), mask))


def test_fewer_queries_than_keys_keep_their_mask(given: list[tuple[Any, bool]]) -> None:
    room.attention(*qkv(4), causal()[:4])
    assert given[0][1] is False


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_is_written_to_is_looked_at_again(inference: bool, given: list[tuple[Any, bool]]) -> None:
    with torch.inference_mode(inference):
        mask = causal()
        room.attention(*qkv(), mask)
        mask[0, -1] = True
        found = room.attention(*qkv(), mask)
        expected = scaled_dot_product_attention(*qkv(), mask)
    assert [is_causal for _, is_causal in given] == [True, False]
    torch.testing.assert_close(found, expected)
