"""Sensitivities of the loss: a backward pass over the calibration batches, weights frozen."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpfx.graph import InputGroup, traced_module
from mpfx.passes.observe import Accumulators, Masks, Reading, argument, finalised, observed, token_weights
from mpfx.passes.ranks import ALONE, Ranks
from mpfx.stats import MomentAccumulator, Moments, Sensitivity

_SHARE_OF_MEAN = 0.01
"""An expert that the loss hardly saw counts at least so much of what its stack's experts count on average."""

_TINY = 1e-30
"""Stands for a gradient of zero."""


@dataclass
class _Call:
    """One reading of a group's input: the squared gradients at the outputs of its sites add up here."""

    x: Tensor
    version: int
    squares: Tensor
    heard: bool

    @property
    def changed(self) -> bool:
        """Whether the input was written to since it was read."""
        return self.x._version != self.version


class Sensing:
    """Gathers sensitivities, and the Hessians that they weigh ("guided" ones), batch by batch.

    Every site's output is made to require a gradient, so nothing else has to: parameters are frozen meanwhile, and
    the model may be checkpointed. Experts in one parameter, whose outputs nobody hands over, are judged by the
    gradient of their weights: ``|dL/dW_e|^2`` over the squares of what expert e read estimates the squared gradient at
    its outputs.

    Args:
        gm: traced module.
        groups: to gather for.
    """

    def __init__(self, gm: fx.GraphModule, groups: Sequence[InputGroup]) -> None:
        self._gm = gm
        self._linear = [group for group in groups if group.sites[0].stack is None]
        self._experts = [group for group in groups if group.sites[0].stack is not None]
        self._moments: Accumulators = {}
        self._expert_moments: Accumulators = {}
        self._batches: dict[str, list[list[Tensor]]] = {group.name: [] for group in self._linear}
        self._gradients: dict[str, float] = defaultdict(float)
        self._overwritten: set[str] | None = None
        self._weigh = token_weights(gm, groups)

    def batch(
        self,
        loss: Callable[[], Tensor],
        masks: Masks,
        root: nn.Module | None = None,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Run one batch forward and backward.

        Args:
            loss: runs the model and returns a differentiable scalar.
            masks: padding of the batch.
            root: what the loss runs, if it is more than the traced module: its parameters gather no gradient.
            around: entered around every run of the loss, so that all runs see the same random numbers.

        Raises:
            ValueError: if the loss cannot be differentiated, or it or its gradient is not finite.
        """
        with around():
            calls = self._run(loss, masks, root)
        if calls is None:  # the first batch told which inputs have to be copied
            self._expert_moments.clear()
            with around():
                calls = self._run(loss, masks, root)
        assert calls is not None
        for name, found in calls.items():
            if any(call.changed for call in found):
                raise ValueError(
                    f"the input of group {name} is written to in place after it was read, in some batches only: write "
                    "`h = h + y` instead of `h += y` there, or set `guidance: 0`."
                )
            for call in found:
                self._add(name, call, masks)
            self._batches[name].append([call.squares.cpu() for call in found])
            found.clear()  # a step that keeps its loss keeps the hooks too: not the inputs

    def _run(self, loss: Callable[[], Tensor], masks: Masks, root: nn.Module | None) -> dict[str, list[_Call]] | None:
        """One run forward and backward.

        Returns:
            What every group read, with the squared gradients; None if the first run found inputs that the model writes
            to after they were read.
        """
        calls: dict[str, list[_Call]] = {group.name: [] for group in self._linear}
        with torch.inference_mode(False), torch.enable_grad(), _deterministic(), self._hooked(calls, masks, root):
            value = loss()
            _check_loss(value)
            if self._overwritten is None:
                self._overwritten = {name for name, found in calls.items() if any(call.changed for call in found)}
                if self._overwritten:
                    return None
            before = {name: len(found) for name, found in calls.items()}
            value.backward()
        # Checkpoints run parts again during the backward pass, some of them beside the graph.
        real = {n: [c for i, c in enumerate(found) if i < before[n] or c.heard] for n, found in calls.items()}
        for name, found in real.items():
            if not all(bool(torch.isfinite(call.squares).all()) for call in found):
                raise ValueError(
                    f"the gradient of the loss at the outputs of group {name} is not finite: look at the data of this "
                    "batch, and at the compute precision (float16 overflows where bfloat16 and float32 do not)."
                )
        return real

    def finalise(self, ranks: Ranks = ALONE) -> tuple[dict[str, Moments], dict[str, Sensitivity]]:
        """Hand over the guided moments and the sensitivities by name of the group; keeps none, as they are large.

        The moments' Hessians are ``2/n sum_t c_t x_t x_t^T`` with c the mean squared gradient of the loss as given.

        Args:
            ranks: that share the batches: all get sensitivities of their own batches, each the moments of its groups.
        """
        linear = ranks.summed(self._moments, self._linear)
        moments = {g.name: m for g, m, _ in finalised(self._moments, linear) if m is not None}
        moments.update(self._finalised_experts(ranks))
        own = {name: Sensitivity.of(batches) for name, batches in self._batches.items()}
        self._batches.clear()
        sums = ranks.gathered(lambda: {name: replace(found, batches=()) for name, found in own.items()})
        found = {name: sensitivity.among([part[name] for part in sums]) for name, sensitivity in own.items()}
        if idle := [name for name, sensitivity in found.items() if not sensitivity.mean > 0]:
            raise ValueError(
                f"the loss does not depend on what sites {idle[:8]} put out, so nobody can tell how few bits they can "
                "do with: leave them dense (`scope.exclude`), hand over a loss that depends on them, or set "
                "`guidance: 0`."
            )
        return moments, found

    def _add(self, name: str, call: _Call, masks: Masks) -> None:
        if name not in self._moments:
            self._moments[name] = MomentAccumulator(call.x.shape[-1], call.x.device)
        with torch.autocast(call.x.device.type, enabled=False):
            # Tokens without a gradient count as tokens, only padding does not.
            self._moments[name].update(call.x, self._weigh(name, call.x, masks, call.squares.clamp(min=_TINY)))

    def _finalised_experts(self, ranks: Ranks) -> dict[str, Moments]:
        experts = ranks.summed(self._expert_moments, self._experts)
        seen, gradients = set(self._expert_moments), ranks.gathered(lambda: dict(self._gradients))
        moments = {g.name: m for g, m, _ in finalised(self._expert_moments, experts) if m is not None}
        means: dict[str, float] = {}
        for group in experts:
            if group.name in moments:
                site, read = group.sites[0], moments[group.name]
                squares = float(read.mean_square.double().sum()) * read.tokens
                gradient = sum(part.get(site.path, 0.0) for part in gradients)
                means[group.name] = gradient / max(squares * site.out_features, 1e-300)
        stacks: dict[Any, list[float]] = defaultdict(list)
        for group in experts:
            stacks[group.sites[0].stack].append(means.get(group.name, 0.0))
        for group in experts:
            if group.name in moments:
                others = stacks[group.sites[0].stack]
                mean = max(means[group.name], _SHARE_OF_MEAN * sum(others) / len(others))
                if group.name not in seen:  # it takes the statistics of all experts, but not their weight
                    mean /= len(others)
                moments[group.name] = replace(moments[group.name], hessian=moments[group.name].hessian * mean)
        return moments

    @contextmanager
    def _hooked(self, calls: dict[str, list[_Call]], masks: Masks, root: nn.Module | None) -> Iterator[None]:
        model = traced_module(self._gm)
        with ExitStack() as stack:
            stack.enter_context(_frozen(model if root is None else root))
            for module in model.modules():
                if isinstance(module, nn.Embedding):  # what reentrant checkpoints ask for
                    stack.callback(module.register_forward_hook(_requiring_gradient).remove)
            for group in self._linear:
                rows = sum(site.out_features for site in group.sites)
                for site in group.sites:
                    copied = self._overwritten is not None and group.name in self._overwritten
                    hook = _site_hook(calls[group.name], rows, copied)
                    module = model.get_submodule(site.path)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            if self._experts:
                seen = stack.enter_context(observed(self._gm, self._experts, lambda: Reading(masks)))
                stack.callback(self._merge_experts, seen)
                self._listen_to_experts(model, stack)
            yield

    def _merge_experts(self, seen: Accumulators) -> None:
        for name, accumulator in seen.items():
            if name in self._expert_moments:
                self._expert_moments[name].merge(accumulator)
            else:
                self._expert_moments[name] = accumulator

    def _listen_to_experts(self, model: nn.Module, stack: ExitStack) -> None:
        parameters = {id(s.parameter(model)): s.parameter(model) for g in self._experts for s in g.sites}
        sites = [site for group in self._experts for site in group.sites]

        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            for site in sites:
                if site.parameter(model) is parameter:
                    self._gradients[site.path] += float(parameter.grad[site.index].double().square().sum())
            parameter.grad = None

        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None  # what the user has there is back when all is done
            stack.callback(parameter.register_post_accumulate_grad_hook(take).remove)


def _site_hook(calls: list[_Call], rows: int, copied: bool) -> Callable[..., Tensor | None]:
    """A forward hook of one site: its k-th call takes part in the k-th reading of its group."""
    count = 0

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
        nonlocal count
        if not torch.is_grad_enabled():  # a checkpoint's first run
            return None
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()  # a leaf could not be written to in place
        if count == len(calls):
            x = argument(args, kwargs).detach()
            x = x.clone() if copied else x
            squares = x.new_zeros(x.numel() // x.shape[-1], dtype=torch.float32)
            calls.append(_Call(x, x._version, squares, False))
        call = calls[count]
        count += 1

        def take(gradient: Tensor) -> None:
            call.squares += gradient.flatten(0, -2).float().square().sum(-1) / rows
            call.heard = True

        output.register_hook(take)
        return output

    return hook


def _requiring_gradient(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output if output.requires_grad or not torch.is_grad_enabled() else output.detach().requires_grad_().clone()


def _check_loss(value: Any) -> None:
    if isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad:
        if not bool(torch.isfinite(value)):
            raise ValueError(
                f"the loss is {float(value.detach())}: look at the data of this batch, and at the compute precision "
                "(float16 overflows where bfloat16 and float32 do not)."
            )
        return
    found = type(value).__name__
    if isinstance(value, Tensor):
        found = f"a tensor of shape {tuple(value.shape)} that {'does' if value.requires_grad else 'does not'} depend"
        found += " on the outputs of the sites in a differentiable way"
    raise ValueError(
        "Expected a differentiable scalar loss, whose gradient says what the model's outputs mean to it, but got "
        f"{found}: return the loss from `validation_step`, hand a function over as `ModelCompression(..., loss=...)`, "
        "or set `guidance: 0` to compress without it."
    )


@contextmanager
def _deterministic() -> Iterator[None]:
    """The backward pass of attention adds up in another order at every run, on GPUs, unless asked not to."""
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)  # what knows no other way runs as it does
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warned)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gathers a gradient; buffers made in inference mode are replaced by such that autograd may save."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    grads = [(p, p.grad) for p in model.parameters()]
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_inference():
                module._buffers[name] = buffer.clone()
    try:
        model.requires_grad_(False)
        yield
    finally:
        model.requires_grad_(False)
        for parameter in wanted:
            parameter.requires_grad_(True)
        for parameter, grad in grads:
            parameter.grad = grad
