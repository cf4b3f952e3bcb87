"""Which modules are linear layers, and their weights as one kind of matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

_PROBE_OUT, _PROBE_IN = 5, 3


@dataclass(frozen=True)
class LinearFacts:
    """What is known of a linear layer from the moment of tracing on.

    Attributes:
        in_features: Number of input channels.
        out_features: Number of output channels.
        dense_reason: Why the layer cannot be replaced, or None.
        transposed: Whether it stores its weight as (in, out).
    """

    in_features: int
    out_features: int
    dense_reason: str | None
    transposed: bool = False


def paths_around(path: str) -> Iterator[str]:
    """The paths of the modules that hold the one at ``path``, innermost first; the last one is ""."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes ``x @ W.T + b`` with a weight of its own.

    True for ``nn.Linear``, for its subclasses that compute the same, and for the transposed layer of GPT-2,
    which is recognised by its form.
    """
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward or _computes_linear(module)
    return _is_transposed_linear(module)


def _is_transposed_linear(module: nn.Module) -> bool:
    """A childless module with ``weight (nx, nf)`` and ``bias (nf,)``: GPT-2's ``Conv1D``."""
    out_features, in_features = getattr(module, "nf", None), getattr(module, "nx", None)
    if not isinstance(out_features, int) or not isinstance(in_features, int) or module._modules:
        return False
    shapes = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    return shapes == {"weight": (in_features, out_features), "bias": (out_features,)}


def _computes_linear(module: nn.Linear) -> bool:
    """Try an overridden forward with a small weight in place of the module's own, which may be on any device."""
    if module._modules or not {"weight", "bias"} >= set(module._parameters) or module._parameters.get("weight") is None:
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_PROBE_OUT, _PROBE_IN, generator=generator)
    x = torch.randn(2, 4, _PROBE_IN, generator=generator)
    small = {"weight": weight}
    if module.bias is not None:
        small["bias"] = torch.randn(_PROBE_OUT, generator=generator)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            result = functional_call(module, small, (x,))
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, AssertionError):
            return False  # whatever it computes, it is not the product with this weight
        expected = nn.functional.linear(x, weight, small.get("bias"))
    return isinstance(result, Tensor) and result.shape == expected.shape and torch.allclose(result, expected)


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer, ``(out, in)``: writing into it in place changes the module.

    Raises:
        TypeError: If the module is no linear layer.
    """
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    if _is_transposed_linear(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().t()
    raise TypeError(f"Expected a linear layer but got {type(module).__name__}.")


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds the weights of several experts as three-dimensional ``(experts, ., .)`` parameters."""
    counts = {p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3}
    if len(counts) != 1 or counts == {1} or isinstance(module, nn.modules.conv._ConvNd):
        return False
    return not any(is_linear(child) for child in module.modules())


def is_leaf(module: nn.Module) -> bool:
    """Whether a trace calls the module as a whole.

    These are childless modules, linear layers, fused experts, ``nn.MultiheadAttention``, which reads the weight of
    its projection without calling it, and modules that say so by an attribute ``traced_as_leaf``.
    """
    if not module._modules or isinstance(module, nn.MultiheadAttention) or getattr(module, "traced_as_leaf", False):
        return True
    return is_linear(module) or is_experts(module)


def describe_linears(root: nn.Module, direct_uses: Collection[str]) -> dict[str, LinearFacts]:
    """Describe every linear layer below ``root`` by its path.

    Args:
        root: The traced module.
        direct_uses: Paths of linear layers whose weight is read by other code than their own forward.
    """
    owners = Counter(id(p) for m in root.modules() for p in m._parameters.values() if p is not None)
    holders = Counter(id(child) for m in root.modules() for child in m._modules.values())
    facts = {}
    for path, module in root.named_modules():
        if path and is_linear(module):
            out_features, in_features = linear_weight(module).shape
            reason = _dense_reason(module, owners, holders) or (
                "its weight is read directly by other code, which a replacement would not reach"
                if path in direct_uses
                else None
            )
            facts[path] = LinearFacts(in_features, out_features, reason, not isinstance(module, nn.Linear))
    return facts


def _dense_reason(module: nn.Module, owners: Counter[int], holders: Counter[int]) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters (a parametrization)"
    if not weight.is_floating_point():
        return f"its weight is stored as {weight.dtype}"
    if owners[id(weight)] > 1:
        return "its weight is shared with another module (tied)"
    if holders[id(module)] > 1:
        return "the module is registered under more than one path"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which a replacement would not run"
    return None
