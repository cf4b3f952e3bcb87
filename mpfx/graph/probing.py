"""Runs an experts module on a few tokens without the values of its weights, to see how it uses them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mpfx.graph.calls import map_leaves, tensors_in
from mpfx.graph.compat import TorchDispatchMode
from mpfx.graph.isolation import undisturbed
from mpfx.graph.operands import UnwatchableError
from mpfx.graph.products import GROUPED, PRODUCTS, Product
from mpfx.graph.watching import call_watched, plain_products

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_LARGEST = 1 << 22
"""Elements that a made-up tensor may have."""

_INDEXING = ("aten.index", "aten.index_put", "aten.index_put_", "aten._unsafe_index")


def orientations(module: nn.Module, stacks: Sequence[str], example: Arguments | None) -> dict[str, bool]:
    """Whether each stack is multiplied by its first dimension: a parameter ``(experts, in, out)``.

    Nothing of the module changes, and its weights may be on any device, meta included.

    Args:
        module: holds the stacks as its own parameters.
        stacks: names of the parameters ``(experts, ., .)``.
        example: arguments of a call, of which the sizes matter; None: the usual ones are tried.

    Raises:
        UnwatchableError: if the module cannot be run like that, or its use of the weights cannot be watched.
    """
    parameters = {name: module.get_parameter(name) for name in stacks}
    attempts = [_real_arguments(example, parameters)] if example is not None else _usual_arguments(module, parameters)
    failures: list[UnwatchableError] = []
    for args, kwargs in attempts:
        try:
            return _attempt(module, parameters, args, kwargs)
        except UnwatchableError as error:
            failures.append(error)
    if not failures:
        raise UnwatchableError("takes arguments that are none of the usual ones")
    raise next((error for error in failures if error.__cause__ is None), failures[0])


def _attempt(
    module: nn.Module, parameters: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, bool]:
    seen: dict[str, set[bool]] = {name: set() for name in parameters}

    def report(product: Product, _: Tensor) -> None:
        seen[product.name].add(product.transposed)

    with undisturbed(module), plain_products(module):
        substitutes, stacks = _substitutes(module, parameters)
        with _Unvalued(), call_watched(stacks, (args, kwargs), report):
            try:
                functional_call(module, substitutes, args, kwargs)
            except UnwatchableError:
                raise
            except Exception as error:  # the user's code raises whatever made-up arguments make it stumble over
                raise UnwatchableError(
                    f"cannot be run on made-up tokens ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
                ) from error
    if mixed := [name for name, found in seen.items() if len(found) != 1]:
        raise UnwatchableError(f"multiplies {mixed} in no direction, or in more than one")
    return {name: found.pop() for name, found in seen.items()}


def _substitutes(module: nn.Module, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stand-ins for all parameters and buffers: without values for the stacks, on the CPU for all others."""
    generator = torch.Generator().manual_seed(0)
    stacks = {
        name: torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta") for name, p in parameters.items()
    }
    rest = dict(module.named_parameters()) | dict(module.named_buffers())
    made = {name: _stand_in(tensor, generator) for name, tensor in rest.items() if name not in stacks}
    return {**made, **stacks}, stacks


def _stand_in(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Made-up values, but for integers, which may be sizes."""
    if tensor.is_floating_point() or tensor.is_meta:
        return _real(tensor, generator, 1)
    return tensor.detach().cpu().clone()


def _real(tensor: Tensor, generator: torch.Generator, below: int) -> Tensor:
    """A tensor on the CPU like another one; integers are 0 .. below-1 in turn."""
    if tensor.numel() > _LARGEST:
        raise UnwatchableError(f"uses a tensor of shape {list(tensor.shape)} that is no stack of weights")
    if tensor.is_floating_point():
        return torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
    if tensor.dtype == torch.bool:
        return torch.ones(tensor.shape, dtype=torch.bool)
    return (torch.arange(tensor.numel()) % below).reshape(tensor.shape).to(tensor.dtype)


def _real_arguments(example: Arguments, parameters: Mapping[str, Tensor]) -> Arguments:
    generator = torch.Generator().manual_seed(0)
    experts = min(len(p) for p in parameters.values())

    def replace(_: str, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return _real(leaf, generator, experts)
        return int(leaf) if isinstance(leaf, torch.SymInt) else leaf

    args, kwargs = map_leaves(example, replace, "")
    return args, kwargs


def _usual_arguments(module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[Arguments]:
    """Arguments as experts modules take them: tokens alone, or with their experts and the weights of these."""
    experts, dtype = len(next(iter(parameters.values()))), next(iter(parameters.values())).dtype
    count = 2 * experts
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.arange(count) % experts, torch.arange(1, count + 1) % experts], 1)
    weights = torch.rand(count, 2, generator=generator).to(dtype)
    required = _required(module.forward)
    for width in sorted({size for p in parameters.values() for size in p.shape[1:]}):
        x = torch.rand(count, width, generator=generator).to(dtype) + 0.5  # no row of zeros
        if required == 1:
            yield from (((shaped,), {}) for shaped in (x, x.view(1, count, width), x.view(experts, 2, width)))
        elif required == 2:
            yield from (((x, other), {}) for other in (index, [2] * experts, torch.full((experts,), 2)))
        else:
            for shaped in (x, x.view(1, count, width)):
                yield from ((order, {}) for order in permutations((shaped, index, weights)) if order[0] is shaped)


def _required(forward: Callable[..., Any]) -> int:
    """How many arguments a forward takes; those of transformers may have defaults that do not work."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    listed = [p for p in inspect.signature(forward).parameters.values() if p.kind in kinds]
    needed = sum(p.default is p.empty for p in listed)
    return needed if needed > 1 else min(len(listed), 3)


class _Unvalued(TorchDispatchMode):
    """Floating tensors on the meta device have sizes only, and all others keep their values beside them.

    Results that depend on a meta tensor are on the meta device too, but for integers and truth values, which are
    made up: an expert is chosen, though none that the real weights would choose.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "meta":
            kwargs["device"] = torch.device("cpu")
        given = (tuple(args), kwargs)
        if not any(t.is_meta for t in tensors_in(given)):
            return func(*args, **kwargs)
        name = str(func.overloadpacket)
        if name in GROUPED:
            left, right = (args[i] for i in PRODUCTS[name])
            return torch.empty(left.shape[0], right.shape[-1], dtype=left.dtype, device="meta")
        return self._without_values(func, name, given)

    def _without_values(self, func: Any, name: str, given: Arguments) -> Any:
        if name == "aten._to_copy" and "device" in given[1]:
            given[1]["device"] = torch.device("meta")
        originals: dict[int, Tensor] = {}  # by the id of the meta tensor that stands for each

        def to_meta(_: str, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            meta = leaf if leaf.is_meta else leaf.to("meta")
            originals[id(meta)] = leaf
            return meta

        args, kwargs = map_leaves((_with_positions(name, given[0]), given[1]), to_meta, "")
        kept = list(tensors_in((args, kwargs)))  # their ids must stay theirs
        out = func(*args, **kwargs)
        made = [t for t in tensors_in(out) if id(t) not in originals]
        del kept
        if any(not t.is_floating_point() for t in made):
            return self._made_up(func, given)
        return map_leaves(out, lambda _, leaf: originals.get(id(leaf), leaf), "")

    def _made_up(self, func: Any, given: Arguments) -> Any:
        generator = torch.Generator().manual_seed(0)

        def to_real(_: str, leaf: Any) -> Any:
            return _real(leaf, generator, 1) if isinstance(leaf, Tensor) and leaf.is_meta else leaf

        args, kwargs = map_leaves(given, to_real, "")
        return func(*args, **kwargs)


def _with_positions(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of an indexing operator with masks as positions, as the result's size depends on their values."""
    if name not in _INDEXING:
        return args
    indices: list[Tensor | None] = []
    for index in args[1]:
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and not index.is_meta
        indices.extend(index.nonzero().unbind(1) if is_mask else [index])
    return (args[0], indices, *args[2:])
