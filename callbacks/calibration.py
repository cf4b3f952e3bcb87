"""Watch a module during a validation loop: its real calls, and what its Linears read."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mpfx.graph import InputGroup, bind_inputs
from mpfx.passes import finalised, observed, padding_masks
from mpfx.stats import Moments


class CallRecorder:
    """Record the calls of a module; from the first one on, also the statistics of its sites' inputs.

    Needs no Trainer: open it, run the module on calibration data, close it. No hook is left behind.

    Args:
        module: whose calls are recorded.
        prepare: called once, with the arguments of the first call, before that call runs. Returns the traced module
            and the input groups to observe (none: only the calls are recorded).
    """

    def __init__(
        self,
        module: nn.Module,
        prepare: Callable[[tuple[Any, ...], dict[str, Any]], tuple[fx.GraphModule, list[InputGroup]]],
    ) -> None:
        self.module = module
        self.graph_module: fx.GraphModule | None = None
        self.calls: list[dict[str, Any]] = []
        self._prepare = prepare
        self._hooks = ExitStack()
        self._accumulators: dict[str, Any] = {}
        self._groups: list[InputGroup] = []
        self._masks: Mapping[str, Tensor] = {}

    def open(self) -> None:
        """Start to listen."""
        handle = self.module.register_forward_pre_hook(self._record, with_kwargs=True)
        self._hooks.callback(handle.remove)

    def close(self) -> None:
        """Stop to listen; what was recorded stays."""
        self._hooks.close()

    def take_moments(self) -> dict[str, Moments]:
        """Hand over the statistics by name of the input group; the recorder keeps none, as Hessians are large."""
        taken = finalised(self._accumulators, self._groups)
        return {group.name: moments for group, moments, _ in taken if moments is not None}

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A validation loop runs in inference mode; what is recorded has to live on outside of it.
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
            if self.graph_module is None:
                self._start(args, kwargs)
            assert self.graph_module is not None
            values = bind_inputs(self.graph_module, args, kwargs)
            self._masks = padding_masks(values)
            self.calls.append(pytree.tree_map_only(Tensor, lambda t: t.to("cpu"), values))

    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.close()  # tracing calls the module: it must not record itself
        self.graph_module, self._groups = self._prepare(args, kwargs)
        self.open()
        self._accumulators = self._hooks.enter_context(observed(self.graph_module, self._groups, lambda: self._masks))
