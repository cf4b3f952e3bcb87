"""A Linear layer over a packed weight: one operator, `mpfx::linear`, and what runs it on each device.

| device | rows | runs on |
| --- | --- | --- |
| CPU | up to 8 | packed words times activations (numba, :mod:`mpfx.nn.kernels.cpu`) |
| CPU | more | chunks of the weight, expanded one after the other |
| CUDA, no bitmask | up to 8 | packed words times activations (Triton, :mod:`mpfx.nn.kernels.decode`) |
| CUDA, no bitmask | more | chunks of the weight, expanded one after the other (:mod:`mpfx.nn.kernels.expand`) |
| any other case | any | :func:`reference`: the dense weight, for the length of the call |

All but the last take float32, float16 and bfloat16. An operator, because compilers and CUDA graphs take one as it is.
"""

from functools import cache
from importlib.util import find_spec
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
    if _plain(x):  # the dispatcher takes longer than a small layer does
        return _run(x, weight, permutation, bias)
    layout = weight.layout
    parts = weight.parts
    result: Tensor = torch.ops.mpfx.linear(
        x, *(parts[name] for name in PARTS), permutation, bias, layout.in_features, weight.out_features,
        encoded(layout.widths), layout.group_size or 0,
    )  # fmt: skip
    return result


def reference(x: Tensor, weight: PackedWeight, permutation: Tensor | None, bias: Tensor | None) -> Tensor:
    """The same in plain PyTorch, on any device and in any floating dtype: what all kernels are tested against."""
    if permutation is not None:
        x = x.index_select(-1, permutation.to(torch.int32))
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, unpack(weight).dequantize().to(x.dtype), bias)


def _plain(x: Tensor) -> bool:
    """Whether nothing but the result is wanted: no graph, no gradient, no stand-in for a tensor."""
    return type(x) is Tensor and not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and x.requires_grad)


@torch.no_grad()
def _run(x: Tensor, weight: PackedWeight, permutation: Tensor | None, bias: Tensor | None) -> Tensor:
    device, rows = x.device.type, x.numel() // max(x.shape[-1], 1)
    known = x.dtype in _KERNEL_DTYPES and rows > 0
    if known and device == "cuda" and weight.mask is None and has_triton():
        from mpfx.nn.kernels.cuda import cuda_linear

        out = cuda_linear(x.reshape(rows, -1), weight, permutation, bias)
    elif known and device == "cpu":
        from mpfx.nn.kernels.cpu import cpu_linear

        out = cpu_linear(x.reshape(rows, -1), weight, permutation)
        out = out if bias is None else out.add_(bias.to(out.dtype))
    else:
        return reference(x, weight, permutation, bias)
    # No view: what an operator hands out may be written to.
    shaped: Tensor = torch.ops.aten._unsafe_view(out, [*x.shape[:-1], weight.out_features])
    return shaped


@cache
def has_triton() -> bool:
    """Whether Triton, which the CUDA kernels are written in, is installed."""
    return find_spec("triton") is not None


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
