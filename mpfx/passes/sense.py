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
from mpfx.passes.observe import Sensed, argument
from mpfx.passes.ranks import ALONE, Ranks
from mpfx.stats import Sensitivity

_TOGETHER = 64  # batches' gradients that wait on the device at most: a few numbers a token


@dataclass
class Call:
    """One reading of a group's input: the squared gradients at the outputs of its sites add up here."""

    squares: Tensor
    heard: bool = False


class Sensing:
    """Gathers sensitivities batch by batch.

    Every site's output is made to require a gradient, so nothing else has to: parameters are frozen meanwhile, and
    the model may be checkpointed. Of experts in one parameter, whose outputs nobody hands over, the gradients of
    their weights are gathered (see :class:`mpfx.passes.observe.Sensed`).

    Args:
        gm: traced module.
        groups: to gather for.
    """

    def __init__(self, gm: fx.GraphModule, groups: Sequence[InputGroup]) -> None:
        self._gm = gm
        self._groups = groups
        self._batches: dict[str, list[list[Tensor]]] = {g.name: [] for g in groups if g.sites[0].stack is None}
        self._gradients: dict[str, float] = defaultdict(float)
        self._taken: list[tuple[dict[str, list[int]], Tensor | None]] = []

    def batch(
        self,
        loss: Callable[[], Tensor],
        root: nn.Module | None = None,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Run one batch forward and backward.

        Args:
            loss: runs the model and returns a differentiable scalar.
            root: what the loss runs, if it is more than the traced module: its parameters gather no gradient.
            around: entered around the run, so that it sees the same random numbers as another.

        Raises:
            ValueError: if the loss cannot be differentiated, or it or its gradient is not finite.
        """
        calls: dict[str, list[Call]] = {name: [] for name in self._batches}
        model = traced_module(self._gm) if root is None else root
        with around(), differentiating(model), _embeddings_requiring_gradients(model), self.listening(calls):
            value = loss()
            check_loss(value)
            before = {name: len(found) for name, found in calls.items()}
            value.backward()
        # Checkpoints run parts again during the backward pass, some of them beside the graph.
        self.take({n: [c for i, c in enumerate(found) if i < before[n] or c.heard] for n, found in calls.items()})
        self.fetch()

    def take(self, calls: Mapping[str, Sequence[Call]]) -> None:
        """Take in what was heard of one batch; it is looked at some time later, as the device is waited for then.

        Raises:
            ValueError: if a gradient is not finite, of this batch or one before.
        """
        heard = [call.squares for found in calls.values() for call in found]
        sizes = {name: [len(call.squares) for call in found] for name, found in calls.items()}
        self._taken.append((sizes, torch.cat(heard) if heard else None))
        if len(self._taken) >= _TOGETHER:
            self.fetch()

    def fetch(self) -> None:
        """Bring what was taken to the host.

        Raises:
            ValueError: if a gradient is not finite.
        """
        for sizes, squares in self._taken:
            counts = [count for found in sizes.values() for count in found]
            host = iter(() if squares is None else squares.cpu().split(counts))
            for name, found in sizes.items():
                self._batches[name].append(self._finite(name, [next(host) for _ in found]))
        self._taken.clear()

    def _finite(self, name: str, squares: list[Tensor]) -> list[Tensor]:
        if not all(bool(torch.isfinite(call).all()) for call in squares):
            raise ValueError(
                f"the gradient of the loss at the outputs of group {name} is not finite in batch "
                f"{len(self._batches[name])}, counted from 0: look at the data of this batch, and at the compute "
                "precision (float16 overflows where bfloat16 and float32 do not)."
            )
        return squares

    def finalise(self, ranks: Ranks = ALONE) -> Sensed:
        """Hand over what was gathered; keeps none.

        Args:
            ranks: that share the batches: each gets the sensitivities of its own ones, as part of all.

        Raises:
            ValueError: if the loss does not depend on what some sites put out, or a gradient is not finite.
        """
        self.fetch()
        own = {name: Sensitivity.of(batches) for name, batches in self._batches.items()}
        self._batches.clear()
        parts = ranks.gathered(lambda: ({name: replace(o, batches=()) for name, o in own.items()}, self._gradients))
        found = {name: sensitivity.among([sums[name] for sums, _ in parts]) for name, sensitivity in own.items()}
        paths = dict.fromkeys(path for _, part in parts for path in part)
        gradients = {path: sum(part.get(path, 0.0) for _, part in parts) for path in paths}
        if idle := [name for name, sensitivity in found.items() if not sensitivity.mean > 0]:
            raise ValueError(
                f"the loss does not depend on what sites {idle[:8]} put out, so nobody can tell how few bits they can "
                "do with: leave them dense (`scope.exclude`), hand over a loss that depends on them, or set "
                "`guidance: 0`."
            )
        return Sensed(found, gradients)

    @contextmanager
    def listening(self, calls: dict[str, list[Call]], groups: Sequence[InputGroup] | None = None) -> Iterator[None]:
        """Inside, runs of the model forward and backward add to the calls, by name of the group.

        Args:
            calls: an empty list for every group of linear layers that is listened to.
            groups: that are; None: all.
        """
        model = traced_module(self._gm)
        with ExitStack() as stack:
            for group in self._groups if groups is None else groups:
                if group.sites[0].stack is None:
                    rows = sum(site.out_features for site in group.sites)
                    for site in group.sites:
                        hook = _site_hook(calls[group.name], rows)
                        module = model.get_submodule(site.path)
                        stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            experts = [g for g in (self._groups if groups is None else groups) if g.sites[0].stack is not None]
            self._listen_to_experts(model, experts, stack)
            yield

    def _listen_to_experts(self, model: nn.Module, experts: Sequence[InputGroup], stack: ExitStack) -> None:
        parameters = {id(s.parameter(model)): s.parameter(model) for group in experts for s in group.sites}
        sites = [site for group in experts for site in group.sites]

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


def _site_hook(calls: list[Call], rows: int) -> Callable[..., Tensor | None]:
    """A forward hook of one site: its k-th call takes part in the k-th reading of its group."""
    count = 0

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
        nonlocal count
        if not torch.is_grad_enabled():  # a checkpoint's first run
            return None
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()  # a leaf could not be written to in place
        if count == len(calls):
            x = argument(args, kwargs)
            calls.append(Call(x.new_zeros(x.numel() // x.shape[-1], dtype=torch.float32)))
        call = calls[count]
        count += 1

        def take(gradient: Tensor) -> None:
            norms = torch.linalg.vector_norm(gradient.flatten(0, -2), dim=-1, dtype=torch.float32)
            call.squares += norms.square_() / rows
            call.heard = True

        output.register_hook(take)
        return output

    return hook


def _requiring_gradient(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output if output.requires_grad or not torch.is_grad_enabled() else output.detach().requires_grad_().clone()


def check_loss(value: Any) -> None:
    """Refuse what is no finite, differentiable scalar."""
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
def _embeddings_requiring_gradients(model: nn.Module) -> Iterator[None]:
    """What reentrant checkpoints ask for."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(_requiring_gradient).remove)
        yield


@contextmanager
def differentiating(model: nn.Module) -> Iterator[None]:
    """Inside, outputs that require a gradient can be traced back through a model, whose parameters gather none."""
    with torch.inference_mode(False), torch.enable_grad(), _deterministic(), _frozen(model):
        yield


@contextmanager
def _deterministic() -> Iterator[None]:
    """The backward pass of attention adds up in another order at every run, on GPUs, unless asked not to."""
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = torch.utils.deterministic
    filled = options.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)  # what knows no other way runs as it does
        options.fill_uninitialized_memory = before and filled  # a tenth of the time
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warned)
            options.fill_uninitialized_memory = filled


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
