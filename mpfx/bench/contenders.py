"""Ways to store and run one weight, each on more copies of it than a cache holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from mpfx.bench.int4 import GROUP, Int4Weight, dequantized
from mpfx.bench.timing import Call, copies, never_waiting
from mpfx.bench.weights import random_order, random_weight, stored_bits
from mpfx.nn import Layout, MixedPrecisionLinear, PackedWeight, filled
from mpfx.nn.kernels import reference

DENSE, INT4 = "F.linear", "int4"
_MOST_ERROR = 0.02  # of the result's norm; rounding to half precision costs some 0.003


@dataclass(frozen=True)
class Contender:
    """One way to store and run a weight.

    Attributes:
        name: for tables.
        bits: stored per weight.
        nbytes: of one copy of the weight.
        runs: one function per copy; takes activations ``(rows, in)``.
        exact: gives the result in float32 for activations in float32.
        optional: whether the others are measured if this one fails or is wrong.
    """

    name: str
    bits: float
    nbytes: int
    runs: Sequence[Callable[[Tensor], Tensor]]
    exact: Callable[[Tensor], Tensor]
    optional: bool = False

    def calls(self, x: Tensor) -> list[Call]:
        """A call per copy."""
        return [partial(run, x) for run in self.runs]

    def error(self, x: Tensor) -> float:
        """Norm of the difference from the exact result, relative to that result's norm.

        Raises:
            ArithmeticError: if it is so large that the kernel must be wrong.
            RuntimeError: if it cannot run, or not without waiting for the device, as in a CUDA graph.
        """
        exact = self.exact(x.float())
        found = float((self.runs[0](x).float() - exact).norm() / exact.norm())
        if not found <= _MOST_ERROR:
            raise ArithmeticError(f"{self.name}: relative error {found:.3g}, more than {_MOST_ERROR} from rounding.")
        with never_waiting(x.device):
            self.runs[0](x)  # the first call may have made tables
        return found


@dataclass(frozen=True)
class Stage:
    """One weight's sizes, and where it runs.

    Attributes:
        out_features: rows.
        in_features: channels.
        device: that runs it.
        dtype: of activations and dense weights.
        cache: bytes of the last-level cache.
    """

    out_features: int
    in_features: int
    device: torch.device
    dtype: torch.dtype
    cache: int

    @property
    def shape(self) -> str:
        """OUTxIN."""
        return f"{self.out_features}x{self.in_features}"

    def generator(self, seed: int = 0) -> torch.Generator:
        """A fresh one: every run has the same numbers."""
        return torch.Generator(self.device).manual_seed(seed)

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        """Normally distributed numbers."""
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=self.generator(seed))

    def copies(self, nbytes: int) -> range:
        """As long as there are copies of a weight of so many bytes."""
        return range(copies(nbytes, self.device, self.cache))

    def bits(self, nbytes: int) -> float:
        """Stored bits per weight."""
        return stored_bits(nbytes, self.out_features, self.in_features)


def dense(stage: Stage) -> Contender:
    """``F.linear`` on a dense weight."""
    weight = stage.random(stage.out_features, stage.in_features)
    weights = [weight.clone() for _ in stage.copies(weight.nbytes)]
    return Contender(
        DENSE,
        stage.bits(weight.nbytes),
        weight.nbytes,
        [partial(linear, weight=copy) for copy in weights],
        lambda x: linear(x, weight.float()),
    )


def torch_int4(stage: Stage) -> Contender:
    """The kernel for 4 bits that torch has for the device.

    Raises:
        RuntimeError: if it takes no weight of this size.
    """
    if stage.in_features % GROUP:
        raise RuntimeError(f"the channels are no multiple of {GROUP}")
    shape = (stage.out_features, stage.in_features)
    codes = torch.randint(16, shape, dtype=torch.int32, device=stage.device, generator=stage.generator())
    scales = stage.random(stage.in_features // GROUP, stage.out_features, 2) / 8
    weight = Int4Weight.of(codes, scales)
    weights = [weight.copy() for _ in stage.copies(weight.nbytes)]
    return Contender(
        INT4,
        stage.bits(weight.nbytes),
        weight.nbytes,
        [copy.linear for copy in weights],
        lambda x: linear(x, dequantized(codes, scales)),
        optional=True,
    )


def packed(name: str, layout: Layout, stage: Stage, sparsity: float | None = None, *, fill: bool = False) -> Contender:
    """The module of mpfx, with a permutation of its own.

    Args:
        name: for tables.
        layout: of the weight.
        stage: its sizes, and where it runs.
        sparsity: share of the weights that a bitmask prunes; None: no bitmask.
        fill: whether the bitmask is filled before; the result is still compared with that under the bitmask.
    """
    generator = stage.generator()
    order = random_order(stage.in_features, generator)
    weight = random_weight(layout, stage.out_features, generator, sparsity=sparsity)
    module = MixedPrecisionLinear(filled(weight) if fill else weight, permutation=order, dtype=stage.dtype)
    nbytes = module.packed.nbytes + order.nbytes
    modules = [_copy(module) for _ in stage.copies(nbytes)]
    exact = partial(reference, weight=weight, permutation=order, bias=None)
    return Contender(name, stage.bits(nbytes), nbytes, modules, exact, optional=sparsity is not None)


def _copy(module: MixedPrecisionLinear) -> MixedPrecisionLinear:
    parts = {name: None if part is None else part.clone() for name, part in module.packed.parts.items()}
    assert module.permutation is not None
    weight = PackedWeight.of(parts, module.layout)
    return MixedPrecisionLinear(weight, permutation=module.permutation.clone(), dtype=module.weight_dtype)
