"""What a module or an operation does to channels, found by trying it on small random tensors instead of by its name."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mpfx.graph.calls import leaves

NormKind = Literal["norm", "norm_plus_one"]

_RELATIVE_ERROR = 1e-5  # modules may compute in float32 inside
_FACTORS = (1e-20, 3.0, 1e20)  # far apart, so that a clamp or a softened linear part shows


_PLAIN = (bool, int, float, str, torch.dtype, types.NoneType, types.FunctionType, types.BuiltinFunctionType)
_BARE_MODULE = nn.Module()
_BARE = frozenset(vars(_BARE_MODULE))
_HOOKS = frozenset(name for name in _BARE if "hook" in name)


@dataclass(frozen=True)
class Pointwise:
    """An operation whose result at a position depends on the input at this position only.

    Attributes:
        homogeneous: Whether a positive factor on the input is the same factor on the result.
        uniform: Whether it is one function for all positions.
    """

    homogeneous: bool
    uniform: bool


def likeness(module: nn.Module) -> Hashable:
    """A key that only modules share which compute the same, whatever the values of their parameters.

    Layers of a model repeat their modules, so that one trial tells about all of them.

    Returns:
        For a childless module without buffers and hooks, whose attributes are plain values and functions: its type,
        these, and the form of its parameters. For any other its id.
    """
    state = {name: value for name, value in vars(module).items() if name not in _BARE}
    hooked = any(value != getattr(_BARE_MODULE, name) for name, value in vars(module).items() if name in _HOOKS)
    if module._modules or module._buffers or hooked or not all(map(_is_plain, state.values())):
        return id(module)
    forms = ((name, None if p is None else (p.shape, p.dtype)) for name, p in module._parameters.items())
    plain = ((name, state[name], repr(state[name])) for name in sorted(state))  # 1 equals True, but for its text
    return type(module), module.training, tuple(plain), tuple(forms)


def _is_plain(value: object) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)


def norm_kind(module: nn.Module) -> NormKind | None:
    """How the last step of a module scales its channels, the last dimension.

    Weights are drawn at random for the trial, so the module may be on the meta device.

    Returns:
        ``"norm"`` where channel c is multiplied by ``weight[c]`` (and ``bias[c]``, if there is one, added),
        ``"norm_plus_one"`` where it is multiplied by ``1 + weight[c]``, None for everything else.
    """
    own = {name: p for name, p in module._parameters.items() if p is not None}
    weight = own.get("weight")
    if module._modules or not {"weight", "bias"} >= set(own) or weight is None or weight.dim() != 1:
        return None
    if any(p.shape != weight.shape for p in own.values()):
        return None
    try:
        with _trial():
            return _try_norm(module, weight.shape[0], "bias" in own)
    except Exception:  # whatever stops it, nothing is known of it then
        return None


def _try_norm(module: nn.Module, width: int, biased: bool) -> NormKind | None:
    x, w, b, scale = _normal(2, 3, width), _normal(width, seed=1), _normal(width, seed=2), _factors(width)

    def run(weight: Tensor, bias: Tensor) -> Any:
        return _call(module, {"weight": weight, "bias": bias} if biased else {"weight": weight}, x)

    expected = run(w, b)
    if not _is_result(expected, x.shape) or not bool(expected.any()):
        return None
    if _close(run(w * scale, b * scale), expected * scale):
        return "norm"
    return "norm_plus_one" if _close(run((1 + w) * scale - 1, b * scale), expected * scale) else None


def pointwise(run: Callable[[Tensor], Any], shape: Sequence[int]) -> Pointwise | None:
    """Try an operation on a random tensor of ``shape``.

    Args:
        run: Called with float64 tensors on the CPU. Random functions count as not pointwise.
        shape: Sizes that the operation accepts.

    Returns:
        None unless the operation works position by position.
    """
    x = _normal(*shape)
    flat = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(1))
    others = torch.where((flat % 2 == 0).view(shape), x, 7 * _normal(*shape, seed=2))
    kept = others == x
    try:
        with _trial():
            y, changed = run(x.clone()), run(others.clone())  # it may work in place
            if not (_is_result(y, x.shape) and _is_result(changed, x.shape) and _close(changed[kept], y[kept])):
                return None
            shuffled = run(x.flatten()[flat].view(shape))
            uniform = _is_result(shuffled, x.shape) and _close(shuffled.flatten(), y.flatten()[flat])
            homogeneous = all(_close(run(x * factor) / factor, y) for factor in _FACTORS)
    except Exception:  # whatever stops it, nothing is known of it then
        return None
    return Pointwise(homogeneous, uniform)


def module_function(module: nn.Module, rest: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[Tensor], Any]:
    """A childless module as a function of its first argument, with random parameters and copies of its buffers."""
    own = {name: _normal(*p.shape, seed=1) for name, p in module._parameters.items() if p is not None}
    return lambda x: _call(module, own, x, *rest, **kwargs)


def matrix_input(module: nn.Module, width: int) -> int | None:
    """The dimension of a two-dimensional ``weight`` through which alone the module reads its input.

    This is the case where a factor on the columns makes up for the inverse factor on the input, as in the router of
    a mixture of experts.

    Args:
        module: A childless module called with one tensor, ``(..., width)``.
        width: Number of input channels.

    Returns:
        0 or 1; None if it is another kind of module, or if sizes do not tell the dimension.
    """
    own = {name: p for name, p in module._parameters.items() if p is not None}
    weight = own.get("weight")
    if module._modules or weight is None or weight.dim() != 2 or sum(size == width for size in weight.shape) != 1:
        return None
    dim = tuple(weight.shape).index(width)
    drawn = {name: _normal(*p.shape, seed=1) for name, p in own.items()}
    x = _normal(6, width)
    scale = _factors(width)
    scaled = {**drawn, "weight": drawn["weight"] * (scale if dim == 1 else scale[:, None])}
    try:
        with _trial():
            expected = _tensors(_call(module, drawn, x))
            found = _tensors(_call(module, scaled, x / scale))
            other = _tensors(_call(module, drawn, 2 * x.flip(0)))
    except Exception:  # whatever stops it, nothing is known of it then
        return None
    reads = not all(map(_close, other, expected))
    return dim if reads and len(found) == len(expected) and all(map(_close, found, expected)) else None


def experts_inputs(module: nn.Module, width: int) -> tuple[tuple[str, int], ...] | None:
    """The three-dimensional parameters through which fused experts read their input, each with the dimension of it.

    All of one module's stacks are ``(experts, out, in)``, or all ``(experts, in, out)`` as its flag
    ``is_transposed`` says. Without the flag, the one order is taken that makes a chain: what the first
    stacks put out, whole or gated to half of it, is what the others take in.

    Args:
        module: Fused experts, see `is_experts`.
        width: Number of input channels.

    Returns:
        Names and dimensions (1 or 2), or None where neither flag nor sizes tell.
    """
    shapes = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None and p.dim() == 3}
    flag = getattr(module, "is_transposed", None)
    dims = [1 if flag else 2] if isinstance(flag, bool) else [1, 2]
    chains = {dim: names for dim in dims if (names := _first_of_chain(shapes, dim, width))}
    if len(chains) != 1:
        return None
    [(dim, names)] = chains.items()
    return tuple((name, dim) for name in names)


def _first_of_chain(shapes: Mapping[str, tuple[int, ...]], dim: int, width: int) -> tuple[str, ...]:
    """The stacks that read ``width`` channels, if all others read what these put out; else none."""
    first = tuple(name for name, shape in shapes.items() if shape[dim] == width)
    made = {shapes[name][3 - dim] for name in first}
    taken = {shape[dim] for name, shape in shapes.items() if name not in first}
    fits = taken and all(size in made or 2 * size in made for size in taken)
    ends = all(shapes[name][3 - dim] == width for name in shapes if name not in first)
    return first if fits and ends and width not in made else ()


# Trials


@contextmanager
def _trial() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _factors(width: int) -> Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5


def _call(module: nn.Module, own: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Run a copy of a childless module, so that whatever its forward stores does not reach the original."""
    private = copy.copy(module)
    for name in ("_parameters", "_buffers"):
        private.__dict__[name] = dict(private.__dict__[name])
    buffers = {name: _private(buffer) for name, buffer in module._buffers.items() if buffer is not None}
    return functional_call(private, {**buffers, **own}, args, kwargs)


def _private(buffer: Tensor) -> Tensor:
    values = torch.zeros(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer.detach().cpu().clone()
    return values.double() if values.is_floating_point() else values


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for _, leaf in leaves(result, "") if isinstance(leaf, Tensor)]


def _is_result(result: Any, shape: torch.Size) -> bool:
    return isinstance(result, Tensor) and result.shape == shape and result.is_floating_point()


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.device != expected.device:
        return False
    found, expected = found.double(), expected.double()
    if not bool(found.isfinite().all() and expected.isfinite().all()):
        return False
    largest = expected.abs().max().item() if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=_RELATIVE_ERROR, atol=_RELATIVE_ERROR * 0.1 * largest)
