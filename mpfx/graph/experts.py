"""Fused experts: stacks of weights ``(experts, ., .)`` in one module, each expert a matrix of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpfx.graph.compat import storage_key
from mpfx.graph.linear import is_experts, paths_around
from mpfx.graph.operands import UnwatchableError
from mpfx.graph.probing import Arguments, orientations
from mpfx.graph.products import Product
from mpfx.graph.watching import Sink, call_watched, plain_products

__all__ = [
    "ExpertStack",
    "ExpertsFacts",
    "Sink",
    "UnwatchableError",
    "describe_experts",
    "expert_weight",
    "watch_experts",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True)
class ExpertStack:
    """The weights of all experts at one place of their computation.

    Attributes:
        module: Path of the experts module.
        parameter: Name of its parameter.
        experts: Number of experts.
        out_features: Number of output channels of each.
        in_features: Number of input channels of each.
        transposed: Whether the parameter is ``(experts, in, out)`` instead of ``(experts, out, in)``.
    """

    module: str
    parameter: str
    experts: int
    out_features: int
    in_features: int
    transposed: bool


@dataclass(frozen=True)
class ExpertsFacts:
    """What is known of a fused experts module.

    Attributes:
        stacks: Its stacks, in the order of its parameters; empty where they cannot be replaced.
        dense_reason: Why they cannot, or None.
    """

    stacks: tuple[ExpertStack, ...]
    dense_reason: str | None


def describe_experts(root: nn.Module, calls: Mapping[str, Arguments] | None = None) -> dict[str, ExpertsFacts]:
    """Describe every fused experts module below ``root`` by its path.

    How a module uses its weights is found by running its forward on a few made-up tokens, without the values of
    the weights: they may be on the meta device, and nothing changes.

    Args:
        root: Holds the modules.
        calls: Example arguments ``(args, kwargs)`` of these modules by path, of whose tensors only the sizes and
            types matter. The usual arguments of experts are tried where there are none: tokens ``(tokens, in)``, the
            experts ``(tokens, k)`` of each, and the weights of these.
    """
    owners = Counter(id(p) for m in root.modules() for p in m._parameters.values() if p is not None)
    memories = Counter(storage_key(p) for p in {id(p): p for p in root.parameters()}.values() if _is_plain(p))
    holders = Counter(id(child) for m in root.modules() for child in m._modules.values())
    facts: dict[str, ExpertsFacts] = {}
    known: dict[object, ExpertsFacts] = {}
    for path, module in root.named_modules():
        if not path or not is_experts(module) or not facts.keys().isdisjoint(paths_around(path)):
            continue
        reason = _dense_reason(module, owners, holders, memories)
        if reason is not None:
            facts[path] = ExpertsFacts((), reason)
            continue
        example = (calls or {}).get(path)
        key = _form(module, example)  # the layers of a model are of few forms
        if key not in known:
            known[key] = _probed(path, module, example)
        facts[path] = _at(path, known[key])
    return facts


def expert_weight(root: nn.Module, stack: ExpertStack, index: int) -> Tensor:
    """The weight of one expert, ``(out, in)``: writing into it in place changes the module.

    Raises:
        IndexError: If there is no such expert.
    """
    if not 0 <= index < stack.experts:
        raise IndexError(f"Expected an expert in 0 .. {stack.experts - 1} of {stack.module} but got {index}.")
    weight = root.get_submodule(stack.module).get_parameter(stack.parameter).detach()[index]
    return weight.t() if stack.transposed else weight


@contextmanager
def watch_experts(module: nn.Module, facts: ExpertsFacts, sink: Sink) -> Iterator[None]:
    """Report the inputs of every single expert of a module, whenever it is called inside the context.

    The module computes what it computes otherwise. Experts that see no token are not reported.

    Args:
        module: A fused experts module.
        facts: What ``describe_experts`` says of it.
        sink: Called with a parameter's name, the index of an expert, and the inputs ``(tokens, in)`` of that matrix:
            of exactly the tokens that are routed to it, each once. It must not change them.

    Raises:
        ValueError: If the module has to stay dense.
        UnwatchableError: From a call whose inputs of single experts cannot be told.
    """
    if facts.dense_reason is not None:
        raise ValueError(f"Expected experts that can be watched, but {facts.dense_reason}.")
    run, replaced = module.forward, module.__dict__.get("forward")

    def watched(*args: Any, **kwargs: Any) -> Any:
        stacks = {stack.parameter: module.get_parameter(stack.parameter) for stack in facts.stacks}
        report = _reporter(facts, sink)
        try:
            with plain_products(module), call_watched(stacks, (args, kwargs), report):
                return run(*args, **kwargs)
        except UnwatchableError as error:
            raise UnwatchableError(
                f"{type(module).__name__} {facts.stacks[0].module}: it {error}. Leave it dense: exclude it by its path."
            ) from error

    module.__dict__["forward"] = watched
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would not pass by here
            yield
    finally:
        del module.__dict__["forward"]
        if replaced is not None:
            module.__dict__["forward"] = replaced


def _reporter(facts: ExpertsFacts, sink: Sink) -> Callable[[Product, Tensor], None]:
    transposed = {stack.parameter: stack.transposed for stack in facts.stacks}

    def report(product: Product, routed: Tensor) -> None:
        if product.transposed != transposed[product.name]:
            raise UnwatchableError(f"multiplies `{product.name}` in another direction than it did on made-up tokens")
        # The sink's own tensors outlive the call, and its sums are in the precision that it chooses.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(product.x.device.type, enabled=False),
        ):
            for expert, x, rows in zip(product.experts, product.x, routed, strict=True):
                if tokens := int(rows.sum()):
                    sink(product.name, expert, x if tokens == len(rows) else x[rows])

    return report


def _is_plain(parameter: Tensor) -> bool:
    return parameter.layout is torch.strided and type(parameter.detach()) is Tensor


def _matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's parameters ``(experts, ., .)``; one with a dimension of size 1 is a bias, or a scale."""
    own = ((n, p) for n, p in module._parameters.items() if p is not None)
    return {n: p for n, p in own if p.dim() == 3 and min(p.shape) > 1}


def _dense_reason(module: nn.Module, owners: Counter[int], holders: Counter[int], memories: Counter[int]) -> str | None:
    """Why experts must stay as they are, as far as the module alone can tell."""
    matrices = _matrices(module)
    if not matrices:
        return "it holds no stack of matrices"
    for name, parameter in matrices.items():
        if owners[id(parameter)] > 1 or (_is_plain(parameter) and memories[storage_key(parameter)] > 1):
            return f"`{name}` shares its memory with another parameter (tied)"
    return _odd_weights(module, matrices) or _odd_calls(module, holders)


def _odd_weights(module: nn.Module, matrices: Mapping[str, Tensor]) -> str | None:
    if any(hasattr(m, "parametrizations") for m in module.modules()):
        return "a weight is computed from other parameters (a parametrization)"
    for name, parameter in matrices.items():
        if not _is_plain(parameter):
            return f"`{name}` is a {type(parameter.detach()).__name__} of layout {parameter.layout}"
        if parameter.dtype not in _FLOATS:
            return f"`{name}` is stored as {parameter.dtype}"
    return None


def _odd_calls(module: nn.Module, holders: Counter[int]) -> str | None:
    if holders[id(module)] > 1:
        return "the module is registered under more than one path"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "it has forward hooks, which a replacement would not run"
    if "forward" in vars(module):
        return "its forward was replaced (device hooks do that), which a packed module would not run"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript, whose products cannot be watched"
    return None


def _form(module: nn.Module, example: Arguments | None) -> object:
    """What the use of the weights can depend on, as far as it is plain to see."""
    tensors = tuple((n, p.shape, p.stride(), p.dtype) for n, p in (*module.named_parameters(), *module.named_buffers()))
    plain = tuple((n, v) for n, v in sorted(vars(module).items()) if isinstance(v, (bool, int, float, str)))
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return type(module), tensors, plain, implementation, id(example) if example is not None else None


def _probed(path: str, module: nn.Module, example: Arguments | None) -> ExpertsFacts:
    matrices = _matrices(module)
    try:
        transposed = orientations(module, list(matrices), example)
    except UnwatchableError as error:
        return ExpertsFacts((), f"which inputs each expert reads cannot be watched: it {error}")
    stacks = []
    for name, parameter in matrices.items():
        experts, first, second = parameter.shape
        sizes = (second, first) if transposed[name] else (first, second)
        stacks.append(ExpertStack(path, name, experts, *sizes, transposed[name]))
    return ExpertsFacts(tuple(stacks), None)


def _at(path: str, facts: ExpertsFacts) -> ExpertsFacts:
    stacks = tuple(
        ExpertStack(path, s.parameter, s.experts, s.out_features, s.in_features, s.transposed) for s in facts.stacks
    )
    return ExpertsFacts(stacks, facts.dense_reason)
