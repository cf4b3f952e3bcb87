"""A Linear layer over a packed weight: one operator, `mpfx::linear`, and what runs it on each device.

| device | rows | runs on |
| --- | --- | --- |
| CPU | up to 8 | packed words times activations (numba, :mod:`mpfx.nn.kernels.cpu`) |
| CPU | more | chunks of the weight, expanded one after the other |
| CUDA | up to 8 | packed words times activations (:mod:`mpfx.nn.kernels.cuda`, from compute capability 8.0 on) |
| CUDA | more, or fewer if faster | the weight, unpacked in registers (Hopper GPUs), or chunks, one after the other |
| any other case | any | :func:`reference`: the dense weight, for the length of the call |

All but the last take float32, float16 and bfloat16. An operator, because compilers and CUDA graphs take one as it is.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mpfx.nn.kernels.tables import encoded, layout_of
from mpfx.nn.packing import PARTS, PackedWeight, own_order, unpack

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def packed_linear(x: Tensor, weight: PackedWeight, permutation: Tensor | None, bias: Tensor | None) -> Tensor:
    """Apply a linear layer.

    Args:
        x: ``(..., in)``, floating.
        weight: packed, on the device of ``x``.
        permutation: integers ``(in,)``; channel ``permutation[k]`` of the input meets channel k of the weight. None:
            the order is the input's own.
        bias: ``(out,)`` or None.

    Returns:
        ``(..., out)`` in the dtype of ``x``.
    """
    if _plain(x, bias):  # the dispatcher takes longer than a small layer does
        return _run(x, weight, permutation, bias)
    layout = weight.layout
    parts = weight.parts
    result: Tensor = torch.ops.mpfx.linear(
        x, *(parts[name] for name in PARTS), permutation, bias, layout.in_features, weight.out_features,
        encoded(layout.widths), layout.group_size or 0,
    )  # fmt: skip
    return result


def packed_linears(
    x: Tensor, weights: Sequence[PackedWeight], permutation: Tensor | None, biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Apply several linear layers to the same activations, on a CUDA device by one launch where it can be.

    Without gradients: what none of the arguments may ask for.

    Args:
        x: ``(..., in)``, floating.
        weights: packed, of the same channels.
        permutation: of all of them, as :func:`packed_linear` takes it.
        biases: one ``(out,)`` or None for every weight.

    Returns:
        A ``(..., out)`` for every weight.
    """
    if not torch.compiler.is_compiling():
        return _run_together(x, weights, permutation, biases)
    parts = [part for weight in weights for part in map(weight.parts.get, PARTS)]
    layouts = [weight.layout for weight in weights]
    results: list[Tensor] = torch.ops.mpfx.linears(
        x, parts, permutation, list(biases), layouts[0].in_features, [weight.out_features for weight in weights],
        ",".join(encoded(layout.widths) for layout in layouts), [layout.group_size or 0 for layout in layouts],
    )  # fmt: skip
    return results


def wants_gradient(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a product must be remembered for a backward pass."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others))


def reference(x: Tensor, weight: PackedWeight, permutation: Tensor | None, bias: Tensor | None) -> Tensor:
    """The same in plain PyTorch, on any device and in any floating dtype: what all kernels are tested against."""
    if permutation is not None:
        x = x.index_select(-1, permutation.to(torch.int32))
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, unpack(weight).dequantize().to(x.dtype), bias)


def _plain(x: Tensor, bias: Tensor | None) -> bool:
    """Whether nothing but the result is wanted: no graph, no gradient, no stand-in for a tensor."""
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    return not wants_gradient(x, bias)


def _check_devices(x: Tensor, weight: PackedWeight, permutation: Tensor | None, bias: Tensor | None) -> None:
    """Refuse tensors that lie elsewhere: kernels get addresses, which mean something else on another device."""
    for name, part in (*weight.parts.items(), ("permutation", permutation), ("bias", bias)):
        if part is not None and part.device != x.device and name != "widths":  # no kernel reads these
            raise ValueError(
                f"Expected all of a packed layer on {x.device}, where its input is, but its `{name}` is on "
                f"{part.device}: move the model as a whole."
            )


def _run(x: Tensor, weight: PackedWeight, permutation: Tensor | None, bias: Tensor | None) -> Tensor:
    _check_devices(x, weight, permutation, bias)
    if x.is_cpu and x.dtype in _KERNEL_DTYPES and x.numel() > 0:
        return _cpu()(x, weight, permutation, bias)
    return _run_elsewhere(x, weight, permutation, bias)


@torch.no_grad()
def _run_together(
    x: Tensor, weights: Sequence[PackedWeight], permutation: Tensor | None, biases: Sequence[Tensor | None]
) -> list[Tensor]:
    if not _on_cuda(x):
        return [_run(x, weight, permutation, bias) for weight, bias in zip(weights, biases, strict=True)]
    for weight, bias in zip(weights, biases, strict=True):
        _check_devices(x, weight, permutation, bias)
    outs = _cuda().cuda_linears(x.reshape(-1, x.shape[-1]), weights, permutation, biases)
    return [_shaped(out, x) for out in outs]


@cache
def _cpu() -> Callable[..., Tensor]:
    from mpfx.nn.kernels.cpu import cpu_linear

    return cpu_linear


@torch.no_grad()
def _run_elsewhere(x: Tensor, weight: PackedWeight, permutation: Tensor | None, bias: Tensor | None) -> Tensor:
    if not _on_cuda(x):
        return reference(x, weight, permutation, bias)
    return _shaped(_cuda().cuda_linear(x.reshape(-1, x.shape[-1]), weight, permutation, bias), x)


def _on_cuda(x: Tensor) -> bool:
    known = x.dtype in _KERNEL_DTYPES and x.numel() > 0
    return known and x.is_cuda and bool(_cuda().runs_on(x.device))


def _shaped(out: Tensor, x: Tensor) -> Tensor:
    # No view: what an operator hands out may be written to.
    shaped: Tensor = torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])
    return shaped


@cache
def _cuda() -> Any:
    return import_module("mpfx.nn.kernels.cuda")


@torch.library.custom_op("mpfx::linear", mutates_args=())
def _linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    scale_codes: Tensor | None,
    row_scales: Tensor | None,
    group_scales: Tensor | None,
    zeros: Tensor | None,
    mask: Tensor | None,
    widths: Tensor,
    permutation: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    encoded_widths: str,
    group_size: int,
) -> Tensor:
    parts = dict(zip(PARTS, (codes, scales, scale_codes, row_scales, group_scales, zeros, mask, widths), strict=True))
    weight = PackedWeight.of(parts, layout_of(in_features, encoded_widths, group_size))
    return _run(x.detach(), weight, permutation, bias)


@_linear.register_fake
def _(x: Tensor, *arguments: object) -> Tensor:
    out_features = arguments[-3]
    assert isinstance(out_features, int)
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("mpfx::linears", mutates_args=())
def _linears(
    x: Tensor,
    parts: Sequence[Tensor | None],
    permutation: Tensor | None,
    biases: Sequence[Tensor | None],
    in_features: int,
    out_features: Sequence[int],
    encoded_widths: str,
    group_sizes: Sequence[int],
) -> list[Tensor]:
    weights = []
    for k, (widths, group_size) in enumerate(zip(encoded_widths.split(","), group_sizes, strict=True)):
        own = dict(zip(PARTS, parts[k * len(PARTS) : (k + 1) * len(PARTS)], strict=True))
        weights.append(PackedWeight.of(own, layout_of(in_features, widths, group_size)))
    return _run_together(x.detach(), weights, permutation, biases)


@_linears.register_fake
def _(x: Tensor, *arguments: Any) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], out_features)) for out_features in arguments[4]]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors = [value for value in inputs[1:10] if isinstance(value, Tensor)]
    ctx.places = [isinstance(value, Tensor) for value in inputs[1:10]]
    ctx.layout, ctx.biased = layout_of(inputs[11], inputs[13], inputs[14]), inputs[10] is not None
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the input and the bias; packed weights have none."""
    saved = iter(ctx.saved_tensors)
    *parts, permutation = (next(saved) if place else None for place in ctx.places)
    weight = PackedWeight.of(dict(zip(PARTS, parts, strict=True)), ctx.layout)
    dense = own_order(unpack(weight).dequantize().to(gradient.dtype), permutation)
    of_bias = gradient.flatten(0, -2).sum(0) if ctx.biased else None
    return (gradient @ dense, *[None] * 9, of_bias, *[None] * 4)


_linear.register_autograd(_backward, setup_context=_remember)
