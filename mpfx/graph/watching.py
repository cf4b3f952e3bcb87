"""Which tokens reach which expert: one call of an experts module, taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpfx.graph.calls import tensors_in
from mpfx.graph.operands import UnwatchableError
from mpfx.graph.products import Product, ProductMode

Sink = Callable[[str, int, Tensor], None]
"""Called with a parameter's name, the index of an expert, and its inputs ``(tokens, in)``."""

_WATCHABLE = ("eager", "grouped_mm", "batched_mm")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@contextmanager
def plain_products(module: nn.Module) -> Iterator[None]:
    """Inside, an experts module of transformers computes by operators of PyTorch, whose operands can be seen.

    Its kernels from elsewhere make way for its own forward; what can be watched as it is stays. The cache of
    autocast is off, as it would hold copies of weights that were made before anyone looked.
    """
    config = getattr(module, "config", None)
    chosen = getattr(config, "_experts_implementation", None)
    swap = chosen is not None and chosen not in _WATCHABLE
    cached = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        if swap:
            setattr(config, "_experts_implementation", "eager")  # noqa: B010 (not declared by every config)
        yield
    finally:
        if swap:
            setattr(config, "_experts_implementation", chosen)  # noqa: B010
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def call_watched(
    stacks: Mapping[str, Tensor], arguments: Any, report: Callable[[Product, Tensor], None]
) -> Iterator[None]:
    """Report every product of one call of an experts module, and check at its end that no token was missed.

    Args:
        stacks: its parameters ``(experts, ., .)`` by name.
        arguments: of the call, nested.
        report: gets each product, for the first part of its output channels only, and bool ``(batches, rows)``:
            the rows that are tokens routed to the expert.

    Raises:
        UnwatchableError: if the inputs of single experts cannot be told, or do not fit the routing.
    """
    call = _Call(stacks, arguments, report)
    with ProductMode(stacks, call.take):
        yield
    call.finish()


class _Call:
    def __init__(self, stacks: Mapping[str, Tensor], arguments: Any, report: Callable[[Product, Tensor], None]) -> None:
        tensors = list(tensors_in(arguments))
        self._tokens = next((t.reshape(-1, t.shape[-1]) for t in tensors if _is_activation(t)), None)
        self._routings = [] if self._tokens is None else list(_routings(tensors, len(self._tokens)))
        self._report = report
        self._routed: dict[tuple[tuple[int, ...], int], tuple[Tensor, set[str]]] = {}
        self._parts: dict[tuple[str, tuple[int, ...]], list[tuple[tuple[int, int], Tensor]]] = {}
        self._counts = {name: [0] * len(parameter) for name, parameter in stacks.items()}

    def take(self, product: Product) -> None:
        """Report a product unless it is a further part of one."""
        if product.rows is not None:
            self._parts.setdefault((product.name, product.experts), []).append((product.rows, product.x))
            if product.rows[0] != 0:
                return
        routed = self._tokens_of(product)
        for expert, rows in zip(product.experts, routed, strict=True):
            self._counts[product.name][expert] += int(rows.sum())
        self._report(product, routed)

    def _tokens_of(self, product: Product) -> Tensor:
        """Bool ``(batches, rows)``: padding is recognised in the first product, where its inputs are zero."""
        key = (product.experts, product.x.shape[1])
        routed, names = self._routed.get(key, (None, set()))
        if routed is None or product.name in names:  # the first product, or that of further tokens
            routed, names = self._recognise(product), set()
        self._routed[key] = routed, names | {product.name}
        return routed

    def _recognise(self, product: Product) -> Tensor:
        x = product.x
        everything = torch.ones(x.shape[:2], dtype=torch.bool, device="cpu" if x.is_meta else x.device)
        if x.is_meta:
            return everything
        if self._routings and self._computes_every_token(x):
            table = self._routings[0].to(x.device)
            return torch.stack([(table == expert).any(-1) for expert in product.experts])
        return (x != 0).any(-1) if product.stacked else everything

    def _computes_every_token(self, x: Tensor) -> bool:
        """Whether every batch is all tokens of the call, in order: the choice among them comes later."""
        if self._tokens is None or x.shape[1:] != self._tokens.shape:
            return False
        tokens = self._tokens.to(x.dtype)
        return all(torch.equal(batch, tokens) for batch in x)

    def finish(self) -> None:
        """Check the call as a whole."""
        for (name, experts), parts in self._parts.items():
            _check_parts(f"`{name}` of experts {list(experts)[:5]}", parts)
        if self._routings:
            self._check_routing()
            return
        unseen = [name for name, count in self._counts.items() if not any(count)]
        if unseen and self._tokens is not None and len(self._tokens):
            raise UnwatchableError(f"computes no product with {unseen} that can be seen")

    def _check_routing(self) -> None:
        """Every stack must have seen as many tokens of every expert as one of the integer arguments asks for."""
        experts = range(len(next(iter(self._counts.values()))))
        asked = [[int((table == expert).sum()) for expert in experts] for table in self._routings]
        if not any(all(count == wanted for count in self._counts.values()) for wanted in asked):
            raise UnwatchableError(
                f"computes {[sum(count) for count in self._counts.values()]} products of a token and an expert where "
                f"the experts in its arguments ask for {sum(asked[0])}: which tokens are meant for which expert "
                "cannot be told"
            )


def _is_activation(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() >= 2


def _routings(tensors: list[Tensor], tokens: int) -> Iterator[Tensor]:
    """Integer arguments that can be the experts of every token, as ``(tokens, k)``."""
    for tensor in tensors:
        if tensor.dtype in _INTEGERS and tokens and tensor.numel() and tensor.numel() % tokens == 0:
            yield tensor.reshape(tokens, -1)


def _check_parts(where: str, parts: list[tuple[tuple[int, int], Tensor]]) -> None:
    """Parts of the output channels must all read what the first one was reported to read."""
    first = [x for (start, _), x in parts if start == 0]
    others = [x for (start, _), x in parts if start != 0]
    if len(first) != 1 or not all(_equal(first[0], x) for x in others):
        raise UnwatchableError(f"multiplies parts of {where} by different inputs")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.is_meta or b.is_meta or torch.equal(a, b))
