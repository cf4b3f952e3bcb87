"""torch's own kernel for codes of 4 bits in groups of 128, to compare with; the CPU and CUDA have one each."""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 128
"""Channels that share a scale and a zero point."""


@dataclass(frozen=True)
class Int4Weight:
    """A weight in the form of torch's kernel.

    Attributes:
        packed: codes, in the order of the device's kernel.
        scales: ``(groups, out, 2)``, scales and zero points.
    """

    packed: Tensor
    scales: Tensor

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor) -> "Int4Weight":
        """Pack codes.

        Args:
            codes: int32 ``(out, in)``, 0..15.
            scales: ``(in / 128, out, 2)``, in the dtype of the activations.

        Raises:
            RuntimeError: where torch has no such kernel, or none for these sizes.
        """
        if codes.device.type == "cpu":
            return cls(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scales)
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        return cls(torch.ops.aten._convert_weight_to_int4pack(pairs, 8), scales)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return self.packed.nbytes + self.scales.nbytes

    def copy(self) -> "Int4Weight":
        """The same in memory of its own."""
        return Int4Weight(self.packed.clone(), self.scales.clone())

    def linear(self, x: Tensor) -> Tensor:
        """Multiply activations ``(tokens, in)``; returns ``(tokens, out)``."""
        name = "_weight_int4pack_mm_for_cpu" if x.device.type == "cpu" else "_weight_int4pack_mm"
        product: Tensor = getattr(torch.ops.aten, name)(x, self.packed, GROUP, self.scales)
        return product


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    """The weight ``(out, in)`` in float32 that such codes and scales stand for."""
    factor, zero = scales.float().permute(2, 1, 0)[..., None]  # (out, groups, 1) each
    groups = codes.unflatten(1, (-1, GROUP)).float() - 8  # (out, groups, 128)
    weight: Tensor = (groups * factor + zero).flatten(1)
    return weight
