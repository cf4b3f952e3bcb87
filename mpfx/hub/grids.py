"""Packed weights as other formats see them: codes on the grids of blocks of neighbouring channels."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from mpfx.hub.contents import Packed, collect, packed_sites
from mpfx.hub.manifest import RESERVED, inside
from mpfx.nn import LEFT_OUT, RAW_BITS, MixedPrecisionLinear, decoded, own_order, unpack

NATURAL = "--order natural --optimal.uniform true"
"""What makes the channels of every site stay where the model has them."""

_SHOWN = 3


@dataclass(frozen=True)
class Problem:
    """Why a format cannot hold a site.

    Attributes:
        site: path.
        has: what the site is.
        holds: what the format holds instead.
        setting: options of ``mpfx compress`` that make it so.
    """

    site: str
    has: str
    holds: str
    setting: str


def refuse(problems: Iterable[Problem], target: str) -> None:
    """Refuse a model that a format cannot hold.

    Args:
        problems: all that there are; none: nothing happens.
        target: name of the format.

    Raises:
        ValueError: naming the first sites of every kind of problem, and the setting that avoids it.
    """
    kinds: dict[tuple[str, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        kinds[problem.holds, problem.setting].append(problem)
    if not kinds:
        return
    lines = []
    for (holds, setting), found in kinds.items():
        shown = "; ".join(f"{problem.site} {problem.has}" for problem in found[:_SHOWN])
        more = f"; and {len(found) - _SHOWN} more sites" if len(found) > _SHOWN else ""
        lines.append(f"expected {holds} but {shown}{more}: compress with `{setting}`.")
    raise ValueError(f"{target} cannot hold this plan: " + " Also ".join(lines))


@dataclass(frozen=True)
class GridWeight:
    """One weight of one width, ``(codes - zeros[:, group]) * scales[:, group]``, channels in the model's own order.

    Attributes:
        codes: int32 ``(out, in)`` in ``0 .. 2**bits - 1``; what is pruned or left out is its group's zero point.
        scales: float32 ``(out, groups)``, 0 for groups that are left out.
        zeros: int32 ``(out, groups)``.
        group: int64 ``(in,)``: the group of every channel.
        bits: width of the codes.
        symmetric: whether all zero points are ``2**(bits - 1)``.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group: Tensor
    bits: int
    symmetric: bool

    @classmethod
    def of(cls, module: MixedPrecisionLinear) -> Self:
        """Unpack a layer whose codes are all of one width."""
        weight, layout, bits = unpack(module.packed), module.layout, width(module)
        quantized = [g for g, group in enumerate(layout.groups) if group.quantized]
        shape = (len(weight.codes), len(layout.groups))
        scales = torch.zeros(shape, device=weight.codes.device)
        scales[:, quantized] = decoded(weight.scales, layout)
        zeros = torch.full(shape, 1 << bits - 1, dtype=torch.int32, device=scales.device)
        if weight.zeros is not None:
            zeros[:, quantized] = weight.zeros.int()
        group = _groups(module, reordered=False).to(scales.device)
        stored = scales.new_tensor([g.quantized for g in layout.groups], dtype=torch.bool)[group].expand_as(
            weight.codes
        )
        kept = stored if weight.kept is None else weight.kept & stored
        codes = torch.where(kept, weight.codes, zeros[:, group])
        own = None if module.permutation is None else module.permutation.long()
        return cls(
            codes=own_order(codes, own),
            scales=scales,
            zeros=zeros,
            group=own_order(group[None], own)[0],
            bits=bits,
            symmetric=weight.zeros is None,
        )

    def blocks(self, size: int) -> tuple[Tensor, Tensor]:
        """Scales and zero points of every ``size`` neighbouring channels, ``(out, in / size)`` each.

        Args:
            size: divides :func:`block_size` of the layer.
        """
        first = self.group[::size]
        return self.scales[:, first], self.zeros[:, first]


def width(module: MixedPrecisionLinear) -> int:
    """Width of the codes of a layer, which has only one; 1 if all of it is left out."""
    return max(*module.layout.widths, 1)


def is_raw(module: MixedPrecisionLinear) -> bool:
    """Whether the weights of a layer are float16 values: nothing but channels that are raw or left out."""
    return {RAW_BITS} == set(module.layout.widths) - {LEFT_OUT}


def block_size(module: MixedPrecisionLinear, *, reordered: bool = True) -> int:
    """Most neighbouring channels that share a scale everywhere in a layer, in blocks of equal size.

    Args:
        module: the layer.
        reordered: neighbours in the model's own order; else in the order they are stored in.
    """
    group = _groups(module, reordered=reordered)
    starts = (group[1:] != group[:-1]).nonzero()[:, 0] + 1
    return gcd(module.in_features, *starts.tolist())


def _groups(module: MixedPrecisionLinear, *, reordered: bool) -> Tensor:
    """The group of every channel, ``(in,)``."""
    sizes = torch.tensor([group.channels for group in module.layout.groups])
    group = torch.arange(len(sizes)).repeat_interleave(sizes)
    if not reordered or module.permutation is None:
        return group
    return own_order(group[None], module.permutation.cpu().long())[0]


def common_problems(sites: Mapping[str, Packed], blocks: int) -> Iterator[Problem]:
    """What no other format holds.

    Args:
        sites: packed modules by path.
        blocks: fewest neighbouring channels that have to share a scale.
    """
    for path, module in sites.items():
        if not isinstance(module, MixedPrecisionLinear):
            has, setting = "is the experts of a layer in one parameter", "--scope.kinds [linear]"
            yield Problem(path, has, "Linear layers", setting)
        elif len(widths := sorted({*module.layout.widths} - {LEFT_OUT})) > 1:
            listed = ", ".join(map(str, widths))
            yield Problem(path, f"has widths {listed}", "one width for all channels of a site", NATURAL)
        elif not is_raw(module) and block_size(module) < min(blocks, block_size(module, reordered=False)):
            holds = "neighbouring channels to share a scale"
            yield Problem(path, "stores its channels in another order", holds, NATURAL)


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's state dict but its packed weights; tensors that share memory once, under the first name."""
    sites = dict(packed_sites(model))
    tensors, _ = collect(model, sites, Path())
    below = inside(sites)
    kept = {n: t for n, t in tensors.items() if n.endswith(".bias") or not n.startswith((*below, RESERVED))}
    weights = {f"{path}.weight": m.weight for path, m in _layers(sites, raw=True)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in {**kept, **weights}.items()}


def grid_layers(model: nn.Module) -> dict[str, MixedPrecisionLinear]:
    """The layers of a model that have codes, by path."""
    return dict(_layers(dict(packed_sites(model)), raw=False))


def _layers(sites: Mapping[str, Packed], *, raw: bool) -> Iterator[tuple[str, MixedPrecisionLinear]]:
    for path, module in sites.items():
        if isinstance(module, MixedPrecisionLinear) and is_raw(module) == raw:
            yield path, module
