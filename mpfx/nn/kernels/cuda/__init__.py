"""Packed products on a CUDA device, in CUDA C++ that is compiled when it is first needed (:mod:`.nvrtc`).

Up to eight rows of activations are multiplied with the packed words themselves (``decode.cu``, or under a bitmask
``decode_masked.cu``). For more, the weight is unpacked in registers, tile by tile, on its way to the tensor cores
(``tile.cu``, on Hopper GPUs), or in chunks that torch multiplies, one after the other (``expand.cu``): whichever was
measured to be faster. Five to eight rows, and fewer that do not fit into shared memory at once, are multiplied either
way, where tiles are possible: again by what was faster.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from mpfx.nn.kernels.cuda import nvrtc
from mpfx.nn.kernels.cuda.decode import alike, decode, room_for
from mpfx.nn.kernels.cuda.expand import Chunks, chunks_for
from mpfx.nn.kernels.cuda.tile import Tile, tiles_for
from mpfx.nn.kernels.cuda.tune import fastest
from mpfx.nn.kernels.cuda.weights import described
from mpfx.nn.packing import PackedWeight

R = TypeVar("R")

DECODE_ROWS = 8
"""Up to so many rows of activations can be multiplied straight from the packed words."""

SURE_ROWS = 4
"""Up to so many rows, if they fit at once, that is not even measured: they ask for too little of tensor cores."""

TILE_ROWS = 1024
"""Up to so many rows, without a measurement, the weight is rather unpacked in registers than in memory."""

MOST_SITES = 8
"""Weights that one launch multiplies, at most."""

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
        ``(rows, out)`` in the dtype of ``x``. Up to eight rows, where they are multiplied with the packed words, are
        rounded to integers of 22 bits relative to the largest activation of their row (30 bits, if they are float32),
        and all that follows is exact up to sums in float32; a row with an activation that is not finite comes out as
        NaN. With more rows, and with fewer where that is faster, the weight is rounded to the dtype of ``x``.
    """
    x, order = x.contiguous(), _order(permutation)
    with torch.cuda.device(x.device):
        most = _most_rows(x, weight)
        if len(x) > DECODE_ROWS or most == 0:
            return _multiply_many(x, weight, order, bias)
        if len(x) <= min(SURE_ROWS, most) or not tiles_for(x, weight):
            return _multiply_few(x, weight, order, bias)
        ways = {"few": lambda: _multiply_few(x, weight, order, bias),
                "many": lambda: _multiply_many(x, weight, order, bias)}  # fmt: skip
        return _by_the_fastest(ways, x, [weight])


def cuda_linears(
    x: Tensor, weights: Sequence[PackedWeight], permutation: Tensor | None, biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Multiply activations with several packed weights: few rows by one launch, unless one by one is faster.

    Args:
        x: as :func:`cuda_linear` takes them.
        weights: of the same channels.
        permutation: of all of them.
        biases: one ``(out,)`` or None for every weight.
    """
    x, order = x.contiguous(), _order(permutation)

    def together() -> list[Tensor]:
        return decode(x, weights, order, biases)

    def apart() -> list[Tensor]:
        return [cuda_linear(x, weight, order, bias) for weight, bias in zip(weights, biases, strict=True)]

    if len(weights) > MOST_SITES or not _decodable(x, weights) or not alike(x, weights):
        return apart()
    with torch.cuda.device(x.device):
        if len(x) <= SURE_ROWS or not any(tiles_for(x, weight) for weight in weights):
            return together()
        return _by_the_fastest({"together": together, "apart": apart}, x, weights)


def _multiply_few(x: Tensor, weight: PackedWeight, order: Tensor | None, bias: Tensor | None) -> Tensor:
    """The product straight from the packed words, of as many rows at once as there is room for."""
    parts = x.chunk(-(-len(x) // _most_rows(x, weight)))
    products = [decode(part, [weight], order, [bias])[0] for part in parts]
    return products[0] if len(products) == 1 else torch.cat(products)


def _multiply_many(x: Tensor, weight: PackedWeight, order: Tensor | None, bias: Tensor | None) -> Tensor:
    """The product for many rows, cut in the way that was the fastest when it was first asked for."""
    out = torch.empty(len(x), weight.out_features, dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    tiles, chunks = tiles_for(x, weight), chunks_for(x, weight)
    ways: tuple[Tile | Chunks, ...] = (*tiles, *chunks) if len(x) <= TILE_ROWS else (*chunks, *tiles)
    count = 1 << (len(x) - 1).bit_length()
    key = f"{count} of {x.dtype}, {weight.out_features} x {x.shape[1]}".replace("torch.", "")
    way = fastest(key, ways, lambda way: way.multiply(x, weight, order, bias, out), x.device)
    way.multiply(x, weight, order, bias, out)
    return out


def _by_the_fastest(ways: Mapping[str, Callable[[], R]], x: Tensor, weights: Sequence[PackedWeight]) -> R:
    chosen = fastest(described(x, weights), tuple(ways), lambda way: ways[way](), x.device)
    return ways[chosen]()


def _decodable(x: Tensor, weights: Sequence[PackedWeight]) -> bool:
    return len(x) <= DECODE_ROWS and all(len(x) <= _most_rows(x, weight) for weight in weights)


def _most_rows(x: Tensor, weight: PackedWeight) -> int:
    return min(DECODE_ROWS, room_for(x, weight)) if weight.codes.nbytes < _MOST_BYTES else 0


def _order(permutation: Tensor | None) -> Tensor | None:
    """The channel order as kernels read it: in words, two entries of 16 bits at a time."""
    if permutation is None:
        return None
    order = permutation if permutation.dtype == torch.uint16 else permutation.to(torch.int32)
    return order if order.data_ptr() % 4 == 0 else order.clone()  # an expert's, of an odd number of channels
