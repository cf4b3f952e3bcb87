"""Statistics of the inputs of sites, taken while the model runs."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpfx.graph import (
    InputGroup,
    blocks,
    expert_modules,
    inputs_behind,
    last_readers,
    linear_weight,
    traced_module,
    watch_experts,
)
from mpfx.passes.locate import located, naming_sites
from mpfx.passes.ranks import ALONE, Ranks
from mpfx.passes.running import Runner
from mpfx.stats import ALL_SUMS, MomentAccumulator, Moments, Sensitivity, Sums, pooled, topped_up

Accumulators = dict[str, MomentAccumulator]


Masks = Mapping[str, Tensor]
"""``(batch, length)`` masks by the name of the model's input."""

_MASK, _DECODER = "attention_mask", "decoder_"


def padding_masks(values: Mapping[str, Any]) -> Masks:
    """Return the attention masks among a model's inputs.

    Padding tells nothing about the inputs that matter, so its tokens weigh nothing in the statistics.
    """
    found = {name: values.get(name) for name in (_MASK, _DECODER + _MASK)}
    return {name: mask for name, mask in found.items() if isinstance(mask, Tensor) and mask.dim() == 2}


def tokens_of(values: Mapping[str, Any]) -> int:
    """How many numbers a mean loss of one call is the mean of: tokens that are no padding, else samples.

    Args:
        values: inputs of the call.
    """
    first = next((t for t in pytree.tree_leaves(dict(values)) if isinstance(t, Tensor) and t.dim()), None)
    if first is None:
        return 1
    if first.dtype.is_floating_point or first.dim() < 2:
        return max(len(first), 1)
    mask = next((mask for mask in padding_masks(values).values() if mask.shape == first.shape), None)
    return max(first.numel() if mask is None else int(mask.sum()), 1)


@dataclass
class Reading:
    """What goes along with the batch that is running; every call of a group's sites takes the next entries.

    Attributes:
        masks: padding.
        weights: of the tokens in the Hessians, ``(tokens,)`` for every call, by group.
        references: what the group reads in another model, for every call, by group.
        paused: this run is not to be observed.
        amiss: groups that read other tokens than weights or references were gathered for, which were left away then:
            their calls depend on the values (a router that sends tokens to one expert or another).
    """

    masks: Masks = field(default_factory=dict)
    weights: dict[str, list[Tensor]] = field(default_factory=dict)
    references: dict[str, list[Tensor]] = field(default_factory=dict)
    paused: bool = False
    amiss: set[str] = field(default_factory=set)

    def next_weights(self, name: str, x: Tensor) -> Tensor | None:
        """Weights of the tokens that a group reads now; None: all alike."""
        return self._next(self.weights, name, x.numel() // x.shape[-1])

    def next_reference(self, name: str, x: Tensor) -> Tensor | None:
        """What the group reads in the other model now, of the shape of x; None: not known."""
        found = self._next(self.references, name, x.numel())
        return None if found is None else found.view(x.shape)

    def _next(self, queues: Mapping[str, list[Tensor]], name: str, numel: int) -> Tensor | None:
        if name not in queues:
            return None
        found = queues[name].pop(0) if queues[name] else None
        if found is not None and found.numel() == numel:
            return found
        self.amiss.add(name)
        return None


_SHARE_OF_MEAN = 0.01
"""An expert that the loss hardly saw counts at least so much of what its stack's experts count on average."""

_HERE = Runner()

_TINY = 1e-30
"""Stands for a gradient of zero: such tokens count as tokens, only padding does not."""


@dataclass(frozen=True)
class Sensed:
    """How the loss feels the outputs of a model's sites.

    Attributes:
        sensitivities: by name of the input group, of linear layers.
        gradients: squared norm of the gradient of every expert's weight, by path of the site.
    """

    sensitivities: Mapping[str, Sensitivity] = field(default_factory=dict)
    gradients: Mapping[str, float] = field(default_factory=dict)

    def of(self, batches: Sequence[int], share: float) -> "Sensed":
        """What some of the batches told; in the unit of all.

        Args:
            batches: numbers of those of this process.
            share: that they, and those of other processes, are of all.
        """
        return Sensed(
            {n: replace(s, batches=tuple(s.batches[i] for i in batches)) for n, s in self.sensitivities.items()},
            {path: gradient * share for path, gradient in self.gradients.items()},
        )

    def weights(self, groups: Sequence[InputGroup], batch: int) -> dict[str, list[Tensor]]:
        """Weights of the tokens that groups read in one batch, relative to their mean."""
        known = {g.name: self.sensitivities[g.name] for g in groups if g.name in self.sensitivities}
        return {name: [call.clamp(min=_TINY) for call in found.weights(batch, 1.0)] for name, found in known.items()}

    def applied(
        self, found: Iterable[tuple[InputGroup, Moments]], tokens: Mapping[str, int]
    ) -> Iterator[tuple[InputGroup, Moments]]:
        """Bring Hessians of weighted tokens, one block's, to the unit of the loss.

        Experts in one parameter, whose outputs nobody hands over, are judged by the gradient of their weights:
        ``|dL/dW_e|^2`` over the squares of what expert e read estimates the squared gradient at its outputs.

        Args:
            found: the moments of the groups.
            tokens: that groups saw themselves, by name; none for experts that take the statistics of all.
        """
        experts: list[tuple[InputGroup, Moments]] = []
        for group, moments in found:
            if group.sites[0].stack is not None:
                experts.append((group, moments))
            else:
                moments.hessian.mul_(self.sensitivities[group.name].mean)
                yield group, moments
        means: dict[Any, list[float]] = defaultdict(list)
        for group, moments in experts:
            means[group.sites[0].stack].append(self._mean(group, moments))
        for group, moments in experts:
            others = means[group.sites[0].stack]
            count = group.sites[0].stack.experts  # type: ignore[union-attr]
            mean = max(self._mean(group, moments), _SHARE_OF_MEAN * sum(others) / count)
            if not tokens.get(group.name):  # it takes the statistics of all experts, but not their weight
                mean /= count
            yield group, replace(moments, hessian=moments.hessian * mean)  # several may share one

    def _mean(self, group: InputGroup, moments: Moments) -> float:
        """Of the squared gradient at the outputs of an expert."""
        squares = float(moments.hessian.diagonal().double().sum()) * moments.tokens / 2
        return self.gradients.get(group.sites[0].path, 0.0) / max(squares * group.sites[0].out_features, 1e-300)


@contextmanager
def observed(
    gm: fx.GraphModule,
    groups: Sequence[InputGroup],
    reading: Callable[[], Reading] = Reading,
    weigh: "Weigh | None" = None,
    taken: Sums = ALL_SUMS,
) -> Iterator[Accumulators]:
    """Accumulate the moments of every group's input while the context is open; leaves no hook behind.

    Args:
        gm: traced module; model or graph may then run.
        groups: to observe, each at its first site; experts with the tokens that are routed to them.
        reading: called for every input; returns what belongs to the current batch. Padding of inputs of another
            number of tokens (one expert's share) counts in full.
        weigh: :func:`token_weights` of these groups and others, where it is at hand.
        taken: which sums.
    """
    moments: Accumulators = {}
    weigh = token_weights(gm, groups) if weigh is None else weigh

    def add(name: str, x: Tensor) -> None:
        now = reading()
        if now.paused:
            return
        if name not in moments:
            moments[name] = MomentAccumulator(x.shape[-1], x.device, taken)
        weights = weigh(name, x, now.masks, now.next_weights(name, x))
        with torch.autocast(x.device.type, enabled=False):  # sums are float32 whatever the model computes in
            moments[name].update(x, weights, now.next_reference(name, x))

    with inputs_read(gm, groups, add):
        yield moments


Weigh = Callable[[str, Tensor, Masks, Tensor | None], Tensor | None]


def token_weights(gm: fx.GraphModule, groups: Sequence[InputGroup]) -> Weigh:
    """Return what makes the weights of the tokens of an input, out of the padding masks and weights of its own."""
    behind = inputs_behind(gm)
    mask_of = {group.name: _mask_name(behind[group.sites[0].path]) for group in groups}

    def weigh(name: str, x: Tensor, masks: Masks, weights: Tensor | None) -> Tensor | None:
        tokens = x.numel() // x.shape[-1]
        mask = masks.get(mask_of[name])
        if mask is not None and mask.numel() != tokens:
            mask = None
        if weights is None:
            return mask
        return weights if mask is None else weights.to(mask.device) * mask.flatten()

    return weigh


@contextmanager
def inputs_read(gm: fx.GraphModule, groups: Sequence[InputGroup], add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand on every input that a group reads, with the group's name, while the context is open."""
    model = traced_module(gm)
    with ExitStack() as hooks:
        for group in groups:
            if group.sites[0].stack is None:
                module = model.get_submodule(group.sites[0].path)
                handle = module.register_forward_pre_hook(_reader(group.name, add), with_kwargs=True)
                hooks.callback(handle.remove)
        wanted = {group.name for group in groups}
        for path in dict.fromkeys(s.module for group in groups for s in group.sites if s.stack is not None):
            facts = expert_modules(gm)[path]
            hooks.enter_context(watch_experts(model.get_submodule(path), facts, _sink(path, wanted, add)))
        yield


@contextmanager
def outputs_left_away(gm: fx.GraphModule, paths: Iterable[str]) -> Iterator[None]:
    """Inside, some linear layers return zeros: what they read is observed, and nobody needs what they make."""
    model = traced_module(gm)
    modules = [model.get_submodule(path) for path in paths]
    idle = [module for module in modules if "forward" not in vars(module) and not module._forward_hooks]
    try:
        for module in idle:
            rows = linear_weight(module).shape[0]
            module.forward = partial(_zeros, rows)
        yield
    finally:
        for module in idle:
            del module.forward


def _zeros(rows: int, x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], rows)


def _mask_name(inputs: frozenset[str]) -> str:
    """Which mask belongs to what depends on these inputs: what the decoder's tokens take part in is as long as they."""
    return _DECODER + _MASK if any(name.startswith(_DECODER) for name in inputs) else _MASK


def _reader(name: str, add: Callable[[str, Tensor], None]) -> Callable[..., None]:
    """A forward pre-hook that hands on what a linear layer reads."""

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        add(name, argument(args, kwargs))

    return hook


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The one argument of a linear layer."""
    read: Tensor = args[0] if args else next(iter(kwargs.values()))
    return read


def _sink(path: str, wanted: set[str], add: Callable[[str, Tensor], None]) -> Callable[[str, int, Tensor], None]:
    """Takes what one expert reads."""

    def sink(parameter: str, index: int, x: Tensor) -> None:
        name = f"{path}.{parameter}.{index}"
        if name in wanted and x.shape[0]:
            add(name, x)

    return sink


def dense_moments(
    gm: fx.GraphModule,
    batches: Sequence[Mapping[str, Any]],
    runner: Runner = _HERE,
    sensed: Sensed | None = None,
    ranks: Ranks = ALONE,
    taken: Sums = ALL_SUMS,
) -> Iterator[tuple[str, Moments]]:
    """Observe what every located input group reads in the model as it is, block after block.

    Memory is taken by the values between two blocks and by the statistics of one block; those who iterate have to be
    done with a block's statistics before they ask for the next.

    Args:
        gm: traced and analysed.
        batches: inputs of the traced call, one dict a batch.
        runner: how blocks run.
        sensed: by how much the loss feels the outputs, for the same batches: Hessians are then ``2/n sum_t c_t x_t
            x_t^T`` with c the mean squared gradient of the loss. None: all tokens count alike.
        ranks: the processes, each with batches of its own; all have to iterate to the end.
        taken: which sums.

    Yields:
        Name and statistics of the groups that were called, while their block lies on the device. Of several processes,
        each gets those of some groups of every block, in the batches of all.
    """
    groups, parts = groups_of_blocks(gm), blocks(gm)
    parts = parts[: max(index for index, found in enumerate(groups) if found) + 1]
    readers, masks = last_readers(parts), [padding_masks(batch) for batch in batches]
    streams, reading = [runner.kept(runner.fetched(batch)) for batch in batches], [Reading()]
    weigh = token_weights(gm, located(gm))
    with runner.placed(parts) as placed:
        for block in placed:
            here = groups[block.index]
            with observed(gm, here, lambda: reading[0], weigh, taken) as seen:
                for index, values in enumerate(streams):
                    weights = {} if sensed is None else sensed.weights(here, index)
                    reading[0] = Reading(masks[index], weights)
                    streams[index] = runner.kept(runner.run(block, values, readers))
            own = ranks.summed(seen, here)
            tokens = {name: accumulator.tokens for name, accumulator in seen.items()}
            found = ((group, moments) for group, moments, _ in finalised(seen, own) if moments is not None)
            yield from ((g.name, m) for g, m in (found if sensed is None else sensed.applied(found, tokens)))


def groups_of_blocks(gm: fx.GraphModule) -> list[list[InputGroup]]:
    """The located input groups of every block, in graph order."""
    block_of = {path: block.index for block in blocks(gm) for path in block.sites}
    found: list[list[InputGroup]] = [[] for _ in blocks(gm)]
    for group in located(gm):
        found[block_of[group.sites[0].path]].append(group)
    return found


def finalised(
    accumulators: MutableMapping[str, MomentAccumulator], groups: Sequence[InputGroup]
) -> Iterator[tuple[InputGroup, Moments | None, str | None]]:
    """Take the statistics out of their accumulators, one group at a time, as Hessians are large.

    An expert that saw fewer tokens than it has input channels is topped up with those of all experts of its stack.

    Args:
        accumulators: by name of the group; emptied.
        groups: to hand over.

    Yields:
        The group, its moments (None: it was never called), and what had to be done about too few tokens.

    Raises:
        ValueError: naming the sites, if all tokens were padding.
    """
    stacks: dict[Any, list[InputGroup]] = defaultdict(list)
    for group in groups:
        stacks[group.sites[0].stack or group.name].append(group)
    for members in stacks.values():
        pool = _pool([accumulators[group.name] for group in members if group.name in accumulators], members)
        for group in members:
            with naming_sites(group):
                moments, note = _taken(accumulators.pop(group.name, None), pool, group.sites[0].in_features)
            yield group, moments, note


def _pool(seen: Sequence[MomentAccumulator], members: Sequence[InputGroup]) -> Moments | None:
    """What all experts of a stack saw; None: these are no experts, or nothing was seen."""
    return pooled(seen).finalise() if seen and members[0].sites[0].stack is not None else None


def _taken(
    accumulator: MomentAccumulator | None, pool: Moments | None, needed: int
) -> tuple[Moments | None, str | None]:
    if pool is None:
        return (None if accumulator is None else accumulator.finalise()), None
    if accumulator is not None and accumulator.tokens >= needed:
        return accumulator.finalise(), None
    return topped_up(accumulator.finalise() if accumulator and accumulator.tokens else None, pool, needed)
