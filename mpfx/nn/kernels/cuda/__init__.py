"""Packed products on a CUDA device, in CUDA C++ that is compiled when it is first needed (:mod:`.nvrtc`).

Up to eight rows of activations are multiplied with the packed words themselves (``decode.cu``); for more, chunks of the
weight are unpacked one after the other (``expand.cu``) and multiplied by torch.
"""

from functools import lru_cache

import torch
from torch import Tensor

from mpfx.nn.kernels.cuda import nvrtc
from mpfx.nn.kernels.cuda.decode import decode, room_for
from mpfx.nn.kernels.cuda.expand import multiply
from mpfx.nn.packing import PackedWeight

DECODE_ROWS = 8
"""Up to so many rows of activations are multiplied straight from the packed words."""

CAPABILITY = (8, 0)
"""The least compute capability of a device that the kernels run on."""

_MOST_BYTES = 1 << 32  # of codes: what an offset of 32 bits reaches


@lru_cache(maxsize=64)
def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device; else, :func:`mpfx.nn.kernels.reference` does the work."""
    return torch.version.hip is None and nvrtc.available() and torch.cuda.get_device_capability(device) >= CAPABILITY


def cuda_linear(x: Tensor, weight: PackedWeight, permutation: Tensor | None, bias: Tensor | None) -> Tensor:
    """Multiply activations with a packed weight.

    Args:
        x: ``(rows, in)``, float32, float16 or bfloat16.
        weight: on the device of ``x``.
        permutation: integers ``(in,)``; channel ``permutation[k]`` of ``x`` meets channel k of the weight. None: the
            order is the input's own.
        bias: ``(out,)`` or None.

    Returns:
        ``(rows, out)`` in the dtype of ``x``. Up to eight rows are rounded to integers of 22 bits relative to the
        largest activation of their row (30 bits, if they are float32), and all that follows is exact up to sums in
        float32; a row with an activation that is not finite comes out as NaN. With more rows the weight is rounded to
        the dtype of ``x``.
    """
    x = x.contiguous()
    order = permutation if permutation is None or permutation.dtype == torch.uint16 else permutation.to(torch.int32)
    most = min(DECODE_ROWS, room_for(x, weight)) if weight.codes.nbytes < _MOST_BYTES else 0
    with torch.cuda.device(x.device):
        if len(x) > DECODE_ROWS or most == 0:
            return multiply(x, weight, order, bias)
        if len(x) <= most:
            return decode(x, weight, order, bias)
        return torch.cat([decode(part, weight, order, bias) for part in x.chunk(-(-len(x) // most))])
